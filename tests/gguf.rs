//! GGUF files: what is read of them is what the same model has in the Hub's layout, bit for bit; hostile and damaged ones
//! are refused with a message that names the file and the tensor or key.

#[path = "support/gguf_file.rs"]
mod gguf_file;

use std::{collections::HashMap, fs, path::Path, sync::Arc};

use bitnet_model::{
    Error, Result,
    checkpoint::{Checkpoint, gguf::Gguf},
    config::{Activation, Config},
    hub::Hub,
    model::Model,
    pretrained::{Precision, Source, default_files},
};
use bitnet_tests::fixture::{Fixture, flat};
use candle_core::{DType, Device, Tensor};
use gguf_file::{Codes, File, bool, f32, integers, kind, string, strings, text, u32};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::Value;

type Tensors = HashMap<String, Tensor>;

/// Names in a block: the file's and the Hub's.
const NAMES: [(&str, &str); 11] = [
    ("attn_norm", "input_layernorm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("attn_sub_norm", "self_attn.attn_sub_norm"),
    ("ffn_sub_norm", "mlp.ffn_sub_norm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

fn name_in_file(hub: &str) -> String {
    match hub {
        "model.embed_tokens.weight" => return "token_embd.weight".into(),
        "model.norm.weight" => return "output_norm.weight".into(),
        "lm_head.weight" => return "output.weight".into(),
        _ => {}
    }
    let (layer, part) = hub.strip_prefix("model.layers.").unwrap().split_once('.').unwrap();
    let part = part.strip_suffix(".weight").unwrap();
    let (ours, _) = NAMES.iter().find(|(_, hub)| *hub == part).unwrap();
    format!("blk.{layer}.{ours}.weight")
}

/// Row of the file for each row of a projection: the pairs that a rotation turns are neighbours.
fn interleaved(head_dim: usize) -> impl Fn(usize) -> usize {
    move |row| {
        let (head, within) = (row / head_dim, row % head_dim);
        head * head_dim + within % 2 * (head_dim / 2) + within / 2
    }
}

fn raw(tensor: &Tensor) -> (u32, Vec<u8>) {
    let tensor = tensor.flatten_all().unwrap();
    match tensor.dtype() {
        DType::F32 => {
            let values: Vec<f32> = tensor.to_vec1().unwrap();
            (kind::F32, values.iter().flat_map(|v| v.to_le_bytes()).collect())
        }
        DType::F16 => {
            let values: Vec<half::f16> = tensor.to_vec1().unwrap();
            (kind::F16, values.iter().flat_map(|v| v.to_le_bytes()).collect())
        }
        _ => {
            let values: Vec<half::bf16> = tensor.to_vec1().unwrap();
            (kind::BF16, values.iter().flat_map(|v| v.to_le_bytes()).collect())
        }
    }
}

/// The file of a model in the Hub's layout; `ternary` is the type of its projections, if they are packed.
fn gguf_of(architecture: &str, config: &Config, tensors: &Tensors, ternary: u32) -> File {
    let mut file = File::new();
    let key = |name: &str| format!("{architecture}.{name}");
    let count = |value: usize| u32(value as u32);
    file.set("general.architecture", string(architecture))
        .set(&key("vocab_size"), count(config.vocab_size))
        .set(&key("context_length"), count(config.max_position_embeddings))
        .set(&key("embedding_length"), count(config.hidden_size))
        .set(&key("block_count"), count(config.num_hidden_layers))
        .set(&key("feed_forward_length"), count(config.intermediate_size))
        .set(&key("rope.dimension_count"), count(config.head_dim))
        .set(&key("attention.head_count"), count(config.num_attention_heads))
        .set(&key("attention.head_count_kv"), count(config.num_key_value_heads))
        .set(&key("attention.layer_norm_rms_epsilon"), f32(config.rms_norm_eps as f32))
        .set(&key("rope.freq_base"), f32(config.rope_theta as f32));
    if let Some(id) = config.bos_token_id {
        file.set("tokenizer.ggml.bos_token_id", u32(id));
    }
    if let Some(id) = config.eos_token_ids.first() {
        file.set("tokenizer.ggml.eos_token_id", u32(*id));
    }
    let mut names: Vec<&String> =
        tensors.keys().filter(|name| !name.ends_with(".weight_scale")).collect();
    names.sort();
    for name in names {
        let tensor = &tensors[name];
        let ours = name_in_file(name);
        let is_rotated = ours.ends_with("attn_q.weight") || ours.ends_with("attn_k.weight");
        let order = interleaved(config.head_dim);
        let order = |row: usize| match architecture == "llama" && is_rotated {
            true => order(row),
            false => row,
        };
        if tensor.dtype() == DType::U8 {
            let scale: f32 = scalar(&tensors[&format!("{name}_scale")]);
            let cols = tensor.dim(1).unwrap();
            let bytes: Vec<u8> = tensor.flatten_all().unwrap().to_vec1().unwrap();
            let codes = Codes::from_hub(&bytes, cols, scale).reordered(order);
            file.push(&ours, &[codes.rows, cols], ternary, codes.pack(ternary));
        } else {
            let rows = tensor.dim(0).unwrap();
            let ids = Vec::from_iter((0..rows).map(|row| order(row) as u32));
            let ids = Tensor::new(ids, &Device::Cpu).unwrap();
            let tensor = tensor.index_select(&ids, 0).unwrap();
            let (kind, data) = raw(&tensor);
            file.push(&ours, tensor.dims(), kind, data);
        }
    }
    file
}

fn scalar(tensor: &Tensor) -> f32 {
    tensor.flatten_all().unwrap().to_dtype(DType::F32).unwrap().to_vec1().unwrap()[0]
}

/// Tensors and configuration of the model inside the library, with scales that an f16 holds.
fn default_model() -> (Config, Tensors, Value) {
    let file = |name: &str| default_files().into_iter().find(|(n, _)| *n == name).unwrap().1;
    let config = str::from_utf8(file("config.json")).unwrap();
    let config = Config::from_json(Path::new("config.json"), config).unwrap();
    let mut tensors =
        candle_core::safetensors::load_buffer(file("model.safetensors"), &Device::Cpu).unwrap();
    for (_, tensor) in tensors.iter_mut().filter(|(name, _)| name.ends_with(".weight_scale")) {
        *tensor = tensor.to_dtype(DType::F16).unwrap().to_dtype(DType::F32).unwrap();
    }
    (config, tensors, serde_json::from_slice(file("tokenizer.json")).unwrap())
}

/// Writes a folder in the Hub's layout.
fn write_hub(folder: &Path, config: &Config, tensors: &Tensors) {
    fs::write(folder.join("config.json"), config.to_json().to_string()).unwrap();
    candle_core::safetensors::save(tensors, folder.join("model.safetensors")).unwrap();
}

fn open(path: &Path, precision: Precision) -> Result<Source> {
    Source::open(path.to_str().unwrap(), precision, &Hub::from_env().offline(true))
}

fn logits(model: &Model) -> Vec<f32> {
    let tokens = Tensor::new(&[[0u32, 17, 250, 3, 99, 4, 5, 200]], &Device::Cpu).unwrap();
    flat(&model.logits(&model.hidden_states(&tokens, None).unwrap()).unwrap())
}

fn load(source: &Source) -> Model {
    source.load(&Device::Cpu).unwrap()
}

/// The message of the error that a file gives, wherever it is found.
fn refusal(folder: &Path, bytes: &[u8]) -> String {
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
fn ternary_types_give_the_bits_of_the_hub_s_packing() {
    let (config, tensors, _) = default_model();
    let hub = tempfile::tempdir().unwrap();
    write_hub(hub.path(), &config, &tensors);
    let expected = logits(&load(&open(hub.path(), Precision::AsConfigured).unwrap()));
    assert!(expected.iter().all(|logit| logit.is_finite()));
    for (architecture, kind) in
        [("bitnet-b1.58", kind::I2_S), ("bitnet-25", kind::TQ1_0), ("bitnet-b1.58", kind::TQ2_0)]
    {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        let mut file = gguf_of(architecture, &config, &tensors, kind);
        file.alignment = 64;
        file.set("general.alignment", u32(64));
        fs::write(&path, file.bytes()).unwrap();
        // The file, and the folder that has no other model.
        for path in [&path, folder.path()] {
            let source = open(path, Precision::AsConfigured).unwrap();
            let mut found = source.config.clone();
            found.eos_token_ids.clone_from(&config.eos_token_ids);
            assert_eq!(found, config, "{kind}");
            assert_eq!(logits(&load(&source)), expected, "type {kind}");
        }
    }
}

#[test]
fn bitnet_has_silu_and_its_scales_may_stand_beside() {
    let (mut config, mut tensors, _) = default_model();
    config.hidden_act = Activation::Silu;
    let file = gguf_of("bitnet", &config, &tensors, kind::TQ2_0);
    for (_, scale) in tensors.iter_mut().filter(|(name, _)| name.ends_with("k_proj.weight_scale")) {
        *scale = (&*scale * 3.).unwrap();
    }
    let hub = tempfile::tempdir().unwrap();
    write_hub(hub.path(), &config, &tensors);
    let expected = logits(&load(&open(hub.path(), Precision::AsConfigured).unwrap()));
    let path = hub.path().join("x.gguf");
    let found = |file: &File| {
        fs::write(&path, file.bytes()).unwrap();
        logits(&load(&open(&path, Precision::AsConfigured).unwrap()))
    };
    assert_ne!(found(&file), expected);
    let mut file = file;
    for layer in 0..config.num_hidden_layers {
        let name = format!("blk.{layer}.attn_k.scale");
        file.push(&name, &[1], kind::F32, 3f32.to_le_bytes().to_vec());
    }
    assert_eq!(found(&file), expected);
}

#[test]
fn rows_of_a_llama_are_put_back_in_order() {
    let fixture = Fixture::open("llama_packed_tied_sharded");
    let tokens = fixture.tokens("single.input_ids");
    let states = |model: &Model| flat(&model.hidden_states(&tokens, None).unwrap());
    let expected = states(&fixture.model());
    let mut tensors = Tensors::new();
    for name in fixture.checkpoint.names() {
        let mut tensor = fixture.checkpoint.read(name).unwrap();
        if name.ends_with(".weight_scale") {
            // This family's scales divide.
            tensor = Tensor::new(&[1. / scalar(&tensor)], &Device::Cpu).unwrap();
        }
        tensors.insert(name.into(), tensor);
    }
    let file = gguf_of("llama", &fixture.config, &tensors, kind::I2_S);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    fs::write(&path, file.bytes()).unwrap();
    let source = open(&path, Precision::AsConfigured).unwrap();
    assert_eq!(states(&load(&source)), expected);

    // What is read in parts is what is read as a whole.
    let name = "model.layers.1.self_attn.q_proj.weight";
    let whole = source.checkpoint.read_bytes(name).unwrap();
    assert_eq!(whole, fixture.checkpoint.read_bytes(name).unwrap());
    use bitnet_model::packed::PackedSource;
    for (at, len) in [(0, 1), (100, 200), (129, 1), (3, 500), (whole.len() - 130, 130)] {
        let mut part = vec![7; len];
        source.checkpoint.read_packed(name, at, &mut part).unwrap();
        assert_eq!(part, whole[at..][..len], "{len} bytes at {at}");
    }
}

#[test]
fn full_precision_of_a_llama() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let fixture = Fixture::open("llama_packed_tied_sharded");
    let config = Config { quantization: None, ..fixture.config.clone() };
    let mut tensors = Tensors::new();
    for name in fixture.checkpoint.names().filter(|name| !name.ends_with("_scale")) {
        let info = fixture.checkpoint.get(name).unwrap();
        let mut shape = info.shape.to_vec();
        if info.dtype.to_string() == "U8" {
            shape[0] *= 4;
        }
        let n = shape.iter().product();
        let values: Vec<f32> = (0..n).map(|_| rng.random_range(-0.2..0.2)).collect();
        tensors.insert(name.into(), Tensor::from_vec(values, shape, &Device::Cpu).unwrap());
    }
    let hub = tempfile::tempdir().unwrap();
    write_hub(hub.path(), &config, &tensors);
    let expected = logits(&load(&open(hub.path(), Precision::Full).unwrap()));
    let path = hub.path().join("model.gguf");
    fs::write(&path, gguf_of("llama", &config, &tensors, kind::F32).bytes()).unwrap();
    assert_eq!(logits(&load(&open(&path, Precision::Full).unwrap())), expected);
    let error = open(&path, Precision::AsConfigured).err().unwrap().to_string();
    assert!(error.contains("--full-precision"), "{error}");
}

#[test]
fn embeddings_of_few_bits_are_dequantized() {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let (config, tensors, _) = default_model();
    let file = gguf_of("bitnet-b1.58", &config, &tensors, kind::I2_S);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let shape = (config.vocab_size, config.hidden_size);
    for (kind, weights, bytes, scales) in [
        (kind::Q4_0, 32, 18, &[0][..]),
        (kind::Q8_0, 32, 34, &[0]),
        (kind::Q4_K, 256, 144, &[0, 2]),
        (kind::Q6_K, 256, 210, &[208]),
    ] {
        let mut data: Vec<u8> =
            (0..shape.0 * shape.1 / weights * bytes).map(|_| rng.random()).collect();
        for block in data.chunks_mut(bytes) {
            for at in scales {
                let scale = half::f16::from_f32(rng.random_range(-0.1..0.1));
                block[*at..at + 2].copy_from_slice(&scale.to_le_bytes());
            }
        }
        let mut file = file.clone();
        let embedding = file.tensor("token_embd.weight");
        (embedding.kind, embedding.data) = (kind, data.clone());
        fs::write(&path, file.bytes()).unwrap();
        let source = open(&path, Precision::AsConfigured).unwrap();
        let found = flat(&source.checkpoint.read("model.embed_tokens.weight").unwrap());
        let expected = gguf_file::dequantize(kind, &data);
        assert_eq!(found, expected, "type {kind}");
        // And in the model.
        let mut tensors = tensors.clone();
        let embedding = Tensor::from_vec(expected, shape, &Device::Cpu).unwrap();
        tensors.insert("model.embed_tokens.weight".into(), embedding);
        let hub = tempfile::tempdir().unwrap();
        write_hub(hub.path(), &config, &tensors);
        let expected = logits(&load(&open(hub.path(), Precision::AsConfigured).unwrap()));
        assert_eq!(logits(&load(&source)), expected, "type {kind}");
    }
}

#[test]
fn a_tied_file_with_a_head_of_its_own_is_not_tied() {
    let (config, mut tensors, _) = default_model();
    let head = (&tensors["model.embed_tokens.weight"] * 2.).unwrap();
    tensors.insert("lm_head.weight".into(), head);
    let file = gguf_of("bitnet-b1.58", &config, &tensors, kind::I2_S);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    fs::write(&path, file.bytes()).unwrap();
    let source = open(&path, Precision::AsConfigured).unwrap();
    assert!(!source.config.tie_word_embeddings);
    tensors.remove("lm_head.weight");
    let path = folder.path().join("tied.gguf");
    fs::write(&path, gguf_of("bitnet-b1.58", &config, &tensors, kind::I2_S).bytes()).unwrap();
    let tied = logits(&load(&open(&path, Precision::AsConfigured).unwrap()));
    let doubled: Vec<f32> = tied.iter().map(|logit| 2. * logit).collect();
    assert_eq!(logits(&load(&source)), doubled);
}

#[test]
fn byte_level_vocabularies() {
    let (config, tensors, tokenizer) = default_model();
    let mut file = gguf_of("bitnet-b1.58", &config, &tensors, kind::I2_S);
    gguf_file::byte_level(&mut file, &tokenizer);
    file.set("tokenizer.chat_template", string("{{ bos_token }}{{ messages[0].content }}"));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    fs::write(&path, file.bytes()).unwrap();
    let source = open(&path, Precision::AsConfigured).unwrap();
    assert!(source.has_tokenizer());
    // The metadata name 1; `<|eot_id|>` ends a turn by its name.
    assert_eq!(source.generation.eos_token_ids, [1, 2]);
    let found = source.tokenizer().unwrap().unwrap();
    let default = Source::open("default", Precision::AsConfigured, &Hub::from_env()).unwrap();
    let expected = default.tokenizer().unwrap().unwrap();
    for text in [
        "",
        "Once upon a time, there was a little girl.",
        "  two spaces\n\nand <|eot_id|> tokens<|end_of_text|>",
        "Zürich 東京 🙂 \u{0}\u{7f} 1234567",
    ] {
        for special in [false, true] {
            let ids = expected.encode(text, special).unwrap();
            assert_eq!(found.encode(text, special).unwrap(), ids, "{text:?}");
            assert_eq!(found.decode(&ids, true).unwrap(), expected.decode(&ids, true).unwrap());
        }
    }
    assert_eq!(found.bos_token(), expected.bos_token());
    assert_eq!(found.eos_token_id(), expected.eos_token_id());
    let template = found.chat_template().unwrap().unwrap();
    let message = bitnet_model::text::Message::new("user", "hi");
    assert_eq!(template.render(&[message], true).unwrap(), "<|begin_of_text|>hi");

    file.set("tokenizer.ggml.add_bos_token", bool(false));
    file.set("tokenizer.ggml.add_eos_token", bool(true));
    fs::write(&path, file.bytes()).unwrap();
    let found = open(&path, Precision::AsConfigured).unwrap().tokenizer().unwrap().unwrap();
    assert_eq!(found.encode("", true).unwrap(), [1]);
}

/// A vocabulary of SentencePiece: control tokens, bytes, and pieces with scores.
fn sentence_piece() -> (Vec<String>, Vec<f32>, Vec<i32>) {
    let mut tokens =
        vec![("<unk>".to_owned(), 0., 2), ("<s>".into(), 0., 3), ("</s>".into(), 0., 3)];
    tokens.extend((0..=255).map(|byte| (format!("<0x{byte:02X}>"), 0., 6)));
    let pieces = [
        "▁t", "he", "▁a", "in", "▁the", "re", "nd", "▁and", "er", "▁th", "ing", "ere", "▁there",
        "an", "▁an", "▁▁", "▁t", "th", "ng",
    ];
    let mut seen = std::collections::HashSet::new();
    for (rank, piece) in pieces.iter().filter(|piece| seen.insert(**piece)).enumerate() {
        tokens.push(((*piece).into(), -(rank as f32), 1));
    }
    for (rank, letter) in "▁etaoinsrhdglé.".chars().enumerate() {
        tokens.push((letter.to_string(), -1000. - rank as f32, 1));
    }
    let (mut names, mut scores, mut kinds) = (vec![], vec![], vec![]);
    for (name, score, kind) in tokens {
        names.push(name);
        scores.push(score);
        kinds.push(kind);
    }
    (names, scores, kinds)
}

/// SentencePiece's own algorithm: joins the neighbours whose union has the highest score, the leftmost of equals, until
/// none is a token; what is no token then becomes its bytes.
fn sentence_piece_ids(text: &str, tokens: &[String], scores: &[f32]) -> Vec<u32> {
    let id = |piece: &str| tokens.iter().position(|token| token == piece);
    let mut pieces: Vec<String> =
        format!("▁{}", text.replace(' ', "▁")).chars().map(String::from).collect();
    loop {
        let mut best: Option<(f32, usize)> = None;
        for at in 0..pieces.len().saturating_sub(1) {
            let union = format!("{}{}", pieces[at], pieces[at + 1]);
            if let Some(id) = id(&union)
                && best.is_none_or(|(score, _)| scores[id] > score)
            {
                best = Some((scores[id], at));
            }
        }
        let Some((_, at)) = best else { break };
        let right = pieces.remove(at + 1);
        pieces[at].push_str(&right);
    }
    let ids = pieces.iter().flat_map(|piece| match id(piece) {
        Some(id) => vec![id as u32],
        None => piece.bytes().map(|byte| id(&format!("<0x{byte:02X}>")).unwrap() as u32).collect(),
    });
    ids.collect()
}

#[test]
fn sentence_piece_vocabularies() {
    let (config, tensors, _) = default_model();
    let (tokens, scores, kinds) = sentence_piece();
    let mut file = gguf_of("bitnet-b1.58", &config, &tensors, kind::I2_S);
    file.set("tokenizer.ggml.model", string("llama"))
        .set("tokenizer.ggml.tokens", strings(&tokens))
        .set("tokenizer.ggml.scores", gguf_file::floats(&scores))
        .set("tokenizer.ggml.token_type", integers(&kinds))
        .set("tokenizer.ggml.bos_token_id", u32(1))
        .set("tokenizer.ggml.eos_token_id", u32(2));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    fs::write(&path, file.bytes()).unwrap();
    let tokenizer = open(&path, Precision::AsConfigured).unwrap().tokenizer().unwrap().unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let alphabet: Vec<char> = " ehtaindrgé.xü☃".chars().collect();
    let mut texts = vec!["the there and  then another".to_owned(), "Zürich ☃".into()];
    for _ in 0..300 {
        let len = rng.random_range(1..24);
        texts.push((0..len).map(|_| alphabet[rng.random_range(0..alphabet.len())]).collect());
    }
    for text in &texts {
        let ids = tokenizer.encode(text, false).unwrap();
        assert_eq!(ids, sentence_piece_ids(text, &tokens, &scores), "{text:?}");
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), *text, "{text:?}");
    }
    assert_eq!(tokenizer.encode("the</s>", true).unwrap().first(), Some(&1));
    assert_eq!(tokenizer.encode("</s>", false).unwrap(), [2]);
    assert_eq!(tokenizer.special_token("unk_token"), None);
}

/// A small file whose weights all lie in it, and its folder.
fn small() -> File {
    let config = r#"{"model_type": "bitnet", "vocab_size": 4, "hidden_size": 128, "intermediate_size": 128,
        "num_hidden_layers": 1, "num_attention_heads": 2, "tie_word_embeddings": true,
        "bos_token_id": 0, "eos_token_id": 1, "quantization_config":
        {"quant_method": "bitnet", "linear_class": "autobitlinear"}}"#;
    let config = Config::from_json(Path::new("config.json"), config).unwrap();
    let mut tensors = Tensors::new();
    let floats = |n: usize, shape: &[usize]| {
        Tensor::from_vec(vec![half::bf16::ONE; n], shape, &Device::Cpu).unwrap()
    };
    tensors.insert("model.embed_tokens.weight".into(), floats(512, &[4, 128]));
    tensors.insert("model.norm.weight".into(), floats(128, &[128]));
    for (_, part) in NAMES {
        let name = format!("model.layers.0.{part}.weight");
        if part.ends_with("proj") {
            let codes = Tensor::from_vec(vec![0x64u8; 4096], &[32, 128], &Device::Cpu).unwrap();
            let scale = Tensor::new(&[0.5f32], &Device::Cpu).unwrap();
            tensors.insert(format!("{name}_scale"), scale);
            tensors.insert(name, codes);
        } else {
            tensors.insert(name, floats(128, &[128]));
        }
    }
    let mut file = gguf_of("bitnet-b1.58", &config, &tensors, kind::I2_S);
    file.set("tokenizer.ggml.model", string("gpt2"))
        .set("tokenizer.ggml.tokens", strings(&["a", "b", "ab", "<|eot_id|>"]))
        .set("tokenizer.ggml.token_type", integers(&[1, 1, 1, 3]))
        .set("tokenizer.ggml.merges", strings(&["a b"]));
    file
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
            vec!["epsilon"],
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

#[test]
fn blocks_of_several_scales_are_no_matrix() {
    let (config, tensors, _) = default_model();
    let folder = tempfile::tempdir().unwrap();
    for (kind, bytes) in [(kind::TQ1_0, 54), (kind::TQ2_0, 66)] {
        let mut file = gguf_of("bitnet-b1.58", &config, &tensors, kind);
        let last = file.tensor("blk.2.ffn_up.weight").data.last_chunk_mut::<2>().unwrap();
        let scale = half::f16::from_le_bytes(*last);
        *last = (scale * half::f16::from_f32(2.)).to_le_bytes();
        let message = refusal(folder.path(), &file.bytes());
        assert!(message.contains("`blk.2.ffn_up.weight` of the file has blocks"), "{message}");

        // A negative scale turns the codes of its block around.
        *file.tensor("blk.2.ffn_up.weight").data.last_chunk_mut().unwrap() = (-scale).to_le_bytes();
        let path = folder.path().join("model.gguf");
        fs::write(&path, file.bytes()).unwrap();
        let checkpoint = Gguf::open(&path).unwrap().checkpoint().unwrap();
        let name = "model.layers.2.mlp.up_proj.weight";
        let found = Codes::from_hub(&checkpoint.read_bytes(name).unwrap(), 256, 1.);
        let stored: Vec<u8> = tensors[name].flatten_all().unwrap().to_vec1().unwrap();
        let mut expected = Codes::from_hub(&stored, 256, 1.);
        let len = expected.codes.len();
        expected.codes[len - 256..].iter_mut().for_each(|code| *code = 2 - *code);
        assert_eq!(found.codes, expected.codes, "blocks of {bytes} bytes");
    }
}

#[test]
fn all_zeros_have_any_scale() {
    let mut file = small();
    for (part, _) in NAMES {
        let tensor = file.tensor(&format!("blk.0.{part}.weight"));
        if tensor.kind == kind::I2_S {
            let zeros = Codes { rows: 64, cols: 256, codes: vec![1; 64 * 256], scale: 0.5 };
            // As many weights in other rows: this model's are too short for such blocks, so only the view is looked at.
            (tensor.kind, tensor.dims, tensor.data) =
                (kind::TQ2_0, vec![256, 64], zeros.pack(kind::TQ2_0));
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    fs::write(&path, file.bytes()).unwrap();
    let checkpoint = Gguf::open(&path).unwrap().checkpoint().unwrap();
    let name = "model.layers.0.mlp.up_proj.weight";
    assert_eq!(checkpoint.read_scale(&format!("{name}_scale")).unwrap(), 1.);
    assert!(checkpoint.read_bytes(name).unwrap().iter().all(|byte| *byte == 0b01_01_01_01));
}

/// Opens and reads everything; whatever is wrong must be an error.
fn read_all(bytes: &'static [u8]) -> Result<()> {
    let gguf = Gguf::from_static("model.gguf", bytes)?;
    gguf.generation()?;
    let checkpoint: Checkpoint = gguf.checkpoint()?;
    gguf.config().check_tensors(&checkpoint)?;
    let checkpoint = Arc::new(checkpoint);
    for name in checkpoint.names() {
        checkpoint.read(name)?;
    }
    if let Some([(_, tokenizer), (_, config)]) = gguf.tokenizer_files()? {
        bitnet_model::text::Tokenizer::from_bytes(&tokenizer, Some(&config), None)?;
    }
    Ok(())
}

/// Test bytes as the program's own; there are few of them.
fn leaked(bytes: Vec<u8>) -> &'static [u8] {
    Box::leak(bytes.into_boxed_slice())
}

#[test]
fn every_truncation_is_an_error() {
    let file = small();
    let (header, data) = file.parts();
    let bytes = leaked([header.clone(), data].concat());
    read_all(bytes).unwrap();
    let last = file.tensors.last().unwrap();
    let padding = last.data.len().next_multiple_of(32) - last.data.len();
    // Each byte of the header and around it, and every 97th of the data: there, all are alike.
    let cuts = (0..header.len() + 64).chain((header.len()..bytes.len() - padding).step_by(97));
    for cut in cuts.chain([bytes.len() - padding - 1]) {
        let error =
            read_all(&bytes[..cut]).err().unwrap_or_else(|| panic!("{cut} bytes are enough"));
        assert!(error.to_string().contains("model.gguf"), "{cut} bytes: {error}");
    }
}

#[test]
fn flipped_bits_never_panic() {
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    let bytes = small().bytes();
    let header = small().parts().0.len();
    let mut refused = 0;
    for _ in 0..4000 {
        let mut bytes = bytes.clone();
        for _ in 0..rng.random_range(1..4) {
            let at = match rng.random_range(0..4) {
                0 => rng.random_range(0..bytes.len()),
                _ => rng.random_range(0..header),
            };
            bytes[at] ^= 1 << rng.random_range(0..8);
        }
        // Freed again: the view needs `'static`, so the file is on disk.
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        fs::write(&path, &bytes).unwrap();
        let read = || -> Result<(), Error> {
            let gguf = Gguf::open(&path)?;
            gguf.generation()?;
            let checkpoint = gguf.checkpoint()?;
            for name in checkpoint.names() {
                checkpoint.read(name)?;
            }
            gguf.tokenizer_files()?;
            gguf.config().check_tensors(&checkpoint)
        };
        refused += usize::from(read().is_err());
    }
    assert!(refused > 1000, "only {refused} of 4000 damaged files are refused");
}
