//! `bitnet batch`: files of requests in OpenAI's Batch format, answered offline.

#![allow(clippy::unwrap_used)] // helpers of tests

mod support;

use std::{collections::BTreeMap, fs, path::Path};

use serde_json::{Value, json};
use support::{failure, fixture, run, stdout, text};
use tempfile::TempDir;

/// A folder with a file `in` of these requests.
fn folder(requests: &[Value]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let lines: String = requests.iter().map(|request| format!("{request}\n")).collect();
    fs::write(folder.path().join("in"), lines).unwrap();
    folder
}

fn request(id: &str, url: &str, body: Value) -> Value {
    json!({"custom_id": id, "method": "POST", "url": format!("/v1/{url}"), "body": body})
}

fn completion(id: &str, body: Value) -> Value {
    request(id, "completions", body)
}

fn chat(id: &str, mut body: Value, message: &str) -> Value {
    body["messages"] = json!([{"role": "user", "content": message}]);
    request(id, "chat/completions", body)
}

/// The bodies of the answers in a file, by their requests, and their statuses.
fn answers(file: &Path) -> BTreeMap<String, (u64, Value)> {
    let lines = fs::read_to_string(file).unwrap();
    let answers = lines.lines().map(|line| {
        let mut answer: Value = serde_json::from_str(line).unwrap();
        let response = &mut answer["response"];
        let status = response["status_code"].as_u64().unwrap();
        let body = response["body"].take();
        (answer["custom_id"].as_str().unwrap().to_owned(), (status, body))
    });
    let found: Vec<_> = answers.collect();
    let count = found.len();
    let found = BTreeMap::from_iter(found);
    assert_eq!(found.len(), count, "a request is answered twice");
    found
}

/// Runs `bitnet batch` in a folder.
fn batch(folder: &TempDir, output: &str, more: &[&str]) -> BTreeMap<String, (u64, Value)> {
    let [input, output] = ["in", output].map(|name| folder.path().join(name));
    let args = ["batch", "-q", "-i", text(&input), "-o", text(&output)];
    assert_eq!(stdout(&[&args[..], more].concat(), ""), "");
    answers(&output)
}

/// The form of a schema.
fn format(schema: &Value) -> Value {
    json!({"type": "json_schema", "json_schema": {"name": "form", "schema": schema}})
}

fn line(text: &str) -> &str {
    text.strip_suffix('\n').unwrap_or(text)
}

#[test]
fn answers_are_those_of_generate_and_chat() {
    let prompts = ["Once upon a time", "A red dragon", "The", "Lily and her mom went to the park."];
    let sampled =
        json!({"prompt": "The dog", "max_tokens": 9, "temperature": 0.8, "seed": 5, "n": 2});
    let mut requests = vec![completion("sampled", sampled)];
    for (index, prompt) in prompts.iter().enumerate() {
        let body = json!({"prompt": prompt, "max_tokens": 8 + index, "temperature": 0});
        requests.push(completion(prompt, body));
        let body = json!({"max_completion_tokens": 10, "temperature": 0, "model": "mine"});
        requests.push(chat(&format!("chat {prompt}"), body, prompt));
    }
    let folder = folder(&requests);
    for more in [&["--max-batch", "1"][..], &["--max-batch", "5"], &["--kv-memory", "2"]] {
        let output = more.concat();
        let found = batch(&folder, &output, more);
        assert_eq!(found.len(), requests.len());
        for (index, prompt) in prompts.iter().enumerate() {
            let n = (8 + index).to_string();
            let args = ["generate", "-q", "--temperature", "0", "-n", &n, prompt];
            let (status, answer) = &found[*prompt];
            let expected = stdout(&args, "");
            let choice = &answer["choices"][0];
            assert_eq!(
                (*status, choice["text"].as_str().unwrap()),
                (200, &line(&expected)[prompt.len()..])
            );
            assert_eq!(
                (&answer["object"], &answer["model"]),
                (&json!("text_completion"), &json!("default"))
            );

            let (_, answer) = &found[&format!("chat {prompt}")];
            let expected = stdout(&["chat", "-q", "--temperature", "0", "-n", "10"], prompt);
            let message = &answer["choices"][0]["message"];
            assert_eq!(line(message["content"].as_str().unwrap()), line(&expected));
            assert_eq!((&message["role"], &answer["model"]), (&json!("assistant"), &json!("mine")));
        }
        let (_, answer) = &found["sampled"];
        for (choice, seed) in answer["choices"].as_array().unwrap().iter().zip(["5", "6"]) {
            let args =
                ["generate", "-q", "--temperature", "0.8", "-n", "9", "--seed", seed, "The dog"];
            let expected = stdout(&args, "");
            assert_eq!(choice["text"].as_str().unwrap(), &line(&expected)["The dog".len()..]);
        }
    }
}

#[test]
fn answers_have_the_form_that_is_asked_for() {
    let place = json!({"enum": ["here", "there"]});
    let schema = json!({"type": "object", "properties": {"place": place}, "required": ["place"], "additionalProperties": false});
    let tool = json!([{"type": "function", "function": {"name": "go", "parameters": schema}}]);
    let (prompt, sampled) =
        ("Once upon a time", json!({"temperature": 1.2, "max_tokens": 200, "n": 3}));
    let with = |more: Value| {
        let mut body = sampled.clone();
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    let form = format(&schema);
    let call = json!({"tools": tool, "tool_choice": "required", "parallel_tool_calls": false, "logprobs": true});
    let folder = folder(&[
        completion("text", with(json!({"prompt": prompt, "response_format": form}))),
        chat("form", with(json!({"response_format": form})), prompt),
        chat("call", with(call), prompt),
        chat("auto", json!({"tools": tool, "max_tokens": 5, "temperature": 0}), prompt),
    ]);
    let found = batch(&folder, "out", &[]);
    let is_valid = |text: &Value| {
        let value: Value = serde_json::from_str(text.as_str().unwrap()).unwrap();
        let place = value["place"].as_str().unwrap();
        ["here", "there"].contains(&place) && value.as_object().unwrap().len() == 1
    };
    for index in 0..3 {
        let choice = |id: &str| found[id].1["choices"][index].clone();
        let (text, form, call) = (choice("text"), choice("form"), choice("call"));
        assert!(is_valid(&text["text"]) && is_valid(&form["message"]["content"]));
        assert_eq!(
            (&text["finish_reason"], &form["finish_reason"]),
            (&json!("stop"), &json!("stop"))
        );
        assert_eq!(
            (&call["finish_reason"], &call["message"]["content"]),
            (&json!("tool_calls"), &Value::Null)
        );
        let calls = call["message"]["tool_calls"].as_array().unwrap();
        assert!(
            calls.len() == 1
                && calls[0]["type"] == "function"
                && calls[0]["function"]["name"] == "go"
        );
        assert!(is_valid(&calls[0]["function"]["arguments"]));
        assert!(!call["logprobs"]["content"].as_array().unwrap().is_empty());
    }
    let auto = &found["auto"].1["choices"][0];
    assert_eq!(
        (&auto["finish_reason"], &auto["message"]["tool_calls"]),
        (&json!("length"), &Value::Null)
    );
    assert!(!auto["message"]["content"].as_str().unwrap().is_empty());
}

#[test]
fn a_job_that_was_cut_short_goes_on() {
    let requests = Vec::from_iter((0..7).map(|index| {
        let body = json!({"prompt": format!("{index} dogs"), "max_tokens": 4, "temperature": 0});
        completion(&index.to_string(), body)
    }));
    let folder = folder(&requests);
    let whole = batch(&folder, "whole", &[]);
    let file = folder.path().join("cut");
    let lines = fs::read_to_string(folder.path().join("whole")).unwrap();
    let (third, _) = lines.match_indices('\n').nth(2).unwrap();
    fs::write(&file, &lines[..third + 20]).unwrap(); // three answers and a piece of one
    let texts = |answers: &BTreeMap<String, (u64, Value)>| {
        let text = |(_, body): &(u64, Value)| body["choices"][0]["text"].clone();
        Vec::from_iter(answers.iter().map(|(id, answer)| (id.clone(), text(answer))))
    };
    assert_eq!(texts(&batch(&folder, "cut", &[])), texts(&whole));
    let kept = fs::read_to_string(&file).unwrap();
    assert!(kept.starts_with(&lines[..third]));
    assert!(kept.lines().all(|line| line.starts_with("{\"id\":\"batch_req_")));
    let before = fs::read(&file).unwrap();
    batch(&folder, "cut", &[]);
    assert_eq!(fs::read(&file).unwrap(), before, "there was nothing left to do");

    let mut shards = batch(&folder, "0", &["--shard", "0/2"]);
    assert_eq!(Vec::from_iter(shards.keys()), ["0", "2", "4", "6"]);
    shards.extend(batch(&folder, "1", &["--shard", "1/2"]));
    assert_eq!(texts(&shards), texts(&whole));
}

#[test]
fn texts_stop_and_say_how_likely_they_were() {
    let echo = json!({"prompt": "Once upon a time", "max_tokens": 0, "echo": true, "logprobs": 0});
    let ids =
        json!({"prompt": [[5, 9, 30], [7]], "max_tokens": 3, "temperature": 0, "logprobs": 2});
    let stop = json!({"prompt": "Once upon a time", "max_tokens": 40, "temperature": 0, "stop": [" little"]});
    let forced =
        json!({"prompt": "A", "max_tokens": 3, "logit_bias": {"2": 100}, "temperature": 0});
    let top = json!({"max_tokens": 2, "temperature": 0, "logprobs": true, "top_logprobs": 3});
    let folder = folder(&[
        completion("echo", echo),
        completion("ids", ids),
        completion("stop", stop),
        completion("forced", forced),
        chat("top", top, "Hello!"),
    ]);
    let found = batch(&folder, "out", &["--kv-cache", "f32"]);
    let body = |id: &str| &found[id].1;

    let choice = &body("echo")["choices"][0];
    assert_eq!(
        (&choice["text"], &choice["finish_reason"]),
        (&json!("Once upon a time"), &json!("length"))
    );
    let logprobs = &choice["logprobs"];
    assert_eq!(logprobs["tokens"], json!(["<|begin_of_text|>", "Once", " upon", " a", " time"]));
    assert_eq!(logprobs["text_offset"], json!([0, 0, 4, 9, 11]));
    let values = logprobs["token_logprobs"].as_array().unwrap();
    assert!(values[0].is_null() && values[1..].iter().all(|value| value.as_f64().unwrap() < 0.));
    let story = folder.path().join("story");
    fs::write(&story, "Once upon a time").unwrap();
    let report = stdout(&["perplexity", "-q", "--json", "--kv-cache", "f32", text(&story)], "");
    let report: Value = serde_json::from_str(&report).unwrap();
    let sum: f64 = values[1..].iter().map(|value| value.as_f64().unwrap()).sum();
    let expected =
        -report["perplexity"].as_f64().unwrap().ln() * report["tokens"].as_f64().unwrap();
    // f32 log-probabilities of about 1, five of them.
    assert!((sum - expected).abs() < 1e-6, "{sum}, not {expected}");

    let ids = body("ids");
    let counts = ["prompt_tokens", "completion_tokens", "total_tokens"];
    assert_eq!(counts.map(|name| ids["usage"][name].as_u64()), [Some(4), Some(6), Some(10)]);
    assert_eq!(ids["choices"][1]["logprobs"]["top_logprobs"][0].as_object().unwrap().len(), 2);
    let stop = &body("stop")["choices"][0];
    assert_eq!(stop["finish_reason"], "stop");
    assert!(!stop["text"].as_str().unwrap().contains("little"));
    assert_eq!(body("forced")["choices"][0]["text"], "", "the bias ends the text at once");
    let content = body("top")["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert_eq!(content.len(), 2);
    for token in content {
        let top = token["top_logprobs"].as_array().unwrap();
        assert_eq!(top.len(), 3);
        assert_eq!((&top[0]["token"], &top[0]["logprob"]), (&token["token"], &token["logprob"]));
    }
}

#[test]
fn what_cannot_be_answered_is_refused_by_name() {
    let say = json!([{"role": "user", "content": "Hello!"}]);
    let long = "word ".repeat(3000);
    let cases = [
        ("completions", json!([1]), Value::Null, "must be an object"),
        ("completions", json!({}), json!("prompt"), "there is no `prompt`"),
        (
            "completions",
            json!({"prompt": 5}),
            json!("prompt"),
            "`prompt` is 5, but must be a string",
        ),
        ("completions", json!({"prompt": ["a", 5]}), json!("prompt"), "must be a string"),
        ("completions", json!({"prompt": [5000]}), json!("prompt"), "token id 5000"),
        ("completions", json!({"prompt": long}), json!("prompt"), "the model's context holds 512"),
        (
            "completions",
            json!({"prompt": "a", "temperature": "1"}),
            json!("temperature"),
            "is a string",
        ),
        ("completions", json!({"prompt": "a", "top_p": 2}), json!("top_p"), "at most 1"),
        ("completions", json!({"prompt": "a", "max_tokens": -1}), json!("max_tokens"), "is -1"),
        ("completions", json!({"prompt": "a", "suffix": "b"}), json!("suffix"), "not supported"),
        ("completions", json!({"prompt": "a", "stream": true}), json!("stream"), "not supported"),
        ("completions", json!({"prompt": "a", "n": 0}), json!("n"), "at least one"),
        ("completions", json!({"prompt": "a", "best_of": 3}), json!("best_of"), "all choices"),
        ("completions", json!({"prompt": "a", "n": 999}), json!("n"), "at most 128"),
        ("completions", json!({"prompt": "a", "stop": [1]}), json!("stop"), "list of strings"),
        (
            "completions",
            json!({"prompt": "a", "logit_bias": {"x": 1}}),
            json!("logit_bias"),
            "token ids",
        ),
        ("chat/completions", json!({}), json!("messages"), "there are no `messages`"),
        (
            "chat/completions",
            json!({"messages": [{"content": ""}]}),
            json!("messages[0].role"),
            "string",
        ),
        (
            "chat/completions",
            json!({"messages": say, "tools": [{}]}),
            json!("tools"),
            "`tools[0].type` must be `function`",
        ),
        (
            "chat/completions",
            json!({"messages": say, "top_logprobs": 2}),
            json!("top_logprobs"),
            "needs",
        ),
        (
            "chat/completions",
            json!({"messages": say, "response_format": {"type": "xml"}}),
            json!("response_format"),
            "`text`, `json_object` or `json_schema`",
        ),
        (
            "completions",
            json!({"prompt": "a", "response_format": format(&json!({"type": "a"}))}),
            json!("response_format"),
            "Invalid type: a",
        ),
        ("completions", json!({"prompt": "a", "tools": [{}]}), json!("tools"), "not supported"),
    ];
    let requests = cases.iter().enumerate();
    let requests =
        requests.map(|(index, (url, body, ..))| request(&index.to_string(), url, body.clone()));
    let fine = completion(
        "fine",
        json!({"prompt": "a", "max_tokens": 1, "stream": false, "tools": [], "user": 7, "stop": null}),
    );
    let folder = folder(&Vec::from_iter(requests.chain([fine])));
    let found = batch(&folder, "out", &[]);
    assert_eq!(found["fine"].0, 200);
    for (index, (_, body, param, message)) in cases.iter().enumerate() {
        let (status, answer) = &found[&index.to_string()];
        let error = &answer["error"];
        assert_eq!((*status, &error["param"]), (400, param), "{body}");
        assert_eq!(error["type"], "invalid_request_error");
        assert!(error["message"].as_str().unwrap().contains(message), "{body}: {error}");
    }
}

#[test]
fn files_are_checked_before_anything_runs() {
    let good = completion("a", json!({"prompt": "a", "max_tokens": 1})).to_string();
    let get = good.replace("POST", "GET");
    let url = good.replace("/v1/completions", "/v1/images");
    for (lines, reason) in [
        (format!("{good}\n{{"), "in:2: is no JSON"),
        (format!("\n{good}\n{good}\n"), "in:3: `custom_id` is `a`, as of an earlier request"),
        (format!("{get}\n"), "in:1: `method` is `GET`"),
        (format!("{url}\n"), "in:1: `url` is `/v1/images`"),
        (format!("{good}\n{{}}\n"), "in:2: `custom_id` must be a string"),
    ] {
        let folder = folder(&[]);
        let [input, output] = ["in", "out"].map(|name| folder.path().join(name));
        fs::write(&input, lines).unwrap();
        let line = failure(&["batch", "-q", "-i", text(&input), "-o", text(&output)], "");
        assert!(line.contains(reason), "{line}");
        assert!(!output.exists());
        fs::write(&input, &good).unwrap();
        let line = failure(&["batch", "-q", "-i", text(&input), "-o", text(&input)], "");
        assert!(line.contains("in:1: is no answer; choose another output"), "{line}");
        assert_eq!(fs::read_to_string(&input).unwrap(), good);
    }
    let folder = folder(&[]);
    let [input, output] = ["in", "out"].map(|name| folder.path().join(name));
    let args = ["batch", "-q", "-i", text(&input), "-o", text(&output)];
    let missing = fixture("bitnet_packed_tied");
    let line = failure(&[&args[..], &["-m", text(&missing)]].concat(), "");
    assert!(line.contains("has no tokenizer"), "{line}");
    assert_eq!(run(&[&args[..], &["--shard", "2/2"]].concat(), "").status.code(), Some(2));
}
