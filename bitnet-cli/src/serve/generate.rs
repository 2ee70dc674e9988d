//! `/v1/chat/completions` and `/v1/completions`.

use std::{convert::Infallible, sync::Arc, time::Duration};

use axum::{
    Json,
    body::{Body, Bytes},
    http::{HeaderName, HeaderValue, header},
    response::{IntoResponse, Response},
};
use futures_util::stream;
use serde_json::Value;

use super::{
    answering::{self, Answering, Context},
    app::App,
    cache::Cache,
    error::{ApiError, Result},
    received::Received,
};
use crate::openai::{Chunks, Route, answer, now, unique};

/// Says whether an answer was kept from an equal request.
const CACHE: HeaderName = HeaderName::from_static("x-bitnet-cache");
/// After so long without a token, a stream sends a comment, so that nobody between takes it for dead.
const COMMENT_AFTER: Duration = Duration::from_secs(15);

/// `POST /v1/chat/completions`
pub async fn chat(Received { context, body }: Received) -> Result<Response> {
    generate(context, Route::Chat, body).await
}

/// `POST /v1/completions`
pub async fn completion(Received { context, body }: Received) -> Result<Response> {
    generate(context, Route::Completion, body).await
}

async fn generate(context: Context, route: Route, body: Value) -> Result<Response> {
    let path = if route == Route::Chat { "chat" } else { "completion" };
    let version = context.loaded.adapters.version();
    let fingerprint = context.app.cache.is_some().then(|| Cache::fingerprint(path, &body, version));
    let asked = answering::read(&context, route, body).await?;
    let keeps = asked.is_deterministic && asked.stream.is_none();
    let cache = fingerprint.filter(|_| keeps);
    if let Some((cache, of)) = context.app.cache.as_ref().zip(cache)
        && let Some(kept) = cache.get(&of)
    {
        context.app.watch.cache_hit();
        return Ok(
            ([(CACHE, HeaderValue::from_static("hit"))], Json(renewed(kept))).into_response()
        );
    }
    let answering = Answering::start(context, asked).await?;
    if answering.asked.stream.is_some() {
        return Ok(streamed(answering));
    }
    let (app, answer) = whole(answering).await?;
    if let Some((kept, of)) = app.cache.as_ref().zip(cache) {
        kept.put(of, &answer);
    }
    Ok(Json(answer).into_response())
}

/// The answer in one piece.
async fn whole(mut answering: Answering) -> Result<(Arc<App>, Value)> {
    while answering.next().await?.is_some() {}
    let Answering { app, loaded, asked, choices, .. } = &answering;
    let answer = answer(asked, choices, &loaded.tokenizer, (&unique(), now()));
    let answer = answer.map_err(|error| ApiError::internal(&error))?;
    Ok((app.clone(), answer))
}

/// A kept answer under an id and a time of its own.
fn renewed(mut answer: Value) -> Value {
    let kind = answer["id"].as_str().and_then(|id| id.split('-').next()).unwrap_or_default();
    answer["id"] = format!("{kind}-{}", unique()).into();
    answer["created"] = now().into();
    answer
}

/// The answer in pieces, as server-sent events.
fn streamed(answering: Answering) -> Response {
    let chunks = Chunks::new(&answering.asked, (&unique(), now()));
    events(Source { answering, chunks: Box::new(chunks) })
}

/// Makes events of what comes to be known of an answer.
pub trait Events: Send + 'static {
    /// Before anything is known.
    fn begin(&mut self, answering: &Answering) -> anyhow::Result<String>;
    /// There is news of a choice.
    fn news(&mut self, answering: &Answering, choice: usize) -> anyhow::Result<String>;
    /// All choices have ended.
    fn end(&mut self, answering: &Answering) -> anyhow::Result<String>;
    /// The answer breaks off.
    fn failed(&mut self, error: &ApiError) -> String;
}

/// An answer and what makes events of it.
pub struct Source {
    pub answering: Answering,
    pub chunks: Box<dyn Events>,
}

/// The events of an answer. When the client goes away, the stream is dropped and with it the answer.
pub fn events(source: Source) -> Response {
    enum Stage {
        Begins,
        Runs,
        Over,
    }
    let piece = |text: String| Ok::<_, Infallible>(Bytes::from(text));
    let next = move |(mut source, stage): (Source, Stage)| async move {
        let (answering, chunks) = (&mut source.answering, &mut source.chunks);
        let (text, stage) = match stage {
            Stage::Over => return None,
            Stage::Begins => (chunks.begin(answering), Stage::Runs),
            Stage::Runs => match tokio::time::timeout(COMMENT_AFTER, answering.next()).await {
                Err(_) => (Ok(": waiting\n\n".to_owned()), Stage::Runs),
                Ok(Ok(Some(choice))) => (chunks.news(answering, choice), Stage::Runs),
                Ok(Ok(None)) => (chunks.end(answering), Stage::Over),
                Ok(Err(error)) => (Ok(chunks.failed(&error)), Stage::Over),
            },
        };
        match text {
            Ok(text) => Some((piece(text), (source, stage))),
            Err(error) => {
                let error = ApiError::internal(&error);
                Some((piece(source.chunks.failed(&error)), (source, Stage::Over)))
            }
        }
    };
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream")),
        // Proxies of nginx's kind hold pieces back without it.
        (HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no")),
    ];
    let body = Body::from_stream(stream::unfold((source, Stage::Begins), next));
    (headers, body).into_response()
}

/// One event.
pub fn data(value: &Value) -> String {
    format!("data: {value}\n\n")
}

impl Events for Chunks {
    fn begin(&mut self, _: &Answering) -> anyhow::Result<String> {
        Ok(String::new())
    }

    fn news(&mut self, answering: &Answering, choice: usize) -> anyhow::Result<String> {
        let Answering { asked, choices, loaded, .. } = answering;
        let chunks = self.of(asked, choice, &choices[choice], &loaded.tokenizer)?;
        Ok(chunks.iter().map(data).collect())
    }

    fn end(&mut self, answering: &Answering) -> anyhow::Result<String> {
        let usage = self.usage(&answering.asked, &answering.choices);
        Ok(usage.iter().map(data).collect::<String>() + "data: [DONE]\n\n")
    }

    fn failed(&mut self, error: &ApiError) -> String {
        data(&error.to_json())
    }
}
