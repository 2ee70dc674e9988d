//! `bitnet eval`: it asks what lm-evaluation-harness asks, goes on where it was, and says what is wrong with its data.

#![allow(clippy::unwrap_used, missing_docs)] // test code

mod support;

use std::{collections::BTreeMap, fs, path::Path};

use flate2::read::GzDecoder;
use serde_json::{Value, json};
use support::{bitnet, edited_default, failure, run, stdout, text};
use tempfile::TempDir;

const TASKS: &str = "arc_easy,arc_challenge,boolq,winogrande,piqa,hellaswag,lambada_openai,wikitext,gsm8k,minerva_math500";

fn data() -> String {
    format!("{}/../tests/fixtures/eval", env!("CARGO_MANIFEST_DIR"))
}

/// A cache of the Hub with the Parquet files of its branch for them: paths in the repository, and what they hold.
fn hub_cache(repository: &str, files: &[(&str, &Path)]) -> TempDir {
    let (cache, commit) = (tempfile::tempdir().unwrap(), "0".repeat(40));
    let folder = cache.path().join(format!("datasets--{}", repository.replace('/', "--")));
    let branch = folder.join("refs/refs/convert/parquet");
    fs::create_dir_all(branch.parent().unwrap()).unwrap();
    fs::write(branch, &commit).unwrap();
    for (path, from) in files {
        let to = folder.join("snapshots").join(&commit).join(path);
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::copy(from, to).unwrap();
    }
    cache
}

/// `arc_easy_test.parquet` was written by pyarrow of the records of `arc_easy.jsonl`, with the columns that the Hub has.
#[test]
fn data_of_the_hub_asks_the_same() {
    let file = Path::new(&data()).join("hub/arc_easy_test.parquet");
    let found =
        [("ARC-Easy/test/0000.parquet", &*file), ("ARC-Challenge/test/0000.parquet", &*file)];
    let cache = hub_cache("allenai/ai2_arc", &found);
    let asked = |sources: &[&str]| {
        let output = cache.path().join("asked.jsonl");
        let args = ["eval", "--tasks", "arc_easy", "--requests-only", text(&output)];
        let ran =
            bitnet(&[&args, sources].concat()).env("HF_HUB_CACHE", cache.path()).output().unwrap();
        (ran.status.success(), String::from_utf8(ran.stderr).unwrap(), fs::read_to_string(output))
    };
    let (ok, said, of_the_hub) = asked(&["--data", "hub"]);
    assert!(ok, "{said}");
    assert_eq!(of_the_hub.unwrap(), asked(&["--data", &data()]).2.unwrap());
    // A folder that has no file of the task comes first; so does one with a Parquet file of its own.
    let empty = tempfile::tempdir().unwrap();
    assert!(asked(&["--data", text(empty.path()), "--data", "hub"]).0);
    assert!(asked(&["--data", &format!("{}/hub", data())]).0);
    let (ok, said, _) = asked(&["--data", "hub", "--num-fewshot", "1"]);
    assert!(!ok && said.contains("allenai/ai2_arc") && said.contains("HF_HUB_OFFLINE"), "{said}");
}

fn lines(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// What is asked in these runs, by task and question, but for `minerva_math500`, whose examples are in the harness, with its tokens. `harness.jsonl.gz` is what lm-evaluation-harness 0.4.13
/// asks, as `scripts/peers_eval.py --data tests/fixtures/eval --freeze` writes it.
#[test]
fn asks_what_the_harness_asks() {
    let runs: [&[&str]; 3] = [
        &["--tasks", &format!("{TASKS},humaneval_plus")],
        &[
            "--tasks",
            "arc_easy,boolq,winogrande,piqa,hellaswag,lambada_openai,gsm8k",
            "--num-fewshot",
            "3",
        ],
        &[
            "--tasks",
            "arc_challenge,winogrande,gsm8k,minerva_math500",
            "--num-fewshot",
            "2",
            "--apply-chat-template",
        ],
    ];
    let expected = fs::File::open(Path::new(&data()).join("harness.jsonl.gz")).unwrap();
    let expected = std::io::read_to_string(GzDecoder::new(expected)).unwrap();
    let expected = expected.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let expected = Vec::from_iter(expected);
    assert_eq!(expected.len(), runs.len());
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("asked.jsonl");
    for (args, expected) in runs.iter().zip(expected) {
        let rest = ["--data", &data(), "--requests-only", text(&file)];
        assert_eq!(stdout(&[&["eval"], *args, &rest].concat(), ""), "");
        let mut asked: BTreeMap<(String, u64), Vec<Value>> = BTreeMap::new();
        for line in lines(&file) {
            let key = (line["task"].as_str().unwrap().to_owned(), line["item"].as_u64().unwrap());
            if key.0 == "minerva_math500" {
                continue;
            }
            for mut request in line["requests"].as_array().unwrap().clone() {
                if let Some(until) = line.get("until") {
                    request["until"] = until.clone();
                }
                asked.entry(key.clone()).or_default().push(request);
            }
        }
        let mut by_harness: BTreeMap<(String, u64), Vec<Value>> = BTreeMap::new();
        for request in expected.as_array().unwrap() {
            let key = (request[0].as_str().unwrap().to_owned(), request[1].as_u64().unwrap());
            by_harness.entry(key).or_default().push(request[2].clone());
        }
        assert_eq!(asked, by_harness, "{args:?}");
    }
}

fn eval(tasks: &str, flags: &[&str]) -> Vec<String> {
    let args = ["eval", "-q", "--data", &data(), "--tasks", tasks, "--max-new-tokens", "8"];
    [&args, flags].concat().into_iter().map(String::from).collect()
}

fn report(tasks: &str, flags: &[&str]) -> Value {
    let args = eval(tasks, &[&["--json", "--bootstrap", "1000"], flags].concat());
    let mut report: Value =
        serde_json::from_str(&stdout(&args.iter().map(String::as_str).collect::<Vec<_>>(), ""))
            .unwrap();
    report.as_object_mut().unwrap().remove("seconds");
    report
}

/// A run that was cut short goes on, with the same results, which neither the batch nor the limit before changes.
#[test]
fn goes_on_where_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("kept.jsonl");
    let kept = ["-o", text(&file)];
    let whole = report(TASKS, &kept);
    let results = &whole["results"];
    let all = lines(&file);
    assert_eq!(all.len(), 1 + 9 * 2 + 4); // a header, four questions of lambada_openai, two of all others
    // The values of the file are what the figures are made of.
    let hits = all.iter().filter(|line| line["task"] == "arc_easy");
    let hits = hits.map(|line| line["values"]["acc,none"][0].as_f64().unwrap());
    assert_eq!(results["arc_easy"]["acc,none"], hits.sum::<f64>() / 2.);
    assert_eq!(results["wikitext"]["word_perplexity_stderr,none"], "N/A");
    assert!(results["lambada_openai"]["perplexity_stderr,none"].as_f64().unwrap() > 0.);
    assert_eq!(whole["n-shot"]["gsm8k"], 5);
    // Their four examples take more tokens than the model has.
    assert_eq!(whole["n-samples"]["minerva_math500"]["cut"], 2);
    assert_eq!(whole["n-samples"]["arc_easy"]["cut"], 0);
    // All but four questions are taken away, and half a line stays.
    let text_of = |path: &Path| fs::read_to_string(path).unwrap();
    let lines_of = text_of(&file);
    let cut: Vec<&str> = lines_of.split_inclusive('\n').take(6).collect();
    let cut = cut.concat();
    fs::write(&file, [&cut.as_bytes()[..cut.len() - 20], &[0xc3]].concat()).unwrap(); // half a character, too
    let mut again = report(TASKS, &[&kept[..], &["--batch", "3"]].concat());
    assert_eq!(again, whole);
    assert_eq!(text_of(&file), lines_of);
    // Of fewer questions the first count.
    again = report("arc_easy", &[&kept[..], &["--limit", "1"]].concat());
    assert_eq!(again["n-samples"]["arc_easy"]["effective"], 1);
    assert_eq!(text_of(&file), lines_of);
    for (flags, reason) in [
        (&["--kv-cache", "f32"][..], "`kv_cache` was \"f16\" and is \"f32\""),
        (&["--num-fewshot", "1"], "question 0 of arc_easy was another one then"),
        (&["--model", "synthetic:2b-4t"], "has no tokenizer"),
    ] {
        let args = eval("arc_easy", &[&kept[..], flags].concat());
        let error = failure(&args.iter().map(String::as_str).collect::<Vec<_>>(), "");
        assert!(error.contains(reason), "{error}");
    }
    fs::write(&file, "a letter\n").unwrap();
    let args = eval("arc_easy", &kept);
    let error = failure(&args.iter().map(String::as_str).collect::<Vec<_>>(), "");
    assert!(error.contains("is no file of results; choose another --output"), "{error}");
    assert_eq!(text_of(&file), "a letter\n");
}

/// A model of the same name may be another one.
#[test]
fn results_of_another_model_are_not_mixed() {
    let model = edited_default("config.json", |_| ());
    let file = model.path().join("kept.jsonl");
    let kept = ["-m", text(model.path()), "-o", text(&file)];
    report("arc_easy", &kept);
    let config = model.path().join("config.json");
    let changed = fs::read_to_string(&config).unwrap().replace("10000.0", "20000.0");
    fs::write(config, changed).unwrap();
    let args = eval("arc_easy", &kept);
    let error = failure(&args.iter().map(String::as_str).collect::<Vec<_>>(), "");
    assert!(error.contains("of another run: `fingerprint` was"), "{error}");
}

#[test]
fn prints_the_harness_table() {
    let args = eval("boolq,gsm8k", &["--bootstrap", "1000"]);
    let table = stdout(&args.iter().map(String::as_str).collect::<Vec<_>>(), "");
    let rows: Vec<Vec<&str>> =
        table.lines().map(|row| row.split('|').map(str::trim).collect()).collect();
    let header =
        ["", "Tasks", "Version", "Filter", "n-shot", "Metric", "", "Value", "", "Stderr", ""];
    assert_eq!(rows[0], header);
    assert_eq!(rows[2][..7], ["", "boolq", "2", "none", "0", "acc", "↑"]);
    assert_eq!(rows[3][..6], ["", "gsm8k", "3", "flexible-extract", "5", "exact_match"]);
    assert_eq!(rows[4][..4], ["", "", "", "strict-match"]);
    assert_eq!(rows.len(), 5);
}

/// The protocol of the report, in which the model is asked in a conversation, beside the report's figures.
#[test]
fn a_protocol_prints_published_figures() {
    let args = ["eval", "-q", "--data", &data(), "--protocol", "report", "--max-new-tokens", "8"];
    let printed = stdout(&args, "");
    assert!(printed.contains("2B4T, published"), "{printed}");
    // Programs do not run unless that is allowed.
    for figure in ["49.91", "80.18", "71.90", "58.38", "43.40", "38.40"] {
        assert!(printed.contains(figure), "{printed}");
    }
    assert!(printed.contains("not run"), "{printed}");
}

fn folder(name: &str, content: &str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join(name), content).unwrap();
    dir
}

#[test]
fn bad_data_is_told_by_file_line_and_field() {
    let arc = json!({"question": "q", "choices": ["a", "b"], "gold": 1}).to_string();
    for (task, name, content, reason) in [
        (
            "arc_easy",
            "arc_easy.jsonl",
            format!("{arc}\n{{}}\n"),
            "arc_easy.jsonl: line 2: `question`: is missing",
        ),
        (
            "arc_easy",
            "arc_easy.jsonl",
            arc.replace('1', "2"),
            "line 1: `gold`: must be a whole number from 0 to 1",
        ),
        (
            "arc_easy",
            "arc_easy.jsonl",
            arc.replace(r#"["a","b"]"#, r#"["a",""]"#),
            "`choices`: must be a list",
        ),
        ("arc_easy", "arc_easy.jsonl", format!("{arc}\nno\n"), "line 2: is no JSON"),
        ("arc_easy", "arc_easy.jsonl", "\n".into(), "holds no records"),
        ("arc_easy", "arc_easy.txt", "text".into(), "is plain text"),
        ("arc_easy", "piqa.jsonl", arc.clone(), "has no file of `arc_easy`"),
        (
            "winogrande",
            "winogrande.jsonl",
            json!({"sentence": "x"}).to_string(),
            "`sentence`: has no `_`",
        ),
        (
            "gsm8k",
            "gsm8k.jsonl",
            json!({"question": "q", "answer": "4"}).to_string(),
            "`answer`: has no `#### `",
        ),
        ("piqa", "piqa.json", "[{\"query\": \"q\"}]".into(), "record 1: `query`: must be"),
        ("minerva_math500", "math500.json", "{}".into(), "is no array of objects"),
    ] {
        let dir = folder(name, &content);
        let args = ["eval", "--data", text(dir.path()), "--tasks", task, "--num-fewshot", "0"];
        let error = failure(&args, "");
        assert!(error.contains(reason), "{error}");
    }
    let dir = folder("arc_easy.jsonl", &arc);
    let asks =
        |flags: &[&str]| failure(&[&["eval", "--data", text(dir.path())], flags].concat(), "");
    let error = asks(&["--tasks", "arc_easy", "--num-fewshot", "1"]);
    assert!(error.contains("arc_easy_train.jsonl"), "{error}");
    let error = asks(&["--tasks", "humaneval_plus"]);
    assert!(error.contains("runs programs that the model writes"), "{error}");
    assert!(asks(&["--tasks", "mmlu"]).contains("`mmlu` is no task; there are arc_easy"));
    assert!(asks(&["--tasks", "arc_easy,arc_easy"]).contains("is there twice"));
    let error =
        failure(&["eval", "--data", &data(), "--tasks", "wikitext", "--num-fewshot", "1"], "");
    assert!(error.contains("has no examples"), "{error}");
    let long = ["eval", "--data", &data(), "--tasks", "gsm8k", "--max-new-tokens", "512"];
    assert!(failure(&long, "").contains("give a smaller --max-new-tokens"));
    assert_eq!(run(&["eval", "--data", text(dir.path())], "").status.code(), Some(2));
}
