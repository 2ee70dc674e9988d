//! `bitnet doctor` as a user meets it, on whatever machine this is.

#![allow(clippy::unwrap_used)] // helpers of tests

mod support;

use std::process::Output;

use serde_json::{Value, json};
use support::{bitnet, failure, stdout};

const QUICK: [&str; 4] = ["doctor", "-q", "-t", "1"];

fn json_of(output: &Output) -> Value {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {stderr}", output.status);
    serde_json::from_slice(&output.stdout).unwrap()
}

fn names(list: &Value, field: &str) -> Vec<String> {
    list.as_array().unwrap().iter().map(|row| row[field].as_str().unwrap().to_owned()).collect()
}

#[test]
fn every_back_end_has_the_results_of_the_portable_kernel() {
    let mut command = bitnet(&[&QUICK[..], &["--json"]].concat());
    let output = command.env_remove("BITNET_KERNEL").output().unwrap();
    let report = json_of(&output);
    assert_eq!(output.stderr, b"");
    assert_eq!((&report["format"], &report["problems"]), (&json!("bitnet-doctor"), &json!([])));
    let kernels = report["processor"]["kernels"].as_array().unwrap();
    let can_run = kernels.iter().filter(|kernel| kernel["missing"] == json!([]));
    let can_run: Vec<_> = can_run.map(|kernel| kernel["name"].as_str().unwrap()).collect();
    let back_ends = report["back_ends"].as_array().unwrap();
    let on_cpu = back_ends.iter().filter(|tried| tried["device"] == "cpu");
    assert!(on_cpu.map(|tried| tried["kernel"].as_str().unwrap()).eq(can_run.iter().copied()));
    assert_eq!(report["processor"]["kernel"], can_run[0]);
    for tried in back_ends {
        let expected = if tried["kernel"] == "scalar" { "reference" } else { "equal" };
        assert_eq!(tried["result"], expected, "{tried}");
        assert!(tried["tokens_per_second"].as_f64().unwrap() > 0.);
    }
    assert_eq!(report["limits"].as_array().map(Vec::len), Some(1));
    assert!(report["limits"][0]["streamed_ternary"].as_f64().unwrap() > 0.);
    let settings = names(&report["advice"], "setting");
    for setting in ["threads", "kernel", "device"] {
        assert!(settings.iter().any(|found| found == setting), "{settings:?}");
    }
    if cfg!(target_os = "linux") {
        let part = report["memory"]["large_part"].as_f64().unwrap();
        assert!((0. ..=1.).contains(&part), "{part}");
        assert!(report["memory"]["available_bytes"].as_u64().unwrap() > 0);
    }
}

/// Nothing in the environment but what would tell a secret, and a home that cannot be written.
#[cfg(target_os = "linux")]
#[test]
fn a_bare_environment_and_a_read_only_home_are_enough() {
    let run = |json: &[&str]| {
        let secrets = [("HF_TOKEN", "hf_secret"), ("HF_ENDPOINT", "https://me:secret@mirror/hf")];
        let mut command = bitnet(&[&QUICK[..], json].concat());
        command.env_clear().env("HOME", "/proc/1/home").envs(secrets).current_dir("/");
        let output = command.output().unwrap();
        for text in [&output.stdout, &output.stderr] {
            assert!(!String::from_utf8_lossy(text).contains("secret"));
        }
        output
    };
    let report = json_of(&run(&["--json"]));
    let hub = &report["hub"];
    assert_eq!(hub["cache"], "/proc/1/home/.cache/huggingface/hub");
    assert_eq!((&hub["exists"], &hub["has_token"]), (&json!(false), &json!(true)));
    assert_eq!(hub["endpoint"], "https://mirror/hf");
    assert_eq!(hub["variables"], json!(["HF_ENDPOINT", "HF_TOKEN"]));
    assert!(hub["not_writable"].as_str().unwrap().starts_with("/proc"), "{hub}");
    let warnings = report["warnings"].as_array().unwrap();
    assert!(warnings.iter().any(|text| text.as_str().unwrap().contains("downloaded")));
    assert!(names(&report["advice"], "setting").contains(&"cache".to_owned()));
}

#[test]
fn the_text_says_what_is_in_use_and_why() {
    let text = stdout(&[&QUICK[..], &["--kernel", "scalar"]].concat(), "");
    assert!(text.contains("in use, as asked for"), "{text}");
    for heading in ["bitnet", "processor", "kernels", "memory", "speed", "hub", "cuda", "problems"]
    {
        assert!(text.lines().any(|line| line.starts_with(heading)), "{heading}: {text}");
    }
    assert!(text.contains("problems     none\n"), "{text}");
    let unknown = failure(&["doctor", "--kernel", "none"], "");
    assert!(unknown.contains("no kernel `none`"), "{unknown}");
}

/// A container without `/sys` has all but a few facts; one without `/proc` cannot start a program again, which is told.
#[cfg(target_os = "linux")]
#[test]
fn a_container_may_lack_files_of_the_system() {
    let hidden = |folder: &str| {
        let script =
            format!("mount -t tmpfs none {folder} && exec \"$0\" {} --json", QUICK.join(" "));
        let mut command = std::process::Command::new("unshare");
        command.args(["--user", "--map-root-user", "--mount", "sh", "-c", &script]);
        command.arg(env!("CARGO_BIN_EXE_bitnet")).env("HF_HUB_OFFLINE", "1");
        command.output()
    };
    let permitted =
        ["--user", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "none", "/sys"];
    let permitted = std::process::Command::new("unshare").args(permitted).status();
    if !permitted.is_ok_and(|status| status.success()) {
        eprintln!("SKIPPED: this system permits no namespaces, so no folder can be hidden");
        return;
    }
    let report = json_of(&hidden("/sys").unwrap());
    assert_eq!(report["memory"]["huge_pages"], Value::Null);
    assert_eq!(report["processor"]["cache_bytes"], Value::Null);
    assert_eq!(report["problems"], json!([]));

    let output = hidden("/proc").unwrap();
    assert_eq!(output.status.code(), Some(1));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(names(&report["back_ends"], "result").iter().all(|result| result == "failed"));
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(stderr.starts_with("error: ") && stderr.lines().count() == 1, "{stderr}");
}
