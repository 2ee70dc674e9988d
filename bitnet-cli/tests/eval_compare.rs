//! `bitnet eval --compare`, and reports.

#![allow(clippy::unwrap_used, missing_docs)] // test code

mod support;

use std::{fs, path::Path};

use serde_json::{Value, json};
use support::{failure, stdout, text};

fn data() -> String {
    format!("{}/../tests/fixtures/eval", env!("CARGO_MANIFEST_DIR"))
}

/// Answers of arc_easy, right or wrong, as `--output` writes them.
fn kept(path: &Path, name: &str, right: &[u8]) {
    let header = json!({"bitnet_eval": 1, "model": name, "kv_cache": "f16"});
    let lines = right.iter().enumerate().map(|(item, right)| {
        let values = json!({"acc,none": [right, 1], "acc_norm,none": [1, 1]});
        json!({"task": "arc_easy", "item": item, "asked": format!("{item:x}"), "values": values})
    });
    let lines = [header].into_iter().chain(lines).map(|line| format!("{line}\n"));
    fs::write(path, lines.collect::<String>()).unwrap();
}

const A: [u8; 20] = [1, 0, 1, 1, 0, 1, 0, 1, 1, 0, 1, 0, 0, 1, 1, 1, 0, 0, 1, 0];
const B: [u8; 20] = [1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 0, 1, 1, 0, 1, 1, 0, 1, 1];

/// SciPy's figures of these answers are in `bitnet-train/src/eval/paired.rs`.
#[test]
fn two_runs_are_compared_question_by_question() {
    let dir = tempfile::tempdir().unwrap();
    let [a, b] = ["a", "b"].map(|name| dir.path().join(name).join("kept.jsonl"));
    for (path, name, right) in [(&a, "one", A), (&b, "other", B)] {
        fs::create_dir(path.parent().unwrap()).unwrap();
        kept(path, name, &right);
    }
    // Of a folder the file of results is taken, whatever else is there.
    fs::write(a.with_file_name("other.jsonl"), "{}\n").unwrap();
    let folder = text(a.parent().unwrap());
    let page = dir.path().join("report.html");
    let args = ["eval", "--compare", folder, text(&b)];
    let found = stdout(&[&args[..], &["--json", "--report", text(&page)]].concat(), "");
    let found: Value = serde_json::from_str(&found).unwrap();
    let acc = &found["results"]["arc_easy"]["acc,none"];
    assert_eq!((&acc["a"], &acc["b"]), (&json!(0.55), &json!(0.75)));
    let close = |value: &Value, expected: f64, bound: f64| {
        assert!((value.as_f64().unwrap() - expected).abs() < bound, "{value} {expected}");
    };
    close(&acc["difference"], 0.2, 1e-12);
    close(&acc["interval"][0], -0.05, 1e-12);
    close(&acc["interval"][1], 0.45, 1e-12);
    close(&acc["p"], 0.19, 4. * (0.19f64 * 0.81 / 10_000.).sqrt());
    close(&acc["mcnemar"]["p"], 0.2890625, 1e-12);
    assert_eq!((&acc["mcnemar"]["only_a"], &acc["mcnemar"]["only_b"]), (&json!(2), &json!(6)));
    assert_eq!(found["results"]["arc_easy"]["acc_norm,none"]["p"], 1.);
    assert_eq!(found["compare"]["b"]["config"]["model"], "other");
    let page = fs::read_to_string(page).unwrap();
    assert!(page.contains("<svg") && page.contains("arc_easy acc: 0.2 (-0.05 to 0.45)"));
    let table = stdout(&args, "");
    for cell in ["one", "other", "+0.2000", "-0.0500 … +0.4500", "0.2891"] {
        assert!(table.contains(cell), "{cell}: {table}");
    }
}

#[test]
fn runs_that_were_asked_something_else_are_not_compared() {
    let dir = tempfile::tempdir().unwrap();
    let [a, b] = ["a.jsonl", "b.jsonl"].map(|name| dir.path().join(name));
    kept(&a, "one", &A);
    let refused = |flags: &[&str]| {
        let args = [&["eval", "--compare", text(&a), text(&b)], flags].concat();
        failure(&args, "")
    };
    kept(&b, "other", &B[..19]);
    let error = refused(&[]);
    assert!(
        error.contains("question 19 of arc_easy and 0 others are in") && error.contains("b.jsonl"),
        "{error}"
    );
    kept(&b, "other", &B);
    let changed = fs::read_to_string(&b).unwrap().replace("\"asked\":\"3\"", "\"asked\":\"ff\"");
    fs::write(&b, &changed).unwrap();
    let error = refused(&[]);
    assert!(
        error.contains("question 3 of arc_easy and 0 others were asked in other words"),
        "{error}"
    );
    fs::write(&b, &changed[..changed.len() - 9]).unwrap();
    assert!(refused(&[]).contains("its last line is cut short"));
    fs::write(&b, "{}\n").unwrap();
    assert!(refused(&[]).contains("is no file of results"));
    kept(&b, "other", &B);
    assert!(refused(&["--tasks", "piqa"]).contains("has no results of `piqa`"));
    assert!(refused(&["--bootstrap", "100"]).contains("give 10000 or more"));
    fs::write(&b, changed.replace("acc_norm,none", "acc_norm")).unwrap();
    assert!(refused(&["--tasks", "arc_easy"]).contains("question 3 of arc_easy"));
    let error = failure(&["eval", "--compare", text(dir.path()), text(&a)], "");
    assert!(error.contains("holds several files of results"), "{error}");
}

/// What a real run leaves can be compared with itself, and is reported in three forms that say the same.
#[test]
fn real_runs_are_reported_and_compared() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str| dir.path().join(name);
    let [kept, html, md, json] = ["kept.jsonl", "r.html", "r.md", "r.json"].map(file);
    let tasks = ["--tasks", "arc_easy,lambada_openai", "--bootstrap", "1000"];
    let reports = ["--report", text(&html), "--report", text(&md), "--report", text(&json)];
    let run = ["eval", "-q", "--data", &data(), "-o", text(&kept)];
    let printed = stdout(&[&run[..], &tasks, &reports].concat(), "");
    let read = |path: &Path| fs::read_to_string(path).unwrap();
    assert!(read(&md).contains(&printed) && read(&md).starts_with("# Evaluation of "));
    let object: Value = serde_json::from_str(&read(&json)).unwrap();
    let value = object["results"]["arc_easy"]["acc_norm,none"].as_f64().unwrap();
    let page = read(&html);
    assert!(page.contains(&format!("<td class=\"n\">{value:.4}</td>")), "{page}");
    assert!(page.contains("role=\"img\"") && !page.contains("src=") && !page.contains("url("));
    let compared = stdout(&["eval", "--compare", text(&kept), text(&kept), "--json"], "");
    let compared: Value = serde_json::from_str(&compared).unwrap();
    for (metric, task) in [("acc,none", "arc_easy"), ("perplexity,none", "lambada_openai")] {
        let found = &compared["results"][task][metric];
        assert_eq!((&found["difference"], &found["p"]), (&json!(0.), &json!(1.)), "{metric}");
        assert_eq!(found["a"], object["results"][task][metric]);
    }
    let refused = failure(&[&run[..], &tasks, &["--report", "r.pdf"]].concat(), "");
    assert!(refused.contains("must end in .md, .html or .json"), "{refused}");
}
