//! `/tokenize`, `/detokenize` and `/tokenizer_info`, as vLLM has them.

use std::sync::Arc;

use axum::{Json, extract::State};
use serde_json::{Value, json};

use super::{
    app::{App, Loaded},
    error::{ApiError, Result},
    received::Received,
};

/// `POST /tokenize`: the ids of `prompt`, or of `messages` by the chat template.
pub async fn tokenize(Received { context, body }: Received) -> Result<Json<Value>> {
    let work = move |app: &App, loaded: &Loaded| {
        let adapters = loaded.adapters.get();
        let reader = loaded.reader(&app.model, &adapters);
        let (tokens, spells) = (reader.read_tokens(&body)?, reader.spells_tokens(&body)?);
        let name = |id: &u32| loaded.tokenizer.id_to_token(*id);
        let strings = spells.then(|| Vec::from_iter(tokens.iter().map(name)));
        Ok(json!({
            "count": tokens.len(),
            "max_model_len": loaded.config.max_position_embeddings,
            "tokens": tokens,
            "token_strs": strings,
        }))
    };
    context.off_thread(work).await.map(Json)
}

/// `POST /detokenize`: the text of `tokens`.
pub async fn detokenize(Received { context, body }: Received) -> Result<Json<Value>> {
    let work = move |_: &App, loaded: &Loaded| {
        let wrong = || {
            let size = loaded.config.vocab_size;
            let message = format!("`tokens` must be a list of token ids below {size}");
            ApiError::bad(message).param("tokens")
        };
        let id = |value: &Value| {
            let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
            id.filter(|id| (*id as usize) < loaded.config.vocab_size)
        };
        let ids = body["tokens"].as_array().ok_or_else(wrong)?;
        let ids = ids.iter().map(id).collect::<Option<Vec<_>>>().ok_or_else(wrong)?;
        let text = loaded.tokenizer.decode(&ids, false);
        Ok(json!({"prompt": text.map_err(|error| ApiError::bad(error.to_string()))?}))
    };
    context.off_thread(work).await.map(Json)
}

/// `GET /tokenizer_info`
pub async fn info(State(app): State<Arc<App>>) -> Result<Json<Value>> {
    let loaded = app.loaded()?;
    let tokenizer = &loaded.tokenizer;
    let template = tokenizer.chat_template().ok().flatten().map(|template| template.source());
    Ok(Json(json!({
        "vocab_size": tokenizer.vocab_size(),
        "model_max_length": loaded.config.max_position_embeddings,
        "bos_token": tokenizer.bos_token(),
        "eos_token": tokenizer.eos_token(),
        "pad_token": tokenizer.pad_token(),
        "bos_token_id": tokenizer.bos_token_id(),
        "eos_token_id": tokenizer.eos_token_id(),
        "pad_token_id": tokenizer.pad_token_id(),
        "chat_template": template,
    })))
}
