//! `bitnet train qat` as a user runs it: trains, stops, goes on, and leaves models that load.

#![allow(clippy::unwrap_used, missing_docs)] // test code

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use bitnet_train::metrics::{self, Record};
use serde_json::Value;
use tempfile::TempDir;

const RECIPE: &str = r#"
[model]
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 1
vocab_size = 300
max_position_embeddings = 64

[data]
sequence_length = 32
train = [{ path = "train.txt", documents = "line" }]
validation = [{ path = "validation.txt", documents = "line" }]

[train]
batch_size = 2
steps = 6
seed = 1
eval_every = 3
save_every = 2

[optimizer]
peak_lr = 1e-3
warmup_steps = 2

[output]
dir = "run"
"#;

/// A folder with a recipe and its texts.
fn workplace() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let story =
        |i: usize| format!("The {} cat number {i} saw {} mice and ran home.\n", i * i, i % 7);
    fs::write(dir.path().join("train.txt"), (0..120).map(story).collect::<String>()).unwrap();
    fs::write(dir.path().join("validation.txt"), (120..140).map(story).collect::<String>())
        .unwrap();
    fs::write(dir.path().join("recipe.toml"), RECIPE).unwrap();
    dir
}

fn train(dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bitnet"));
    command.args(["train", "qat", "recipe.toml"]).args(args).current_dir(dir);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn run(dir: &Path, args: &[&str]) -> Output {
    train(dir, args).output().unwrap()
}

fn json(output: &Output) -> Value {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Waits until `dir` holds a checkpoint of at least `step` updates.
fn wait_for_checkpoint(dir: &Path, step: usize) {
    let start = Instant::now();
    let steps = |name: &str| name.strip_prefix("step-")?.parse::<usize>().ok();
    let is_there = || {
        fs::read_dir(dir).is_ok_and(|mut entries| {
            entries.any(|entry| {
                steps(entry.unwrap().file_name().to_str().unwrap()).is_some_and(|n| n >= step)
            })
        })
    };
    while !is_there() {
        assert!(start.elapsed() < Duration::from_secs(60), "no checkpoint of {step} appears");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The metrics of a run without timings and memory.
fn untimed_metrics(run: &Path) -> Vec<Record> {
    let records = metrics::read(&run.join(metrics::FILE)).unwrap();
    records.into_iter().map(Record::untimed).collect()
}

#[test]
fn trains_and_leaves_models_that_run() {
    let dir = workplace();
    let plan = json(&run(dir.path(), &["--dry-run", "--json"]));
    assert!(!dir.path().join("run").exists(), "a dry run wrote something");
    assert_eq!((&plan["steps"], &plan["tokens_per_step"]), (&6.into(), &64.into()));
    assert!(plan["seconds"].as_f64().unwrap() > 0.);

    let output = run(dir.path(), &["--json"]);
    let summary = json(&output);
    assert_eq!((&summary["outcome"], &summary["step"]), (&"finished".into(), &6.into()));
    assert_eq!(summary["parameters"], plan["parameters"]);
    assert!(summary["best"]["nats_per_byte"].as_f64().unwrap() > 0.);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(stderr.contains("evaluation after 3: ") && stderr.contains("update 6/6 "), "{stderr}");

    for name in ["packed", "latent"] {
        let model: PathBuf = dir.path().join(summary[name].as_str().unwrap());
        let file = dir.path().join(format!("{name}.safetensors"));
        let output = Command::new(env!("CARGO_BIN_EXE_bitnet"))
            .args(["logits", "--text", "The cat", "--json", "-m"])
            .args([model.as_path(), Path::new("-o"), &file])
            .output()
            .unwrap();
        assert_eq!(json(&output)["shape"][1], 300);
        let output = Command::new(env!("CARGO_BIN_EXE_bitnet"))
            .args([Path::new("info"), Path::new("--json"), &model])
            .output()
            .unwrap();
        let info = json(&output);
        assert_eq!(info["parameters"]["total"], summary["parameters"]);
        assert_eq!(info["quantization"]["form"], name);
    }

    let again = run(dir.path(), &[]);
    let stderr = String::from_utf8(again.stderr).unwrap();
    assert_eq!(again.status.code(), Some(1));
    assert!(stderr.contains("resume") && stderr.lines().count() == 1, "{stderr}");
    // A finished run that is resumed is finished.
    assert_eq!(json(&run(dir.path(), &["--resume", "--json", "-q"]))["step"], 6);
}

#[test]
fn a_run_that_is_killed_five_times_ends_with_the_same_bits() {
    let dir = workplace();
    let long = ["--steps", "60", "--eval-every", "7", "--set", "train.codes_every=5", "-q"];
    let whole = run(dir.path(), &[&long[..], &["--output", "whole"]].concat());
    assert!(whole.status.success(), "{}", String::from_utf8_lossy(&whole.stderr));

    let cut = [&long[..], &["-o", "cut", "--resume", "--tensorboard"]].concat();
    for kill in 0..5 {
        let mut child = train(dir.path(), &cut).spawn().unwrap();
        wait_for_checkpoint(&dir.path().join("cut"), 10 * kill + 1);
        std::thread::sleep(Duration::from_millis(3 * kill as u64)); // in the midst of something else
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let output = run(dir.path(), &cut);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let [whole, cut] = ["whole", "cut"].map(|run| dir.path().join(run));
    for file in [
        "packed/model.safetensors",
        "best.safetensors",
        "step-60/model.safetensors",
        "step-60/optimizer.safetensors",
        "step-60/codes.safetensors",
        "step-60/trainer_state.json",
    ] {
        assert!(fs::read(whole.join(file)).unwrap() == fs::read(cut.join(file)).unwrap(), "{file}");
    }
    assert_eq!(untimed_metrics(&whole), untimed_metrics(&cut));
}

#[test]
fn an_absurd_learning_rate_stops_the_run() {
    let dir = workplace();
    let args = ["--steps", "200", "--peak-lr", "10", "--set", "train.limits.divergence_updates=8"];
    let output = run(dir.path(), &args);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    let last = stderr.lines().last().unwrap();
    assert!(last.contains("for 8 updates") && last.contains("`optimizer.peak_lr`"), "{stderr}");
    let off =
        [&args[2..], &["--steps", "20", "--set", "train.stop_on_divergence=false", "-o", "off"]];
    assert!(run(dir.path(), &off.concat()).status.success());
}

#[test]
fn the_printed_recipe_makes_the_same_recipe() {
    let dir = workplace();
    let args = ["--peak-lr", "3e-4", "--set", "optimizer.beta2=0.98", "--precision", "full"];
    let printed = run(dir.path(), &[&args[..], &["--print-recipe"]].concat());
    let text = String::from_utf8(printed.stdout).unwrap();
    for line in ["peak_lr = 0.0003", "beta2 = 0.98", "precision = \"full\"", "eps = "] {
        assert!(text.contains(line), "{text}");
    }
    assert!(!dir.path().join("run").exists());
    let elsewhere = tempfile::tempdir().unwrap();
    fs::write(elsewhere.path().join("recipe.toml"), &text).unwrap();
    let again = run(elsewhere.path(), &["--print-recipe"]);
    assert_eq!(String::from_utf8(again.stdout).unwrap(), text);
    // A run leaves the same in its folder.
    assert!(run(dir.path(), &[&args[..], &["-q"]].concat()).status.success());
    assert_eq!(fs::read_to_string(dir.path().join("run/recipe.toml")).unwrap(), text);
}

#[cfg(unix)]
#[test]
fn ctrl_c_saves_and_says_how_to_go_on() {
    let dir = workplace();
    let long = ["--steps", "3000", "--set", "train.eval_every=3000"];
    let child = train(dir.path(), &long).spawn().unwrap();
    wait_for_checkpoint(&dir.path().join("run"), 1);
    let kill = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(kill.success());
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(130), "{stderr}");
    let last = stderr.lines().last().unwrap();
    assert!(last.starts_with("interrupted; go on with: "), "{stderr}");
    assert!(last.ends_with("--set train.eval_every=3000 --resume"), "{stderr}");
    assert!(String::from_utf8(output.stdout).unwrap().contains("interrupted after "));
    assert!(!dir.path().join("run/packed").exists());
    let saved = fs::read_dir(dir.path().join("run")).unwrap();
    let saved = saved.filter(|e| e.as_ref().unwrap().path().join("trainer_state.json").is_file());
    assert!(saved.count() > 0);
}

#[test]
fn a_recipe_that_makes_no_run_is_one_line() {
    let dir = workplace();
    for (args, reason) in [
        (
            &["--set", "train.stepz=1"][..],
            "train.stepz=1`: unknown field `stepz`; did you mean `steps`?",
        ),
        (
            &["--set", "model.hidden_sizes=1"],
            "unknown field `hidden_sizes`; did you mean `hidden_size`?",
        ),
        (&["--set", "train.limits.margin=1"], "unknown field `margin`"),
        (&["--set", "train.batch_size=many"], "invalid type: string"),
        (&["--batch-size", "0"], "`train.batch_size`"),
        (&["--peak-lr", "inf"], "`optimizer.peak_lr`"),
        (&["--precision", "half"], "model.precision=half"),
        (&["--set", "data.train=[{path='no.txt',documents='line'}]"], "no.txt"),
        (&["--set", "model.vocab_size=100"], "`model.vocab_size`"),
        (&["--batch-size", "100000"], "training tokens"),
    ] {
        let output = run(dir.path(), args);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{args:?}: {stderr}");
        assert!(stderr.contains(reason) && stderr.lines().count() == 1, "{stderr}");
    }
    fs::write(dir.path().join("recipe.toml"), RECIPE.replace("seed = 1", "sead = 1")).unwrap();
    let stderr = String::from_utf8(run(dir.path(), &[]).stderr).unwrap();
    assert!(
        stderr.contains(
            "recipe.toml: line 19, `sead = 1`: unknown field `sead`; did you mean `seed`?"
        ),
        "{stderr}"
    );
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    let left =
        fs::read_dir(dir.path().join("run")).unwrap().map(|entry| entry.unwrap().file_name());
    assert!(left.eq(["tokens"]), "more than the encoded text is left");
}

#[test]
fn a_full_precision_model_is_gone_on_from_and_not_just_rounded() {
    let dir = workplace();
    let full = run(dir.path(), &["--precision", "full", "--steps", "3", "-o", "full", "-q"]);
    assert!(full.status.success(), "{}", String::from_utf8_lossy(&full.stderr));
    let model = ["--init", "full/latent", "--teacher", "full/latent", "--lambda-steps", "2"];
    let student = json(&run(dir.path(), &[&model[..], &["-o", "student", "--json"]].concat()));
    assert_eq!(student["packed"], "student/packed");
    let metrics = fs::read_to_string(dir.path().join("student/metrics.jsonl")).unwrap();
    let first: Value = serde_json::from_str(metrics.lines().next().unwrap()).unwrap();
    assert_eq!(first["lambda"], 0.);
    assert!(first["terms"]["logits_divergence"].as_f64().unwrap() < 1e-5, "{first}");

    let convert = |args: &[&str]| {
        Command::new(env!("CARGO_BIN_EXE_bitnet"))
            .args(["convert", "full/latent", "rounded", "--to", "packed"])
            .args(args)
            .current_dir(dir.path())
            .output()
            .unwrap()
    };
    let refused = convert(&[]);
    let stderr = String::from_utf8(refused.stderr).unwrap();
    assert!(stderr.contains("--i-know --text FILE") && stderr.contains("[init]"), "{stderr}");
    assert!(!refused.status.success() && !dir.path().join("rounded").exists());
    let rounded = json(&convert(&["--i-know", "--text", "validation.txt", "--json"]));
    for key in ["perplexity_before", "perplexity_after"] {
        assert!(rounded[key].as_f64().unwrap() > 1., "{rounded}");
    }
}
