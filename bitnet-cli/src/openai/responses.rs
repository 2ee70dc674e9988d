//! `/v1/responses`: requests of it as those of `/v1/chat/completions`, and answers in its words.

use serde_json::{Map, Value, json};

use super::{
    Asked, Choice, Refusal,
    answer::usage,
    fields::{Fields, wrong},
};

/// Fields that mean the same in both, extensions included.
const SAME: [&str; 13] = [
    "model",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
    "seed",
    "stop",
    "stream",
    "user",
];
/// What a server that keeps no conversations and calls no tools cannot do.
const REFUSED: [&str; 7] = [
    "tools",
    "previous_response_id",
    "conversation",
    "background",
    "prompt",
    "include",
    "top_logprobs",
];

/// The request as one for a chat completion.
///
/// # Errors
/// The first field that cannot be answered.
pub fn to_chat(body: &Value) -> Result<Value, Refusal> {
    let fields = Fields::new(body)?;
    for name in REFUSED {
        fields.refuse(name)?;
    }
    let mut chat = Map::new();
    for name in SAME {
        chat.extend(fields.any(name).map(|value| (name.to_owned(), value.clone())));
    }
    if let Some(length) = fields.count("max_output_tokens")? {
        chat.insert("max_completion_tokens".into(), length.into());
    }
    if let Some(text) = fields.any("text") {
        chat.extend(format(text)?.map(|format| ("response_format".to_owned(), format)));
    }
    let mut messages = Vec::new();
    if let Some(instructions) = fields.text("instructions")? {
        messages.push(json!({"role": "system", "content": instructions}));
    }
    match fields.any("input") {
        Some(Value::String(text)) => messages.push(json!({"role": "user", "content": text})),
        Some(Value::Array(items)) => {
            let items = items.iter().enumerate().map(|(index, item)| message(index, item));
            messages.extend(items.collect::<Result<Vec<_>, _>>()?);
        }
        Some(input) => return Err(wrong("input", input, "a string or a list of messages")),
        None => return Err(Refusal::of("input", "there is no `input`")),
    }
    chat.insert("messages".into(), messages.into());
    Ok(chat.into())
}

/// `text.format`, which has a schema beside its type, as `response_format`.
fn format(text: &Value) -> Result<Option<Value>, Refusal> {
    const NAME: &str = "text.format";
    if !text.is_object() {
        return Err(wrong("text", text, "an object"));
    }
    let format = match &text["format"] {
        Value::Null => return Ok(None),
        Value::Object(format) => format,
        format => return Err(wrong(NAME, format, "an object")),
    };
    if format.get("type").is_some_and(|kind| kind == "json_schema") {
        let schema: Map<_, _> =
            format.clone().into_iter().filter(|(name, _)| name != "type").collect();
        return Ok(Some(json!({"type": "json_schema", "json_schema": schema})));
    }
    Ok(Some(format.clone().into()))
}

/// An item of the input.
fn message(index: usize, item: &Value) -> Result<Value, Refusal> {
    let refuse = |field: &str, expected: &str| {
        let name = format!("input[{index}]{field}");
        Refusal::of(&name, format!("`{name}` must be {expected}"))
    };
    if !item.is_object() || !matches!(item["type"].as_str(), Some("message") | None) {
        return Err(refuse("", "a message"));
    }
    let role = match item["role"].as_str() {
        Some("developer") => "system",
        Some(role) => role,
        None => return Err(refuse(".role", "a string")),
    };
    let part = |part: &Value| {
        let is_text = matches!(part["type"].as_str(), Some("input_text" | "output_text" | "text"));
        part["text"].as_str().filter(|_| is_text).map(String::from)
    };
    let content = match &item["content"] {
        Value::String(text) => Some(text.clone()),
        Value::Array(parts) => parts.iter().map(part).collect(),
        _ => None,
    };
    let expected = "a string or a list of parts of the type `input_text`";
    let content = content.ok_or_else(|| refuse(".content", expected))?;
    Ok(json!({"role": role, "content": content}))
}

/// What of a response changes while it comes.
#[derive(Clone, Debug)]
pub struct Response {
    id: String,
    created: u64,
    /// Fields of the request that a response repeats.
    repeated: Map<String, Value>,
}

impl Response {
    /// To a request. `id` is a unique part of its id, `created` in seconds since 1970.
    pub fn new(body: &Value, (id, created): (&str, u64)) -> Self {
        let defaults = [
            ("instructions", Value::Null),
            ("max_output_tokens", Value::Null),
            ("metadata", json!({})),
            ("temperature", Value::Null),
            ("top_p", Value::Null),
            ("text", json!({"format": {"type": "text"}})),
            ("user", Value::Null),
        ];
        let value = |(name, default): (&str, Value)| {
            let given = body.get(name).filter(|value| !value.is_null());
            (name.to_owned(), given.cloned().unwrap_or(default))
        };
        let repeated = defaults.into_iter().map(value).collect();
        Self { id: id.to_owned(), created, repeated }
    }

    /// The response as it is now.
    pub fn to_json(&self, asked: &Asked, choices: &[Choice]) -> Value {
        let choice = choices.first().filter(|choice| choice.is_ended());
        let reason = choice.map(|choice| choice.finish_reason(false));
        let (status, incomplete) = match reason.as_ref().and_then(Value::as_str) {
            None => ("in_progress", Value::Null),
            Some("length") => ("incomplete", json!({"reason": "max_output_tokens"})),
            Some("content_filter") => ("incomplete", json!({"reason": "content_filter"})),
            Some("error") => ("failed", Value::Null),
            Some(_) => ("completed", Value::Null),
        };
        let output = choice.map(|choice| self.item(status, &[self.part(choice.text())]));
        let usage = choice.map(|_| {
            let usage = usage(asked, choices);
            json!({
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": usage["prompt_tokens_details"],
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_tokens"],
            })
        });
        let mut response = json!({
            "id": format!("resp_{}", self.id),
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": null,
            "incomplete_details": incomplete,
            "model": asked.model,
            "output": Vec::from_iter(output),
            "usage": usage,
            "parallel_tool_calls": true,
            "previous_response_id": null,
            "reasoning": {"effort": null, "summary": null},
            "store": false,
            "tool_choice": "auto",
            "tools": [],
            "truncation": "disabled",
        });
        if let Some(fields) = response.as_object_mut() {
            fields.extend(self.repeated.clone());
        }
        response
    }

    /// The message in the output.
    pub fn item(&self, status: &str, content: &[Value]) -> Value {
        json!({"id": self.item_id(), "type": "message", "status": status, "role": "assistant", "content": content})
    }

    /// The text in the message.
    pub fn part(&self, text: &str) -> Value {
        json!({"type": "output_text", "text": text, "annotations": [], "logprobs": []})
    }

    /// Of the message.
    pub fn item_id(&self) -> String {
        format!("msg_{}", self.id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_response_is_asked_as_a_chat() {
        let parts =
            json!([{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]);
        let schema = json!({"type": "json_schema", "name": "n", "schema": {"type": "object"}});
        let chat = to_chat(&json!({
            "model": "m", "instructions": "Be brief.", "max_output_tokens": 5, "text": {"format": schema}, "store": true,
            "input": [{"role": "developer", "content": "x"}, {"type": "message", "role": "user", "content": parts}],
        }));
        let expected = json!({
            "model": "m", "max_completion_tokens": 5,
            "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}},
            "messages": [
                {"role": "system", "content": "Be brief."}, {"role": "system", "content": "x"},
                {"role": "user", "content": "ab"},
            ],
        });
        assert_eq!(chat, Ok(expected));
        let param = |body: Value| to_chat(&body).unwrap_err().param.unwrap();
        assert_eq!(param(json!({})), "input");
        assert_eq!(param(json!({"input": 1})), "input");
        assert_eq!(param(json!({"input": [{"type": "function_call"}]})), "input[0]");
        assert_eq!(
            param(json!({"input": [{"role": "user", "content": [{"type": "input_image"}]}]})),
            "input[0].content"
        );
        assert_eq!(
            param(json!({"input": "", "previous_response_id": "x"})),
            "previous_response_id"
        );
        assert_eq!(param(json!({"input": "", "text": {"format": 3}})), "text.format");
    }
}
