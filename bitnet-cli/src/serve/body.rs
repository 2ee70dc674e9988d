//! Bodies of requests: JSON, no longer than allowed, and there in time.

use axum::{
    body::{Body, Bytes},
    http::{HeaderMap, StatusCode, header},
};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde_json::Value;

use super::{
    app::Policy,
    error::{ApiError, Result},
};

/// Reads a body.
///
/// # Errors
/// 415 for what is no JSON by its type, 413 for what is too long, 408 for what comes too slowly, 400 for what breaks off.
pub async fn read(policy: &Policy, headers: &HeaderMap, body: Body) -> Result<Bytes> {
    // A page of another site can send other types without asking first whether it may.
    let kind = headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
    let kind = kind.unwrap_or_default().split(';').next().unwrap_or_default().trim();
    if !kind.eq_ignore_ascii_case("application/json") {
        let message = "the body must be JSON, with the header `Content-Type: application/json`";
        return Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, message));
    }
    let collected = Limited::new(body, policy.max_body).collect();
    let Ok(collected) = tokio::time::timeout(policy.body_timeout, collected).await else {
        let message = format!("the body did not come within {} s", policy.body_timeout.as_secs());
        return Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, message).blocked("slow"));
    };
    match collected {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => {
            let message = format!("the body is longer than the {} bytes allowed", policy.max_body);
            Err(ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message).blocked("body"))
        }
        Err(_) => Err(ApiError::bad("the body breaks off")),
    }
}

/// The value of a body. It can take many times the memory of its bytes, and a while to make.
///
/// # Errors
/// 400 for what is no JSON.
pub fn parse(bytes: &[u8]) -> Result<Value> {
    serde_json::from_slice(bytes)
        .map_err(|error| ApiError::bad(format!("the body is no JSON: {error}")))
}
