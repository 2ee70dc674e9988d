//! `bitnet chat`, scripted through a pipe.

#![allow(clippy::unwrap_used)] // helpers of tests

mod support;

use std::{fs, io::Write, path::Path};

use serde_json::{Value, json};
use support::{
    bitnet, default_json, edited_default, eos_ids, failure, fixture, interrupt, long_context,
    read_some, run, stdout, text,
};

const GREEDY: [&str; 5] = ["chat", "--temperature", "0", "-n", "12"];

fn saved(path: &Path) -> Vec<(String, String)> {
    let messages: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    let field = |message: &Value, name: &str| message[name].as_str().unwrap().to_owned();
    let messages = messages.as_array().unwrap();
    messages.iter().map(|m| (field(m, "role"), field(m, "content"))).collect()
}

fn roles(messages: &[(String, String)]) -> Vec<&str> {
    messages.iter().map(|message| message.0.as_str()).collect()
}

#[test]
fn a_conversation_is_saved_and_continued() {
    let folder = tempfile::tempdir().unwrap();
    let (whole, half, again) =
        (folder.path().join("a.json"), folder.path().join("b.json"), folder.path().join("c.json"));
    let script = format!(
        "Hello!\n/save {}\nTell me\\\nmore.\n/save {}\n/exit\nnot read\n",
        text(&half),
        text(&whole)
    );
    let output = stdout(&[&GREEDY[..], &["--system", "Be kind."]].concat(), script);
    let messages = saved(&whole);
    assert_eq!(roles(&messages), ["system", "user", "assistant", "user", "assistant"]);
    assert_eq!(messages[0].1, "Be kind.");
    assert_eq!((messages[1].1.as_str(), messages[3].1.as_str()), ("Hello!", "Tell me\nmore."));
    let line = |reply: &str| format!("{}\n", reply.strip_suffix('\n').unwrap_or(reply));
    assert_eq!(output, line(&messages[2].1) + &line(&messages[4].1));

    // A new process knows nothing but the messages and must say the same.
    let script =
        format!("/load {}\n\"\"\"Tell me\nmore.\"\"\"\n/save {}\n", text(&half), text(&again));
    assert_eq!(stdout(&GREEDY, script), line(&messages[4].1));
    assert_eq!(saved(&again), messages);
}

#[test]
fn reset_and_system() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("chat.json");
    let script = format!("One.\n/reset\n/system Be brief.\nTwo.\n/save {}\n", text(&file));
    stdout(&GREEDY, script);
    let messages = saved(&file);
    assert_eq!(roles(&messages), ["system", "user", "assistant"]);
    assert_eq!((messages[0].1.as_str(), messages[1].1.as_str()), ("Be brief.", "Two."));
}

#[test]
fn commands_answer_on_stderr() {
    let output = run(&GREEDY, "/help\n/stats\n/system\n");
    assert!(output.status.success());
    assert!(output.stdout.is_empty());
    let stderr = String::from_utf8(output.stderr).unwrap();
    for part in ["/reset ", "0 messages, 0 of", "no system message is set"] {
        assert!(stderr.contains(part), "{stderr}");
    }
}

#[test]
fn mistakes_end_a_script() {
    let folder = tempfile::tempdir().unwrap();
    let bad = folder.path().join("bad.json");
    fs::write(&bad, r#"[{"role": "tool", "content": "x"}]"#).unwrap();
    let long = "word ".repeat(3000);
    for (script, expected) in [
        ("/quit\n", "there is no command /quit"),
        ("/save\n", "/save needs a file"),
        ("/save /no/such/folder/x.json\n", "/save /no/such/folder/x.json: "),
        ("/load /no/such/file\n", "/load /no/such/file: "),
        (&format!("/load {}\n", text(&bad)), "role `tool` is not system, user or assistant"),
        (&long, "/reset starts a new conversation"),
    ] {
        let line = failure(&GREEDY, script);
        assert!(line.contains(expected), "{line:?} lacks {expected:?}");
    }
    assert_eq!(
        failure(&GREEDY, b"/stats now\n\xff"),
        "/stats takes no argument, but was given `now`"
    );
    assert_eq!(failure(&GREEDY, b"\n\xff\n"), "line 2 of stdin is not UTF-8");
}

#[test]
fn a_template_is_needed_and_can_be_given() {
    let line = failure(&["chat", "-m", text(&fixture("bitnet_packed_tied"))], "hi\n");
    assert!(line.contains("has no tokenizer"), "{line}");

    let mut template = String::new();
    let model = edited_default("tokenizer_config.json", |config| {
        let removed = config.as_object_mut().unwrap().remove("chat_template").unwrap();
        template = removed.as_str().unwrap().to_owned();
    });
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("template.jinja");
    let chat = [&GREEDY[..], &["-m", text(model.path())]].concat();
    let line = failure(&chat, "hi\n");
    assert!(line.contains("has no chat template: give one with --chat-template FILE"), "{line}");

    let with_template = [&chat[..], &["--chat-template", text(&file)]].concat();
    let line = failure(&with_template, "hi\n");
    assert!(line.contains(text(&file)), "{line}");
    fs::write(&file, "{% for %}").unwrap();
    let line = failure(&with_template, "hi\n");
    assert!(line.contains(text(&file)) && line.contains("line 1"), "{line}");

    let expected = stdout(&GREEDY, "hi\n");
    fs::write(&file, &template).unwrap();
    assert_eq!(stdout(&with_template, "hi\n"), expected);
    // A template that spells out the begin-of-text token does not double it.
    fs::write(&file, format!("{{{{ bos_token }}}}{template}")).unwrap();
    assert_eq!(stdout(&with_template, "hi\n"), expected);
}

#[test]
fn a_full_context_says_so() {
    let context = default_json("config.json")["max_position_embeddings"].to_string();
    let mut args = vec!["chat", "--temperature", "0", "-n", &context];
    let biases: Vec<String> = eos_ids().iter().map(|id| format!("{id}=-inf")).collect();
    biases.iter().for_each(|bias| args.extend(["--logit-bias", bias]));
    let output = run(&args, "Hello!\n");
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(stderr.contains("the model's context is full; /reset starts anew"), "{stderr}");
    assert!(output.status.success());
    let output = run(&args, "Hello!\n/reset\nHello!\n");
    assert!(output.status.success());
}

#[cfg(unix)]
#[test]
fn ctrl_c_stops_the_reply_and_not_the_program() {
    let model = long_context();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("chat.json");
    let biases: Vec<String> = eos_ids().iter().map(|id| format!("{id}=-inf")).collect();
    let mut args = vec!["chat", "-m", text(model.path()), "--seed", "1", "-n", "100000"];
    biases.iter().for_each(|bias| args.extend(["--logit-bias", bias]));
    let mut child = bitnet(&args).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    writeln!(stdin, "Tell me a story.").unwrap();
    let begun = read_some(&mut child, 10);
    interrupt(&child);
    writeln!(stdin, "/save {}", text(&file)).unwrap();
    drop(stdin);
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{stderr}");
    assert!(stderr.contains("(stopped)"), "{stderr}");
    let messages = saved(&file);
    assert_eq!(roles(&messages), ["user", "assistant"]);
    let reply = &messages[1].1;
    let line_break = if reply.ends_with('\n') { "" } else { "\n" };
    assert_eq!([begun, output.stdout].concat(), format!("{reply}{line_break}").into_bytes());
}

#[test]
fn saved_files_are_plain_messages() {
    let folder = tempfile::tempdir().unwrap();
    let (old, new) = (folder.path().join("old.json"), folder.path().join("new.json"));
    let messages = json!([
        {"role": "user", "content": "Grüße\n\"quoted\""},
        {"role": "assistant", "content": "🙂"},
    ]);
    fs::write(&old, messages.to_string()).unwrap();
    stdout(&GREEDY, format!("/load {}\n/save {}\n", text(&old), text(&new)));
    assert_eq!(serde_json::from_slice::<Value>(&fs::read(&new).unwrap()).unwrap(), messages);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2, "something half-written is left");
}
