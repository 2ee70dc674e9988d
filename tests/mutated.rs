//! Readers of files, given damaged ones: whatever is wrong must be an error, and never a panic.
//!
//! An ordinary run gives each a thousand. `scripts/check.sh` gives them seconds and another seed, by `BITNET_FUZZ_SECONDS` and
//! `BITNET_FUZZ_SEED`.

#![allow(clippy::unwrap_used)]

mod support {
    pub mod mutation;
}

use std::{fs, path::Path};

use bitnet_model::{
    Result,
    adapter::Adapter,
    checkpoint::{
        Checkpoint, Dtype, SafetensorsWriter, TensorSpec,
        gguf::Gguf,
        onnx::{self, OnnxGraph, OnnxWeights},
    },
    config::{Config, GenerationConfig},
    hub::ModelFiles,
    text::{ChatTemplate, Message, Tokenizer},
};
use bitnet_tests::{
    fixture::{Fixture, root},
    gguf_model::small,
};
use support::mutation::hammer;

/// A small file of every element type that is read.
fn safetensors() -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    let types = [Dtype::U8, Dtype::BF16, Dtype::F16, Dtype::F32, Dtype::I64];
    let spec = |dtype: &Dtype| TensorSpec::new(format!("model.{dtype}.weight"), *dtype, [3, 4]);
    let specs: Vec<TensorSpec> = types.iter().map(spec).collect();
    let mut writer = SafetensorsWriter::create(&path, specs).unwrap();
    for dtype in types {
        let bytes = vec![0x3f; 12 * dtype.bitsize() / 8];
        writer.write(&format!("model.{dtype}.weight"), &bytes).unwrap();
    }
    writer.finish().unwrap();
    fs::read(path).unwrap()
}

fn read_tensors(checkpoint: &Checkpoint) -> Result<()> {
    for name in checkpoint.names() {
        checkpoint.read(name)?;
    }
    Ok(())
}

#[test]
fn safetensors_files() {
    hammer("safetensors", &[safetensors()], |bytes| {
        let checkpoint = Checkpoint::from_bytes("model.safetensors", bytes.to_vec());
        checkpoint.and_then(|checkpoint| read_tensors(&checkpoint)).is_ok()
    });
}

#[test]
fn gguf_files() {
    let (header, data) = small().parts();
    hammer("gguf", &[[&header[..], &data].concat()], |bytes| {
        let read = || {
            let gguf = Gguf::from_bytes("model.gguf", bytes.to_vec())?;
            gguf.generation()?;
            let checkpoint = gguf.checkpoint()?;
            read_tensors(&checkpoint)?;
            if let Some([(_, tokenizer), (_, config)]) = gguf.tokenizer_files()? {
                Tokenizer::from_bytes(&tokenizer, Some(&config), None)?;
            }
            gguf.config().check_tensors(&checkpoint)
        };
        read().is_ok()
    });
}

/// The files of this name in all fixtures.
fn in_fixtures(name: &str) -> Vec<Vec<u8>> {
    let folders = fs::read_dir(root()).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<_> =
        folders.map(|folder| folder.join(name)).filter(|f| f.is_file()).collect();
    files.sort();
    files.iter().map(|file| fs::read(file).unwrap()).collect()
}

#[test]
fn configurations() {
    let path = Path::new("config.json");
    hammer("config", &in_fixtures("config.json"), |bytes| {
        let config = String::from_utf8(bytes.to_vec()).map(|json| Config::from_json(path, &json));
        match config {
            Ok(Ok(config)) => {
                // What is taken is described, and its sizes fit.
                config.to_json();
                assert!(config.parameters() > 0);
                config.projections().count() == 7 * config.num_hidden_layers
            }
            _ => false,
        }
    });
    hammer("generation_config", &in_fixtures("generation_config.json"), |bytes| {
        let json = String::from_utf8_lossy(bytes);
        GenerationConfig::from_json(Path::new("generation_config.json"), &json).is_ok()
    });
}

#[test]
fn adapters() {
    let source = root().join("lora_bitnet_offline/adapter");
    let dir = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(&source).unwrap().map(|entry| entry.unwrap()) {
        fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
    }
    let path = dir.path().join("adapter_config.json");
    hammer("adapter", &[fs::read(&path).unwrap()], |bytes| {
        fs::write(&path, bytes).unwrap();
        Adapter::open(dir.path()).is_ok()
    });
}

#[test]
fn indexes_of_shards() {
    let name = "model.safetensors.index.json";
    let dir = tempfile::tempdir().unwrap();
    let source = root().join("llama_packed_tied_sharded");
    for entry in fs::read_dir(&source).unwrap().map(|entry| entry.unwrap()) {
        fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
    }
    hammer("index", &in_fixtures(name), |bytes| {
        fs::write(dir.path().join(name), bytes).unwrap();
        let files = ModelFiles::from_path(dir.path());
        files.and_then(|files| Checkpoint::open(&files.weights).map(drop)).is_ok()
    });
}

#[test]
fn tokenizers_and_templates() {
    let tokenizer = in_fixtures("tokenizer.json");
    let config = in_fixtures("tokenizer_config.json");
    hammer("tokenizer", &tokenizer, |bytes| {
        let tokenizer = Tokenizer::from_bytes(bytes, Some(&config[0]), None);
        tokenizer.and_then(|t| t.encode("Hi, Zürich 123\n", true)).is_ok()
    });
    hammer("tokenizer_config", &config, |bytes| {
        Tokenizer::from_bytes(&tokenizer[0], Some(bytes), None).is_ok()
    });
    hammer("template", &in_fixtures("chat_template.jinja"), |bytes| {
        let messages = [Message::new("user", "Hi"), Message::new("assistant", "Ho")];
        let template = ChatTemplate::new(&String::from_utf8_lossy(bytes), &Default::default());
        template.and_then(|template| template.render(&messages, true)).is_ok()
    });
}

#[test]
fn onnx_graphs() {
    let fixture = Fixture::open("bitnet_packed_tied");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.onnx");
    onnx::write(&fixture.config, &fixture.checkpoint, OnnxWeights::Int2, &path, |_, _| ()).unwrap();
    hammer("onnx", &[fs::read(&path).unwrap()], |bytes| OnnxGraph::from_bytes(bytes).is_some());
}

/// Small valid files for libFuzzer to begin with, in folders by its targets' names.
#[test]
#[ignore = "writes into $BITNET_FUZZ_CORPUS, for scripts/fuzz.sh"]
fn seeds_of_the_fuzzer() {
    let Some(corpus) = std::env::var_os("BITNET_FUZZ_CORPUS") else { return };
    let (header, data) = small().parts();
    for (target, bytes) in [("safetensors", safetensors()), ("gguf", [&header[..], &data].concat())]
    {
        let folder = Path::new(&corpus).join(target);
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("small"), bytes).unwrap();
    }
}
