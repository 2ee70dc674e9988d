//! OpenAI's wire format: what a request asks for, and what is answered.

mod answer;
mod conversation;
mod embeddings;
mod fields;
mod format;
#[cfg(test)]
mod mutated;
mod request;
pub mod responses;
mod stream;
mod tools;

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

pub use self::{
    answer::{Choice, answer},
    request::{Asked, Lengths, Reader},
    stream::Chunks,
};

/// An id that nothing else has.
pub fn unique() -> String {
    format!("{:032x}", rand::random::<u128>())
}

/// Seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// Where a request goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// `/v1/chat/completions`
    Chat,
    /// `/v1/completions`
    Completion,
}

impl Route {
    /// What ids of its answers begin with.
    fn kind(self) -> &'static str {
        match self {
            Self::Chat => "chatcmpl",
            Self::Completion => "cmpl",
        }
    }

    /// The route of this path.
    pub fn of(path: &str) -> Option<Self> {
        match path {
            "/v1/chat/completions" => Some(Self::Chat),
            "/v1/completions" => Some(Self::Completion),
            _ => None,
        }
    }
}

/// Why a request is not answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// What is wrong and what to do.
    pub message: String,
    /// The field that is wrong.
    pub param: Option<String>,
}

impl Refusal {
    /// Of a field.
    pub fn of(param: &str, message: impl Into<String>) -> Self {
        Self { message: message.into(), param: Some(param.into()) }
    }

    /// As OpenAI words it.
    pub fn to_json(&self) -> Value {
        let Self { message, param } = self;
        json!({"error": {"message": message, "type": "invalid_request_error", "param": param, "code": null}})
    }
}
