//! GGUF files as a user meets them: written, run, described and turned back.

#![allow(clippy::unwrap_used, missing_docs)] // test code

use std::{
    fs,
    path::Path,
    process::{Command, Output, Stdio},
};

use serde_json::Value;

fn run(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bitnet"));
    command.args(args).env("HF_HUB_OFFLINE", "1").stdin(Stdio::null()).output().unwrap()
}

fn stdout(args: &[&str]) -> String {
    let output = run(args);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {stderr}");
    String::from_utf8(output.stdout).unwrap()
}

fn failure(args: &[&str]) -> String {
    let output = run(args);
    assert_eq!(output.status.code(), Some(1), "{args:?}");
    String::from_utf8(output.stderr).unwrap()
}

fn str(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn json(args: &[&str]) -> Value {
    serde_json::from_str(&stdout(args)).unwrap()
}

#[test]
fn a_file_writes_the_text_of_the_model_it_was_made_of() {
    let dir = tempfile::tempdir().unwrap();
    let greedy = ["--temperature", "0", "--repetition-penalty", "1.2", "-n", "24", "-q"];
    let text = |model: &str| {
        stdout(&[&["generate", "-m", model, "Once upon a time"], &greedy[..]].concat())
    };
    let expected = text("default");
    for form in ["i2_s", "tq1_0", "tq2_0", "f16"] {
        let file = dir.path().join(format!("{form}.gguf"));
        let summary = json(&["convert", "default", str(&file), "--to", form, "--json"]);
        assert_eq!((&summary["form"], &summary["file"]), (&form.into(), &str(&file).into()));
        assert_eq!(summary["bytes_written"], fs::metadata(&file).unwrap().len());
        assert_eq!(text(str(&file)), expected, "{form}");
    }
    let file = dir.path().join("tq1_0.gguf");
    let info = json(&["info", str(&file), "--json"]);
    assert_eq!(info["family"], "BitNet b1.58 (sub-norms)");
    assert_eq!(info["tokenizer"]["chat_template"], true);
    assert_eq!(info["files"]["tq1_0.gguf"], fs::metadata(&file).unwrap().len());
    assert_eq!(info["generation"]["eos_token_id"], serde_json::json!([1, 2]));
    let perplexity = |model: &str| {
        let story = dir.path().join("story");
        fs::write(&story, "Once upon a time there was a cat. The cat was happy.").unwrap();
        let report = json(&["perplexity", "-m", model, str(&story), "--json", "-q"]);
        report["perplexity"].as_f64().unwrap()
    };
    assert_eq!(perplexity(str(&file)), perplexity("default"));
}

#[test]
fn back_in_the_hub_s_layout_nothing_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let (file, folder) = (dir.path().join("model.gguf"), dir.path().join("folder"));
    stdout(&["convert", "default", str(&file), "--to", "tq2_0"]);
    stdout(&["convert", str(&file), str(&folder), "--to", "packed"]);
    let default = Path::new(env!("CARGO_MANIFEST_DIR")).join("../bitnet-model/assets/default");
    let tensors = |folder: &Path| {
        let bytes = fs::read(folder.join("model.safetensors")).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let mut all: Vec<(String, Vec<u8>)> =
            tensors.tensors().into_iter().map(|(name, t)| (name, t.data().to_vec())).collect();
        all.sort();
        all
    };
    assert!(tensors(&folder) == tensors(&default));
    for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        assert!(folder.join(name).is_file(), "{name}");
    }
    let ids =
        |model: &str| json(&["tokenize", "-m", model, "a ☃<|eot_id|>", "--json"])["tokens"].clone();
    assert_eq!(ids(str(&folder)), ids("default"));
}

#[test]
fn embeddings_of_few_bits_and_what_is_said_of_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let bytes = |file: &Path| fs::metadata(file).unwrap().len();
    let (kept, few) = (path("kept.gguf"), path("few.gguf"));
    stdout(&["convert", "default", str(&kept), "--to", "tq2_0"]);
    let args = ["convert", "default", str(&few), "--to", "tq2_0", "--token-embedding-type", "q6_k"];
    let output = run(&args);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(stderr.contains("llama.cpp does not run it") && stderr.contains("relu²"), "{stderr}");
    // 2048 rows of 256: bf16, and blocks of 210 bytes.
    assert_eq!(bytes(&kept) - bytes(&few), 2048 * (512 - 210));
    let card = fs::read_to_string(path("few.md")).unwrap();
    for expected in [
        "---\nlicense:\n- mit\n",
        "library_name: gguf",
        "- tq2_0\n",
        "| embedding | Q6_K |",
        "| head | the embedding |",
        "bitnet convert default few.gguf --to tq2_0 --token-embedding-type q6_k",
        "| llama.cpp | no: it has no BitNet with relu²",
    ] {
        assert!(card.contains(expected), "{expected:?} in {card}");
    }
    // Back in a folder, whose card knows the licence from the file's.
    let folder = path("folder");
    stdout(&["convert", str(&few), str(&folder), "--to", "packed"]);
    let card = fs::read_to_string(folder.join("README.md")).unwrap();
    for expected in ["- apache-2.0\n", "library_name: transformers", "| transformers | yes |"] {
        assert!(card.contains(expected), "{expected:?} in {card}");
    }
    // A card of somebody else is not replaced.
    fs::write(path("kept.md"), "mine").unwrap();
    let line = failure(&["convert", "default", str(&kept), "--to", "tq2_0", "--force"]);
    assert!(line.contains("kept.md") && line.contains("move it away"), "{line}");
}

#[test]
fn an_adapter_becomes_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/lora_bitnet_offline");
    let (adapter, file) = (base.join("adapter"), path("adapter.gguf"));
    let args =
        ["convert", str(&adapter), str(&file), "--to", "lora", "--base", str(&base), "--json"];
    let summary = json(&args);
    assert_eq!(summary["bytes_written"], fs::metadata(&file).unwrap().len());
    let peft = fs::read(adapter.join("adapter_model.safetensors")).unwrap();
    let peft = safetensors::SafeTensors::deserialize(&peft).unwrap();
    assert_eq!(summary["tensors"], peft.len());
    let written = fs::read(&file).unwrap();
    let has = |text: &str| written.windows(text.len()).any(|window| window == text.as_bytes());
    assert!(has("adapter.lora.alpha") && has("blk.0.attn_q.weight.lora_a"));
    let card = fs::read_to_string(path("adapter.md")).unwrap();
    assert!(
        card.contains("- lora\n") && card.contains("bitnet convert adapter adapter.gguf"),
        "{card}"
    );

    let line = failure(&["info", str(&file)]);
    assert!(line.contains("general.type"), "{line}");
    let (x, folder) = (path("x.gguf"), path("x"));
    let other = ["convert", str(&adapter), str(&x), "--to", "lora", "--base", "default"];
    assert!(failure(&other).contains("another model"));
    let line = failure(&["convert", "default", str(&x), "--to", "tq2_0", "--base", "x"]);
    assert!(line.contains("--to lora"), "{line}");
    let types = ["--to", "packed", "--token-embedding-type", "f16"];
    let line = failure(&[&["convert", "default", str(&folder)], &types[..]].concat());
    assert!(line.contains("--token-embedding-type"), "{line}");
    assert!(!x.exists() && !folder.exists());
}

#[test]
fn refusals() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let line = failure(&["convert", "default", str(&path("model.bin")), "--to", "i2_s"]);
    assert!(line.contains("model.bin") && line.contains(".gguf"), "{line}");
    let file = path("model.gguf");
    fs::write(&file, "GGUF").unwrap();
    let line = failure(&["convert", "default", str(&file), "--to", "i2_s"]);
    assert!(line.contains("--force"), "{line}");
    let line = failure(&["info", str(&file)]);
    assert!(line.contains("model.gguf: the version at byte 4"), "{line}");
    stdout(&["convert", "default", str(&file), "--to", "i2_s", "--force"]);
    stdout(&["info", str(&file)]);

    let recipe = path("lora.toml");
    fs::write(&recipe, "[init]\nmodel = \"model.gguf\"\n[lora]\n[data]\ntrain = [\"x\"]\n")
        .unwrap();
    let line = failure(&["train", "lora", str(&recipe)]);
    assert!(line.contains("bitnet convert"), "{line}");
}
