//! What all requests share.

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bitnet_model::{
    config::{Config, GenerationConfig},
    grammar::GrammarFactory,
    text::Tokenizer,
};
use candle_core::Device;
use tokio::sync::Semaphore;

use super::{
    adapters::SharedAdapters,
    audit::Audit,
    cache::Cache,
    engine::{Engine, State},
    error::{ApiError, Result},
    filter::Filter,
    keys::Keys,
    rates::Rates,
    sanitize::Sanitizer,
    watch::Watch,
};
use crate::{
    adapter::NamedAdapters,
    openai::{Lengths, Reader},
};

/// What the operator decided.
#[derive(Default)]
pub struct Policy {
    /// Who may ask; anybody who reaches the server if there are none.
    pub keys: Option<Keys>,
    /// Whether requests must name this machine as their host: without keys on loopback, web pages of others would else reach
    /// the server through a name of theirs that resolves to it.
    pub loopback_hosts_only: bool,
    /// Not let in.
    pub deny_input: Option<Filter>,
    /// Not let out.
    pub deny_output: Option<Filter>,
    /// Whether texts are cleaned.
    pub sanitize: bool,
    /// Whether the audit log has prompts.
    pub log_prompts: bool,
    /// Whether answers go over TLS.
    pub tls: bool,
    /// Bytes of a body.
    pub max_body: usize,
    /// From the arrival of a request to the end of its answer.
    pub request_timeout: Duration,
    /// For reading a body.
    pub body_timeout: Duration,
}

/// What all requests share.
pub struct App {
    /// What the operator decided.
    pub policy: Policy,
    /// What clients have used up.
    pub rates: Rates,
    /// Statistics.
    pub watch: Arc<Watch>,
    /// Who asked when.
    pub audit: Option<Audit>,
    /// Answers to be given again.
    pub cache: Option<Cache>,
    /// How many requests are read at once: schemas can take long.
    pub readers: Arc<Semaphore>,
    /// The model's name.
    pub model: String,
    /// Makes hashes of addresses say nothing outside this run.
    pub salt: u128,
    /// Once there is a model.
    pub loaded: OnceLock<Arc<Loaded>>,
    /// Whether the server ends.
    pub drains: AtomicBool,
}

/// The model, ready.
pub struct Loaded {
    /// Runs it.
    pub engine: Engine,
    /// Of the model.
    pub tokenizer: Tokenizer,
    /// Of the model.
    pub config: Config,
    /// What its publisher recommends.
    pub generation: GenerationConfig,
    /// Of its vocabulary.
    pub grammars: GrammarFactory,
    /// Bytes that keys and values may take.
    pub kv_bytes: usize,
    /// Sequences that may run, and wait.
    pub sequences: (usize, usize),
    /// How long texts may be.
    pub lengths: Lengths,
    /// Of texts that come in.
    pub sanitizer: Option<Sanitizer>,
    /// Seconds since 1970.
    pub created: u64,
    /// Those that requests choose from.
    pub adapters: SharedAdapters,
    /// Where the model computes.
    pub device: Device,
}

impl Loaded {
    /// Reads requests for the model and these adapters.
    pub fn reader<'a>(&'a self, model: &'a str, adapters: &'a NamedAdapters) -> Reader<'a> {
        let Self { tokenizer, config, grammars, generation, lengths, .. } = self;
        Reader { model, adapters, tokenizer, config, grammars, generation, limits: *lengths }
    }
}

impl App {
    /// The model.
    ///
    /// # Errors
    /// While it is being loaded, and when the server ends.
    pub fn loaded(&self) -> Result<Arc<Loaded>> {
        if self.drains.load(Ordering::Acquire) {
            return Err(ApiError::unavailable("the server is about to end"));
        }
        let loaded = self.loaded.get().cloned();
        loaded.ok_or_else(|| ApiError::unavailable("the model is being loaded: ask again soon"))
    }

    /// What the engine does; nothing before there is one.
    pub fn engine_state(&self) -> State {
        self.loaded.get().map(|loaded| loaded.engine.state()).unwrap_or_default()
    }

    /// `loading`, `ready` or `draining`.
    pub fn phase(&self) -> &'static str {
        match (self.drains.load(Ordering::Acquire), self.loaded.get()) {
            (true, _) => "draining",
            (false, Some(_)) => "ready",
            (false, None) => "loading",
        }
    }
}
