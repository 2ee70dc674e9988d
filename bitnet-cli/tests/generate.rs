//! `bitnet generate` as a user meets it.

#![allow(clippy::unwrap_used)] // helpers of tests

mod support;

use std::sync::Arc;

use bitnet_model::{
    pretrained::Pretrained,
    sampler::{Sampler, SamplingParams},
    session::{GenerateOptions, Session},
};
use candle_core::{DType, Device};
use rand::SeedableRng;
use serde_json::Value;
use support::{
    bitnet, default_json, eos_ids, failure, fixture, interrupt, long_context, read_some, run,
    stdout, text,
};

/// The best token each time, without the penalty that the model's generation_config.json asks for.
const GREEDY: [&str; 9] = [
    "generate",
    "Once upon a time",
    "--temperature",
    "0",
    "--repetition-penalty",
    "1",
    "--ignore-eos",
    "-n",
    "40",
];

fn json(args: &[&str]) -> Value {
    let args = [args, &["--json"]].concat();
    serde_json::from_str(&stdout(&args, "")).unwrap()
}

fn continuation(args: &[&str]) -> String {
    json(args)["text"].as_str().unwrap().to_owned()
}

fn library_greedy(model: &str, prompt: &[u32], max_new_tokens: usize) -> Vec<u32> {
    let model = Pretrained::open(model).unwrap().model;
    let options = GenerateOptions {
        sampler: Sampler::new(SamplingParams::greedy()).unwrap(),
        max_new_tokens,
        eos_token_ids: Vec::new(),
        interrupt: Arc::default(),
    };
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(0);
    let go_on = |_| std::ops::ControlFlow::Continue(());
    Session::new(model).generate(prompt, &options, &mut rng, go_on).unwrap().tokens
}

/// One flag for several, each of which may still be given.
#[test]
fn low_memory_is_a_smaller_head_and_cache() {
    let run = |flags: &[&str]| json(&[&GREEDY[..], flags].concat());
    let cache = |result: &Value| result["statistics"]["kv_cache_bytes"].as_u64().unwrap();
    let (usual, low) = (run(&[]), run(&["--low-memory"]));
    assert!(cache(&low) * 3 < cache(&usual) * 2, "{} {}", cache(&low), cache(&usual));
    let spelled = run(&["--lm-head", "q4", "--kv-cache", "int8"]);
    assert_eq!((&low["tokens"], cache(&low)), (&spelled["tokens"], cache(&spelled)));
    let exact = run(&["--low-memory", "--lm-head", "exact", "--kv-cache", "f16"]);
    assert_eq!((&exact["tokens"], cache(&exact)), (&usual["tokens"], cache(&usual)));
}

#[test]
fn greedy_text_is_the_librarys() {
    let result = json(&GREEDY);
    let tokenizer = Pretrained::open("default").unwrap().tokenizer.unwrap();
    let prompt = tokenizer.encode("Once upon a time", true).unwrap();
    let tokens = library_greedy("default", &prompt, 40);
    assert_eq!(result["tokens"], serde_json::json!(tokens));
    assert_eq!(result["prompt_tokens"], prompt.len());
    let reply = result["text"].as_str().unwrap();
    assert_eq!(reply, tokenizer.decode(&tokens, true).unwrap());

    let line_break = if reply.ends_with('\n') { "" } else { "\n" };
    assert_eq!(stdout(&GREEDY, ""), format!("Once upon a time{reply}{line_break}"));
    let no_echo = [&GREEDY[..], &["--no-echo"]].concat();
    assert_eq!(stdout(&no_echo, ""), format!("{reply}{line_break}"));
}

#[test]
fn json_has_all_there_is_to_know() {
    let result = json(&GREEDY);
    let keys = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    let expected = ["text", "tokens", "prompt_tokens", "finish", "seed", "statistics"];
    assert_eq!(keys(&result), expected);
    assert_eq!(result["finish"], "length");
    assert_eq!(result["tokens"].as_array().unwrap().len(), 40);
    let statistics = &result["statistics"];
    for name in keys(statistics) {
        assert!(statistics[&name].as_f64().is_some_and(|x| x > 0.), "{name}: {statistics}");
    }
    assert!(keys(statistics).len() >= 5, "{statistics}");
}

#[test]
fn a_seed_repeats_a_text() {
    let sampled = |seed: &str| {
        continuation(&["generate", "The", "--temperature", "1", "--seed", seed, "-n", "40"])
    };
    assert_eq!(sampled("1"), sampled("1"));
    assert_ne!(sampled("1"), sampled("2"));

    let unseeded = ["generate", "The", "--temperature", "1", "--ignore-eos", "-n", "40"];
    let (first, second) = (json(&unseeded), json(&unseeded));
    assert_ne!(first["text"], second["text"]);
    let seed = first["seed"].to_string();
    assert_eq!(first["text"], json(&[&unseeded[..], &["--seed", &seed]].concat())["text"]);
}

#[test]
fn tokens_go_in_and_out_without_a_tokenizer() {
    let folder = fixture("bitnet_packed_tied");
    let expected =
        candle_core::safetensors::load(folder.join("expected.safetensors"), &Device::Cpu).unwrap();
    let ids = |name: &str| -> Vec<u32> {
        let ids = expected[name].to_dtype(DType::U32).unwrap();
        ids.flatten_all().unwrap().to_vec1().unwrap()
    };
    let (prompt, reference) = (ids("single.input_ids"), ids("greedy.tokens"));
    let list = |ids: &[u32]| ids.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
    let (listed, n) = (list(&prompt), reference.len().to_string());
    let args =
        ["generate", "-m", text(&folder), "--tokens", &listed, "--ignore-eos", "-n", &n, "-q"];
    let ours = library_greedy(text(&folder), &prompt, reference.len());
    assert_eq!(stdout(&args, ""), list(&ours) + "\n");
    assert_eq!(json(&args)["text"], Value::Null);

    let margins = expected["greedy.margin"].flatten_all().unwrap().to_vec1::<f32>().unwrap();
    // A narrower margin of the reference can fall either way in f32.
    let decided = margins.iter().position(|margin| *margin < 0.03).unwrap_or(margins.len());
    assert!(decided > 0);
    assert_eq!(ours[..decided], reference[..decided]);
}

#[test]
fn tokens_of_a_model_with_a_tokenizer_are_text() {
    let tokenizer = Pretrained::open("default").unwrap().tokenizer.unwrap();
    let ids = tokenizer.encode("Once upon a time", true).unwrap();
    let ids = ids.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
    let args = [&["generate", "--tokens", &ids], &GREEDY[2..]].concat();
    assert_eq!(stdout(&args, ""), stdout(&GREEDY, ""));
}

#[test]
fn the_prompt_may_come_from_stdin() {
    let expected = stdout(&GREEDY, "");
    let flags = &GREEDY[2..];
    assert_eq!(stdout(&[&["generate"], flags].concat(), "Once upon a time\n"), expected);
    assert_eq!(stdout(&[&["generate", "-"], flags].concat(), "Once upon a time"), expected);
}

#[test]
fn an_empty_prompt_starts_from_the_begin_of_text_token() {
    let empty = json(&["generate", "", "-n", "3", "--ignore-eos"]);
    assert_eq!((&empty["prompt_tokens"], &empty["finish"]), (&1.into(), &"length".into()));
    let raw = json(&["generate", "Once", "--raw", "-n", "1"]);
    let with_bos = json(&["generate", "Once", "-n", "1"]);
    let count = |result: &Value| result["prompt_tokens"].as_u64().unwrap();
    assert_eq!(count(&raw) + 1, count(&with_bos));
}

#[test]
fn a_stop_string_ends_the_text_wherever_tokens_are_cut() {
    let whole = continuation(&GREEDY);
    let chars: Vec<char> = whole.chars().collect();
    let stop: String = chars[chars.len() / 2..][..4].iter().collect();
    let args = [&GREEDY[..], &["--stop", "never in any text", "--stop", &stop]].concat();
    let result = json(&args);
    assert_eq!(result["text"], whole[..whole.find(&stop).unwrap()]);
    assert_eq!(result["finish"], "stop");
}

#[test]
fn texts_end_at_eos_and_at_the_end_of_the_context() {
    let bias = format!("{}=1000", eos_ids()[0]);
    let ended = ["generate", "Once", "--logit-bias", &bias, "-n", "5"];
    let result = json(&ended);
    assert_eq!((&result["finish"], &result["text"]), (&"eos".into(), &"".into()));
    let result = json(&[&ended[..], &["--ignore-eos"]].concat());
    assert_eq!(result["finish"], "length");
    assert_eq!(result["tokens"].as_array().unwrap().len(), 5);

    let result = json(&["generate", "Once", "--ignore-eos", "-n", "100000"]);
    assert_eq!(result["finish"], "context");
    let context = default_json("config.json")["max_position_embeddings"].as_u64().unwrap();
    let new = result["tokens"].as_array().unwrap().len() as u64;
    // The last token is chosen with a full context and never run.
    assert_eq!(result["prompt_tokens"].as_u64().unwrap() + new, context + 1);
}

#[test]
fn statistics_are_one_line_on_stderr() {
    let stderr = |args: &[&str]| String::from_utf8(run(args, "").stderr).unwrap();
    let line = stderr(&["generate", "Once", "-n", "3", "--seed", "7", "--temperature", "1"]);
    assert_eq!(line.lines().count(), 1, "{line}");
    for part in ["prompt tokens", "new tokens", "tokens/s", "first token after", "seed 7"] {
        assert!(line.contains(part), "{line}");
    }
    assert_eq!(stderr(&["generate", "Once", "-n", "3", "--quiet"]), "");
}

#[test]
fn bad_input_is_one_clear_line() {
    let without_tokenizer = fixture("bitnet_packed_tied");
    let long = "word ".repeat(3000);
    let cases: [(&[&str], &str); 12] = [
        (&["-m", text(&without_tokenizer), "hi"], "give the prompt as token ids with --tokens"),
        (&["-m", "./no/such/model", "hi"], "./no/such/model"),
        (&["--tokens", "1,99999"], "token id 99999 is outside the model's vocabulary"),
        (&["--raw", ""], "the prompt is empty"),
        (&[&long], "the model's context holds"),
        (&["--temperature", "-1", "hi"], "temperature is -1"),
        (&["--top-p", "1.5", "hi"], "top_p is 1.5"),
        (&["--min-p", "nan", "hi"], "min_p is NaN"),
        (&["--presence-penalty", "-3", "hi"], "presence_penalty is -3"),
        (&["--logit-bias", "99999=1", "hi"], "--logit-bias names token 99999"),
        (&["--stop", "", "hi"], "a stop string is empty"),
        (
            &["--device", "tpu", "hi"],
            "--device `tpu` is not available: give cpu, cuda, cuda:N or auto",
        ),
    ];
    for (args, expected) in cases {
        let line = failure(&[&["generate"], args].concat(), "");
        assert!(line.contains(expected), "{line:?} lacks {expected:?}");
    }
    let line = failure(&["generate"], b"caf\xe9");
    assert_eq!(line, "the prompt on stdin is not UTF-8: byte 3 begins no character");
}

#[test]
fn contradictory_flags_are_refused() {
    for args in [&["--tokens", "1", "hi"][..], &["--tokens", "1,x"], &["--max-new-tokens", "0"]] {
        let output = run(&[&["generate"], args].concat(), "");
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(output.stdout.is_empty() && !output.stderr.is_empty(), "{args:?}");
    }
}

#[test]
fn a_reader_that_has_seen_enough_is_no_error() {
    let model = long_context();
    let args = ["generate", "-m", text(model.path()), "Once", "--ignore-eos", "-n", "100000"];
    let mut child = bitnet(&args).spawn().unwrap();
    assert_eq!(read_some(&mut child, 4), b"Once");
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[cfg(unix)]
#[test]
fn ctrl_c_keeps_what_is_there() {
    let model = long_context();
    let args = ["generate", "-m", text(model.path()), "Once", "--ignore-eos", "-n", "100000"];
    let mut child = bitnet(&args).spawn().unwrap();
    read_some(&mut child, 20);
    interrupt(&child);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130));
    assert!(output.stdout.ends_with(b"\n"));
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(stderr.contains("new tokens at"), "{stderr}");
}

#[cfg(target_os = "linux")]
#[test]
fn ctrl_c_is_a_finish_in_json() {
    let model = long_context();
    let args =
        ["generate", "-m", text(model.path()), "a", "--ignore-eos", "-n", "100000", "--json"];
    let child = bitnet(&args).spawn().unwrap();
    support::wait_for_handler(&child);
    interrupt(&child);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130));
    let result: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(result["finish"], "interrupted");
}
