//! Hostile and damaged GGUF files: refused with a message that names the file and the tensor or key, and without a panic.

use std::{fs, path::Path};

use bitnet_model::{Result, checkpoint::gguf::Gguf, pretrained::Precision, text::Tokenizer};
use candle_core::Device;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use bitnet_tests::{
    gguf_file::{self, File, f32, integers, kind, string, strings, text, u32},
    gguf_model::{open, small},
};

/// The message of the error that a file gives, wherever it is found.
pub fn refusal(folder: &Path, bytes: &[u8]) -> String {
    let path = folder.join("model.gguf");
    fs::write(&path, bytes).unwrap();
    let loaded = open(&path, Precision::AsFound).and_then(|source| {
        source.load(&Device::Cpu)?;
        source.tokenizer()
    });
    match loaded {
        Ok(_) => panic!("the file was taken"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn files_that_lie_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let changed = |change: &dyn Fn(&mut File)| {
        let mut file = small();
        change(&mut file);
        file.bytes()
    };
    let removed = |key: &'static str| {
        changed(&move |file: &mut File| {
            file.remove(key);
        })
    };
    let set = |key: &'static str, value: Vec<u8>| {
        changed(&move |file: &mut File| {
            file.set(key, value.clone());
        })
    };
    let patched = |at: usize, bytes: &[u8]| {
        let mut file = small().bytes();
        file[at..][..bytes.len()].copy_from_slice(bytes);
        file
    };
    let tensor = |name: &'static str, change: &dyn Fn(&mut gguf_file::Tensor)| {
        changed(&|file: &mut File| change(file.tensor(name)))
    };
    let huge = u64::MAX.to_le_bytes();
    let list = |kind: u32, len: u64| {
        [&9u32.to_le_bytes()[..], &kind.to_le_bytes(), &len.to_le_bytes()].concat()
    };
    let q = "blk.0.attn_q.weight";
    let cases: Vec<(&str, Vec<u8>, Vec<&str>)> = vec![
        ("empty", vec![], vec!["is no GGUF file"]),
        ("another magic", patched(0, b"PK\x03\x04"), vec!["is no GGUF file"]),
        ("version 1", patched(4, &1u32.to_le_bytes()), vec!["GGUF version 1"]),
        ("big-endian", patched(4, &3u32.to_be_bytes()), vec!["big-endian"]),
        ("2⁶⁴ tensors", patched(8, &huge), vec!["claims 18446744073709551615 tensors"]),
        ("2⁶⁴ values", patched(16, &huge), vec!["claims 18446744073709551615 metadata values"]),
        (
            "a key of 2⁶⁴ bytes",
            patched(24, &huge),
            vec!["the key of metadata value 0", "18446744073709551615 bytes"],
        ),
        ("an unknown value type", set("x", vec![99, 0, 0, 0]), vec!["`x`", "unknown type 99"]),
        ("no truth", set("x", vec![7, 0, 0, 0, 2]), vec!["`x`", "neither true nor false"]),
        (
            "a string that is too long",
            set("x", [&8u32.to_le_bytes()[..], &huge].concat()),
            vec!["`x`", "incomplete"],
        ),
        ("2⁶⁴ numbers", set("x", list(6, u64::MAX)), vec!["`x`", "incomplete"]),
        (
            "2⁶⁰ strings",
            set("x", list(8, 1 << 60)),
            vec!["`x`", "claims 1152921504606846976 values"],
        ),
        (
            "deep lists",
            set(
                "x",
                [
                    list(9, 1),
                    list(9, 1)[4..].to_vec(),
                    list(9, 1)[4..].to_vec(),
                    list(4, 0)[4..].to_vec(),
                ]
                .concat(),
            ),
            vec!["`x`", "lists in lists"],
        ),
        (
            "alignment 3",
            set("general.alignment", u32(3)),
            vec!["`general.alignment`", "3 is no power of two"],
        ),
        ("alignment 0", set("general.alignment", u32(0)), vec!["`general.alignment`"]),
        ("alignment 2³¹", set("general.alignment", u32(1 << 31)), vec!["`general.alignment`"]),
        (
            "no architecture",
            removed("general.architecture"),
            vec!["`general.architecture`", "missing"],
        ),
        (
            "another architecture",
            set("general.architecture", string("qwen2")),
            vec!["\"qwen2\"", "\"llama\""],
        ),
        (
            "architecture of a number",
            set("general.architecture", u32(1)),
            vec!["expected a string, found 1"],
        ),
        ("a part of a model", set("split.count", u32(3)), vec!["`split.count`", "--merge"]),
        (
            "an adapter",
            set("general.type", string("adapter")),
            vec!["`general.type`", "\"adapter\""],
        ),
        (
            "no layers",
            removed("bitnet-b1.58.block_count"),
            vec!["`bitnet-b1.58.block_count`", "missing"],
        ),
        (
            "a width of 0",
            set("bitnet-b1.58.embedding_length", u32(0)),
            vec!["`bitnet-b1.58.embedding_length`"],
        ),
        (
            "no eps",
            removed("bitnet-b1.58.attention.layer_norm_rms_epsilon"),
            vec!["layer_norm_rms_epsilon`", "missing"],
        ),
        (
            "eps NaN",
            set("bitnet-b1.58.attention.layer_norm_rms_epsilon", f32(f32::NAN)),
            vec!["epsilon`", "expected a finite number, found NaN"],
        ),
        (
            "partial rotation",
            set("bitnet-b1.58.rope.dimension_count", u32(32)),
            vec!["`bitnet-b1.58.rope.dimension_count`", "a head has 64"],
        ),
        (
            "scaled rotation",
            set("bitnet-b1.58.rope.scaling.type", string("yarn")),
            vec!["rope.scaling.type`", "\"yarn\""],
        ),
        ("experts", set("bitnet-b1.58.expert_count", u32(8)), vec!["`bitnet-b1.58.expert_count`"]),
        (
            "bos outside",
            set("tokenizer.ggml.bos_token_id", u32(4)),
            vec!["`tokenizer.ggml.bos_token_id`"],
        ),
        (
            "a token type too few",
            set("tokenizer.ggml.token_type", integers(&[1])),
            vec!["`tokenizer.ggml.token_type`", "1 for 4"],
        ),
        (
            "tokens that are numbers",
            set("tokenizer.ggml.tokens", integers(&[1])),
            vec!["`tokenizer.ggml.tokens`", "a list of 1 I32"],
        ),
        ("no merges", removed("tokenizer.ggml.merges"), vec!["`tokenizer.ggml.merges`", "missing"]),
        (
            "a merge of one part",
            set("tokenizer.ggml.merges", strings(&["ab"])),
            vec!["`tokenizer.ggml.merges`", "\"ab\""],
        ),
        (
            "a merge of no token",
            set("tokenizer.ggml.merges", strings(&["a c"])),
            vec!["model.gguf", "tokenizer"],
        ),
        (
            "another tokenizer",
            set("tokenizer.ggml.model", string("t5")),
            vec!["`tokenizer.ggml.model`", "\"t5\""],
        ),
        (
            "another cut",
            set("tokenizer.ggml.pre", string("viking")),
            vec!["`tokenizer.ggml.pre`", "\"viking\""],
        ),
        (
            "no first projection",
            tensor(q, &|t| t.name = "blk.1.attn_q.weight".into()),
            vec![q, "not in the file"],
        ),
        (
            "a tensor of no model",
            tensor("output_norm.weight", &|t| t.name = "rope_freqs.weight".into()),
            vec!["`rope_freqs.weight`", "no model"],
        ),
        (
            "a tensor missing",
            changed(&|file| file.tensors.retain(|t| t.name != "output_norm.weight")),
            vec!["`model.norm.weight`", "not in the checkpoint"],
        ),
        ("a tensor twice", tensor("output_norm.weight", &|t| t.name = q.into()), vec![q, "twice"]),
        ("no dimensions", tensor(q, &|t| t.dims = vec![]), vec![q, "0 dimensions"]),
        ("many dimensions", tensor(q, &|t| t.dims = vec![1; 9]), vec![q, "9 dimensions"]),
        ("no elements", tensor(q, &|t| t.dims = vec![128, 0]), vec![q, "shape"]),
        ("2¹²⁶ elements", tensor(q, &|t| t.dims = vec![1 << 63, 1 << 63]), vec![q, "shape"]),
        ("2⁶⁰ elements", tensor(q, &|t| t.dims = vec![1 << 30, 1 << 30]), vec![q, "incomplete"]),
        (
            "another shape",
            tensor(q, &|t| {
                t.dims = vec![128, 124];
                t.data.drain(..128);
            }),
            vec!["q_proj", "expected U8 [32, 128]"],
        ),
        (
            "rows of no blocks",
            tensor(q, &|t| t.dims = vec![64, 256]),
            vec![q, "no whole blocks of 128"],
        ),
        ("an unknown type", tensor(q, &|t| t.kind = 77), vec![q, "element type 77", "I2_S"]),
        ("TL2", tensor(q, &|t| t.kind = 39), vec![q, "element type 39", "bitnet.cpp"]),
        (
            "float weights",
            tensor(q, &|t| (t.kind, t.data) = (kind::F16, vec![0; 32768])),
            vec![q, "F16", "llama-quantize"],
        ),
        (
            "one float projection",
            tensor("blk.0.attn_v.weight", &|t| (t.kind, t.data) = (kind::F16, vec![0; 32768])),
            vec!["`blk.0.attn_v.weight`", "ternary as a whole"],
        ),
        // 36 was IQ4_NL_4_4 in llama.cpp: 18 bytes for 32 weights.
        (
            "36 of another length",
            tensor(q, &|t| t.data.resize(128 * 128 / 32 * 18, 0)),
            vec![q, "another type"],
        ),
        ("a scale of 0", tensor(q, &|t| t.data[4096..4100].fill(0)), vec![q, "the scale 0"]),
        (
            "a scale that is none",
            tensor(q, &|t| t.data[4096..4100].fill(255)),
            vec![q, "the scale NaN"],
        ),
        (
            "a code 3",
            tensor(q, &|t| t.data[32] = 0b01_11_01_01),
            vec!["q_proj", "row 1, column 32 holds code 3"],
        ),
        (
            "ternary embeddings",
            tensor("token_embd.weight", &|t| (t.kind, t.data) = (36, vec![0; 512 / 4 + 32])),
            vec!["embed_tokens", "expected BF16, F16 or F32"],
        ),
    ];
    for (what, bytes, words) in &cases {
        let message = refusal(folder.path(), bytes);
        assert!(message.contains("model.gguf"), "{what}: {message}");
        for word in words {
            assert!(message.contains(word), "{what}: {message:?} lacks {word:?}");
        }
    }
    // A place in the data that is none.
    let bytes = small().bytes();
    let name = text(q);
    let at = bytes.windows(name.len()).position(|window| window == name).unwrap();
    let offset = at + name.len() + 4 + 16 + 4;
    for (place, word) in
        [(1u64, "no multiple"), (1 << 40, "behind the end"), (u64::MAX - 31, "behind the end")]
    {
        let mut bytes = bytes.clone();
        bytes[offset..][..8].copy_from_slice(&place.to_le_bytes());
        let message = refusal(folder.path(), &bytes);
        assert!(message.contains(q) && message.contains(word), "{message}");
    }
    // The place of another tensor.
    let mut overlapping = bytes.clone();
    overlapping[offset..][..8].copy_from_slice(&0u64.to_le_bytes());
    let message = refusal(folder.path(), &overlapping);
    assert!(message.contains("incomplete download, or a damaged file"), "{message}");
}

/// Files to damage. A hundred times as many passed as well.
const FLIPS: usize = 4000;

/// Reads everything; whatever is wrong must be an error.
fn read_all(gguf: &Gguf) -> Result<()> {
    gguf.generation()?;
    let checkpoint = gguf.checkpoint()?;
    for name in checkpoint.names() {
        checkpoint.read(name)?;
    }
    if let Some([(_, tokenizer), (_, config)]) = gguf.tokenizer_files()? {
        Tokenizer::from_bytes(&tokenizer, Some(&config), None)?;
    }
    gguf.config().check_tensors(&checkpoint)
}

#[test]
fn every_truncation_is_an_error() {
    let file = small();
    let (header, data) = file.parts();
    let bytes = [&header[..], &data].concat();
    let read = |len: usize| read_all(&Gguf::from_bytes("model.gguf", bytes[..len].to_vec())?);
    read(bytes.len()).unwrap();
    let last = file.tensors.last().unwrap();
    let padding = last.data.len().next_multiple_of(32) - last.data.len();
    // Each byte of the header and around it, and every 97th of the data: there, all are alike.
    let cuts = (0..header.len() + 64).chain((header.len()..bytes.len() - padding).step_by(97));
    for len in cuts.chain([bytes.len() - padding - 1]) {
        let error = read(len).err().unwrap_or_else(|| panic!("{len} bytes are enough"));
        assert!(error.to_string().contains("model.gguf"), "{len} bytes: {error}");
    }
}

#[test]
fn flipped_bits_never_panic() {
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    let (header, data) = small().parts();
    let file = [&header[..], &data].concat();
    let mut refused = 0;
    for _ in 0..FLIPS {
        let mut bytes = file.clone();
        for _ in 0..rng.random_range(1..4) {
            let at = match rng.random_range(0..4) {
                0 => rng.random_range(0..bytes.len()),
                _ => rng.random_range(0..header.len()),
            };
            bytes[at] ^= 1 << rng.random_range(0..8);
        }
        let read = Gguf::from_bytes("model.gguf", bytes).and_then(|gguf| read_all(&gguf));
        refused += usize::from(read.is_err());
    }
    assert!(refused > FLIPS / 4, "only {refused} of {FLIPS} damaged files are refused");
}
