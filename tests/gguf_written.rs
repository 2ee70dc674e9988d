//! GGUF files that are written: what of the model is in them, and that it is read back.

use std::{
    fs,
    path::{Path, PathBuf},
};

use bitnet_model::{
    Result,
    checkpoint::gguf::{self, Contents, FloatType, ProjectionType, Types},
    hub::Hub,
    model::Model,
    pretrained::{Precision, Source},
    text::{Message, Tokenizer},
};
use bitnet_tests::fixture::{Fixture, flat};
use candle_core::{DType, Device, Tensor};

use bitnet_tests::gguf_model::{load, open};

const EMBEDDING: &str = "model.embed_tokens.weight";

fn write(source: &Source, types: Types, folder: &Path, name: &str) -> Result<PathBuf> {
    let path = folder.join(name);
    let text = source.text_files().unwrap();
    let contents = Contents {
        name: "a name",
        config: &source.config,
        checkpoint: &source.checkpoint,
        text: text.as_ref(),
    };
    gguf::write(contents, types, &path, |_, _| ()).map(|()| path)
}

/// The tensor `name` of `source` as f32.
fn floats(source: &Source, name: &str) -> Vec<f32> {
    flat(&source.checkpoint.read(name).unwrap().to_dtype(DType::F32).unwrap())
}

/// How far a weight may be from what it was, if the largest of those that share its scale is `largest`.
fn bound(floats: FloatType, weight: f32, largest: f32) -> f32 {
    match floats {
        FloatType::F32 => 0.,
        // Half a unit of the last of 11 or 8 bits; smaller than 2⁻¹⁴, of a f16 half of 2⁻²⁴.
        FloatType::F16 => weight.abs() / 2048. + 2f32.powi(-25),
        FloatType::Bf16 => weight.abs() / 256.,
        // Half a step of largest/127, and 127 steps that an f16 makes longer or shorter by 2⁻¹¹ of them.
        FloatType::Q8_0 => largest / 254. * 1.01 + largest / 2048. + 1e-7,
        // A step is at most 1/31 of the largest of 16, and rounded to 1/128 of the largest step of 256; that of 16 may be
        // clipped by one step and half of another.
        FloatType::Q6K => largest / 31. * 1.5 + largest / 128.,
    }
}

#[test]
fn embeddings_are_rounded_as_their_type_says() {
    let folder = tempfile::tempdir().unwrap();
    let default = Source::open("default", Precision::AsConfigured, &Hub::from_env()).unwrap();
    let expected = floats(&default, EMBEDDING);
    let mut sizes = Vec::new();
    for (kind, group) in [
        (FloatType::F32, 1),
        (FloatType::F16, 1),
        (FloatType::Bf16, 1),
        (FloatType::Q8_0, 32),
        (FloatType::Q6K, 256),
    ] {
        let types = Types { embedding: Some(kind), ..ProjectionType::Tq2_0.into() };
        let path = write(&default, types, folder.path(), &format!("{kind:?}.gguf")).unwrap();
        sizes.push(fs::metadata(&path).unwrap().len());
        let found = floats(&open(&path, Precision::AsConfigured).unwrap(), EMBEDDING);
        assert_eq!(found.len(), expected.len());
        let mut is_changed = false;
        for (found, expected) in found.chunks(group).zip(expected.chunks(group)) {
            let largest = expected.iter().fold(0f32, |largest, weight| largest.max(weight.abs()));
            for (found, expected) in found.iter().zip(expected) {
                let error = (found - expected).abs();
                assert!(
                    error <= bound(kind, *expected, largest),
                    "{kind:?}: {expected} is {found}"
                );
                is_changed |= error > 0.;
            }
        }
        // The source's embedding is bf16, which f32 and bf16 hold.
        assert_eq!(is_changed, !matches!(kind, FloatType::F32 | FloatType::Bf16), "{kind:?}");
    }
    // 2048 rows of 256 weights, at 32, 16, 16, 8.5 and 6.5625 bits.
    let saved = |a: usize, b: usize| sizes[a] - sizes[b];
    assert_eq!([saved(0, 1), saved(1, 2)], [2048 * 256 * 2, 0]);
    assert_eq!([saved(1, 3), saved(1, 4)], [2048 * 8 * (64 - 34), 2048 * (512 - 210)]);
}

#[test]
fn a_head_of_its_own_has_its_type() {
    let folder = tempfile::tempdir().unwrap();
    let untied = open(&Fixture::open("bitnet_packed_untied").dir, Precision::AsConfigured).unwrap();
    let types = Types { head: Some(FloatType::Q8_0), ..ProjectionType::I2S.into() };
    let path = write(&untied, types, folder.path(), "untied.gguf").unwrap();
    let found = open(&path, Precision::AsConfigured).unwrap();
    assert_eq!(floats(&found, EMBEDDING), floats(&untied, EMBEDDING));
    assert_ne!(floats(&found, "lm_head.weight"), floats(&untied, "lm_head.weight"));

    let default = Source::open("default", Precision::AsConfigured, &Hub::from_env()).unwrap();
    let error = write(&default, types, folder.path(), "refused.gguf").unwrap_err().to_string();
    assert!(error.contains("no head of its own"), "{error}");
    let types = Types { embedding: Some(FloatType::Q6K), ..ProjectionType::I2S.into() };
    let error = write(&untied, types, folder.path(), "refused.gguf").unwrap_err().to_string();
    assert!(error.contains("embed_tokens") && error.contains("blocks of 256 Q6_K"), "{error}");
    assert!(!folder.path().join("refused.gguf").exists());
}

#[test]
fn floats_of_three_values_are_codes_and_others_are_not() {
    let folder = tempfile::tempdir().unwrap();
    let default = Source::open("default", Precision::AsConfigured, &Hub::from_env()).unwrap();
    let path = write(&default, ProjectionType::F16.into(), folder.path(), "f16.gguf").unwrap();
    let name = "model.layers.5.mlp.down_proj.weight";
    let found = open(&path, Precision::AsConfigured).unwrap();
    assert_eq!(
        found.checkpoint.read_bytes(name).unwrap(),
        default.checkpoint.read_bytes(name).unwrap()
    );
    // The norms of the file are at its end: what precedes them is a weight of the last projection.
    let mut bytes = fs::read(&path).unwrap();
    let scale = half::f16::from_f32(found.checkpoint.read_scale(&format!("{name}_scale")).unwrap());
    let is_weight = |at: &usize| {
        let run = bytes[*at..][..64].chunks(2);
        run.map(|pair| half::f16::from_le_bytes([pair[0], pair[1]]))
            .all(|w| w == scale || w == -scale || w == half::f16::ZERO)
            && bytes[*at..][..64].chunks(2).any(|pair| pair == scale.to_le_bytes())
    };
    let at = (0..bytes.len() - 64).step_by(32).rfind(is_weight).unwrap();
    bytes[at..at + 2].copy_from_slice(&half::f16::from_f32(3.).to_le_bytes());
    fs::write(&path, bytes).unwrap();
    let source = open(&path, Precision::AsConfigured).unwrap();
    let error = source.checkpoint.read_bytes(name).unwrap_err().to_string();
    assert!(
        error.contains("blk.5.ffn_down.weight") && error.contains("no ternary matrix"),
        "{error}"
    );
}

#[test]
fn what_is_written_is_read() {
    let types =
        [ProjectionType::I2S, ProjectionType::Tq1_0, ProjectionType::Tq2_0, ProjectionType::F16];
    let folder = tempfile::tempdir().unwrap();
    let tokens = Tensor::new(&[[1u32, 17, 250, 3, 99, 4, 5, 200]], &Device::Cpu).unwrap();
    let states = |model: &Model| flat(&model.hidden_states(&tokens, None).unwrap());
    let write = |source: &Source, projections: ProjectionType, name: &str| {
        write(source, projections.into(), folder.path(), name)
    };
    let default = Source::open("default", Precision::AsConfigured, &Hub::from_env()).unwrap();
    let tokenizer = default.tokenizer().unwrap().unwrap();
    let expected = states(&load(&default));
    for (index, ternary) in types.into_iter().enumerate() {
        let path = write(&default, ternary, &format!("{index}.gguf")).unwrap();
        let found = open(&path, Precision::AsConfigured).unwrap();
        assert_eq!(found.config, default.config);
        assert_eq!(found.generation.eos_token_ids, [1, 2]);
        assert_eq!(states(&load(&found)), expected, "{ternary:?}");
        let text = "Once upon a time<|eot_id|> ☃";
        let read = found.tokenizer().unwrap().unwrap();
        assert_eq!(read.encode(text, true).unwrap(), tokenizer.encode(text, true).unwrap());
        let template = |tokenizer: &Tokenizer| {
            let template = tokenizer.chat_template().unwrap().unwrap().clone();
            template.render(&[Message::new("user", "hi")], true).unwrap()
        };
        assert_eq!(template(&read), template(&tokenizer));
    }
    // Rows in another order, a head of its own, masters, other names, and no vocabulary.
    for name in ["llama_packed_tied_sharded", "bitnet_packed_untied", "legacy_1bitllm"] {
        let source = open(&Fixture::open(name).dir, Precision::AsConfigured).unwrap();
        for projections in [ProjectionType::I2S, ProjectionType::F16] {
            let path = write(&source, projections, &format!("{name}.gguf")).unwrap();
            let found = open(&path, Precision::AsConfigured).unwrap();
            assert!(!found.has_tokenizer());
            // An f16 holds the scale that multiplies in a packed file, a bf16; not its inverse, nor a mean of masters.
            if projections == ProjectionType::I2S || name == "bitnet_packed_untied" {
                assert_eq!(states(&load(&found)), states(&load(&source)), "{name}");
                continue;
            }
            for (weight, _) in source.config.projections() {
                let scale = found.checkpoint.read_scale(&format!("{weight}_scale")).unwrap();
                assert_eq!(half::f16::from_f32(scale).to_f32(), scale);
                let Ok(divisor) = source.checkpoint.read_scale(&format!("{weight}_scale")) else {
                    continue; // masters
                };
                assert_eq!(scale, half::f16::from_f32(1. / divisor).to_f32());
                let codes = |source: &Source| source.checkpoint.read_bytes(&weight).unwrap();
                assert_eq!(codes(&found), codes(&source), "{name}");
            }
        }
        let error = write(&source, ProjectionType::Tq2_0, "refused.gguf").unwrap_err().to_string();
        assert!(error.contains("no whole blocks of 256"), "{error}");
    }
    let norms = open(&Fixture::open("llama_packed_rmsnorm").dir, Precision::AsConfigured).unwrap();
    let error = write(&norms, ProjectionType::I2S, "refused.gguf").unwrap_err().to_string();
    assert!(error.contains("no place in a GGUF file"), "{error}");
    assert!(!folder.path().join("refused.gguf").exists());
}
