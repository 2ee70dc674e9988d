//! `bitnet bench` as a user meets it. What it measures depends on the machine; here it is only looked at whether it
//! is there and consistent.

#![allow(clippy::unwrap_used)] // helpers of tests

mod support;

use std::fs;

use serde_json::{Value, json};
#[cfg(target_os = "linux")]
use support::wait_for_handler;
use support::{bitnet, failure, fixture, interrupt, long_context, run, stdout, text};

/// `bitnet bench` with `more`, and few tokens and samples on one thread where that does not say how many.
fn with<'a>(more: &[&'a str]) -> Vec<&'a str> {
    let defaults = [["-p", "8"], ["-n", "4"], ["-r", "2"], ["-t", "1"]];
    let missing = defaults.iter().filter(|flag| !more.contains(&flag[0]));
    [&["bench", "-q"], &missing.flatten().copied().collect::<Vec<_>>()[..], more].concat()
}

fn json_of(more: &[&str]) -> Value {
    serde_json::from_str(&stdout(&[&with(more)[..], &["--json"]].concat(), "")).unwrap()
}

/// Test, threads and batch of each result.
fn keys(report: &Value) -> Vec<(String, u64, u64)> {
    let key = |row: &Value| {
        let number = |name: &str| row[name].as_u64().unwrap();
        (row["test"].as_str().unwrap().to_owned(), number("threads"), number("batch"))
    };
    report["results"].as_array().unwrap().iter().map(key).collect()
}

#[test]
fn json_has_every_test_with_its_samples_and_its_limit() {
    let report = json_of(&["-d", "0,16", "-t", "2,1", "-b", "1,2"]);
    let mut expected = Vec::new();
    for threads in [1, 2] {
        expected.push(("pp8".to_owned(), threads, 1));
        for batch in [1, 2] {
            expected.extend(["tg4", "tg4@16"].map(|test| (test.to_owned(), threads, batch)));
        }
    }
    assert_eq!(keys(&report), expected);
    for row in report["results"].as_array().unwrap() {
        let number = |name: &str| row[name].as_f64().unwrap_or_else(|| panic!("{name}: {row}"));
        let samples: Vec<f64> =
            row["samples"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect();
        assert_eq!(samples.len(), 2);
        let speed = number("tokens_per_second");
        assert!(speed > 0. && (speed - (samples[0] + samples[1]) / 2.).abs() < 1e-9 * speed);
        assert!(["memory", "cache", "multiply"].contains(&row["limit"].as_str().unwrap()), "{row}");
        let fraction = speed / number("limit_tokens_per_second");
        assert!(fraction > 0. && (number("limit_fraction") - fraction).abs() < 1e-9, "{row}");
        assert!(number("bytes_per_token") > 0.);
        assert!(number("kv_cache_bytes") > 0.);
        assert!(row["joules_per_token"].is_null() || number("joules_per_token") >= 0.);
    }
    let threads: Vec<_> =
        report["limits"].as_array().unwrap().iter().map(|row| row["threads"].clone()).collect();
    assert_eq!(threads, [json!(1), json!(2)]);
    for row in report["limits"].as_array().unwrap() {
        for name in [
            "read_large_pages",
            "read_small_pages",
            "multiply",
            "cached_ternary",
            "streamed_ternary",
        ] {
            assert!(row[name].as_f64().unwrap() > 0., "{name}: {row}");
        }
    }
    assert_eq!(
        (&report["format"], &report["interrupted"]),
        (&json!("bitnet-bench"), &json!(false))
    );
    assert_eq!((&report["kv_cache"], &report["lm_head"]), (&json!("f16"), &json!("exact")));
    assert!(report["load_seconds"].as_f64() < report["first_token_seconds"].as_f64());
    if cfg!(target_os = "linux") {
        assert!(report["peak_rss_bytes"].as_u64() > report["kv_cache_bytes"].as_u64());
    }
}

#[test]
fn bytes_of_a_token_are_those_of_the_model() {
    let report = json_of(&["-p", "0"]);
    let info: Value = serde_json::from_str(&stdout(&["info", "--json"], "")).unwrap();
    let work = &report["work"];
    assert_eq!(work["projection_bytes"], info["memory"]["projections"]);
    assert_eq!(work["ternary_weights"], info["parameters"]["ternary"]);
    assert_eq!(work["head_weights"], info["parameters"]["embedding"]);
    let per_thousand = info["memory"]["cache_per_1k_tokens"].as_u64().unwrap();
    assert_eq!(work["kv_token_bytes"].as_u64().unwrap() * 1000, per_thousand);
    // Four tokens see 1, 2, 3 and 4.
    let number = |name: &str| work[name].as_f64().unwrap();
    let expected =
        number("projection_bytes") + number("head_bytes") + 2.5 * number("kv_token_bytes");
    assert_eq!(report["results"][0]["bytes_per_token"].as_f64(), Some(expected));
}

#[test]
fn levels_and_kernels_are_what_they_say() {
    let setting = |more: &[&str]| {
        let report = json_of(&[&["-p", "0", "-n", "1", "-r", "1"], more].concat());
        ["kernel", "kv_cache", "lm_head"].map(|name| report[name].as_str().unwrap().to_owned())
    };
    let [fastest, ..] = setting(&[]);
    assert_eq!(setting(&["--level", "baseline"]), ["scalar", "f32", "exact"]);
    assert_eq!(setting(&["--level", "aggressive"]), [&*fastest, "int8", "q4"]);
    let overridden = ["--level", "aggressive", "--kv-cache", "bf16", "--lm-head", "q6"];
    assert_eq!(setting(&overridden), [&*fastest, "bf16", "q6"]);
    assert_eq!(setting(&["--low-memory"]), [&*fastest, "int8", "q4"]);
    let kernels = json_of(&[])["machine"]["kernels"].clone();
    assert_eq!(
        (&kernels[0], kernels.as_array().unwrap().last()),
        (&json!(fastest), Some(&json!("scalar")))
    );
    for kernel in kernels.as_array().unwrap() {
        let kernel = kernel.as_str().unwrap();
        assert_eq!(setting(&["--kernel", kernel]), [kernel, "f16", "exact"]);
    }
}

#[test]
fn a_kernel_changes_no_text() {
    let generate = ["generate", "--temperature", "0", "-n", "12", "--quiet", "Once upon"];
    let fastest = stdout(&generate, "");
    assert_eq!(stdout(&[&generate[..], &["--kernel", "scalar"]].concat(), ""), fastest);
    let by_variable = bitnet(&generate).env("BITNET_KERNEL", "scalar").output().unwrap();
    assert_eq!(String::from_utf8(by_variable.stdout).unwrap(), fastest);
    let error = failure(&["generate", "--kernel", "mmx", "Once"], "");
    assert!(error.starts_with("--kernel mmx: ") && error.contains("scalar"), "{error}");
}

#[test]
fn tables_have_a_line_for_each_test() {
    let csv = stdout(&with(&["--csv"]), "");
    let lines: Vec<Vec<&str>> = csv.lines().map(|line| line.split(',').collect()).collect();
    assert_eq!(lines.len(), 3);
    assert!(lines.iter().all(|cells| cells.len() == lines[0].len()), "{csv}");
    let test = lines[0].iter().position(|cell| *cell == "test").unwrap();
    assert_eq!([lines[1][test], lines[2][test]], ["pp8", "tg4"]);

    let markdown = stdout(&with(&["--markdown"]), "");
    assert!(markdown.contains("| test | threads |"), "{markdown}");
    assert!(markdown.contains("\n| pp8 | ") && markdown.contains("\n| tg4 | "), "{markdown}");

    let plain = stdout(&with(&[]), "");
    assert!(plain.lines().any(|line| line.starts_with("pp8 ")), "{plain}");
    assert!(plain.ends_with('\n') && plain.contains("energy "), "{plain}");
}

#[test]
fn an_output_file_appears_and_is_compared_with() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("old.json");
    assert_eq!(stdout(&with(&["--json", "-o", text(&path), "-d", "0,8"]), ""), "");
    let old: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    assert_eq!(old["results"].as_array().unwrap().len(), 3);

    let report = json_of(&["--compare", text(&path), "-b", "1,2", "--kv-cache", "int8"]);
    let comparison = &report["comparison"];
    let ratios = comparison["ratios"].as_array().unwrap();
    assert_eq!(ratios.len(), 2);
    for ratio in ratios {
        let number = |name: &str| ratio[name].as_f64().unwrap();
        assert!((number("ratio") - number("new") / number("old")).abs() < 1e-9, "{ratio}");
    }
    let threads = old["results"][0]["threads"].as_u64().unwrap();
    let only =
        |test: &str, batch: u32| json!([format!("{test} ({threads} threads, batch {batch})")]);
    assert_eq!(comparison["only_new"], only("tg4", 2));
    assert_eq!(comparison["only_old"], only("tg4@8", 1));
    assert_eq!(comparison["differences"], json!(["keys and values f16, now int8"]));

    let plain = stdout(&with(&["--compare", text(&path)]), "");
    assert!(plain.contains("now / before") && plain.contains("only in the earlier run: tg4@8"));
}

#[test]
fn other_files_are_no_reports() {
    let folder = tempfile::tempdir().unwrap();
    let compare = |content: &str| {
        let path = folder.path().join("old.json");
        fs::write(&path, content).unwrap();
        failure(&with(&["--compare", text(&path)]), "")
    };
    for content in ["", "[1, 2]", r#"{"results": []}"#, r#"{"format": "llama-bench"}"#] {
        let error = compare(content);
        assert!(error.ends_with("is no report of `bitnet bench --json`"), "{content}: {error}");
    }
    let error = compare(r#"{"format": "bitnet-bench"}"#);
    assert!(error.contains("is a damaged report: missing field"), "{error}");
    let error = failure(&with(&["--compare", "/nowhere/old.json"]), "");
    assert!(error.starts_with("--compare /nowhere/old.json: "), "{error}");
}

#[test]
fn numbers_that_make_no_sense_are_refused_before_loading() {
    let most = usize::MAX.to_string();
    let cases: [(&[&str], &str); 11] = [
        (&["-t", "0"], "--threads 0 cannot compute"),
        (&["-b", "1,0"], "--batch 0 is no sequence"),
        (&["-r", "0"], "--repetitions 0 measures nothing"),
        (&["-p", "0", "-n", "0"], "there is nothing to measure"),
        (&["-p", "100000"], "pp100000 needs a context of 100000 tokens"),
        (&["-d", "99998"], "tg4@99998 needs a context of 100002 tokens"),
        (&["-d", &most], "needs a context of"),
        (&["-b", &most], "sequences takes about"),
        (&["-b", "100000000"], "with 100000000 sequences takes about"),
        (&["-m", "synthetic:falcon3-10b", "--preset", "mobile"], "but the preset allows"),
        (&["-m", "synthetic:7b"], "there is no such synthetic model"),
    ];
    for (more, message) in cases {
        let error = failure(&with(more), "");
        assert!(error.contains(message), "{more:?}: {error}");
    }
    let error = failure(&["generate", "-t", "1,2", "Once"], "");
    assert!(error.starts_with("--threads takes one number here"), "{error}");
    let output = run(&with(&["--json", "--csv"]), "");
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn presets_choose_what_is_not_given() {
    let flags = ["bench", "-q", "-p", "8", "-n", "4", "-r", "1", "--preset", "mobile", "--json"];
    let mobile: Value = serde_json::from_str(&stdout(&flags, "")).unwrap();
    let context = 2048.min(context());
    let deep = format!("tg4@{}", context - 4);
    let tests: Vec<String> = keys(&mobile).into_iter().map(|key| key.0).collect();
    assert_eq!(tests, ["pp8", "tg4", &deep]);
    assert!(mobile["memory_limit_bytes"].as_u64().unwrap() <= 2 << 30);
    assert!(keys(&mobile).iter().all(|key| key.1 <= 4 && key.2 == 1));

    let edge = json_of(&["--preset", "edge", "-t", "1", "-b", "3"]);
    assert_eq!(keys(&edge), [("pp8".to_owned(), 1, 1), ("tg4".to_owned(), 1, 3)]);
}

fn context() -> usize {
    support::default_json("config.json")["max_position_embeddings"].as_u64().unwrap() as usize
}

#[test]
fn a_model_in_full_precision_has_speeds_and_no_limit() {
    let model = fixture("grad_llama_onebit_qat");
    let report = json_of(&["-m", text(&model), "--full-precision"]);
    for row in report["results"].as_array().unwrap() {
        assert!(row["tokens_per_second"].as_f64().unwrap() > 0.);
        assert!(row["limit"].is_null() && row["limit_fraction"].is_null(), "{row}");
    }
    assert!(stdout(&with(&["-m", text(&model), "--full-precision"]), "").contains('–'));
}

#[cfg(target_os = "linux")]
#[test]
fn ctrl_c_keeps_what_was_measured() {
    let model = long_context();
    let model = text(model.path());
    // The first test takes a moment, the second longer than any test may.
    let args = ["bench", "-m", model, "-p", "8", "-n", "190000", "-r", "1", "-t", "1", "--json"];
    let mut child = bitnet(&args).spawn().unwrap();
    wait_for_handler(&child);
    let mut stderr = std::io::BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.starts_with("pp8, ") {
        line.clear();
        assert!(std::io::BufRead::read_line(&mut stderr, &mut line).unwrap() > 0);
    }
    interrupt(&child);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["interrupted"], true);
    assert_eq!(keys(&report), [("pp8".to_owned(), 1, 1)]);
    assert!(report["results"][0]["limit_fraction"].as_f64().unwrap() > 0.);
}

#[test]
fn help_has_examples_and_numbers() {
    let long = stdout(&["bench", "--help"], "");
    for part in ["Limits, measured", "mobile", "M/2, at most 2 GiB", "baseline", "Examples:"] {
        assert!(long.contains(part), "{part}");
    }
    let table = long.lines().find(|line| line.trim_start().starts_with("cloud ")).unwrap();
    assert!(table.ends_with("128"), "a broken line: {table}");
    let short = stdout(&["bench", "-h"], "");
    assert!(short.contains("Examples:") && short.len() < long.len());
}
