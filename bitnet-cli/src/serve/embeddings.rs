//! `/v1/embeddings`: the mean of a text's hidden states after the final norm, scaled to length 1.

use std::time::Instant;

use axum::Json;
use base64::{Engine as _, engine::general_purpose::STANDARD};
use bitnet_model::batch::{Sequence, Update};
use serde_json::{Value, json};

use super::{
    answering::{Context, News, look_through, news, note_model},
    app::{App, Loaded},
    error::{ApiError, Result},
    received::Received,
};

/// `POST /v1/embeddings`
pub async fn embed(Received { context, mut body }: Received) -> Result<Json<Value>> {
    let record = context.record.clone();
    let read = move |app: &App, loaded: &Loaded| {
        look_through((app, loaded), &mut body, "input", &record)?;
        let adapters = loaded.adapters.get();
        let asked = loaded.reader(&app.model, &adapters).read_embeddings(&body)?;
        note_model(app, &adapters, &asked.model, &record);
        Ok(asked)
    };
    let asked = context.off_thread(read).await?;
    let Context { app, loaded, caller, record, turn } = context;
    drop(turn);
    let client = &caller.client;
    let tokens = asked.sequences.iter().map(|sequence| sequence.prompt.len()).sum();
    record.note(|details| details.prompt_tokens = tokens);
    app.rates.tokens(client, tokens).map_err(|exceeded| ApiError::rate(exceeded, "tokens"))?;
    let deadline = Instant::now() + app.policy.request_timeout;
    // Clients send thousands of texts at once, more than may wait. As many as may run go in together: the queue is for all.
    let (mut rest, at_once) = (asked.sequences.into_iter(), loaded.sequences.0);
    let mut means = Vec::with_capacity(rest.len());
    while rest.len() > 0 {
        let next = rest.by_ref().take(at_once).collect();
        means.extend(pooled((&app, &loaded), client, next, deadline).await?);
    }
    let vector = |mean: Vec<f32>| {
        let mean = scaled(mean);
        match asked.base64 {
            true => {
                STANDARD.encode(Vec::from_iter(mean.iter().flat_map(|x| x.to_le_bytes()))).into()
            }
            false => json!(mean),
        }
    };
    let vectors = means.into_iter().map(vector).enumerate();
    let data = vectors
        .map(|(index, vector)| json!({"object": "embedding", "index": index, "embedding": vector}));
    Ok(Json(json!({
        "object": "list",
        "data": Vec::from_iter(data),
        "model": asked.model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    })))
}

/// The mean of each sequence's hidden states.
async fn pooled(
    (app, loaded): (&App, &Loaded),
    client: &str,
    sequences: Vec<Sequence>,
    deadline: Instant,
) -> Result<Vec<Vec<f32>>> {
    let mut means = vec![None; sequences.len()];
    let mut ticket = loaded.engine.submit(sequences, client, deadline)?;
    while means.iter().any(Option::is_none) {
        let (index, news) = news(&mut ticket, app).await?;
        if let News::Update(Update::Pooled(mean)) = news? {
            means[index] = Some(mean);
        }
    }
    Ok(means.into_iter().flatten().collect())
}

/// To length 1; zeros stay.
fn scaled(mut vector: Vec<f32>) -> Vec<f32> {
    let square: f64 = vector.iter().map(|x| f64::from(*x).powi(2)).sum();
    if square > 0. {
        let factor = 1. / square.sqrt();
        vector.iter_mut().for_each(|x| *x = (f64::from(*x) * factor) as f32);
    }
    vector
}
