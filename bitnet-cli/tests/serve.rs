//! `bitnet serve`: what it answers.

#![allow(clippy::unwrap_used)] // helpers of tests

mod support;

use serde_json::{Value, json};
use support::{
    edited_default,
    server::{Answer, Server, wait_until},
    stdout, text,
};

const PROMPTS: [&str; 4] =
    ["Once upon a time", "A red dragon", "The", "Lily and her mom went to the park."];

fn completion(prompt: &str, max_tokens: usize) -> Value {
    json!({"prompt": prompt, "max_tokens": max_tokens, "temperature": 0})
}

fn chat(message: &str, more: Value) -> Value {
    let mut body = json!({"messages": [{"role": "user", "content": message}], "max_tokens": 12, "temperature": 0});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

/// The texts of a stream's choices, and why they ended.
fn joined(answer: &Answer, pointer: &str, n: usize) -> Vec<(String, String)> {
    assert_eq!((answer.status, answer.header("content-type")), (200, Some("text/event-stream")));
    let mut choices = vec![(String::new(), String::new()); n];
    let events = answer.events();
    assert_eq!(events.last(), Some(&json!("[DONE]")));
    for event in &events {
        for choice in event["choices"].as_array().into_iter().flatten() {
            let (text, finish) = &mut choices[choice["index"].as_u64().unwrap() as usize];
            *text += choice.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
            *finish += choice["finish_reason"].as_str().unwrap_or_default();
        }
    }
    choices
}

#[test]
fn answers_are_those_of_generate_and_chat_in_any_company() {
    let server = Server::start(&["--max-batch", "3", "--prefill-tokens", "3"]);
    std::thread::scope(|scope| {
        for (index, prompt) in PROMPTS.iter().enumerate() {
            let server = &server;
            scope.spawn(move || {
                let n = 8 + 5 * index;
                let args = ["generate", "-q", "--temperature", "0", "-n", &n.to_string(), prompt];
                let expected = stdout(&args, "");
                let expected = expected.strip_suffix('\n').unwrap().strip_prefix(prompt).unwrap();
                let mut body = completion(prompt, n);
                let whole = server.post("/v1/completions", &body).json();
                assert_eq!(whole["choices"][0]["text"], expected);
                body["stream"] = true.into();
                let stream = server.post("/v1/completions", &body);
                assert_eq!(joined(&stream, "/text", 1), [(expected.into(), "length".into())]);

                let expected = stdout(&["chat", "-q", "--temperature", "0", "-n", "12"], prompt);
                let whole = server.post("/v1/chat/completions", &chat(prompt, json!({}))).json();
                let content = &whole["choices"][0]["message"]["content"];
                assert_eq!(
                    content.as_str().unwrap().trim_end_matches('\n'),
                    expected.trim_end_matches('\n')
                );
                let stream =
                    server.post("/v1/chat/completions", &chat(prompt, json!({"stream": true})));
                assert_eq!(json!(joined(&stream, "/delta/content", 1)[0].0), *content);
            });
        }
    });
    let left = || server.stat("/engine/running") + server.stat("/engine/kv_running_bytes");
    wait_until(|| left() == 0);
}

#[test]
fn a_stream_says_what_the_whole_says() {
    let server = Server::start(&[]);
    let mut body = json!({
        "prompt": [[5, 6, 7], "The dog"], "max_tokens": 20, "n": 2, "temperature": 0.9, "seed": 3, "echo": true, "logprobs": 2,
        "stop": ["e "],
    });
    let whole = server.post("/v1/completions", &body).json();
    body["stream"] = true.into();
    body["stream_options"] = json!({"include_usage": true});
    let stream = server.post("/v1/completions", &body);
    let choices = joined(&stream, "/text", 4);
    let events = stream.events();
    for (index, (text, finish)) in choices.iter().enumerate() {
        let choice = &whole["choices"][index];
        assert_eq!((&json!(text), &json!(finish)), (&choice["text"], &choice["finish_reason"]));
        for list in ["tokens", "token_logprobs", "text_offset"] {
            let of =
                events.iter().flat_map(|event| event["choices"].as_array().into_iter().flatten());
            let of = of.filter(|choice| choice["index"] == index).map(|choice| &choice["logprobs"]);
            let all =
                of.flat_map(|logprobs| logprobs[list].as_array().into_iter().flatten().cloned());
            assert_eq!(Value::from_iter(all), choice["logprobs"][list], "{list}");
        }
    }
    let usage = &events[events.len() - 2];
    assert_eq!(usage["choices"], json!([]));
    let tokens =
        |usage: &Value| (usage["prompt_tokens"].clone(), usage["completion_tokens"].clone());
    assert_eq!(tokens(&usage["usage"]), tokens(&whole["usage"]));
    assert!(events[0]["usage"].is_null());

    let place = json!({"type": "object", "properties": {"place": {"enum": ["here"]}}, "required": ["place"], "additionalProperties": false});
    let tools = json!([{"type": "function", "function": {"name": "go", "parameters": place}}]);
    let call = chat(
        "Go!",
        json!({"tools": tools, "tool_choice": "required", "parallel_tool_calls": false, "max_tokens": 300, "stream": true}),
    );
    let stream = server.post("/v1/chat/completions", &call);
    assert_eq!(joined(&stream, "/delta/content", 1), [(String::new(), "tool_calls".into())]);
    let events = stream.events();
    let calls = events.iter().find_map(|event| event.pointer("/choices/0/delta/tool_calls/0"));
    let calls = calls.unwrap();
    assert_eq!((&calls["index"], &calls["function"]["name"]), (&json!(0), &json!("go")));
    let arguments: Value =
        serde_json::from_str(calls["function"]["arguments"].as_str().unwrap()).unwrap();
    assert_eq!(arguments, json!({"place": "here"}));
}

#[test]
fn mistakes_are_told_by_status_and_field() {
    let server =
        Server::start(&["--max-body", "64", "--max-prompt-tokens", "9", "--max-new-tokens", "30"]);
    let error = |answer: Answer| {
        let error = answer.json()["error"].clone();
        assert!(error["message"].as_str().unwrap().len() > 10);
        (answer.status, error["param"].as_str().unwrap_or_default().to_owned())
    };
    let post = |path: &str, body: Value| error(server.post(path, &body));
    let raw = |method: &str, path: &str, headers: &str, body: &[u8]| {
        error(server.ask(method, path, headers, body)).0
    };
    let (chat, text) = ("/v1/chat/completions", "/v1/completions");
    assert_eq!(post(chat, json!({})), (400, "messages".into()));
    assert_eq!(post(chat, json!({"messages": "x"})), (400, "messages".into()));
    assert_eq!(post(text, json!({"prompt": 1})), (400, "prompt".into()));
    assert_eq!(post(text, json!({"prompt": "a", "stream": "yes"})), (400, "stream".into()));
    assert_eq!(
        post(text, json!({"prompt": "a", "stream_options": {}})),
        (400, "stream_options".into())
    );
    assert_eq!(post(text, json!({"prompt": "a", "suffix": "b"})), (400, "suffix".into()));
    assert_eq!(
        post(text, json!({"prompt": "a", "temperature": "hot"})),
        (400, "temperature".into())
    );
    assert_eq!(post(text, json!({"prompt": "a", "n": 129})), (400, "n".into()));
    assert_eq!(post(text, json!({"prompt": "a", "max_tokens": 31})), (400, "max_tokens".into()));
    assert_eq!(post(text, json!({"prompt": vec![5; 10]})), (400, "prompt".into()));
    assert_eq!(post(text, json!({"prompt": "a", "stop": vec!["x"; 2000]})), (400, "stop".into()));
    assert_eq!(post("/v1/embeddings", json!({"input": []})), (400, "input".into()));
    assert_eq!(post("/v1/responses", json!({"input": 1})), (400, "input".into()));
    assert_eq!(
        post("/v1/responses", json!({"input": "a", "max_output_tokens": 31})),
        (400, "max_output_tokens".into())
    );
    assert_eq!(post("/detokenize", json!({"tokens": [9_999_999]})), (400, "tokens".into()));
    for flag in ["return_token_strs", "add_special_tokens"] {
        let body = json!({"messages": [{"role": "user", "content": "a"}], flag: "yes"});
        assert_eq!(post("/tokenize", body), (400, flag.into()));
    }
    assert_eq!(post("/v1/load_lora_adapter", json!({"lora_name": "a", "lora_path": "/"})).0, 403);
    assert_eq!(raw("POST", text, "Content-Type: text/plain\r\n", b"{}"), 415);
    assert_eq!(raw("POST", text, "", b"{"), 400);
    assert_eq!(raw("POST", text, "", b"\"\xff\xfe\""), 400);
    assert_eq!(raw("POST", text, "", b"[]"), 400);
    assert_eq!(raw("POST", text, "", &b"[".repeat(50_000)), 400);
    assert_eq!(raw("POST", text, "", &b" ".repeat(70_000)), 413);
    assert_eq!(raw("GET", text, "", b""), 405);
    assert_eq!(raw("GET", "/v2", "", b""), 404);
    assert_eq!(raw("GET", "/v1/models/none", "", b""), 404);
    assert_eq!(raw("GET", "/v1/models", "Host: evil.example\r\n", b""), 403);
    let fine = json!({"prompt": "a", "max_tokens": null, "unheard_of": {"x": 1}, "user": "me"});
    assert_eq!(server.post(text, &fine).status, 200);
    let blocked = "bitnet_blocked_total{reason=\"body\"} 1\n";
    wait_until(|| server.get("/metrics").body.contains(blocked));
}

#[test]
fn embeddings_are_of_length_one_and_the_texts_own() {
    let server = Server::start(&[]);
    let embed = |input: Value| server.post("/v1/embeddings", &json!({"input": input})).json();
    let vector = |answer: &Value, index: usize| {
        let vector = answer["data"][index]["embedding"].as_array().unwrap().iter();
        Vec::from_iter(vector.map(|x| x.as_f64().unwrap()))
    };
    let both = embed(json!(["The cat sat.", "A dragon flew over the sea."]));
    assert_eq!(vector(&both, 0), vector(&embed(json!("The cat sat.")), 0));
    assert_ne!(vector(&both, 0), vector(&both, 1));
    for index in 0..2 {
        let length: f64 = vector(&both, index).iter().map(|x| x * x).sum();
        // Each of 128 squares is rounded to f32 once: 128 · 2⁻²⁴ at most.
        assert!((length - 1.).abs() < 1e-5, "{length}");
    }
    let ids = server.post("/tokenize", &json!({"prompt": "The cat sat."})).json();
    assert_eq!(vector(&embed(ids["tokens"].clone()), 0), vector(&both, 0));
    assert_eq!(both["usage"]["prompt_tokens"].as_u64().unwrap() as usize, {
        let other =
            server.post("/tokenize", &json!({"prompt": "A dragon flew over the sea."})).json();
        (ids["count"].as_u64().unwrap() + other["count"].as_u64().unwrap()) as usize
    });
    let back = server.post("/detokenize", &json!({"tokens": ids["tokens"]})).json();
    assert!(back["prompt"].as_str().unwrap().ends_with("The cat sat."));

    // More than may run and wait.
    let server = Server::start(&["--max-batch", "2", "--max-queue", "1"]);
    let many = json!({"input": vec!["The cat sat."; 5]});
    let many = server.post("/v1/embeddings", &many).json();
    assert_eq!(many["data"].as_array().unwrap().len(), 5);
    assert_eq!(many["data"][4]["index"], 4);
    assert_eq!(vector(&many, 4), vector(&both, 0));
}

#[test]
fn responses_say_what_a_chat_says() {
    let server = Server::start(&[]);
    let whole = server.post("/v1/chat/completions", &chat("Hello!", json!({}))).json();
    let content = whole["choices"][0]["message"]["content"].as_str().unwrap();
    let mut body = json!({"input": "Hello!", "max_output_tokens": 12, "temperature": 0});
    let response = server.post("/v1/responses", &body).json();
    assert_eq!(response["output"][0]["content"][0]["text"], content);
    assert_eq!(
        (&response["status"], &response["usage"]["output_tokens"]),
        (&json!("incomplete"), &json!(12))
    );
    body["stream"] = true.into();
    let events = server.post("/v1/responses", &body).events();
    let deltas = events.iter().filter(|event| event["type"] == "response.output_text.delta");
    assert_eq!(deltas.map(|event| event["delta"].as_str().unwrap()).collect::<String>(), content);
    let last = events.last().unwrap();
    assert_eq!(
        (&last["type"], &last["response"]["output"][0]["content"][0]["text"]),
        (&json!("response.incomplete"), &json!(content))
    );
    assert!(events.iter().enumerate().all(|(index, event)| event["sequence_number"] == index));
}

#[test]
fn a_model_without_a_template_continues_texts_only() {
    let folder = edited_default("tokenizer_config.json", |config| {
        config.as_object_mut().unwrap().remove("chat_template");
    });
    let _ = std::fs::remove_file(folder.path().join("chat_template.jinja"));
    let server = Server::start(&["-m", text(folder.path()), "--served-name", "mine"]);
    let error = server.post("/v1/chat/completions", &chat("a", json!({})));
    assert_eq!(error.status, 400);
    assert!(error.body.contains("chat template"));
    assert_eq!(server.post("/v1/completions", &completion("a", 3)).json()["model"], "mine");
    assert_eq!(server.get("/v1/models").json()["data"][0]["id"], "mine");
}

#[test]
fn routes_are_described_and_described_routes_are_there() {
    let server = Server::start(&[]);
    let spec = server.get("/openapi.json").json();
    let paths = spec["paths"].as_object().unwrap();
    assert!(paths.len() > 15);
    for (path, methods) in paths {
        for method in methods.as_object().unwrap().keys() {
            let path = path.replace("{id}", "default");
            let answer = server.ask(&method.to_uppercase(), &path, "", "{}");
            let status = if method == "get" { 200 } else { 400 };
            let is_admin = path.contains("lora");
            assert_eq!(answer.status, if is_admin { 403 } else { status }, "{method} {path}");
            assert!(methods[method]["responses"].get(answer.status.to_string()).is_some());
        }
    }
    let page = server.get("/");
    let policy = page.header("content-security-policy").unwrap();
    assert!(
        policy.contains("script-src 'sha256-") && policy.contains("style-src 'sha256-"),
        "{policy}"
    );
    assert!(page.body.starts_with("<!doctype html>"));
    assert_eq!(page.header("content-length").unwrap(), page.body.len().to_string());
}
