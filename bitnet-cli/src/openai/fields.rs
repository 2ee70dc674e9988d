//! The fields of a request, by name: absent or null is not given, another type than expected is refused.

use serde_json::{Map, Value};

use super::Refusal;

/// The body of a request.
#[derive(Clone, Copy)]
pub struct Fields<'a>(&'a Map<String, Value>);

impl<'a> Fields<'a> {
    /// The fields of `body`.
    ///
    /// # Errors
    /// What is no object.
    pub fn new(body: &'a Value) -> Result<Self, Refusal> {
        let object = body.as_object();
        object.map(Self).ok_or_else(|| Refusal {
            message: format!("the body is {}, but must be an object", kind(body)),
            param: None,
        })
    }

    /// A field of any type.
    pub fn any(&self, name: &str) -> Option<&'a Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    fn read<T>(
        &self,
        name: &str,
        expected: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, Refusal> {
        let Some(value) = self.any(name) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| wrong(name, value, expected))
    }

    /// A number.
    pub fn number(&self, name: &str) -> Result<Option<f32>, Refusal> {
        Ok(self.read(name, "a number", Value::as_f64)?.map(|value| value as f32))
    }

    /// A whole number that is not negative.
    pub fn count(&self, name: &str) -> Result<Option<u64>, Refusal> {
        self.read(name, "a whole number that is not negative", Value::as_u64)
    }

    /// A whole number of 64 bits, with or without a sign.
    pub fn bits(&self, name: &str) -> Result<Option<u64>, Refusal> {
        let read = |value: &Value| value.as_u64().or_else(|| Some(value.as_i64()? as u64));
        self.read(name, "a whole number of 64 bits", read)
    }

    /// A truth value.
    pub fn flag(&self, name: &str) -> Result<Option<bool>, Refusal> {
        self.read(name, "true or false", Value::as_bool)
    }

    /// A text.
    pub fn text(&self, name: &str) -> Result<Option<&'a str>, Refusal> {
        self.read(name, "a string", Value::as_str)
    }

    /// A text or a list of texts.
    pub fn texts(&self, name: &str) -> Result<Vec<String>, Refusal> {
        let read = |value: &Value| match value {
            Value::String(text) => Some(vec![text.clone()]),
            Value::Array(texts) => {
                texts.iter().map(|text| text.as_str().map(String::from)).collect()
            }
            _ => None,
        };
        Ok(self.read(name, "a string or a list of strings", read)?.unwrap_or_default())
    }

    /// Refuses what is not supported, unless it says nothing: false, an empty list or object.
    pub fn refuse(&self, name: &str) -> Result<(), Refusal> {
        let says_something = |value: &&Value| match value {
            Value::Bool(value) => *value,
            Value::Array(values) => !values.is_empty(),
            Value::Object(values) => !values.is_empty(),
            _ => true,
        };
        match self.any(name).filter(says_something) {
            Some(_) => Err(Refusal::of(name, format!("`{name}` is not supported: leave it out"))),
            None => Ok(()),
        }
    }
}

/// A refusal of a value of another type than expected.
pub fn wrong(name: &str, value: &Value, expected: &str) -> Refusal {
    Refusal::of(name, format!("`{name}` is {}, but must be {expected}", kind(value)))
}

fn kind(value: &Value) -> String {
    match value {
        Value::Null => "null".into(),
        Value::Bool(value) => value.to_string(),
        Value::Number(value) => value.to_string(),
        Value::String(_) => "a string".into(),
        Value::Array(_) => "a list".into(),
        Value::Object(_) => "an object".into(),
    }
}
