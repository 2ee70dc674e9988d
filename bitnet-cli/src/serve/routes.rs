//! Which path leads where.

use std::sync::Arc;

use axum::{
    Router,
    http::{HeaderName, HeaderValue, Method, StatusCode, header},
    middleware,
    response::IntoResponse,
    routing::{get, post},
};
use tower_http::cors::CorsLayer;

use super::{
    app::App,
    embeddings,
    error::ApiError,
    generate,
    guard::{self, REQUEST_ID},
    models, responses, status, tokenize,
};

/// All routes. Pages of these origins may ask, besides our own.
pub fn router(app: Arc<App>, origins: Vec<HeaderValue>) -> Router {
    let router = Router::new()
        .route("/", get(status::page))
        .route("/health", get(status::health))
        .route("/ready", get(status::ready))
        .route("/metrics", get(status::metrics))
        .route("/stats", get(status::stats))
        .route("/openapi.json", get(status::openapi))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::one))
        .route("/v1/chat/completions", post(generate::chat))
        .route("/v1/completions", post(generate::completion))
        .route("/v1/responses", post(responses::respond))
        .route("/v1/embeddings", post(embeddings::embed))
        .route("/v1/load_lora_adapter", post(models::load_adapter))
        .route("/v1/unload_lora_adapter", post(models::unload_adapter))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .route("/tokenizer_info", get(tokenize::info))
        .fallback(|| async {
            ApiError::new(StatusCode::NOT_FOUND, "there is no such route: see /openapi.json")
        })
        .method_not_allowed_fallback(|| async {
            ApiError::new(
                StatusCode::METHOD_NOT_ALLOWED,
                "the route has no such method: see /openapi.json",
            )
            .into_response()
        })
        .layer(middleware::from_fn_with_state(app.clone(), guard::guard))
        .with_state(app);
    if origins.is_empty() {
        return router;
    }
    let api_key = HeaderName::from_static("x-api-key");
    router.layer(
        CorsLayer::new()
            .allow_origin(origins)
            .allow_methods([Method::GET, Method::POST])
            .allow_headers([header::AUTHORIZATION, header::CONTENT_TYPE, REQUEST_ID, api_key])
            .expose_headers([REQUEST_ID, header::RETRY_AFTER]),
    )
}
