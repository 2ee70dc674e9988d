//! `bitnet train lora` as a user runs it, offline, on the model inside the program.

#![allow(clippy::unwrap_used, missing_docs)] // test code

use std::{
    fs,
    path::Path,
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use bitnet_train::metrics::{self, Record};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A folder with a few records.
fn workplace() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let record = |i: usize| {
        let (prompt, completion) =
            (format!("How many mice did cat {i} see?"), format!("It saw {} mice.", i % 7));
        json!({"prompt": prompt, "completion": completion}).to_string() + "\n"
    };
    fs::write(dir.path().join("mine.jsonl"), (0..20).map(record).collect::<String>()).unwrap();
    dir
}

/// A small and short run: rank 4, updates of two examples.
const SHORT: [&str; 14] = [
    "--data",
    "mine.jsonl",
    "--rank",
    "4",
    "--alpha",
    "8",
    "--max-length",
    "48",
    "--gradient-accumulation",
    "2",
    "--steps",
    "6",
    "--eval-every",
    "3",
];

fn train(dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bitnet"));
    command.args(["train", "lora"]).args(SHORT).args(args).current_dir(dir);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn run(dir: &Path, args: &[&str]) -> Output {
    train(dir, args).output().unwrap()
}

fn summary(output: &Output) -> Value {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn trains_an_adapter_and_shows_what_it_says() {
    let dir = workplace();
    let args =
        ["-o", "run", "--json", "--prompt", "How many mice?", "--set", "samples.max_new_tokens=4"];
    let plan = summary(&run(dir.path(), &["-o", "run", "--json", "--dry-run"]));
    assert!(!dir.path().join("run").exists(), "a dry run wrote something");
    let output = run(dir.path(), &args);
    let (summary, stderr) =
        (summary(&output), String::from_utf8_lossy(&output.stderr).into_owned());
    assert_eq!((&summary["outcome"], &summary["step"]), (&"finished".into(), &6.into()));
    assert_eq!(summary["parameters"], plan["parameters"]);
    assert!(
        stderr.contains("prompt/completion") && stderr.contains("How many mice?\n    → "),
        "{stderr}"
    );
    let adapter = dir.path().join(summary["adapter"].as_str().unwrap());
    let config: Value =
        serde_json::from_slice(&fs::read(adapter.join("adapter_config.json")).unwrap()).unwrap();
    assert_eq!((&config["peft_type"], &config["r"]), (&"LORA".into(), &4.into()));
    let records = metrics::read(&dir.path().join("run/metrics.jsonl")).unwrap();
    let samples = records.iter().filter(|record| matches!(record, Record::Samples(_)));
    assert_eq!(samples.count(), 2);
}

#[test]
fn a_run_that_is_killed_goes_on_to_the_same_adapter() {
    let dir = workplace();
    let whole = run(dir.path(), &["-o", "whole", "-q", "--save-every", "1"]);
    assert!(whole.status.success(), "{}", String::from_utf8_lossy(&whole.stderr));
    let cut = ["-o", "cut", "-q", "--save-every", "1", "--resume"];
    let mut child = train(dir.path(), &cut).spawn().unwrap();
    let start = Instant::now();
    let is_saved = || (1..6).any(|step| dir.path().join(format!("cut/step-{step}")).exists());
    while !is_saved() {
        assert!(start.elapsed() < Duration::from_secs(60), "no checkpoint appears");
        std::thread::sleep(Duration::from_millis(2));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(run(dir.path(), &cut).status.success());
    for file in ["adapter/adapter_model.safetensors", "step-6/optimizer.safetensors"] {
        let [whole, cut] = ["whole", "cut"].map(|run| fs::read(dir.path().join(run).join(file)));
        assert!(whole.unwrap() == cut.unwrap(), "{file}");
    }
}

#[test]
fn bad_input_is_named() {
    let dir = workplace();
    fs::write(dir.path().join("empty.jsonl"), "").unwrap();
    for (args, reason) in [
        (&["--target-modules", "q_proj,gate"][..], "`gate` is no projection; there are q_proj"),
        (&["--rank", "0"], "`lora.rank`: must be at least 1"),
        (&["--rank", "300"], "300 is more than"),
        (&["--dropout", "1"], "`lora.dropout`"),
        (&["--mode", "qat"], "packed codes and no masters"),
        (&["--modules-to-save", "q_proj"], "cannot be trained whole"),
        (&["-m", "no-such-folder/model"], "no-such-folder/model"),
        (&["--set", "lora.ranks=3"], "did you mean `rank`?"),
        (&["--set", "distillation.teacher=default"], "`distillation`"),
        (&["--data", "empty.jsonl"], "empty.jsonl"),
    ] {
        // What is given twice counts as the last one says, but for lists.
        let mut command = Command::new(env!("CARGO_BIN_EXE_bitnet"));
        command.args(["train", "lora", "-o", "run", "--steps", "1"]).args(args);
        if !args.contains(&"--data") {
            command.args(["--data", "mine.jsonl"]);
        }
        let offline = command.env("HF_HUB_OFFLINE", "1").current_dir(dir.path());
        let output = offline.output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        let last = stderr.lines().last().unwrap_or_default();
        assert!(last.starts_with("error: ") && last.contains(reason), "{args:?}: {stderr}");
        assert_eq!(output.status.code(), Some(1), "{args:?}");
    }
    let output =
        Command::new(env!("CARGO_BIN_EXE_bitnet")).args(["train", "lora"]).output().unwrap();
    assert!(String::from_utf8_lossy(&output.stderr).contains("give --data FILE"));
}
