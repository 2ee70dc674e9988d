//! What becomes of the records of a file.

use std::{ops::ControlFlow, path::Path};

use serde_json::Value;

use crate::Error;

/// Takes the records of a file, one after another.
pub(crate) trait RecordSink {
    /// Takes a record, and may break off.
    fn take(&mut self, record: Value) -> Result<ControlFlow<()>, Refusal>;

    /// Whether reading goes on after what is no record that can be taken: `place` is where in the file, `reason` what is
    /// wrong.
    fn skips(&mut self, _path: &Path, _place: &str, _reason: &str) -> bool {
        false
    }
}

/// Why a record was not taken.
#[derive(Debug)]
pub(crate) enum Refusal {
    /// Something is wrong with it.
    Malformed(String),
    /// Something is wrong with the world.
    Failed(Error),
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

/// Hands on the text of each record: of an object the one under `field`; null is no text.
pub(super) struct Texts<'a, 'b> {
    pub field: &'a str,
    pub sink: &'a mut super::Sink<'b>,
}

impl RecordSink for Texts<'_, '_> {
    fn take(&mut self, record: Value) -> Result<ControlFlow<()>, Refusal> {
        let text = text(record, self.field).map_err(Refusal::Malformed)?;
        Ok((self.sink)(text)?)
    }
}

fn text(record: Value, field: &str) -> Result<String, String> {
    let value = match record {
        Value::Object(mut object) => match object.remove(field) {
            Some(value) => value,
            None => {
                let only = keys(object.keys().map(String::as_str));
                return Err(format!(
                    "the record has no `{field}`, only {only}; name the key of its text in `field`"
                ));
            }
        },
        value @ Value::String(_) => value,
        other => {
            return Err(format!("a record must be an object or a string, not {}", kind(&other)));
        }
    };
    match value {
        Value::String(text) => Ok(text),
        Value::Null => Ok(String::new()),
        other => Err(format!("`{field}` must be a string, not {}", kind(&other))),
    }
}

/// The first few of the keys of a record, for messages.
pub(crate) fn keys<'a>(keys: impl Iterator<Item = &'a str>) -> String {
    let keys: Vec<String> = keys.take(8).map(|key| format!("`{}`", key.escape_debug())).collect();
    if keys.is_empty() { "nothing".into() } else { keys.join(", ") }
}

/// What a value is, for messages.
pub(crate) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}
