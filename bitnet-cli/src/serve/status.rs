//! How the server is: `/health`, `/ready`, `/metrics`, `/stats`, and what it offers: `/openapi.json`, the page.

use std::sync::{Arc, LazyLock};

use axum::{
    Json,
    extract::State,
    http::{HeaderValue, StatusCode, header},
    response::{Html, IntoResponse, Response},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::app::App;

/// The description of all routes.
pub const OPENAPI: &str = include_str!("openapi.json");
const PAGE: &str = include_str!("page.html");

/// `GET /health`: the process is alive.
pub async fn health() -> Json<Value> {
    Json(json!({"status": "ok"}))
}

/// `GET /ready`: requests are answered.
pub async fn ready(State(app): State<Arc<App>>) -> Response {
    let phase = app.phase();
    let status = if phase == "ready" { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(json!({"status": phase}))).into_response()
}

/// `GET /metrics`
pub async fn metrics(State(app): State<Arc<App>>) -> Response {
    let kv_bytes = app.loaded.get().map_or(0, |loaded| loaded.kv_bytes);
    let text = app.watch.metrics(app.engine_state(), kv_bytes);
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, HeaderValue::from_static(kind))], text).into_response()
}

/// `GET /stats`
pub async fn stats(State(app): State<Arc<App>>) -> Json<Value> {
    Json(statistics(&app))
}

/// What `/stats` says.
pub fn statistics(app: &App) -> Value {
    let (state, loaded) = (app.engine_state(), app.loaded.get());
    let (usage, (max_batch, max_queue)) =
        (state.usage, loaded.map_or((0, 0), |loaded| loaded.sequences));
    let adapters = loaded.map(|loaded| Vec::from_iter(loaded.adapters.get().keys().cloned()));
    let mut stats = json!({
        "model": app.model,
        "version": env!("CARGO_PKG_VERSION"),
        "state": app.phase(),
        "adapters": adapters.unwrap_or_default(),
        "engine": {
            "in_flight": loaded.map_or(0, |loaded| loaded.engine.in_flight()),
            "running": usage.running,
            "queued": state.queued,
            "max_batch": max_batch,
            "max_queue": max_queue,
            "kv_running_bytes": usage.running_bytes,
            "kv_kept_bytes": usage.kept_bytes,
            "kv_limit_bytes": loaded.map_or(0, |loaded| loaded.kv_bytes),
            "steps": usage.steps,
            "joined": usage.joined,
            "prefix_hits": usage.prefix_hits,
            "prefix_hit_rate": usage.prefix_hits as f64 / usage.joined.max(1) as f64,
            "prefix_tokens": usage.prefix_tokens,
            "prompt_tokens": usage.prompt_tokens,
            "new_tokens": usage.new_tokens,
        },
    });
    if let (Some(stats), Value::Object(more)) = (stats.as_object_mut(), app.watch.stats()) {
        stats.extend(more);
    }
    stats
}

/// `GET /openapi.json`
pub async fn openapi() -> Response {
    ([(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))], OPENAPI)
        .into_response()
}

/// `GET /`: the page, which may run its own script and style and talk to this server, and nothing else.
pub async fn page() -> Response {
    static POLICY: LazyLock<Option<HeaderValue>> = LazyLock::new(|| {
        let hash = |tag: &str| {
            let (open, close) = (format!("<{tag}>"), format!("</{tag}>"));
            let (_, rest) = PAGE.split_once(&open)?;
            let (text, _) = rest.split_once(&close)?;
            Some(format!("'sha256-{}'", STANDARD.encode(Sha256::digest(text))))
        };
        let (script, style) = (hash("script")?, hash("style")?);
        let policy = format!(
            "default-src 'none'; connect-src 'self'; script-src {script}; style-src {style}; base-uri 'none'; \
             form-action 'none'; frame-ancestors 'none'"
        );
        HeaderValue::from_str(&policy).ok()
    });
    let mut response = Html(PAGE).into_response();
    if let Some(policy) = POLICY.clone() {
        response.headers_mut().insert(header::CONTENT_SECURITY_POLICY, policy);
    }
    response
}
