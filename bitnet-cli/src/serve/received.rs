//! What a handler is given: the body of a request, and what it is answered with.

use std::sync::Arc;

use axum::{
    extract::{FromRequest, Request},
    http::StatusCode,
};
use serde_json::Value;

use super::{
    answering::Context,
    app::App,
    body,
    error::{ApiError, Result},
    guard::Caller,
    watch::Record,
};

/// A request whose body has been read.
pub struct Received {
    pub context: Context,
    pub body: Value,
}

/// The same, of one who may change what is served.
pub struct Admin(pub Received);

/// Whom [`guard`](super::guard::guard) has let in, and its record.
fn admitted(request: &Request) -> Result<(Caller, Arc<Record>)> {
    let extensions = request.extensions();
    let pair = extensions.get().cloned().zip(extensions.get().cloned());
    pair.ok_or_else(|| ApiError::internal(&anyhow::anyhow!("a request came past the guard")))
}

impl FromRequest<Arc<App>> for Received {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self> {
        let ((caller, record), app) = (admitted(&request)?, app.clone());
        let loaded = app.loaded()?;
        let (parts, body) = request.into_parts();
        let bytes = body::read(&app.policy, &parts.headers, body).await?;
        let Ok(turn) = app.readers.clone().acquire_owned().await else {
            return Err(ApiError::unavailable("the server is about to end"));
        };
        let context = Context { app, loaded, caller, record, turn: Arc::new(turn) };
        let body = context.off_thread(move |_, _| body::parse(&bytes)).await?;
        Ok(Self { context, body })
    }
}

impl FromRequest<Arc<App>> for Admin {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self> {
        if !admitted(&request)?.0.is_admin {
            let message = "only a key whose name begins with `admin` may change adapters";
            return Err(ApiError::new(StatusCode::FORBIDDEN, message).blocked("admin"));
        }
        Received::from_request(request, app).await.map(Self)
    }
}
