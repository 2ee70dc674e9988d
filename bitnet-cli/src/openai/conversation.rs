//! `messages` as the text of a prompt.

use bitnet_model::text::{ChatTemplate, Message};
use serde_json::{Value, json};

use super::{
    Refusal,
    fields::wrong,
    tools::{Call, OPEN, Tools},
};

const NAME: &str = "messages";

/// One message.
struct Turn {
    role: String,
    content: String,
    /// Of the assistant.
    calls: Vec<Call>,
}

/// The text before the assistant's reply, by the model's chat template. One that knows nothing of `tools` or of calls as
/// models are made to write them here gets both in words.
///
/// # Errors
/// What is no conversation, or none that the template writes.
pub fn prompt(
    messages: &Value,
    tools: Option<&Tools>,
    template: &ChatTemplate,
) -> Result<String, Refusal> {
    let Some(values) = messages.as_array() else { return Err(wrong(NAME, messages, "a list")) };
    let turns = values.iter().enumerate().map(|(index, value)| Turn::read(index, value));
    let turns = turns.collect::<Result<Vec<_>, _>>()?;
    let text = if template.calls_tools(OPEN) {
        let messages = turns.iter().map(Turn::to_json).collect();
        template.render_with_tools(&messages, tools.map(|tools| &tools.json), true)
    } else {
        template.render(&in_words(turns, tools), true)
    };
    text.map_err(|error| Refusal::of(NAME, error.to_string()))
}

impl Turn {
    /// A message. Its content is a text or parts of the type `text`, and may be missing beside calls.
    fn read(index: usize, value: &Value) -> Result<Self, Refusal> {
        let refuse = |field: &str, expected: &str| {
            let name = format!("{NAME}[{index}].{field}");
            Refusal::of(&name, format!("`{name}` must be {expected}"))
        };
        let Some(role) = value["role"].as_str() else { return Err(refuse("role", "a string")) };
        let calls = match &value["tool_calls"] {
            Value::Null => Some(Vec::new()),
            Value::Array(calls) => calls.iter().map(call).collect(),
            _ => None,
        };
        let Some(calls) = calls else {
            let expected = "a list of {\"function\": {\"name\", \"arguments\"}}, the arguments an object in a string";
            return Err(refuse("tool_calls", expected));
        };
        let part = |part: &Value| match part["type"].as_str() {
            Some("text") => part["text"].as_str().map(String::from),
            _ => None,
        };
        let content = match &value["content"] {
            Value::String(text) => Some(text.clone()),
            Value::Array(parts) => parts.iter().map(part).collect(),
            Value::Null if !calls.is_empty() => Some(String::new()),
            _ => None,
        };
        let content = content
            .ok_or_else(|| refuse("content", "a string or a list of parts of the type `text`"))?;
        Ok(Self { role: role.to_owned(), content, calls })
    }

    /// As chat templates that know tools take it: with arguments as objects.
    fn to_json(&self) -> Value {
        let Self { role, content, calls } = self;
        if calls.is_empty() {
            return json!({"role": role, "content": content});
        }
        let call = |Call { name, arguments }: &Call| {
            let arguments: Value = serde_json::from_str(arguments).unwrap_or_default();
            json!({"type": "function", "function": {"name": name, "arguments": arguments}})
        };
        let calls = Vec::from_iter(calls.iter().map(call));
        json!({"role": role, "content": content, "tool_calls": calls})
    }
}

/// A call of an earlier message.
fn call(value: &Value) -> Option<Call> {
    let function = &value["function"];
    let (name, arguments) = (function["name"].as_str()?, function["arguments"].as_str()?);
    let object: Value = serde_json::from_str(arguments).ok()?;
    object.is_object().then(|| Call { name: name.into(), arguments: arguments.into() })
}

/// Messages of the roles that every template knows: functions in the system's, calls in the assistant's, results in the
/// user's.
fn in_words(turns: Vec<Turn>, tools: Option<&Tools>) -> Vec<Message> {
    let mut messages: Vec<Message> = Vec::new();
    let mut after_result = false;
    for Turn { role, content, calls } in turns {
        let texts = (!content.is_empty() || calls.is_empty()).then_some(content);
        let text = Vec::from_iter(texts.into_iter().chain(calls.iter().map(Call::to_text)));
        let mut message = Message::new(role, text.join("\n"));
        let is_result = message.role == "tool";
        if is_result {
            let content = format!("<tool_response>\n{}\n</tool_response>", message.content);
            message = Message::new("user", content);
        }
        match messages.last_mut() {
            Some(last) if is_result && after_result => {
                last.content = format!("{}\n{}", last.content, message.content);
            }
            _ => messages.push(message),
        }
        after_result = is_result;
    }
    let Some(tools) = tools else { return messages };
    match messages.first_mut() {
        Some(first) if first.role == "system" => {
            first.content = format!("{}\n\n{}", first.content, tools.in_words());
        }
        _ => messages.insert(0, Message::new("system", tools.in_words())),
    }
    messages
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::openai::fields::Fields;

    const PLAIN: &str = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}";

    fn tools() -> Tools {
        let function =
            json!({"name": "add", "description": "Adds.", "parameters": {"type": "object"}});
        let body = json!({"tools": [{"type": "function", "function": function}]});
        Tools::read(Fields::new(&body).unwrap()).unwrap().unwrap()
    }

    fn rendered(
        template: &str,
        messages: &Value,
        tools: Option<&Tools>,
    ) -> Result<String, Refusal> {
        prompt(messages, tools, &ChatTemplate::new(template, &Default::default()).unwrap())
    }

    fn conversation() -> Value {
        let call = |arguments: &str| json!({"id": "1", "type": "function", "function": {"name": "add", "arguments": arguments}});
        json!([
            {"role": "user", "content": "Add!"},
            {"role": "assistant", "content": null, "tool_calls": [call("{\"a\":1}"), call("{\"a\": 2}")]},
            {"role": "tool", "tool_call_id": "1", "content": "3"},
            {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "4"}]},
        ])
    }

    #[test]
    fn a_template_that_knows_no_tools_gets_them_in_words() {
        let text = rendered(PLAIN, &conversation(), Some(&tools())).unwrap();
        let (system, rest) = text.split_once("[user]").unwrap();
        assert!(
            system.starts_with("[system]") && system.contains("\"description\":\"Adds.\""),
            "{system}"
        );
        assert_eq!(
            rest,
            "Add![assistant]<tool_call>\n{\"name\": \"add\", \"arguments\": {\"a\":1}}\n</tool_call>\n\
             <tool_call>\n{\"name\": \"add\", \"arguments\": {\"a\": 2}}\n</tool_call>[user]\
             <tool_response>\n3\n</tool_response>\n<tool_response>\n4\n</tool_response>"
        );
        let with_system =
            json!([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]);
        let text = rendered(PLAIN, &with_system, Some(&tools())).unwrap();
        assert!(
            text.starts_with("[system]Be kind.\n\n") && text.matches("[system]").count() == 1,
            "{text}"
        );
        assert_eq!(rendered(PLAIN, &with_system, None).unwrap(), "[system]Be kind.[user]Hi");
    }

    #[test]
    fn a_template_that_knows_them_writes_them() {
        let template = "{{ tools | tojson if tools else 'none' }} <tool_call>{% for m in messages %}[{{ m.role }}]{{ m.content }}\
                        {% for c in m.tool_calls %}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}";
        let text = rendered(template, &conversation(), Some(&tools())).unwrap();
        assert!(
            text.starts_with("[{\"type\": \"function\", \"function\": {\"name\": \"add\""),
            "{text}"
        );
        assert!(
            text.ends_with("[user]Add![assistant]{\"a\": 1}{\"a\": 2}[tool]3[tool]4"),
            "{text}"
        );
        assert!(rendered(template, &conversation(), None).unwrap().starts_with("none"));
    }

    #[test]
    fn what_is_no_message_is_named() {
        for (message, param) in [
            (json!({"content": "a"}), "messages[0].role"),
            (json!({"role": "user"}), "messages[0].content"),
            (
                json!({"role": "assistant", "content": null, "tool_calls": []}),
                "messages[0].content",
            ),
            (
                json!({"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "["}}]}),
                "messages[0].tool_calls",
            ),
            (json!({"role": "assistant", "tool_calls": {}}), "messages[0].tool_calls"),
        ] {
            let refusal = rendered(PLAIN, &json!([message]), None).unwrap_err();
            assert_eq!(refusal.param.as_deref(), Some(param), "{}", refusal.message);
        }
        assert_eq!(rendered(PLAIN, &json!("Hi"), None).unwrap_err().param.as_deref(), Some(NAME));
    }
}
