//! `tools`: functions that a model may call instead of answering.
//!
//! A call is written as models learn it from Hermes and Qwen, `<tool_call>`, a line of JSON with `name` and `arguments`,
//! `</tool_call>`, and a grammar lets the model write no other.

use bitnet_model::grammar::{Grammar, GrammarFactory};
use serde_json::{Map, Value, json};

use super::{
    Refusal,
    fields::{Fields, wrong},
};

/// Begins a call.
pub const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";
/// The JSON of a call around its name.
const BEFORE_NAME: &str = "{\"name\": \"";
const BEFORE_ARGUMENTS: &str = "\", \"arguments\": ";

/// The most functions of a request, as OpenAI has it.
const MOST_TOOLS: usize = 128;

/// The functions of a request.
pub struct Tools {
    functions: Vec<Function>,
    must_call: bool,
    may_call_several: bool,
    /// As they were given, a list, for the chat template.
    pub json: Value,
}

struct Function {
    name: String,
    /// Their schema.
    arguments: Value,
}

impl Tools {
    /// The functions that may be called.
    ///
    /// # Errors
    /// What is no list of functions, and a choice that is not among them.
    pub fn read(fields: Fields<'_>) -> Result<Option<Self>, Refusal> {
        let choice = fields.any("tool_choice");
        let Some(tools) = fields.any("tools") else {
            return match choice.and_then(Value::as_str) {
                None if choice.is_some() => Err(unknown_choice()),
                Some("required") => Err(unknown_choice()),
                _ => Ok(None),
            };
        };
        let Some(list) = tools.as_array() else { return Err(wrong("tools", tools, "a list")) };
        if list.len() > MOST_TOOLS {
            let reason = format!("`tools` are {}, but must be at most {MOST_TOOLS}", list.len());
            return Err(Refusal::of("tools", reason));
        }
        let mut functions = Vec::new();
        for (index, tool) in list.iter().enumerate() {
            let function = Function::read(index, tool)?;
            if functions.iter().any(|other: &Function| other.name == function.name) {
                let reason = format!("`tools` has two functions of the name `{}`", function.name);
                return Err(Refusal::of("tools", reason));
            }
            functions.push(function);
        }
        let must_call = match choice {
            None => false,
            Some(Value::String(choice)) => match &choice[..] {
                "none" => return Ok(None),
                "auto" => false,
                "required" => true,
                _ => return Err(unknown_choice()),
            },
            Some(choice) => {
                let name = choice["function"]["name"].as_str();
                functions.retain(|function| Some(&function.name[..]) == name);
                true
            }
        };
        if functions.is_empty() {
            return if must_call { Err(unknown_choice()) } else { Ok(None) };
        }
        let may_call_several = fields.flag("parallel_tool_calls")?.unwrap_or(true);
        Ok(Some(Self { functions, must_call, may_call_several, json: tools.clone() }))
    }

    /// What a model is told whose chat template knows no tools.
    pub fn in_words(&self) -> String {
        let functions = self.json.as_array().into_iter().flatten().map(|tool| &tool["function"]);
        let functions = Vec::from_iter(functions.map(Value::to_string)).join("\n");
        format!(
            "You can call functions. To call one, answer with its name and its arguments:\n{OPEN}\n{}{{…}}}}\n{CLOSE}\nThe \
             functions are:\n{functions}",
            opening("…")
        )
    }

    /// What the model may write: calls, and if it need not call, texts or what `schema` asks for.
    ///
    /// # Errors
    /// Parameters and schemas that cannot be kept to.
    pub fn grammar(
        &self,
        schema: Option<&Value>,
        grammars: &GrammarFactory,
    ) -> Result<Grammar, Refusal> {
        let schema = schema.filter(|_| !self.must_call);
        let start = match (self.must_call, schema) {
            (true, _) => format!("start: {OPEN:?} calls\n"),
            (false, Some(_)) => format!("start: @answer | {OPEN:?} calls\n"),
            (false, None) => format!(
                "start: TEXT | before calls\n\
                 TEXT: /(?s:.*)/ & ~/(?s:.*){OPEN}(?s:.*)/\n\
                 before[suffix={OPEN:?}]: /(?s:.*)/\n"
            ),
        };
        let more =
            if self.may_call_several { format!(" (\"\\n{OPEN}\" call)*") } else { String::new() };
        let functions = self.functions.iter().enumerate();
        let calls = functions.clone().map(|(index, function)| {
            format!("{:?} @arguments_{index} \"}}\"", opening(&function.name))
        });
        let calls = Vec::from_iter(calls).join(" | ");
        let lark = format!("{start}calls: call{more}\ncall: \"\\n\" ({calls}) \"\\n{CLOSE}\"\n");
        let arguments =
            functions.map(|(index, function)| (format!("arguments_{index}"), &function.arguments));
        let answer = schema.map(|schema| ("answer".to_owned(), schema));
        let param = if schema.is_some() { "tools or response_format" } else { "tools" };
        grammars
            .compile(&lark, arguments.chain(answer))
            .map_err(|error| Refusal::of("tools", format!("`{param}`: {error}")))
    }
}

impl Function {
    fn read(index: usize, tool: &Value) -> Result<Self, Refusal> {
        let refuse = |what: &str, reason: &str| {
            Err(Refusal::of("tools", format!("`tools[{index}]{what}` {reason}")))
        };
        if tool["type"] != "function" {
            return refuse(".type", "must be `function`");
        }
        let function = &tool["function"];
        let is_of_name = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
        let name = match function["name"].as_str() {
            Some(name) if (1..=64).contains(&name.len()) && name.chars().all(is_of_name) => name,
            _ => {
                return refuse(
                    ".function.name",
                    "must be 1 to 64 letters, digits, `_`, `-` and `.`",
                );
            }
        };
        let mut arguments = match &function["parameters"] {
            Value::Null => Map::from_iter([
                ("properties".to_owned(), json!({})),
                ("additionalProperties".to_owned(), false.into()),
            ]),
            Value::Object(schema) => schema.clone(),
            _ => return refuse(".function.parameters", "must be the schema of an object"),
        };
        if *arguments.entry("type").or_insert("object".into()) != "object" {
            return refuse(".function.parameters", "must be of the type `object`");
        }
        Ok(Self { name: name.to_owned(), arguments: arguments.into() })
    }
}

fn unknown_choice() -> Refusal {
    let reason = "`tool_choice` must be `none`, `auto`, `required` or {\"type\": \"function\", \"function\": {\"name\": …}} with \
                  the name of one of the `tools`";
    Refusal::of("tool_choice", reason)
}

/// What a call begins with, before its arguments.
fn opening(name: &str) -> String {
    format!("{BEFORE_NAME}{name}{BEFORE_ARGUMENTS}")
}

/// A call of a function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// Of the function.
    pub name: String,
    /// JSON, the beginning of one if the text was cut.
    pub arguments: String,
}

impl Call {
    /// As the model writes it.
    pub fn to_text(&self) -> String {
        let Self { name, arguments } = self;
        format!("{OPEN}\n{}{arguments}}}\n{CLOSE}", opening(name))
    }

    /// As OpenAI words the call of this index; `id` is a unique part of its id.
    pub fn to_json(&self, id: &str, index: usize) -> Value {
        let Self { name, arguments } = self;
        let function = json!({"name": name, "arguments": arguments});
        json!({"id": format!("call_{id}_{index}"), "type": "function", "function": function})
    }
}

/// What a text says before it calls functions, and the calls.
pub fn split(text: &str) -> (&str, Vec<Call>) {
    let Some((before, mut rest)) = text.split_once(OPEN) else { return (text, Vec::new()) };
    let mut calls = Vec::new();
    while let Some((name, after)) = call(rest) {
        let (arguments, after) = after.split_at(object_end(after));
        calls.push(Call { name: name.into(), arguments: arguments.into() });
        let Some((_, next)) = after.split_once(OPEN) else { break };
        rest = next;
    }
    (before.trim_end(), calls)
}

/// The beginning of a text that is no call, whatever follows.
pub fn before_calls(text: &str) -> &str {
    let text = text.split_once(OPEN).map_or(text, |(before, _)| before);
    let may_open = (1..OPEN.len()).rev().find(|len| text.ends_with(&OPEN[..*len]));
    text[..text.len() - may_open.unwrap_or(0)].trim_end()
}

/// The name of the function that a call begins with, and its arguments with what follows.
fn call(text: &str) -> Option<(&str, &str)> {
    text.strip_prefix('\n')?.strip_prefix(BEFORE_NAME)?.split_once(BEFORE_ARGUMENTS)
}

/// Where the object that `text` begins with ends.
fn object_end(text: &str) -> usize {
    let (mut depth, mut in_string, mut escaped) = (0, false, false);
    for (index, byte) in text.bytes().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => in_string = !in_string,
            b'{' if !in_string => depth += 1,
            b'}' if !in_string && depth <= 1 => return index + 1,
            b'}' if !in_string => depth -= 1,
            _ => {}
        }
    }
    text.len()
}

#[cfg(test)]
mod tests {
    use bitnet_model::text::Tokenizer;

    use super::*;

    /// One token for each ASCII character that a text may have.
    fn tokenizer() -> Tokenizer {
        let characters = ('!'..='~').chain(['Ġ', 'Ċ']).map(String::from);
        let vocab = Value::from_iter(characters.zip((0..).map(Value::from)));
        let level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
        let file = json!({
            "version": "1.0", "normalizer": null, "pre_tokenizer": level, "post_processor": null, "decoder": level,
            "added_tokens": [], "model": {"type": "BPE", "vocab": vocab, "merges": []},
        });
        Tokenizer::from_bytes(file.to_string().as_bytes(), None, None).unwrap()
    }

    fn tools(choice: &Value, more: &Value) -> Result<Option<Tools>, Refusal> {
        let place = json!({"type": "object", "properties": {"place": {"$ref": "#/$defs/place"}}, "required": ["place"],
            "additionalProperties": false, "$defs": {"place": {"enum": ["here", "th}e\"re"]}}});
        let mut body = json!({"tool_choice": choice, "tools": [
            {"type": "function", "function": {"name": "weather", "parameters": place}},
            {"type": "function", "function": {"name": "time"}},
        ]});
        for (name, value) in more.as_object().unwrap() {
            body[name] = value.clone();
        }
        Tools::read(Fields::new(&body).unwrap())
    }

    /// How a text fares: nothing if it is not allowed, else whether it may end.
    fn outcome(grammar: &Grammar, text: &str) -> Option<bool> {
        let (tokenizer, end) = (tokenizer(), 1000);
        let mut matcher = grammar.matcher();
        for id in tokenizer.encode(text, false).unwrap() {
            matcher.accept(id).ok()?;
        }
        let mut logits = vec![0.; end as usize + 1];
        matcher.allow(&mut logits, &[end]).unwrap();
        Some(logits[end as usize] == 0.)
    }

    fn grammar(tools: &Tools, schema: Option<&Value>) -> Grammar {
        let grammars = GrammarFactory::new(&tokenizer(), 1001);
        tools.grammar(schema, &grammars).unwrap()
    }

    fn written(name: &str, arguments: &str) -> String {
        Call { name: name.into(), arguments: arguments.into() }.to_text()
    }

    #[test]
    fn a_model_answers_or_calls() {
        let (here, time) = (written("weather", r#"{"place": "here"}"#), written("time", "{}"));
        let auto = tools(&json!("auto"), &json!({})).unwrap().unwrap();
        let grammar = grammar(&auto, None);
        for text in ["It is late.", "a < b", "<tool", &here, &time] {
            assert_eq!(outcome(&grammar, text), Some(true), "{text}");
        }
        assert_eq!(outcome(&grammar, &format!("Let me see. {here}")), Some(true));
        assert_eq!(outcome(&grammar, &format!("{time}\n{here}")), Some(true));
        assert_eq!(outcome(&grammar, &here[..here.len() - 3]), Some(false));
        for text in [
            "<tool_call>nothing",
            &written("rain", "{}"),
            &written("weather", "{}"),
            &written("time", "{\"a\": 1}"),
        ] {
            assert_eq!(outcome(&grammar, text), None, "{text}");
        }
    }

    #[test]
    fn a_model_must_call() {
        let (here, time) = (written("weather", r#"{"place":"here"}"#), written("time", "{}"));
        let required =
            tools(&json!("required"), &json!({"parallel_tool_calls": false})).unwrap().unwrap();
        let required = grammar(&required, None);
        assert_eq!(outcome(&required, &here), Some(true));
        assert_eq!(outcome(&required, &time), Some(true));
        assert_eq!(outcome(&required, &format!("{time}\n{here}")), None, "only one");
        assert_eq!(outcome(&required, "It"), None);
        let named = json!({"type": "function", "function": {"name": "time"}});
        let named =
            grammar(&tools(&named, &json!({})).unwrap().unwrap(), Some(&json!({"type": "null"})));
        assert_eq!(outcome(&named, &time), Some(true));
        assert_eq!(outcome(&named, &here), None);
        assert_eq!(outcome(&named, "null"), None);
    }

    #[test]
    fn answers_may_have_a_form_too() {
        let auto = tools(&Value::Null, &json!({})).unwrap().unwrap();
        let grammar = grammar(&auto, Some(&json!({"type": "boolean"})));
        assert_eq!(outcome(&grammar, "true"), Some(true));
        assert_eq!(outcome(&grammar, &written("time", "{}")), Some(true));
        assert_eq!(outcome(&grammar, "It"), None);
    }

    #[test]
    fn what_is_no_tool_is_named() {
        assert!(tools(&json!("none"), &json!({})).unwrap().is_none());
        assert!(tools(&json!("auto"), &json!({"tools": []})).unwrap().is_none());
        assert!(tools(&json!("auto"), &json!({"tools": null})).unwrap().is_none());
        let function =
            |function: Value| json!({"tools": [{"type": "function", "function": function}]});
        for (choice, more, param, said) in [
            (json!("perhaps"), json!({}), "tool_choice", "`none`"),
            (json!({"function": {"name": "rain"}}), json!({}), "tool_choice", "one of the `tools`"),
            (json!("required"), json!({"tools": null}), "tool_choice", "one of the `tools`"),
            (json!("auto"), json!({"tools": "all"}), "tools", "a list"),
            (json!("auto"), json!({"tools": [{"type": "web_search"}]}), "tools", "`tools[0].type`"),
            (json!("auto"), function(json!({"name": "a b"})), "tools", "function.name"),
            (
                json!("auto"),
                function(json!({"name": "a", "parameters": 1})),
                "tools",
                "schema of an object",
            ),
            (
                json!("auto"),
                function(json!({"name": "a", "parameters": {"type": "array"}})),
                "tools",
                "type `object`",
            ),
            (
                json!("auto"),
                json!({"parallel_tool_calls": 2}),
                "parallel_tool_calls",
                "true or false",
            ),
        ] {
            let refusal = tools(&choice, &more).err().unwrap();
            assert_eq!(refusal.param.as_deref(), Some(param), "{}", refusal.message);
            assert!(refusal.message.contains(said), "{}", refusal.message);
        }
        let wrong =
            function(json!({"name": "a", "parameters": {"properties": {"b": {"not": {}}}}}));
        let tools = tools(&json!("auto"), &wrong).unwrap().unwrap();
        let refusal = tools.grammar(None, &GrammarFactory::new(&tokenizer(), 100)).err().unwrap();
        assert!(refusal.message.contains("\"not\""), "{}", refusal.message);
    }

    #[test]
    fn calls_are_found_in_a_text() {
        let call = |arguments: &str| Call { name: "weather".into(), arguments: arguments.into() };
        let tricky = r#"{"place": "th}e\"re</tool_call>", "more": {"a": []}}"#;
        let (first, second) = (call(tricky), call("{}"));
        let text = format!("Let me see.\n{}\n{}", first.to_text(), second.to_text());
        assert_eq!(split(&text), ("Let me see.", vec![first.clone(), second]));
        assert_eq!(split("a < b"), ("a < b", vec![]));
        let cut = first.to_text();
        assert_eq!(split(&cut[..cut.len() - 20]).1, [call(&tricky[..tricky.len() - 6])]);
        assert_eq!(split(&cut[..30]), ("", vec![]));
        assert_eq!(
            split("<tool_call>\n{\"name\": \"weather\", \"arguments\": "),
            ("", vec![call("")])
        );
    }
}
