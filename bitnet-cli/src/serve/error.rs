//! Errors as OpenAI words them.

use std::time::Duration;

use axum::{
    Json,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde_json::json;

use super::{engine, rates::Exceeded};
use crate::openai::Refusal;

/// Why a request is not answered.
#[derive(Clone, Debug)]
pub struct ApiError {
    status: StatusCode,
    kind: &'static str,
    message: String,
    param: Option<String>,
    code: Option<&'static str>,
    /// When to ask again.
    retry_after: Option<Duration>,
    /// In statistics, if it is one that we were told not to let through.
    blocked: Option<&'static str>,
}

/// What `/stats` counts a response under.
#[derive(Clone, Copy, Debug)]
pub struct Blocked(pub &'static str);

pub type Result<T, E = ApiError> = std::result::Result<T, E>;

impl ApiError {
    /// With a status and a message.
    pub fn new(status: StatusCode, message: impl Into<String>) -> Self {
        let kind = match status {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::FORBIDDEN => "permission_error",
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        };
        let (param, code, retry_after, blocked) = Default::default();
        Self { status, kind, message: message.into(), param, code, retry_after, blocked }
    }

    /// The request is wrong.
    pub fn bad(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    /// We are at fault. The client is told no more than that.
    pub fn internal(error: &anyhow::Error) -> Self {
        tracing::error!("{error:#}");
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "the server failed on this request")
    }

    /// The server does not answer now.
    pub fn unavailable(message: &str) -> Self {
        let error = Self::new(StatusCode::SERVICE_UNAVAILABLE, message);
        Self { retry_after: Some(Duration::from_secs(2)), ..error }
    }

    /// A request took longer than it may.
    pub fn expired(most: Duration) -> Self {
        let message = format!("the request took longer than the {} s it may take", most.as_secs());
        Self::new(StatusCode::GATEWAY_TIMEOUT, message).code("timeout")
    }

    /// With the field's other name, where a route calls it so.
    pub fn renamed(self, names: &[(&str, &str)]) -> Self {
        let Some(param) = &self.param else { return self };
        let Some((from, to)) = names.iter().find(|(from, _)| param.starts_with(from)) else {
            return self;
        };
        let param = param.replacen(from, to, 1);
        let message = self.message.replace(&format!("`{from}"), &format!("`{to}"));
        Self { message, param: Some(param), ..self }
    }

    /// Which field is wrong.
    pub fn param(self, param: impl Into<String>) -> Self {
        Self { param: Some(param.into()), ..self }
    }

    /// A word for programs.
    pub fn code(self, code: &'static str) -> Self {
        Self { code: Some(code), ..self }
    }

    /// Counts as not let through.
    pub fn blocked(self, reason: &'static str) -> Self {
        Self { blocked: Some(reason), ..self }
    }

    /// A client has used up its rate of `what`.
    pub fn rate(exceeded: Exceeded, what: &str) -> Self {
        let error = |message| Self::new(StatusCode::TOO_MANY_REQUESTS, message);
        let error = match exceeded {
            Exceeded::For(wait) => {
                let message = format!("too many {what}: wait {} s", wait.as_secs() + 1);
                Self { retry_after: Some(wait), ..error(message) }
            }
            Exceeded::Always(most) => {
                let message =
                    format!("the request may take more than the {most} {what} of a minute");
                Self::bad(message)
            }
        };
        error.code("rate_limit_exceeded").blocked("rate")
    }

    /// For an answer that has begun already.
    pub fn to_json(&self) -> serde_json::Value {
        let Self { message, kind, param, code, .. } = self;
        json!({"error": {"message": message, "type": kind, "param": param, "code": code}})
    }
}

impl From<Refusal> for ApiError {
    fn from(Refusal { message, param }: Refusal) -> Self {
        let is_model =
            param.as_deref() == Some("model") && message.starts_with("there is no model");
        let error = match is_model {
            true => Self::new(StatusCode::NOT_FOUND, message).code("model_not_found"),
            false => Self::bad(message),
        };
        Self { param, ..error }
    }
}

impl From<engine::Refused> for ApiError {
    fn from(refused: engine::Refused) -> Self {
        match refused {
            engine::Refused::Busy => {
                let message = "the server is busy: its queue is full, ask again soon";
                let error = Self::new(StatusCode::TOO_MANY_REQUESTS, message).code("queue_full");
                Self { retry_after: Some(Duration::from_secs(1)), ..error.blocked("queue") }
            }
            engine::Refused::TooMany(most) => Self::bad(format!(
                "the request asks for more texts at once than the {most} that the server takes"
            )),
            engine::Refused::Draining => Self::unavailable("the server is about to end"),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.to_json())).into_response();
        let headers = response.headers_mut();
        if let Some(wait) = self.retry_after {
            // Whole seconds, rounded up.
            let seconds = wait.as_millis().div_ceil(1000).max(1) as u64;
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if let Some(reason) = self.blocked {
            response.extensions_mut().insert(Blocked(reason));
        }
        response
    }
}
