//! Shards and ONNX graphs as a user writes them.

#![allow(clippy::unwrap_used, missing_docs)] // test code

mod support;

use std::{collections::BTreeMap, fs, path::Path};

use serde_json::Value;
use support::{failure, fixture, stdout, text};

fn json(args: &[&str]) -> Value {
    serde_json::from_str(&stdout(args, "")).unwrap()
}

/// Name, type, shape and bytes of the tensors in all files of a folder.
type Tensors = BTreeMap<String, (String, Vec<usize>, Vec<u8>)>;

fn tensors(folder: &Path) -> Tensors {
    let mut tensors = Tensors::new();
    for entry in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
        if entry.extension().is_some_and(|extension| extension == "safetensors")
            && !entry.ends_with("expected.safetensors")
        {
            let bytes = fs::read(&entry).unwrap();
            for (name, view) in safetensors::SafeTensors::deserialize(&bytes).unwrap().tensors() {
                let dtype = view.dtype().to_string();
                let tensor = (dtype, view.shape().to_vec(), view.data().to_vec());
                assert!(tensors.insert(name.clone(), tensor).is_none(), "{name} is there twice");
            }
        }
    }
    tensors
}

#[test]
fn shards_hold_what_one_file_holds_and_join_again() {
    let dir = tempfile::tempdir().unwrap();
    let source = fixture("bitnet_packed_untied");
    let [shards, latent, joined] = ["shards", "latent", "joined"].map(|name| dir.path().join(name));
    let args = ["convert", text(&source), text(&shards), "--to", "packed", "--json"];
    let summary = json(&[&args[..], &["--max-shard-size", "50KB"]].concat());
    assert_eq!(tensors(&shards), tensors(&source));

    let index = fs::read_to_string(shards.join("model.safetensors.index.json")).unwrap();
    let index: Value = serde_json::from_str(&index).unwrap();
    let files: Vec<&str> =
        index["weight_map"].as_object().unwrap().values().map(|v| v.as_str().unwrap()).collect();
    assert_eq!(files.len(), tensors(&source).len());
    let total: usize = tensors(&source).values().map(|(_, _, data)| data.len()).sum();
    assert_eq!(index["metadata"]["total_size"], total);
    let mut written = 0;
    let mut names: Vec<&str> = files.clone();
    names.sort_unstable();
    names.dedup();
    assert!(names.len() > 2);
    assert_eq!(names[0], format!("model-00001-of-{:05}.safetensors", names.len()));
    for name in &names {
        let bytes = fs::read(shards.join(name)).unwrap();
        let shard = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let sizes: Vec<usize> = shard.tensors().iter().map(|(_, v)| v.data().len()).collect();
        assert!(sizes.len() == 1 || sizes.iter().sum::<usize>() <= 50_000, "{name}: {sizes:?}");
        for (tensor, _) in shard.tensors() {
            assert_eq!(index["weight_map"][&tensor], **name);
        }
        written += bytes.len();
    }
    assert_eq!(summary["bytes_written"], written);

    // Through masters in shards, back to codes in one file.
    let to_latent = ["convert", text(&shards), text(&latent), "--to", "latent"];
    stdout(&[&to_latent[..], &["--max-shard-size", "100KiB"]].concat(), "");
    assert!(latent.join("model.safetensors.index.json").is_file());
    stdout(&["convert", text(&latent), text(&joined), "--to", "packed"], "");
    assert_eq!(tensors(&joined), tensors(&source));
    assert!(!joined.join("model.safetensors.index.json").exists());
    assert_eq!(
        json(&["info", text(&shards), "--json"])["files"].as_object().unwrap().len(),
        names.len()
    );

    for size in ["0", "x", "5TB", "99999999999GB", "-1MB"] {
        let args = ["convert", "default", "x", "--to", "packed", "--max-shard-size", size];
        assert_eq!(support::run(&args, "").status.code(), Some(2), "{size}");
    }
}

#[test]
fn a_graph_is_written_whole_described_and_replaced_on_demand() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("model.onnx");
    let data = dir.path().join("model.onnx.data");
    let source = fixture("llama_packed_rmsnorm");
    let args = ["convert", text(&source), text(&file), "--to", "onnx", "--json"];
    let summary = json(&args);
    let size = |path: &Path| fs::metadata(path).unwrap().len();
    assert_eq!(summary["bytes_written"], size(&file) + size(&data));
    assert_eq!((&summary["form"], &summary["file"]), (&"onnx".into(), &text(&file).into()));

    let info = json(&["info", text(&file), "--json"]);
    assert_eq!(info["tensors"].as_array().unwrap().len() as u64, summary["tensors"]);
    assert_eq!(info["files"]["model.onnx.data"], size(&data));
    assert_eq!(info["inputs"][0], "input_ids");
    assert_eq!(info["outputs"][0], "logits");
    assert_eq!(info["geometry"], json(&["info", text(&source), "--json"])["geometry"]);
    let layers = info["geometry"]["num_hidden_layers"].as_u64().unwrap();
    assert_eq!(info["operators"]["MatMulNBits"], 7 * layers);
    let table = stdout(&["info", text(&file)], "");
    assert!(table.contains("past_key_values.0.key") && table.contains("MatMulNBits"), "{table}");

    let refused = failure(&args[..5], "");
    assert!(refused.contains("--force"), "{refused}");
    let before = fs::read(&data).unwrap();
    let options = ["--onnx-weights", "int8", "--force"];
    stdout(&[&args[..], &options].concat(), "");
    assert_ne!(fs::read(&data).unwrap(), before);
    assert_eq!(json(&["info", text(&file), "--json"])["operators"]["MatMulInteger"], 7 * layers);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "temporary files are left");
}

#[test]
fn what_does_not_go_together_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| text(&dir.path().join(name)).to_owned();
    let folder = dir.path().join("folder.onnx");
    fs::create_dir(&folder).unwrap();
    for (output, form, options, words) in [
        ("model.bin", "onnx", &[][..], "ends in .onnx"),
        ("folder.onnx", "onnx", &["--force"], "no file"),
        ("x", "packed", &["--onnx-weights", "int8"], "--to onnx"),
        ("x.onnx", "onnx", &["--max-shard-size", "5GB"], "folders"),
        ("x.gguf", "tq2_0", &["--max-shard-size", "5GB"], "folders"),
        ("x.onnx", "onnx", &["--i-know", "--text", "README.md"], "--to packed"),
    ] {
        let args = ["convert", "default", &path(output), "--to", form];
        let message = failure(&[&args[..], options].concat(), "");
        assert!(message.contains(words), "{options:?}: {message}");
    }
    let damaged = path("damaged.onnx");
    fs::write(&damaged, b"\x0a\xff\xff\xff\xff\x0f").unwrap();
    let message = failure(&["info", &damaged], "");
    assert!(message.contains("damaged.onnx") && message.contains("no ONNX model"), "{message}");
    for verb in
        [&["generate", "-m", &damaged, "x"][..], &["convert", &damaged, "y", "--to", "packed"]]
    {
        let message = failure(verb, "");
        assert!(message.contains("onnx") && message.contains("ONNX"), "{message}");
    }
}
