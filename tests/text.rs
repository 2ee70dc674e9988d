//! Tokenizer and chat templates against what transformers makes of the same files.

#![allow(clippy::unwrap_used)] // helpers of tests

use std::{collections::BTreeMap, path::PathBuf};

use bitnet_model::text::{ChatTemplate, Message, Tokenizer};
use flate2::read::GzDecoder;
use serde_json::Value;

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name)
}

fn json(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(fixture(name)).unwrap()).unwrap()
}

fn templates() -> Value {
    let file = std::fs::File::open(fixture("chat_templates.json.gz")).unwrap();
    serde_json::from_reader(GzDecoder::new(file)).unwrap()
}

fn messages(chat: &Value) -> Vec<Message> {
    let text = |message: &Value, field: &str| message[field].as_str().unwrap().to_owned();
    let chat = chat.as_array().unwrap().iter();
    chat.map(|message| Message::new(text(message, "role"), text(message, "content"))).collect()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn tokenizer() -> Tokenizer {
    let file = |name: &str| fixture("tokenizer_chat").join(name);
    Tokenizer::from_files(
        &file("tokenizer.json"),
        Some(&file("tokenizer_config.json")),
        None,
        Some(&file("chat_template.jinja")),
    )
    .unwrap()
}

#[test]
fn encodings_equal_the_reference() {
    let tokenizer = tokenizer();
    let expected = json("tokenizer_chat/expected.json");
    for case in expected["cases"].as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        assert_eq!(tokenizer.encode(text, true).unwrap(), ids(&case["ids"]), "{text:?}");
        let plain = tokenizer.encode(text, false).unwrap();
        assert_eq!(plain, ids(&case["ids_no_special"]), "{text:?}");
        assert_eq!(tokenizer.decode(&plain, true).unwrap(), text);
        assert_eq!(tokenizer.decode(&ids(&case["ids"]), true).unwrap(), text);
    }
    assert_eq!(tokenizer.bos_token_id(), Some(1));
    assert_eq!(tokenizer.eos_token(), Some("<|end_of_text|>"));
    assert_eq!(tokenizer.pad_token_id(), Some(0));
}

#[test]
fn chats_equal_the_reference() {
    let tokenizer = tokenizer();
    let expected = json("tokenizer_chat/expected.json");
    let template = tokenizer.chat_template().unwrap().unwrap();
    for case in expected["chats"].as_array().unwrap() {
        let prompt = case["add_generation_prompt"].as_bool().unwrap();
        let text = template.render(&messages(&case["messages"]), prompt).unwrap();
        assert_eq!(text, case["text"].as_str().unwrap());
        assert_eq!(tokenizer.encode(&text, true).unwrap(), ids(&case["ids"]));
        let without_bos = ids(&case["ids_apply_chat_template"]);
        assert_eq!(tokenizer.encode(&text, false).unwrap(), without_bos);
    }
}

/// Every template either writes each turn the same way wherever it stands, and then the parts are the whole and the replies
/// are in them, or it is refused.
#[test]
fn replies_are_found_in_what_templates_render() {
    let fixture = templates();
    let special_tokens: BTreeMap<String, String> =
        serde_json::from_value(fixture["special_tokens"].clone()).unwrap();
    let talk = [
        ("user", "Où est le chat ? 🐈"),
        ("assistant", "Ici."),
        ("user", "a\n\nb"),
        ("assistant", "日本!\n\n- one"),
    ];
    let messages = talk.map(|(role, text)| Message::new(role, text));
    let mut found = Vec::new();
    for case in fixture["cases"].as_array().unwrap() {
        let name = case["name"].as_str().unwrap();
        let template =
            ChatTemplate::new(case["template"].as_str().unwrap(), &special_tokens).unwrap();
        let Ok(whole) = template.render(&messages, false) else { continue };
        let Ok(spans) = template.spans(&messages) else { continue };
        let text: String = spans.iter().map(|span| span.text.as_str()).collect();
        assert!(whole.starts_with(&text), "{name}");
        let replies: Vec<String> =
            spans.iter().filter(|span| span.is_reply).map(|s| s.text.to_lowercase()).collect();
        assert_eq!(replies.len(), 2, "{name}: {replies:?}");
        for (reply, content) in replies.iter().zip(["ici.", "日本!\n\n- one"]) {
            assert!(reply.trim_start().starts_with(content), "{name}: {reply:?}");
            assert!(!reply.contains("user") && !reply.contains("assistant"), "{name}: {reply:?}");
        }
        found.push(name);
    }
    for name in ["bitnet", "llama3", "generation"] {
        assert!(found.contains(&name), "{name} is not among {found:?}");
    }
}

#[test]
fn chat_templates_render_as_in_transformers() {
    let fixture = templates();
    let special_tokens: BTreeMap<String, String> =
        serde_json::from_value(fixture["special_tokens"].clone()).unwrap();
    for case in fixture["cases"].as_array().unwrap() {
        let name = case["name"].as_str().unwrap();
        let template =
            ChatTemplate::new(case["template"].as_str().unwrap(), &special_tokens).unwrap();
        for (chat, renderings) in std::iter::zip(
            fixture["chats"].as_array().unwrap(),
            case["renderings"].as_array().unwrap(),
        ) {
            for (expected, prompt) in renderings.as_array().unwrap().iter().zip([false, true]) {
                let rendered = template.render(&messages(chat), prompt);
                match expected["text"].as_str() {
                    Some(text) => assert_eq!(rendered.unwrap(), text, "{name}"),
                    None => {
                        let error = rendered.unwrap_err().to_string();
                        let expected = expected["error"].as_str().unwrap();
                        assert!(error.contains(expected), "{name}: {error}");
                    }
                }
            }
        }
    }
}
