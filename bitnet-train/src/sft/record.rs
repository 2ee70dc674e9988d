//! Records → samples: the forms in which sets of instructions and conversations come.

use bitnet_model::text::Message;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::dataset::{keys, kind};

/// How a record says what is asked and what is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// `auto`: each record is of the first of the following forms whose keys it has.
    Auto,
    /// `messages`: a list of objects with `role` and `content`.
    Messages,
    /// `conversations`: ShareGPT's list of objects with `from` (`human`, `gpt`, `system`) and `value`.
    Conversations,
    /// `instruction`: Alpaca's `instruction`, perhaps `input` (or `context`) and `system`, and `output` (or `response`).
    Instruction,
    /// `prompt-completion`: `prompt` and `completion` (or `response`).
    PromptCompletion,
    /// `input-output`: `input` and `output`.
    InputOutput,
    /// `text`: one text, under the `field` of its source, all of which is trained.
    Text,
}

impl Format {
    /// The keys that a record of the form has, for people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Messages => "messages",
            Self::Conversations => "conversations",
            Self::Instruction => "instruction/output",
            Self::PromptCompletion => "prompt/completion",
            Self::InputOutput => "input/output",
            Self::Text => "text",
        }
    }
}

/// What one record says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Sample {
    /// Turns, of which those of the assistant are learned.
    Conversation(Vec<Message>),
    /// A task and its solution.
    Instruction { system: String, instruction: String, input: String, output: String },
    /// A text and how it goes on.
    Completion { prompt: String, completion: String },
    /// A text.
    Text(String),
}

/// What `record` says in `format`, and in which form; `field` is the key of a plain text.
pub(super) fn sample(
    record: Value,
    format: Format,
    field: &str,
) -> Result<(Format, Sample), String> {
    let mut object = match record {
        Value::Object(object) => object,
        Value::String(text) if matches!(format, Format::Auto | Format::Text) => {
            return Ok((Format::Text, Sample::Text(filled("the text", text)?)));
        }
        other => return Err(format!("a record must be an object, not {}", kind(&other))),
    };
    let form = match format {
        Format::Auto => detect(&object, field).ok_or_else(|| {
            format!(
                "a record of no known form: it has {}; known are `messages`, `conversations`, `instruction` and `output`, \
                 `prompt` and `completion`, `input` and `output`, `{field}`",
                keys(object.keys().map(String::as_str))
            )
        })?,
        form => form,
    };
    let sample = match form {
        Format::Messages => Sample::Conversation(messages(take(&mut object, &["messages"])?)?),
        Format::Conversations => {
            let turns = take(&mut object, &["conversations", "conversation"])?;
            Sample::Conversation(conversation(turns)?)
        }
        Format::Instruction => Sample::Instruction {
            system: optional(&mut object, &["system"])?,
            instruction: required(&mut object, &["instruction"])?,
            input: optional(&mut object, &["input", "context"])?,
            output: required(&mut object, &["output", "response"])?,
        },
        Format::PromptCompletion => Sample::Completion {
            prompt: required(&mut object, &["prompt"])?,
            completion: required(&mut object, &["completion", "response"])?,
        },
        Format::InputOutput => Sample::Completion {
            prompt: required(&mut object, &["input"])?,
            completion: required(&mut object, &["output"])?,
        },
        Format::Auto | Format::Text => Sample::Text(required(&mut object, &[field])?),
    };
    Ok((form, sample))
}

/// The first form whose keys `object` has.
fn detect(object: &Map<String, Value>, field: &str) -> Option<Format> {
    let has = |key: &str| object.contains_key(key);
    let forms = [
        (Format::Messages, has("messages")),
        (Format::Conversations, has("conversations") || has("conversation")),
        (Format::Instruction, has("instruction") && (has("output") || has("response"))),
        (Format::PromptCompletion, has("prompt") && (has("completion") || has("response"))),
        (Format::InputOutput, has("input") && has("output")),
        (Format::Text, has(field)),
    ];
    forms.into_iter().find(|(_, has)| *has).map(|(form, _)| form)
}

/// The value of the first of `names` that the record has.
fn take(object: &mut Map<String, Value>, names: &[&str]) -> Result<Value, String> {
    let found = names.iter().find(|name| object.contains_key(**name));
    found.and_then(|name| object.remove(*name)).ok_or_else(|| {
        let only = keys(object.keys().map(String::as_str));
        format!("the record has no `{}`, only {only}", names.join("` or `"))
    })
}

fn required(object: &mut Map<String, Value>, names: &[&str]) -> Result<String, String> {
    let name = names.iter().find(|name| object.contains_key(**name)).unwrap_or(&names[0]);
    match take(object, names)? {
        Value::String(text) => filled(&format!("`{name}`"), text),
        other => Err(format!("`{name}` must be a string, not {}", kind(&other))),
    }
}

/// Nothing where the record has no such key, or null.
fn optional(object: &mut Map<String, Value>, names: &[&str]) -> Result<String, String> {
    let Some(name) = names.iter().find(|name| object.contains_key(**name)) else {
        return Ok(String::new());
    };
    match object.remove(*name) {
        Some(Value::String(text)) => Ok(text),
        Some(Value::Null) | None => Ok(String::new()),
        Some(other) => Err(format!("`{name}` must be a string, not {}", kind(&other))),
    }
}

fn filled(what: &str, text: String) -> Result<String, String> {
    if text.trim().is_empty() { Err(format!("{what} is empty")) } else { Ok(text) }
}

fn messages(value: Value) -> Result<Vec<Message>, String> {
    turns(value, "messages", "role", "content", |role| Some(role.to_owned()))
}

fn conversation(value: Value) -> Result<Vec<Message>, String> {
    turns(value, "conversations", "from", "value", |from| {
        let role = match from {
            "human" | "user" => "user",
            "gpt" | "assistant" | "model" | "chatgpt" | "bot" => "assistant",
            "system" => "system",
            _ => return None,
        };
        Some(role.to_owned())
    })
}

/// A list of objects with the keys `who` and `what`. The assistant speaks at least once.
fn turns(
    value: Value,
    list: &str,
    who: &str,
    what: &str,
    role: impl Fn(&str) -> Option<String>,
) -> Result<Vec<Message>, String> {
    let Value::Array(items) = value else {
        return Err(format!("`{list}` must be a list, not {}", kind(&value)));
    };
    let mut messages = Vec::new();
    for (index, item) in items.into_iter().enumerate() {
        let at = format!("`{list}[{index}]`");
        let Value::Object(mut item) = item else {
            return Err(format!("{at} must be an object, not {}", kind(&item)));
        };
        let name = match item.remove(who) {
            Some(Value::String(name)) => name,
            Some(other) => {
                return Err(format!("{at}: `{who}` must be a string, not {}", kind(&other)));
            }
            None => {
                let only = keys(item.keys().map(String::as_str));
                return Err(format!("{at} has no `{who}`, only {only}"));
            }
        };
        let role = role(&name)
            .ok_or_else(|| format!("{at}: `{who}` is `{name}`; known are human, gpt and system"))?;
        let content = content(item.remove(what)).map_err(|e| format!("{at}: `{what}` {e}"))?;
        if role == "assistant" && content.trim().is_empty() {
            return Err(format!("{at}: the assistant's `{what}` is empty"));
        }
        messages.push(Message { role, content });
    }
    match messages.iter().any(|message| message.role == "assistant") {
        true => Ok(messages),
        false => Err(format!("`{list}` has no turn of the assistant")),
    }
}

/// The text of a turn: a string, or a list of parts of the type `text`.
fn content(value: Option<Value>) -> Result<String, String> {
    let parts = match value {
        Some(Value::String(text)) => return Ok(text),
        Some(Value::Array(parts)) => parts,
        Some(other) => return Err(format!("must be a string, not {}", kind(&other))),
        None => return Err("is missing".into()),
    };
    let text = |part: &Value| match (part["type"].as_str(), part["text"].as_str()) {
        (None | Some("text"), Some(text)) => Ok(text.to_owned()),
        (Some(kind), _) if kind != "text" => {
            Err(format!("has a part of type `{kind}`; only text can be learned"))
        }
        _ => Err("has a part without a string `text`".into()),
    };
    parts.iter().map(text).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn auto(record: Value) -> Result<(Format, Sample), String> {
        sample(record, Format::Auto, "text")
    }

    fn conversation_of(turns: &[(&str, &str)]) -> Sample {
        let message = |(role, content): &(&str, &str)| Message::new(*role, *content);
        Sample::Conversation(turns.iter().map(message).collect())
    }

    #[test]
    fn forms_are_told_by_their_keys() {
        let instruction = |system: &str, input: &str| Sample::Instruction {
            system: system.into(),
            instruction: "do".into(),
            input: input.into(),
            output: "done".into(),
        };
        let completion = Sample::Completion { prompt: "é ".into(), completion: "✓".into() };
        let talk = conversation_of(&[("system", "s"), ("user", "hi"), ("assistant", "ho")]);
        for (record, form, expected) in [
            (
                json!({"id": 7, "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"},
                    {"role": "assistant", "content": [{"type": "text", "text": "h"}, {"text": "o"}]}]}),
                Format::Messages,
                talk.clone(),
            ),
            (
                json!({"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "hi"},
                    {"from": "gpt", "value": "ho"}]}),
                Format::Conversations,
                talk,
            ),
            (
                json!({"instruction": "do", "input": "", "output": "done"}),
                Format::Instruction,
                instruction("", ""),
            ),
            (
                json!({"instruction": "do", "context": "it", "response": "done", "system": "be"}),
                Format::Instruction,
                instruction("be", "it"),
            ),
            (
                json!({"instruction": "do", "input": null, "output": "done", "text": "x"}),
                Format::Instruction,
                instruction("", ""),
            ),
            (
                json!({"prompt": "é ", "completion": "✓"}),
                Format::PromptCompletion,
                completion.clone(),
            ),
            (
                json!({"prompt": "é ", "response": "✓"}),
                Format::PromptCompletion,
                completion.clone(),
            ),
            (json!({"input": "é ", "output": "✓"}), Format::InputOutput, completion),
            (json!({"text": "x"}), Format::Text, Sample::Text("x".into())),
            (json!("x"), Format::Text, Sample::Text("x".into())),
        ] {
            assert_eq!(auto(record.clone()).unwrap(), (form, expected.clone()), "{record}");
            let forced = sample(record.clone(), form, "text").unwrap();
            assert_eq!(forced, (form, expected), "{record}");
        }
        let other = sample(json!({"body": "x"}), Format::Auto, "body").unwrap();
        assert_eq!(other, (Format::Text, Sample::Text("x".into())));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (record, reason) in [
            (json!([1]), "a record must be an object, not an array"),
            (json!({}), "of no known form: it has nothing; known are"),
            (json!({"question": "x"}), "it has `question`; known are `messages`"),
            (json!({"prompt": 5, "completion": "x"}), "`prompt` must be a string, not a number"),
            (json!({"prompt": "x", "response": " \n"}), "`response` is empty"),
            (json!({"instruction": "x", "output": null}), "`output` must be a string, not null"),
            (json!({"instruction": "x", "input": [], "output": "y"}), "`input` must be a string"),
            (json!({"messages": "x"}), "`messages` must be a list, not a string"),
            (json!({"messages": []}), "`messages` has no turn of the assistant"),
            (json!({"messages": ["x"]}), "`messages[0]` must be an object, not a string"),
            (
                json!({"messages": [{"content": "x"}]}),
                "`messages[0]` has no `role`, only `content`",
            ),
            (json!({"messages": [{"role": 1}]}), "`messages[0]`: `role` must be a string"),
            (
                json!({"messages": [{"role": "assistant", "content": null}]}),
                "`messages[0]`: `content` must be a string, not null",
            ),
            (
                json!({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]}),
                "`messages[1]`: the assistant's `content` is empty",
            ),
            (
                json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
                "`messages[0]`: `content` has a part of type `image_url`",
            ),
            (
                json!({"conversations": [{"from": "tool", "value": "x"}]}),
                "`from` is `tool`; known are human, gpt and system",
            ),
        ] {
            let message = auto(record.clone()).unwrap_err();
            assert!(message.contains(reason), "{record}: {message}");
        }
        let message = sample(json!({"text": "x"}), Format::PromptCompletion, "text").unwrap_err();
        assert_eq!(message, "the record has no `prompt`, only `text`");
        let message = sample(json!({"prompt": "x"}), Format::PromptCompletion, "text").unwrap_err();
        assert!(message.starts_with("the record has no `completion` or `response`"), "{message}");
    }
}
