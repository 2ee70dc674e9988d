//! Conversations to prompts: Jinja chat templates, rendered as transformers' `apply_chat_template`
//! does.
//!
//! The environment is that of transformers' `_compile_jinja_template`: `trim_blocks`,
//! `lstrip_blocks`, loop controls, `raise_exception`, `strftime_now`, a `tojson` without HTML
//! escapes, `{% generation %}` blocks, and the methods of Python's types that templates call. Left
//! out: tools and documents (always none), `%` on strings, and filters and globals for web pages
//! (`center`, `truncate`, `wordcount`, `cycler`, `lipsum`, …).

use std::{collections::BTreeMap, sync::Arc};

use minijinja::{
    Environment, Error as TemplateError, ErrorKind, State, Value, context, syntax::SyntaxConfig,
    value::Kwargs,
};
use serde::{Deserialize, Serialize};

use super::{python, sandbox};
use crate::{Error, Result};

/// The template's name in its environment: no extension, so nothing is escaped.
const NAME: &str = "chat template";

/// Stand around what a `{% generation %}` block prints: characters that are kept free for such internal use, and that no
/// text has.
pub(super) const MARKS: [char; 2] = ['\u{fdd0}', '\u{fdd1}'];

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks: `system`, `user` or `assistant`, as far as the template knows them.
    pub role: String,
    /// What is said.
    pub content: String,
}

impl Message {
    /// A message of `role`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// A compiled chat template. Templates are untrusted: what they can do is bounded in time and
/// memory.
///
/// ```
/// use bitnet_model::text::{ChatTemplate, Message};
///
/// let source = "{% for m in messages %}{{ m.role | title }}: {{ m.content ~ eos_token }}{% endfor %}";
/// let template = ChatTemplate::new(source, &[("eos_token".into(), "</s>".into())].into())?;
/// assert_eq!(template.render(&[Message::new("user", "hi")], false)?, "User: hi</s>");
/// # Ok::<(), bitnet_model::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    source: Arc<str>,
    environment: Arc<Environment<'static>>,
    /// It has `{% generation %}` blocks.
    is_marked: bool,
    /// It has the variable `tools`.
    takes_tools: bool,
    special_tokens: Arc<BTreeMap<String, String>>,
}

impl ChatTemplate {
    /// Compiles Jinja source. `special_tokens` are variables of the template: `bos_token`,
    /// `eos_token`, ….
    pub fn new(source: &str, special_tokens: &BTreeMap<String, String>) -> Result<Self> {
        let (original, source) = (Arc::from(source), sandbox::prepare(source)?);
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(describe)?);
        environment.set_debug(true); // errors say which value is undefined
        environment.set_unknown_method_callback(python::method);
        environment.add_filter("tojson", python::tojson);
        environment.add_filter("trim", python::trim);
        environment.add_function(
            "raise_exception",
            |message: String| -> Result<(), TemplateError> {
                Err(TemplateError::new(ErrorKind::InvalidOperation, message))
            },
        );
        environment.add_function("strftime_now", |format: &str| {
            python::strftime(format, chrono::Local::now())
        });
        environment.add_function(
            sandbox::GENERATION,
            |state: &mut State, block: Kwargs| -> Result<String, TemplateError> {
                let printed = block.get::<Value>("caller")?.call(state, &[])?;
                let [begin, end] = MARKS;
                Ok(format!("{begin}{printed}{end}"))
            },
        );
        sandbox::limit(&mut environment);
        let is_marked = source.contains(sandbox::GENERATION);
        let (environment, takes_tools) = sandbox::isolated(move || {
            environment.add_template_owned(NAME, source).map_err(describe)?;
            let template = environment.get_template(NAME).map_err(describe)?;
            let takes_tools = template.undeclared_variables(false).contains("tools");
            Ok((Arc::new(environment), takes_tools))
        })?;
        Ok(Self {
            source: original,
            environment,
            is_marked,
            takes_tools,
            special_tokens: Arc::new(special_tokens.clone()),
        })
    }

    /// The Jinja source.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The prompt for a conversation. `add_generation_prompt` adds the opening of the assistant's
    /// turn.
    ///
    /// # Errors
    /// If the template refuses the conversation (`raise_exception`), fails, or does more work than
    /// any honest template needs; the message has the template's line.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let text = self.render_marked(messages, add_generation_prompt)?;
        Ok(if self.is_marked { text.replace(MARKS, "") } else { text })
    }

    /// Whether it presents tools, and calls of them with this mark.
    pub fn calls_tools(&self, mark: &str) -> bool {
        let template = self.environment.get_template(NAME);
        self.takes_tools && template.is_ok_and(|template| template.source().contains(mark))
    }

    /// As [`render`](Self::render), with the tools that the model may call and messages of any fields, both as transformers'
    /// `apply_chat_template` takes them.
    pub fn render_with_tools(
        &self,
        messages: &serde_json::Value,
        tools: Option<&serde_json::Value>,
        add_generation_prompt: bool,
    ) -> Result<String> {
        let tools = tools.map_or(Value::from(()), value);
        let text = self.run(value(messages), tools, add_generation_prompt)?;
        Ok(text.replace(MARKS, ""))
    }

    /// Whether `{% generation %}` blocks say what the assistant writes.
    pub(super) fn is_marked(&self) -> bool {
        self.is_marked
    }

    /// As [`render`](Self::render), with [`MARKS`] around what `{% generation %}` blocks print.
    pub(super) fn render_marked(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<String> {
        let messages: Value =
            messages.iter().map(|Message { role, content }| context! { role, content }).collect();
        self.run(messages, Value::from(()), add_generation_prompt)
    }

    fn run(&self, messages: Value, tools: Value, add_generation_prompt: bool) -> Result<String> {
        let template = self.clone();
        sandbox::isolated(move || {
            let variables = context! {
                messages, add_generation_prompt, tools, documents => (),
                ..Value::from(BTreeMap::clone(&template.special_tokens))
            };
            let compiled = template.environment.get_template(NAME);
            compiled.and_then(|compiled| compiled.render(variables)).map_err(describe)
        })
    }
}

/// JSON as templates see it. minijinja's own conversion comes with its feature `serde`, which nothing else needs.
fn value(json: &serde_json::Value) -> Value {
    use serde_json::Value::{Array, Bool, Null, Number, Object, String};
    match json {
        Null => Value::from(()),
        Bool(truth) => Value::from(*truth),
        Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(number), _) => Value::from(number),
            (None, Some(number)) => Value::from(number),
            (None, None) => Value::from(number.as_f64()),
        },
        String(text) => Value::from(text.as_str()),
        Array(items) => items.iter().map(value).collect(),
        Object(fields) => {
            Value::from_pairs(fields.iter().map(|(name, field)| (name.as_str(), value(field))))
        }
    }
}

fn describe(error: TemplateError) -> Error {
    let line = error.line().map(|line| format!(", line {line}")).unwrap_or_default();
    let reason = match (error.kind(), error.detail()) {
        (ErrorKind::InvalidOperation, Some(detail)) => detail.to_owned(),
        (ErrorKind::OutOfFuel, _) => "takes too many steps".into(),
        (kind, Some(detail)) => format!("{kind}: {detail}"),
        (kind, None) => kind.to_string(),
    };
    Error::Tokenizer(format!("chat template{line}: {reason}"))
}
