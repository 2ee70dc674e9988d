//! What all requests share.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{
        Arc, OnceLock, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use bitnet_model::{
    adapter::Adaptation,
    config::{Config, GenerationConfig},
    grammar::GrammarFactory,
    text::Tokenizer,
};
use tokio::sync::Semaphore;

use super::{
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
use crate::openai::{Lengths, Reader, now};

/// Adapters by name.
pub type Adapters = BTreeMap<String, Arc<Adaptation>>;

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
    adapters: RwLock<Arc<Adapters>>,
    /// Changes with the adapters.
    version: AtomicU64,
}

/// Parts of [`Loaded`] that are made before it.
pub struct Parts {
    pub engine: Engine,
    pub tokenizer: Tokenizer,
    pub config: Config,
    pub generation: GenerationConfig,
    pub adapters: Adapters,
    pub kv_bytes: usize,
    pub sequences: (usize, usize),
    pub lengths: Lengths,
    pub sanitize: bool,
}

impl Loaded {
    /// Ready.
    pub fn new(parts: Parts) -> Self {
        let Parts { engine, tokenizer, config, generation, adapters, .. } = parts;
        Self {
            engine,
            grammars: GrammarFactory::new(&tokenizer, config.vocab_size),
            sanitizer: parts.sanitize.then(|| Sanitizer::new(&tokenizer)),
            tokenizer,
            config,
            generation,
            kv_bytes: parts.kv_bytes,
            sequences: parts.sequences,
            lengths: parts.lengths,
            created: now(),
            adapters: RwLock::new(Arc::new(adapters)),
            version: AtomicU64::new(0),
        }
    }

    /// Those there are now.
    pub fn adapters(&self) -> Arc<Adapters> {
        self.adapters.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Changes the adapters, all at once. Requests that run keep theirs.
    pub fn change_adapters<T>(&self, change: impl FnOnce(&mut Adapters) -> T) -> T {
        let mut adapters = self.adapters.write().unwrap_or_else(PoisonError::into_inner);
        let mut changed = Adapters::clone(&adapters);
        let result = change(&mut changed);
        *adapters = Arc::new(changed);
        self.version.fetch_add(1, Ordering::AcqRel);
        result
    }

    /// Changes with the adapters.
    pub fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// Reads requests for the model and these adapters.
    pub fn reader<'a>(&'a self, model: &'a str, adapters: &'a Adapters) -> Reader<'a> {
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

/// Where statistics go besides, and how often.
pub struct StatsFile {
    pub path: PathBuf,
    pub every: Duration,
}
