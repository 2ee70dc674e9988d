//! `bitnet serve`: who gets in, how much anybody gets, what is written down, and how it ends.

#![allow(clippy::unwrap_used)] // helpers of tests

mod support;

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    path::Path,
    process::Stdio,
    time::Duration,
};

use serde_json::{Value, json};
use support::{
    bitnet, failure, long_context,
    server::{Server, read, wait_until},
    text,
};

const TEXT: &str = "/v1/completions";

fn completion(max_tokens: usize) -> Value {
    json!({"prompt": "Once upon a time", "max_tokens": max_tokens, "temperature": 0})
}

/// A text that goes on until somebody ends it.
fn endless() -> Value {
    let mut body = completion(150_000);
    body["stream"] = true.into();
    body["logit_bias"] =
        Value::from_iter(support::eos_ids().iter().map(|id| (id.to_string(), json!(-100))));
    body
}

/// A connection on which a text has begun to come.
fn talking(server: &Server) -> BufReader<std::net::TcpStream> {
    let mut stream =
        BufReader::new(server.send("POST", TEXT, "", endless().to_string().as_bytes()));
    let mut line = String::new();
    while !line.starts_with("data: ") {
        line.clear();
        assert!(stream.read_line(&mut line).unwrap() > 0, "the stream ended");
    }
    stream
}

/// A file of the test's own.
fn file(name: &str, text: &str) -> (tempfile::TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    fs::write(&path, text).unwrap();
    let path = path.to_str().unwrap().to_owned();
    (folder, path)
}

#[test]
fn keys_open_the_door_and_say_who_asks() {
    let (_folder, keys) = file("keys", "ann:0123456789abcdef\nadmin:fedcba9876543210\n");
    let server = Server::start_with(&["--api-keys", &keys], |command| {
        command.env("BITNET_API_KEYS", "bob:bobs-key-is-secret,0-a-key-without-a-name")
    });
    let body = completion(2);
    let refused = server.post(TEXT, &body);
    assert_eq!((refused.status, refused.header("www-authenticate")), (401, Some("Bearer")));
    assert_eq!(refused.json()["error"]["code"], "invalid_api_key");
    assert_eq!(server.post_as("wrong", TEXT, &body).status, 401);
    for key in ["0123456789abcdef", "bobs-key-is-secret", "0-a-key-without-a-name"] {
        assert_eq!(server.post_as(key, TEXT, &body).status, 200);
    }
    assert_eq!(
        server.ask("POST", TEXT, "x-api-key: 0123456789abcdef\r\n", body.to_string()).status,
        200
    );
    for path in ["/stats", "/metrics", "/v1/models", "/openapi.json", "/nothing"] {
        assert_eq!(server.get(path).status, 401, "{path}");
    }
    for path in ["/", "/health", "/ready"] {
        assert_eq!(server.get(path).status, 200, "{path}");
    }
    let load = json!({"lora_name": "x", "lora_path": "/nowhere"});
    assert_eq!(server.post_as("0123456789abcdef", "/v1/load_lora_adapter", &load).status, 403);
    let missing = server.post_as("fedcba9876543210", "/v1/load_lora_adapter", &load);
    assert_eq!(
        (missing.status, missing.json()["error"]["param"].clone()),
        (400, json!("lora_path"))
    );
    let guesses = (0..40).map(|_| server.post_as("guess", TEXT, &body).status);
    assert!(guesses.max() == Some(429), "guessing goes on for ever");
}

#[test]
fn others_are_not_let_in_without_keys() {
    let refused = failure(&["serve", "--host", "0.0.0.0"], "");
    assert!(refused.contains("--api-keys") && refused.contains("--insecure-no-keys"), "{refused}");
    let (_folder, keys) = file("keys", "# none\n");
    assert!(failure(&["serve", "--api-keys", &keys], "").contains("has no key"));
    let (_folder, keys) = file("keys", "ann:0123456789abcdef\nann:another-0123456789\n");
    let refused = failure(&["serve", "--api-keys", &keys], "");
    assert!(refused.contains("`ann`") && !refused.contains("another-"), "{refused}");
    let server = Server::start(&["--host", "0.0.0.0", "--insecure-no-keys"]);
    assert_eq!(server.ask("GET", "/v1/models", "Host: any.example\r\n", "").status, 200);
}

#[test]
fn clients_get_no_more_than_their_rates() {
    let server = Server::start(&["--requests-per-minute", "3", "--tokens-per-minute", "40"]);
    assert_eq!(server.post(TEXT, &completion(20)).status, 200);
    let waits = server.post(TEXT, &completion(20));
    assert_eq!(
        (waits.status, waits.json()["error"]["code"].clone()),
        (429, json!("rate_limit_exceeded"))
    );
    let seconds: u64 = waits.header("retry-after").unwrap().parse().unwrap();
    assert!((1..=60).contains(&seconds), "{seconds}");
    assert_eq!(server.post(TEXT, &completion(100)).status, 400, "more than a minute has");
    let waits = server.post(TEXT, &completion(1));
    assert_eq!((waits.status, waits.header("retry-after").is_some()), (429, true));
    assert_eq!(server.get("/v1/models").status, 200);
    wait_until(|| server.stat("/blocked/rate") == 3);
}

#[test]
fn a_client_that_goes_away_leaves_nothing_behind() {
    let folder = long_context();
    let server =
        Server::start(&["-m", text(folder.path()), "--max-batch", "2", "--max-queue", "1"]);
    let (first, second) = (talking(&server), talking(&server));
    let waiting = server.send("POST", TEXT, "", completion(3).to_string().as_bytes());
    wait_until(|| server.stat("/engine/queued") == 1);
    let full = server.post(TEXT, &completion(3));
    assert_eq!((full.status, full.json()["error"]["code"].clone()), (429, json!("queue_full")));
    assert!(full.header("retry-after").is_some());
    let many = server.post(TEXT, &json!({"prompt": "a", "n": 4}));
    assert_eq!(many.status, 400, "never so many at once");
    drop(first);
    assert_eq!(read(waiting).status, 200, "what waited comes in");
    drop(second);
    wait_until(|| server.stat("/engine/in_flight") == 0 && server.stat("/requests/in_flight") == 1);
    wait_until(|| server.stat("/engine/running") + server.stat("/engine/kv_running_bytes") == 0);
    // A client that waits for the whole answer is missed as well.
    let mut whole = endless();
    whole["stream"] = false.into();
    let stream = server.send("POST", TEXT, "", whole.to_string().as_bytes());
    wait_until(|| server.stat("/engine/running") == 1);
    drop(stream);
    wait_until(|| server.stat("/engine/in_flight") == 0);
}

#[test]
fn nobody_holds_a_request_or_a_connection_for_ever() {
    let folder = long_context();
    let server = Server::start(&[
        "-m",
        text(folder.path()),
        "--request-timeout",
        "1",
        "--client-timeout",
        "1",
    ]);
    let mut body = endless();
    body["stream"] = false.into();
    let late = server.post(TEXT, &body);
    assert_eq!((late.status, late.json()["error"]["code"].clone()), (504, json!("timeout")));
    let late = server.post(TEXT, &endless());
    assert_eq!(late.events().last().unwrap()["error"]["code"], "timeout");
    wait_until(|| server.stat("/engine/in_flight") == 0);
    let mut silent = server.connect();
    let mut half = server.connect();
    half.write_all(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{").unwrap();
    let mut bytes = Vec::new();
    silent.read_to_end(&mut bytes).unwrap();
    assert!(bytes.is_empty() || bytes.starts_with(b"HTTP/1.1 408"));
    let mut bytes = [0; 12];
    half.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"HTTP/1.1 408");
}

#[test]
fn what_is_denied_comes_neither_in_nor_out() {
    let (_input, input) = file("in", "forbidden\\s+fruit\n");
    let (_output, output) = file("out", "little\n");
    let server =
        Server::start(&["--deny-input", &input, "--deny-output", &output, "--sanitize-input"]);
    let refused = server.post(TEXT, &json!({"prompt": ["a", "The Forbidden  Fruit"]}));
    assert_eq!(
        (refused.status, refused.json()["error"]["code"].clone()),
        (400, json!("content_filter"))
    );
    let answer = server.post(TEXT, &completion(40)).json();
    let choice = &answer["choices"][0];
    assert_eq!(
        (&choice["text"], &choice["finish_reason"]),
        (&json!(", there was a "), &json!("content_filter"))
    );
    let mut body = completion(40);
    body["stream"] = true.into();
    let events = server.post(TEXT, &body).events();
    let pieces = events.iter().filter_map(|event| event.pointer("/choices/0/text")?.as_str());
    assert!(!pieces.collect::<String>().contains("little"));
    let hidden = server
        .post("/v1/completions", &json!({"prompt": "a forbid\u{200b}den fruit", "max_tokens": 1}));
    assert_eq!(hidden.status, 400);
    let blocked = |what: &str| server.stat(&format!("/blocked/filter_{what}"));
    wait_until(|| (blocked("input"), blocked("output")) == (2, 2));
}

#[test]
fn a_short_request_does_not_ask_for_very_much() {
    let server = Server::start(&[]);
    for (path, body, param) in [
        (TEXT, json!({"prompt": vec!["a"; 2000], "n": 128}), "prompt"),
        (TEXT, json!({"prompt": "a", "model": "x".repeat(1000), "stream": true}), "model"),
        (TEXT, json!({"prompt": "a".repeat(1_000_000)}), "prompt"),
        ("/v1/embeddings", json!({"input": vec!["a"; 2049]}), "input"),
    ] {
        let refused = server.post(path, &body);
        assert_eq!((refused.status, &refused.json()["error"]["param"]), (400, &json!(param)));
    }
}

#[test]
fn it_serves_though_nobody_reads_what_it_says() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let server = Server::start_with(&["--log", "info"], |command| {
        command.stderr(writer.try_clone().unwrap())
    });
    assert_eq!(server.post(TEXT, &completion(2)).status, 200);
}

#[test]
fn adapters_come_and_go() {
    let (_folder, keys) = file("keys", "admin:fedcba9876543210\n");
    let tuned = tempfile::tempdir().unwrap();
    let data = tuned.path().join("data.jsonl");
    fs::write(&data, "{\"prompt\": \"Cow?\", \"completion\": \"Moo!\"}\n".repeat(8)).unwrap();
    let out = tuned.path().join("out");
    let train = [
        "train",
        "lora",
        "-q",
        "--data",
        text(&data),
        "-o",
        text(&out),
        "--epochs",
        "8",
        "--lr",
        "5e-2",
        "--rank",
        "2",
    ];
    support::stdout(&train, "");
    let adapter = out.join("adapter");
    let server = Server::start(&["--api-keys", &keys, "--response-cache", "1"]);
    let ask = |path: &str, body: Value| server.post_as("fedcba9876543210", path, &body);
    let text = |model: &str| {
        let mut body = completion(12);
        body["model"] = model.into();
        let answer = ask(TEXT, body);
        (answer.header("x-bitnet-cache").is_some(), answer.json()["choices"][0]["text"].clone())
    };
    let (_, plain) = text("default");
    assert_eq!(text("default"), (true, plain.clone()));
    let load = json!({"lora_name": "cow", "lora_path": adapter});
    assert_eq!(ask("/v1/load_lora_adapter", load.clone()).status, 200);
    let args = [
        "generate",
        "-q",
        "--temperature",
        "0",
        "-n",
        "12",
        "Once upon a time",
        "--adapter",
        adapter.to_str().unwrap(),
    ];
    let expected = support::stdout(&args, "");
    let expected = expected.trim_end_matches('\n').strip_prefix("Once upon a time").unwrap();
    assert_ne!(plain, expected);
    for model in ["cow", "default:cow"] {
        assert_eq!(text(model), (false, json!(expected)));
    }
    assert_eq!(text("default"), (false, plain));
    let unknown = ask(TEXT, json!({"prompt": "a", "model": "default:dog"}));
    assert_eq!(
        (unknown.status, unknown.json()["error"]["code"].clone()),
        (404, json!("model_not_found"))
    );
    let models = server.ask("GET", "/v1/models", "x-api-key: fedcba9876543210\r\n", "").json();
    assert_eq!(models["data"][1]["id"], "default:cow");
    assert_eq!(ask("/v1/unload_lora_adapter", json!({"lora_name": "cow"})).status, 200);
    assert_eq!(ask("/v1/unload_lora_adapter", json!({"lora_name": "cow"})).status, 404);
    let gone = ask(TEXT, json!({"prompt": "a", "model": "default:cow"}));
    assert_eq!(gone.status, 404);
}

#[test]
fn logs_are_lines_of_json_if_that_is_asked_for() {
    let mut command = bitnet(&["serve", "--port", "0", "--log", "info", "--log-format", "json"]);
    let mut child = command.spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stderr.take().unwrap()).read_line(&mut line).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    let line: Value = serde_json::from_str(&line).unwrap_or_else(|_| panic!("no JSON: {line}"));
    assert!(line["timestamp"].is_string() && line["level"] == "INFO", "{line}");
}

#[test]
fn what_happens_is_written_down_and_what_is_private_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let [audit, stats] = ["audit", "stats"].map(|name| folder.path().join(name));
    let args = [
        "--audit-log",
        text(&audit),
        "--stats-file",
        text(&stats),
        "--stats-every",
        "1",
        "--alert-memory",
        "1",
    ];
    let mut server = Server::start(&args);
    server.ask("POST", TEXT, "X-Request-Id: mine-1\r\n", completion(5).to_string());
    assert_eq!(server.post(TEXT, &json!({"prompt": 3})).status, 400);
    wait_until(|| server.get("/stats").json()["alerts"][0]["name"] == "memory");
    let expected = [
        "bitnet_requests_total{route=\"/v1/completions\",code=\"200\"} 1\n",
        "bitnet_requests_total{route=\"/v1/completions\",code=\"400\"} 1\n",
        "bitnet_new_tokens_total 5\n",
        "bitnet_time_to_first_token_seconds_count 1\n",
        "bitnet_inter_token_seconds_count 4\n",
        "bitnet_alert{name=\"memory\"} 1\n",
        "# EOF\n",
    ];
    // A request is counted when its answer has gone out.
    wait_until(|| {
        let metrics = server.get("/metrics").body;
        expected.iter().all(|line| metrics.contains(line))
    });
    let written = |path: &Path| fs::read_to_string(path).unwrap();
    wait_until(|| written(&stats).contains("\"new_tokens\":5"));
    serde_json::from_str::<Value>(&written(&stats)).unwrap();
    server.signal("-TERM");
    assert!(server.end().success());
    let lines = written(&audit);
    assert!(!lines.contains("Once upon") && !lines.contains("127.0.0.1"));
    let first: Value =
        serde_json::from_str(lines.lines().find(|line| line.contains("mine-1")).unwrap()).unwrap();
    assert_eq!(
        (&first["status"], &first["new_tokens"], &first["finish"]),
        (&json!(200), &json!(5), &json!("length"))
    );
}

#[test]
fn the_end_waits_for_what_runs() {
    let folder = long_context();
    let mut server = Server::start(&["-m", text(folder.path())]);
    let mut body = endless();
    body["max_tokens"] = 2000.into();
    let mut stream = BufReader::new(server.send("POST", TEXT, "", body.to_string().as_bytes()));
    let mut line = String::new();
    while !line.starts_with("data: ") {
        line.clear();
        stream.read_line(&mut line).unwrap();
    }
    server.signal("-TERM");
    assert!(server.end().success());
    let mut rest = String::new();
    stream.read_to_string(&mut rest).unwrap();
    assert!(
        rest.contains("\"finish_reason\":\"length\"") && rest.contains("data: [DONE]"),
        "it was cut"
    );

    let mut server = Server::start(&["-m", text(folder.path()), "--drain-seconds", "1"]);
    let _endless = talking(&server);
    server.signal("-INT");
    assert!(server.end().success(), "its grace is over");
    let mut server = Server::start(&["-m", text(folder.path())]);
    let _endless = talking(&server);
    server.signal("-TERM");
    std::thread::sleep(Duration::from_millis(200));
    server.signal("-TERM");
    assert!(server.end().success(), "a second signal ends it at once");
}

#[test]
fn mistakes_on_the_command_line_are_told_before_anything_is_loaded() {
    let taken = Server::start(&[]);
    let port = taken.address.rsplit(':').next().unwrap();
    assert!(failure(&["serve", "--port", port], "").contains("cannot be listened at"));
    assert!(failure(&["serve", "--tls-cert", "/none", "--tls-key", "/none"], "").contains("/none"));
    assert!(failure(&["serve", "--cors-origin", "example.org"], "").contains("is no origin"));
    let (_folder, list) = file("list", "(\n");
    assert!(failure(&["serve", "--deny-output", &list], "").contains("line 1 is no pattern"));
    assert!(failure(&["serve", "--audit-log", "/none/x"], "").contains("/none/x"));
    let help = bitnet(&["serve", "--help"]).stdout(Stdio::piped()).output().unwrap();
    assert!(String::from_utf8(help.stdout).unwrap().contains("--requests-per-minute"));
}
