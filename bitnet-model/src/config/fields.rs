//! Typed access to the fields of a JSON object, with errors that name file, field and value.

use std::{fs::File, io::Read, path::Path};

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// Real ones are a few kilobytes.
const MAX_FILE_BYTES: u64 = 4 << 20;

/// The text of a configuration file.
pub(crate) fn read_text(path: &Path) -> Result<String> {
    let mut text = String::new();
    let file = File::open(path).map_err(Error::io(path))?;
    file.take(MAX_FILE_BYTES + 1).read_to_string(&mut text).map_err(Error::io(path))?;
    if text.len() as u64 > MAX_FILE_BYTES {
        let reason = format!("larger than {MAX_FILE_BYTES} bytes: not a configuration file");
        return Err(Error::Checkpoint { path: path.into(), reason });
    }
    Ok(text)
}

/// Parses the text of a file as one JSON object.
pub(crate) fn parse_object(path: &Path, json: &str) -> Result<Map<String, Value>> {
    serde_json::from_str(json).map_err(|e| Error::Checkpoint {
        path: path.into(),
        reason: format!("not a JSON object: {e}"),
    })
}

/// A JSON object of a file. A null field is an absent one.
#[derive(Clone, Copy)]
pub(crate) struct Fields<'a> {
    path: &'a Path,
    /// `quantization_config.` in front of nested names.
    prefix: &'a str,
    object: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    pub fn new(path: &'a Path, object: &'a Map<String, Value>) -> Self {
        Self { path, prefix: "", object }
    }

    pub fn has(&self, name: &str) -> bool {
        self.value(name).is_some()
    }

    pub fn integer(&self, name: &str) -> Result<Option<u64>> {
        self.typed(name, "a non-negative integer", Value::as_u64)
    }

    pub fn number(&self, name: &str) -> Result<Option<f64>> {
        self.typed(name, "a number", Value::as_f64)
    }

    pub fn boolean(&self, name: &str) -> Result<Option<bool>> {
        self.typed(name, "true or false", Value::as_bool)
    }

    pub fn string(&self, name: &str) -> Result<Option<&'a str>> {
        self.typed(name, "a string", Value::as_str)
    }

    pub fn strings(&self, name: &str) -> Result<Vec<&'a str>> {
        let read = |value: &'a Value| value.as_array()?.iter().map(Value::as_str).collect();
        Ok(self.typed(name, "a list of strings", read)?.unwrap_or_default())
    }

    /// A nested object; `prefix` is its name and a dot.
    pub fn object(&self, name: &str, prefix: &'static str) -> Result<Option<Fields<'a>>> {
        let object = self.typed(name, "an object", Value::as_object)?;
        Ok(object.map(|object| Fields { path: self.path, prefix, object }))
    }

    /// The names and values of this object.
    pub fn entries(&self) -> impl Iterator<Item = (&'a str, &'a Value)> {
        self.object.iter().map(|(name, value)| (name.as_str(), value))
    }

    pub fn token_id(&self, name: &str) -> Result<Option<u32>> {
        self.typed(name, "a token id", token_id)
    }

    /// One token id or a list of them.
    pub fn token_ids(&self, name: &str) -> Result<Vec<u32>> {
        let read = |value: &Value| match value {
            Value::Array(ids) => ids.iter().map(token_id).collect(),
            one => Some(vec![token_id(one)?]),
        };
        Ok(self.typed(name, "a token id or a list of them", read)?.unwrap_or_default())
    }

    /// An error about a field.
    pub fn error(&self, name: &str, reason: impl Into<String>) -> Error {
        let field = format!("{}{name}", self.prefix);
        Error::Config { path: self.path.into(), field, reason: reason.into() }
    }

    /// The error for a value outside of what is `supported`.
    pub fn unsupported(&self, name: &str, supported: &str) -> Error {
        self.error(name, format!("{}; supported: {supported}", self.shown(name)))
    }

    fn value(&self, name: &str) -> Option<&'a Value> {
        self.object.get(name).filter(|value| !value.is_null())
    }

    fn typed<T>(
        &self,
        name: &str,
        expected: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.value(name) else { return Ok(None) };
        let read = read(value);
        read.map(Some).ok_or_else(|| {
            self.error(name, format!("expected {expected}, found {}", self.shown(name)))
        })
    }

    /// The value for a message, cut to a readable length.
    fn shown(&self, name: &str) -> String {
        const MAX_CHARS: usize = 80;
        let Some(value) = self.value(name) else { return "missing".into() };
        let text = value.to_string();
        match text.char_indices().nth(MAX_CHARS) {
            Some((end, _)) => format!("{}…", &text[..end]),
            None => text,
        }
    }
}

fn token_id(value: &Value) -> Option<u32> {
    value.as_u64()?.try_into().ok()
}
