//! One request, from its arrival to the end of its answer: counted, logged and audited when it is over.

use std::{
    sync::{Arc, Mutex},
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use serde_json::{Value, json};

use super::{Watch, lock};
use crate::serve::audit::Audit;

/// Kept by everything that works on the request; when the last of these lets go of it, the request is over.
pub struct Record {
    /// Unique, or what the client said.
    pub id: String,
    route: String,
    method: String,
    arrived: Instant,
    at: SystemTime,
    watch: Arc<Watch>,
    audit: Option<Audit>,
    details: Mutex<Details>,
}

/// What comes to be known of a request.
#[derive(Clone, Debug, Default)]
pub struct Details {
    /// The client's address, hashed.
    pub client: String,
    /// The name of its key.
    pub key: Option<String>,
    /// Which it asks for.
    pub model: Option<String>,
    /// Of the answer.
    pub status: u16,
    /// Tokens of its prompts.
    pub prompt_tokens: usize,
    /// Tokens of its answer.
    pub new_tokens: usize,
    /// Why its answer ended; none if the client went before it did.
    pub finish: Option<String>,
    /// Why it was not let through.
    pub blocked: Option<&'static str>,
    /// What it asked, if that is to be logged.
    pub prompt: Option<String>,
}

impl Record {
    /// A request that arrives now.
    pub fn new(
        id: String,
        (method, route): (String, String),
        watch: Arc<Watch>,
        audit: Option<Audit>,
    ) -> Arc<Self> {
        watch.request_begins();
        Arc::new(Self {
            id,
            route,
            method,
            arrived: Instant::now(),
            at: SystemTime::now(),
            watch,
            audit,
            details: Mutex::default(),
        })
    }

    /// Notes what is known now.
    pub fn note(&self, change: impl FnOnce(&mut Details)) {
        change(&mut lock(&self.details));
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let (took, details) = (self.arrived.elapsed(), lock(&self.details).clone());
        self.watch.request_ends(&self.route, details.status, took);
        if let Some(reason) = details.blocked {
            self.watch.blocked(reason);
        }
        let Details {
            client,
            key,
            model,
            status,
            prompt_tokens,
            new_tokens,
            finish,
            blocked,
            prompt,
        } = details;
        let ms = took.as_millis() as u64;
        tracing::info!(
            request_id = self.id,
            method = self.method,
            route = self.route,
            client,
            key,
            status,
            ms,
            prompt_tokens,
            new_tokens,
            finish,
            blocked,
            "request"
        );
        let Some(audit) = &self.audit else { return };
        let at = self.at.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64;
        let mut line = json!({
            "time_ms": at, "request_id": self.id, "method": self.method, "route": self.route, "client": client,
            "key": key, "model": model, "status": status, "ms": ms, "prompt_tokens": prompt_tokens,
            "new_tokens": new_tokens, "finish": finish, "blocked": blocked,
        });
        if let Some(prompt) = prompt {
            line["prompt"] = Value::String(prompt);
        }
        if !audit.write(&line) {
            self.watch.audit_lost();
        }
    }
}
