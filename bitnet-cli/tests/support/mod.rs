//! Runs the built `bitnet`, and models for it.

#![allow(dead_code)] // every test program takes what it needs

pub mod server;

use std::{
    fs,
    io::{Read, Write},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
};

use bitnet_model::pretrained::default_files;
use serde_json::{Value, json};
use tempfile::TempDir;

/// `bitnet` with all three streams piped.
pub fn bitnet(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bitnet"));
    command.args(args).env("HF_HUB_OFFLINE", "1");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Runs it to its end with `stdin`.
pub fn run(args: &[&str], stdin: impl AsRef<[u8]>) -> Output {
    let mut child = bitnet(args).spawn().unwrap();
    // A program that ends early closes its stdin: what it says then is tested, not the write.
    let _ = child.stdin.take().unwrap().write_all(stdin.as_ref());
    child.wait_with_output().unwrap()
}

/// The stdout of a run that succeeds.
pub fn stdout(args: &[&str], stdin: impl AsRef<[u8]>) -> String {
    let output = run(args, stdin);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {}: {stderr}", output.status);
    String::from_utf8(output.stdout).unwrap()
}

/// The one line of stderr of a run that fails without a word on stdout.
pub fn failure(args: &[&str], stdin: impl AsRef<[u8]>) -> String {
    let output = run(args, stdin);
    assert_eq!(output.status.code(), Some(1), "{args:?}");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "", "{args:?}");
    let stderr = String::from_utf8(output.stderr).unwrap();
    let line = stderr.strip_suffix('\n').unwrap_or_else(|| panic!("{args:?}: {stderr:?}"));
    assert!(!line.contains('\n'), "{args:?}: {stderr}");
    line.strip_prefix("error: ").unwrap_or_else(|| panic!("{args:?}: {line}")).to_owned()
}

/// Waits for the first `len` bytes of a child's stdout.
pub fn read_some(child: &mut Child, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    child.stdout.as_mut().unwrap().read_exact(&mut bytes).unwrap();
    bytes
}

/// What Ctrl-C sends.
pub fn interrupt(child: &Child) {
    let status = Command::new("kill").args(["-INT", &child.id().to_string()]).status();
    assert!(status.unwrap().success());
}

/// Waits until a child handles Ctrl-C: before that, the signal ends it.
#[cfg(target_os = "linux")]
pub fn wait_for_handler(child: &Child) {
    let caught = || {
        let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
        let mask = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap();
        u64::from_str_radix(mask.trim(), 16).unwrap()
    };
    while caught() & 1 << 1 == 0 {
        std::thread::sleep(std::time::Duration::from_millis(5)); // bit 1: signal 2, SIGINT
    }
}

/// A checkpoint without a tokenizer.
pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(name)
}

/// The text of a path.
pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A file of the embedded default model.
pub fn default_json(name: &str) -> Value {
    let file = default_files().into_iter().find(|file| file.0 == name);
    serde_json::from_slice(file.unwrap().1).unwrap()
}

/// The default model in a folder, its JSON file `name` edited.
pub fn edited_default(name: &str, edit: impl FnOnce(&mut Value)) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (file, bytes) in default_files() {
        fs::write(folder.path().join(file), bytes).unwrap();
    }
    let mut value = default_json(name);
    edit(&mut value);
    fs::write(folder.path().join(name), value.to_string()).unwrap();
    folder
}

/// The default model with room for a text that takes longer than any test.
pub fn long_context() -> TempDir {
    edited_default("config.json", |config| config["max_position_embeddings"] = json!(200_000))
}

/// Ids that end a text of the default model.
pub fn eos_ids() -> Vec<u64> {
    match default_json("generation_config.json")["eos_token_id"].clone() {
        Value::Array(ids) => ids.iter().map(|id| id.as_u64().unwrap()).collect(),
        id => vec![id.as_u64().unwrap()],
    }
}
