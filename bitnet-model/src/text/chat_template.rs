//! Conversations to prompts: Jinja chat templates, rendered as transformers' `apply_chat_template` does.
//!
//! The environment is that of transformers' `_compile_jinja_template`: `trim_blocks`, `lstrip_blocks`, loop
//! controls, `raise_exception`, `strftime_now`, a `tojson` without HTML escapes, `{% generation %}` blocks,
//! and the Python methods that templates call. Tools and documents are not passed.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    sync::{
        Arc,
        mpsc::{self, RecvTimeoutError},
    },
    thread,
    time::Duration,
};

use minijinja::{Environment, Error as TemplateError, ErrorKind, Value, context, syntax::SyntaxConfig};
use serde::{Deserialize, Serialize};

use super::python;
use crate::{Error, Result};

/// The work one rendering may do, in minijinja's unit: an instruction or 64 bytes. Real templates take about
/// 100 for a message and 1 for 10 bytes of it, so this lasts for megabytes; a hostile one stops within a
/// fraction of a second and about 64 MB.
const FUEL: u64 = 1_000_000;

/// Far above the longest real templates (about 20 KiB). It bounds the compiler's recursion.
const MAX_SOURCE_BYTES: usize = 128 << 10;

/// minijinja recurses over long operator chains and deeply nested values: this is room for the longest chain
/// of [`MAX_SOURCE_BYTES`] and the deepest value of [`FUEL`]. Untouched stack takes no memory.
const STACK_BYTES: usize = 256 << 20;

/// The last resort for work that fuel does not count, such as comparing lists that share their parts.
const DEADLINE: Duration = Duration::from_secs(10);

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

/// A compiled chat template. Templates are untrusted: compiling and rendering are bounded in time and memory.
///
/// ```
/// use bitnet_model::text::{ChatTemplate, Message};
///
/// let source = "{% for m in messages %}{{ m.role | capitalize }}: {{ m.content }}{{ eos_token }}{% endfor %}";
/// let template = ChatTemplate::new(source, &[("eos_token".into(), "</s>".into())].into())?;
/// assert_eq!(template.render(&[Message::new("user", "hi")], false)?, "User: hi</s>");
/// # Ok::<(), bitnet_model::Error>(())
/// ```
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Arc<Environment<'static>>,
    special_tokens: BTreeMap<String, String>,
}

impl ChatTemplate {
    /// Compiles Jinja source. `special_tokens` are variables of the template: `bos_token`, `eos_token`, ….
    pub fn new(source: &str, special_tokens: &BTreeMap<String, String>) -> Result<Self> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(describe)?);
        environment.set_fuel(Some(FUEL));
        environment.set_debug(true); // errors say which value is undefined
        environment.set_unknown_method_callback(python::method);
        environment.add_filter("tojson", python::tojson);
        environment.add_filter("trim", python::trim);
        environment.add_function("raise_exception", |message: String| -> Result<(), TemplateError> {
            Err(TemplateError::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", |format: &str| {
            python::strftime(format, chrono::Local::now())
        });
        if source.len() > MAX_SOURCE_BYTES {
            let limit = MAX_SOURCE_BYTES >> 10;
            return Err(Error::Tokenizer(format!("chat template: longer than {limit} KiB")));
        }
        let source = source.replace("\r\n", "\n").replace('\r', "\n"); // as Jinja2's lexer does
        let source = generation_blocks_as_scopes(&source).into_owned();
        let environment = isolated(move || {
            environment.add_template_owned(NAME, source).map_err(describe)?;
            Ok(environment)
        })?;
        Ok(Self { environment: Arc::new(environment), special_tokens: special_tokens.clone() })
    }

    /// The prompt for a conversation. `add_generation_prompt` adds the opening of the assistant's turn.
    ///
    /// # Errors
    /// If the template refuses the conversation (`raise_exception`), fails, or does more work than any
    /// honest template needs; the message has the template's line.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let messages: Value = messages
            .iter()
            .map(|Message { role, content }| context! { role, content })
            .collect();
        let variables = context! {
            messages, add_generation_prompt, tools => (), documents => (),
            ..Value::from(self.special_tokens.clone())
        };
        let environment = Arc::clone(&self.environment);
        isolated(move || {
            environment.get_template(NAME).and_then(|t| t.render(variables)).map_err(describe)
        })
    }
}

/// Runs `work` where a deep recursion, a panic or an endless loop of the template engine cannot harm the caller.
fn isolated<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let failed = |reason: &str| Error::Tokenizer(format!("chat template: {reason}"));
    let (sender, receiver) = mpsc::channel();
    let worker = move || {
        let _ = sender.send(work()); // nobody listens after the deadline
    };
    let thread = thread::Builder::new().name(NAME.into()).stack_size(STACK_BYTES);
    thread.spawn(worker).map_err(|e| failed(&format!("no thread to render it in: {e}")))?;
    receiver.recv_timeout(DEADLINE).unwrap_or_else(|error| {
        Err(failed(match error {
            RecvTimeoutError::Timeout => "takes too long",
            RecvTimeoutError::Disconnected => "the template engine failed on it",
        }))
    })
}

/// The template's name in its environment: no extension, so nothing is escaped.
const NAME: &str = "chat template";

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

/// `{% generation %}` marks the assistant's tokens for training and prints its block unchanged, so it
/// becomes `{% with %}`, which is a scope and nothing else.
fn generation_blocks_as_scopes(source: &str) -> Cow<'_, str> {
    if !source.contains("generation") {
        return source.into();
    }
    let mut out = String::with_capacity(source.len());
    for (n, part) in source.split("{%").enumerate() {
        if n > 0 {
            out.push_str("{%");
        }
        let sign = usize::from(n > 0 && part.starts_with(['-', '+']));
        let tag = part[sign..].trim_start();
        let tags = [("generation", "with"), ("endgeneration", "endwith")];
        let replaced = tags.iter().filter(|_| n > 0).find_map(|(from, to)| {
            let after = tag.strip_prefix(from)?;
            let closes = after.trim_start().trim_start_matches(['-', '+']).starts_with("%}");
            closes.then(|| format!("{} {to}{after}", &part[..sign]))
        });
        out.push_str(replaced.as_deref().unwrap_or(part));
    }
    out.into()
}
