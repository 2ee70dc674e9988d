//! `bitnet perplexity`, and what the inexact forms of a model cost.

#![allow(clippy::unwrap_used, missing_docs)] // test code

mod support;

use std::fs;

use serde_json::Value;
use support::{failure, fixture, stdout, text};
use tempfile::TempDir;

const STORY: &str = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she \
saw a big dog. The dog was very sad because he lost his ball. Lily wanted to help him. They looked for the ball together and \
found it under a tree. The dog was happy and they became good friends.\n";

fn story() -> (TempDir, String) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("story.txt");
    fs::write(&file, STORY).unwrap();
    let name = text(&file).to_owned();
    (dir, name)
}

fn json(args: &[&str]) -> Value {
    serde_json::from_str(&stdout(&[args, &["--json"]].concat(), "")).unwrap()
}

#[test]
fn fewer_bits_cost_a_little() {
    let (_dir, file) = story();
    let run = |flags: &[&str]| json(&[&["perplexity", &file, "-m", "default"], flags].concat());
    let of = |flags: &[&str]| run(flags)["perplexity"].as_f64().unwrap();
    let exact = run(&[]);
    assert_eq!((&exact["lm_head"], &exact["kv_cache"]), (&"exact".into(), &"f16".into()));
    let value = exact["perplexity"].as_f64().unwrap();
    // The embedded model was trained on such stories; a uniform guess would be its vocabulary of thousands.
    assert!((1.5..30.).contains(&value), "{value}");
    // What a weight is off by grows fourfold with every two bits less.
    for (head, most) in [("q8", 0.002), ("q6", 0.01), ("q4", 0.08)] {
        let change = (of(&["--lm-head", head]) / value - 1.).abs();
        assert!(change < most && change > 0., "{head}: {change}");
    }
    assert!((of(&["--kv-cache", "f32"]) / value - 1.).abs() < 0.001);
    let low = run(&["--low-memory"]);
    assert_eq!((&low["lm_head"], &low["kv_cache"]), (&"q4".into(), &"int8".into()));
    assert_eq!(of(&["--low-memory", "--lm-head", "exact", "--kv-cache", "f16"]), value);
    let short = run(&["--window", "16", "--stride", "4", "--max-tokens", "40"]);
    assert_eq!((&short["tokens"], &short["stride"]), (&39.into(), &4.into()));
    assert!(
        stdout(&["perplexity", &file], "").starts_with(&format!("perplexity {value:.4} over "))
    );
}

#[test]
fn what_cannot_be_scored_is_refused() {
    let (dir, file) = story();
    let message = failure(&["perplexity", text(&dir.path().join("none.txt"))], "");
    assert!(message.contains("none.txt"), "{message}");
    let message = failure(&["perplexity", &file, "--window", "8", "--stride", "8"], "");
    assert!(message.contains("windows of 8 tokens, 8 apart"), "{message}");
    let message = failure(&["perplexity", &file, "-m", text(&fixture("bitnet_packed_tied"))], "");
    assert!(message.contains("tokenizer"), "{message}");
}
