//! `/v1/models`, and adapters that come and go while the server runs.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Path, State, rejection::PathRejection},
    http::StatusCode,
};
use serde_json::{Value, json};

use super::{
    app::{App, Loaded},
    error::{ApiError, Result},
    received::{Admin, Received},
};
use crate::{
    adapter::{AdapterSpec, read_named},
    openai::Refusal,
};

/// `GET /v1/models`
pub async fn list(State(app): State<Arc<App>>) -> Result<Json<Value>> {
    let loaded = app.loaded()?;
    Ok(Json(json!({"object": "list", "data": models(&app, &loaded)})))
}

/// `GET /v1/models/{id}`
pub async fn one(
    State(app): State<Arc<App>>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<Value>> {
    let Path(id) = id.map_err(|error| ApiError::bad(error.body_text()).param("model"))?;
    let loaded = app.loaded()?;
    let found = models(&app, &loaded).into_iter().find(|model| model["id"] == id[..]);
    found.map(Json).ok_or_else(|| {
        let error = ApiError::new(StatusCode::NOT_FOUND, format!("there is no model `{id}`"));
        error.param("model").code("model_not_found")
    })
}

/// The model, and each adapter beside it.
fn models(app: &App, loaded: &Loaded) -> Vec<Value> {
    let model = |id: String, parent: Option<&str>| {
        json!({
            "id": id, "object": "model", "created": loaded.created, "owned_by": "bitnet", "root": app.model,
            "parent": parent, "max_model_len": loaded.config.max_position_embeddings,
        })
    };
    let adapters = loaded.adapters.get();
    let names =
        adapters.keys().map(|name| model(format!("{}:{name}", app.model), Some(&app.model)));
    std::iter::once(model(app.model.clone(), None)).chain(names).collect()
}

/// `POST /v1/load_lora_adapter`: `lora_name` and `lora_path`, a folder or Hub repo id of the server. A name that is taken is
/// replaced, for requests from now on.
pub async fn load_adapter(Admin(Received { context, body }): Admin) -> Result<Json<Value>> {
    let name = text(&body, "lora_name")?;
    let spec = AdapterSpec::parse(&text(&body, "lora_path")?);
    let spec = spec.map_err(|reason| ApiError::bad(reason).param("lora_path"))?;
    if name.is_empty() || name.contains([':', '/', '\\']) || name == context.app.model {
        let message = "`lora_name` must be a name without `:`, `/` and `\\`, and not the model's";
        return Err(ApiError::bad(message).param("lora_name"));
    }
    let work = move |_: &App, loaded: &Loaded| {
        let tokenizer = || Ok(Some(loaded.tokenizer.clone()));
        let adapter = read_named(&spec, &loaded.config, tokenizer, false);
        let adapter = adapter.and_then(|adapter| Ok(adapter.to_device(&loaded.device)?));
        let adapter =
            adapter.map_err(|error| ApiError::bad(format!("{error:#}")).param("lora_path"))?;
        loaded.adapters.change(|adapters| adapters.insert(name.clone(), Arc::new(adapter)));
        tracing::info!(name, "adapter loaded");
        Ok(json!({"status": "loaded", "lora_name": name}))
    };
    context.off_thread(work).await.map(Json)
}

/// `POST /v1/unload_lora_adapter`: `lora_name`. Requests that run with it go on.
pub async fn unload_adapter(Admin(Received { context, body }): Admin) -> Result<Json<Value>> {
    let name = text(&body, "lora_name")?;
    if context.loaded.adapters.change(|adapters| adapters.remove(&name)).is_none() {
        let error = ApiError::new(StatusCode::NOT_FOUND, format!("there is no adapter `{name}`"));
        return Err(error.param("lora_name"));
    }
    tracing::info!(name, "adapter unloaded");
    Ok(Json(json!({"status": "unloaded", "lora_name": name})))
}

fn text(body: &Value, name: &str) -> Result<String> {
    let text = body[name].as_str().map(String::from);
    Ok(text.ok_or_else(|| Refusal::of(name, format!("`{name}` must be a string")))?)
}
