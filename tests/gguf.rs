//! GGUF files: what is read of them is what the same model has in the Hub's layout, bit for bit.

#![allow(clippy::unwrap_used)]

mod gguf_hostile;
mod gguf_text;
mod gguf_written;

use std::fs;

use bitnet_model::{
    checkpoint::gguf::Gguf,
    config::{Activation, Config},
    model::Model,
    packed::PackedSource,
    pretrained::Precision,
};
use bitnet_tests::{
    fixture::{Fixture, flat},
    gguf_file::{self, Codes, File, kind, u32},
    gguf_model::{
        NAMES, Tensors, default_model, gguf_of, load, logits, open, scalar, small, write_hub,
    },
};
use candle_core::{Device, Tensor};
use gguf_hostile::refusal;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

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
