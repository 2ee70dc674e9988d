//! `bitnet serve`: the model for clients of OpenAI's API.

use std::{
    io::{self, Write},
    net::{IpAddr, SocketAddr},
    num::{NonZeroU64, NonZeroUsize},
    path::PathBuf,
    sync::{Arc, OnceLock, atomic::AtomicBool},
    time::Duration,
};

use anyhow::{Context, bail};
use axum::http::HeaderValue;
use bitnet_model::{grammar::GrammarFactory, pretrained::Source};
use candle_core::Device;
use tokio::sync::{Semaphore, oneshot};

use crate::{
    adapter::{self, Adapters, NamedAdapter},
    args::Global,
    batching::{self, BatchingArgs},
    model::ModelArgs,
    openai::{Lengths, now},
    serve::{
        self,
        adapters::SharedAdapters,
        app::{App, Loaded, Policy},
        audit::Audit,
        cache::Cache,
        engine::Engine,
        filter::Filter,
        keys::{self, Keys},
        listen::{self, Listener, Timeouts},
        rates::{RateArgs, Rates},
        routes,
        sanitize::Sanitizer,
        stats_file::StatsFile,
        watch::{Watch, alerts::Thresholds},
    },
};

/// Requests that are read at once.
const READERS: usize = 4;
/// Threads that speak with clients; the cores are for the model.
const TALKERS: usize = 2;

/// Options of `bitnet serve`.
#[derive(clap::Args)]
#[command(
    after_long_help = "Any client of OpenAI's API talks to it: give it the base URL http://127.0.0.1:8080/v1. The page at / chats and \
shows how the server does; /openapi.json lists all routes. The first line on stdout says where it listens; requests are \
answered once /ready says so.

SIGTERM or Ctrl-C lets what runs come to its end, for --drain-seconds at most, and then ends with status 0; a second one ends at \
once.

Examples:
  bitnet serve
  bitnet serve -m microsoft/bitnet-b1.58-2B-4T --adapter support=./support-lora
  bitnet serve --host 0.0.0.0 --api-keys keys.txt --requests-per-minute 60 --audit-log audit.jsonl
  curl http://127.0.0.1:8080/v1/completions -H 'Content-Type: application/json' -d '{\"prompt\": \"Once upon a time\"}'"
)]
pub struct Args {
    /// Address to listen at; others than loopback need API keys
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    host: IpAddr,
    /// Port to listen at; 0 takes a free one
    #[arg(long, short, value_name = "PORT", default_value = "8080")]
    port: u16,
    /// The name of the model in answers and in /v1/models [default: as given to -m]
    #[arg(long, value_name = "NAME")]
    served_name: Option<String>,
    /// The model
    #[command(flatten)]
    model: ModelArgs,
    /// LoRA adapter in PEFT's format, folder or Hub repo id. With a name it is beside the model for requests whose `model` is
    /// NAME or ends in `:NAME`; without one, for all. Repeatable: those without a name are summed
    #[arg(long = "adapter", value_name = "[NAME=]DIR[:SCALE]", value_parser = NamedAdapter::parse)]
    adapters: Vec<NamedAdapter>,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    security: SecurityArgs,
    #[command(flatten)]
    rates: RateArgs,
    #[command(flatten)]
    watching: WatchingArgs,
    #[command(flatten)]
    thresholds: Thresholds,
}

#[derive(clap::Args)]
#[command(next_help_heading = "Engine")]
struct EngineArgs {
    #[command(flatten)]
    batching: BatchingArgs,
    /// The most texts that wait beside those that are continued; further requests get the status 429
    #[arg(long, value_name = "N", default_value = "256")]
    max_queue: usize,
    /// Tokens of new prompts that are read between two tokens of running texts: more answer new requests sooner, fewer hold
    /// up the running ones less
    #[arg(long, value_name = "N", default_value = "64")]
    prefill_tokens: NonZeroUsize,
    /// The most tokens of a prompt [default: the model's context]
    #[arg(long, value_name = "N")]
    max_prompt_tokens: Option<NonZeroUsize>,
    /// The most new tokens of a text [default: the model's context]
    #[arg(long, value_name = "N")]
    max_new_tokens: Option<NonZeroUsize>,
    /// The most time from a request to the end of its answer
    #[arg(long, value_name = "SECONDS", default_value = "600")]
    request_timeout: NonZeroU64,
    /// Keep answers to greedy and seeded requests, and give them again, in so much memory [default: none]
    #[arg(long, value_name = "MIB")]
    response_cache: Option<NonZeroUsize>,
    /// How long what runs may go on after SIGTERM
    #[arg(long, value_name = "SECONDS", default_value = "30")]
    drain_seconds: u64,
}

#[derive(clap::Args)]
#[command(next_help_heading = "Security")]
struct SecurityArgs {
    /// File of API keys, lines of `name:key`; more come from the variable BITNET_API_KEYS, separated by commas. Keys whose
    /// names begin with `admin` may load and unload adapters
    #[arg(long, value_name = "FILE")]
    api_keys: Option<PathBuf>,
    /// Let anybody in who reaches an address that is not loopback
    #[arg(long)]
    insecure_no_keys: bool,
    /// Certificate chain for TLS, PEM
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// Key of the certificate, PEM
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// Origin whose pages may ask, such as `https://example.org`. Repeatable
    #[arg(long = "cors-origin", value_name = "ORIGIN")]
    cors_origins: Vec<String>,
    /// The longest body of a request, in KiB
    #[arg(long, value_name = "KIB", default_value = "4096")]
    max_body: NonZeroUsize,
    /// The most open connections
    #[arg(long, value_name = "N", default_value = "1024")]
    max_connections: NonZeroUsize,
    /// How long a client may take for a request's headers or body, to take what is sent to it, and between requests
    #[arg(long, value_name = "SECONDS", default_value = "30")]
    client_timeout: NonZeroU64,
    /// File of regular expressions, one a line; requests that have one are refused. It finds spellings, not meanings
    #[arg(long, value_name = "FILE")]
    deny_input: Option<PathBuf>,
    /// The same for answers, which end before it with the reason `content_filter`
    #[arg(long, value_name = "FILE")]
    deny_output: Option<PathBuf>,
    /// Take characters that are not seen and spellings of special tokens out of what comes in
    #[arg(long)]
    sanitize_input: bool,
}

#[derive(clap::Args)]
#[command(next_help_heading = "Watching")]
struct WatchingArgs {
    /// Append a line of JSON about each request to this file
    #[arg(long, value_name = "FILE")]
    audit_log: Option<PathBuf>,
    /// Write prompts into the audit log, too
    #[arg(long, requires = "audit_log")]
    log_prompts: bool,
    /// Write what /stats says to this file
    #[arg(long, value_name = "FILE")]
    stats_file: Option<PathBuf>,
    /// How often
    #[arg(long, value_name = "SECONDS", default_value = "10")]
    stats_every: NonZeroU64,
}

impl Args {
    /// What the operator decided, all files of it read.
    fn policy(&self) -> anyhow::Result<Policy> {
        let security = &self.security;
        let keys = Keys::read(security.api_keys.as_deref())?;
        if keys.is_none() && !self.host.is_loopback() && !security.insecure_no_keys {
            bail!(
                "--host {}: others reach this address, so it needs --api-keys or the variable {}; --insecure-no-keys lets \
                 anybody in",
                self.host,
                keys::VARIABLE
            );
        }
        let timeout = Duration::from_secs(security.client_timeout.get());
        Ok(Policy {
            loopback_hosts_only: keys.is_none() && self.host.is_loopback(),
            keys,
            deny_input: security.deny_input.as_deref().map(Filter::read).transpose()?,
            deny_output: security.deny_output.as_deref().map(Filter::read).transpose()?,
            sanitize: security.sanitize_input,
            log_prompts: self.watching.log_prompts,
            tls: security.tls_cert.is_some(),
            max_body: security.max_body.get() << 10,
            request_timeout: Duration::from_secs(self.engine.request_timeout.get()),
            body_timeout: timeout,
        })
    }

    fn origins(&self) -> anyhow::Result<Vec<HeaderValue>> {
        let origin = |origin: &String| {
            let is_origin = origin.split_once("://").is_some_and(|(_, host)| !host.contains('/'));
            let value = HeaderValue::from_str(origin).ok().filter(|_| is_origin);
            value.with_context(|| {
                format!("--cors-origin {origin}: is no origin, such as https://example.org")
            })
        };
        self.security.cors_origins.iter().map(origin).collect()
    }

    fn app(&self, model: String) -> anyhow::Result<App> {
        Ok(App {
            policy: self.policy()?,
            rates: Rates::new(self.rates),
            watch: Arc::new(Watch::new(self.thresholds)),
            audit: self.watching.audit_log.as_deref().map(Audit::open).transpose()?,
            cache: self.engine.response_cache.map(|mib| Cache::new(mib.get() << 20)),
            readers: Arc::new(Semaphore::new(READERS)),
            model,
            salt: rand::random(),
            loaded: OnceLock::new(),
            drains: AtomicBool::new(false),
        })
    }

    /// Reads the weights and starts the engine.
    fn load(
        &self,
        source: Source,
        adapters: Adapters,
        device: &Device,
        app: &App,
    ) -> anyhow::Result<Loaded> {
        let (config, generation) = (source.config.clone(), source.generation.clone());
        let (network, adapters, tokenizer) = batching::load(source, adapters, device)?;
        let engine = &self.engine;
        let limits = engine.batching.limits(&self.model, engine.prefill_tokens);
        let most = |length: Option<NonZeroUsize>| length.map_or(usize::MAX, NonZeroUsize::get);
        // A text has as many bytes as its tokens at most.
        let ids = 0..tokenizer.vocab_size() as u32;
        let longest = ids.filter_map(|id| tokenizer.id_to_token(id)).map(|token| token.len()).max();
        let prompt = most(engine.max_prompt_tokens).min(config.max_position_embeddings);
        let running = Engine::start(network, limits, engine.max_queue, app.watch.clone());
        Ok(Loaded {
            engine: running.context("the engine's thread could not be started")?,
            grammars: GrammarFactory::new(&tokenizer, config.vocab_size),
            sanitizer: app.policy.sanitize.then(|| Sanitizer::new(&tokenizer)),
            adapters: SharedAdapters::new(adapters),
            device: device.clone(),
            tokenizer,
            config,
            generation,
            kv_bytes: limits.kv_bytes,
            sequences: (limits.sequences, engine.max_queue),
            lengths: Lengths {
                prompt: most(engine.max_prompt_tokens),
                bytes: prompt.saturating_mul(longest.unwrap_or(1)),
                new: most(engine.max_new_tokens),
                texts: limits.sequences.saturating_add(engine.max_queue),
            },
            created: now(),
        })
    }
}

/// Serves until a signal.
pub fn run(args: Box<Args>, global: &Global) -> anyhow::Result<()> {
    let origins = args.origins()?;
    let security = &args.security;
    let tls = security.tls_cert.as_deref().zip(security.tls_key.as_deref());
    let tls = tls.map(|(certificate, key)| listen::tls(certificate, key)).transpose()?;
    let source = args.model.open(global)?;
    let adapters = adapter::read_all(&args.adapters, &source, global)?;
    let device = global.device()?;
    let name = args.served_name.clone().unwrap_or_else(|| source.name.clone());
    let app = Arc::new(args.app(name)?);
    let every = Duration::from_secs(args.watching.stats_every.get());
    let stats = args.watching.stats_file.clone().map(|path| StatsFile { path, every });
    if let Some(file) = &stats {
        file.write(&app).with_context(|| format!("{}", file.path.display()))?;
    }
    let (address, quiet) = (SocketAddr::new(args.host, args.port), global.quiet);
    let timeout = Duration::from_secs(security.client_timeout.get());
    let timeouts = Timeouts { headers: timeout, write: timeout };
    let (connections, grace) =
        (security.max_connections.get(), Duration::from_secs(args.engine.drain_seconds));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(TALKERS)
        .enable_all()
        .build()
        .context("the threads for connections could not be started")?;
    runtime.block_on(async {
        let listener = Listener::bind(address, tls, timeouts, connections).await?;
        // Whoever started it need not listen.
        let _ = writeln!(io::stdout(), "listening on {}", listener.url()?);
        let (stop, stopped) = oneshot::channel();
        let mut signals = Signals::new().context("signals cannot be waited for")?;
        tracing::info!(model = app.model, "listening");
        let router = routes::router(app.clone(), origins);
        let serving = tokio::spawn(listener.serve(app.clone(), router, stopped, grace));
        let looking = tokio::spawn(serve::look_after(app.clone(), stats));
        let loading = {
            let app = app.clone();
            tokio::task::spawn_blocking(move || args.load(source, adapters, &device, &app))
        };
        tokio::select! {
            loaded = loading => {
                let loaded = loaded.context("the model could not be loaded")??;
                let _ = app.loaded.set(Arc::new(loaded)); // there is no other
            }
            () = signals.next() => return Ok(()),
        }
        if !quiet {
            let _ = writeln!(io::stderr(), "{} is ready", app.model);
        }
        signals.next().await;
        if !quiet {
            let _ = writeln!(io::stderr(), "ending: what runs may take {} s", grace.as_secs());
        }
        let _ = stop.send(());
        tokio::select! {
            _ = serving => {}
            () = signals.next() => {}
        }
        looking.abort();
        if let Some(audit) = &app.audit {
            audit.sync();
        }
        anyhow::Ok(())
    })?;
    // A thread that still reads a schema or a model is not waited for.
    runtime.shutdown_background();
    Ok(())
}

/// Signals that end the server.
#[cfg(unix)]
struct Signals([tokio::signal::unix::Signal; 2]);

#[cfg(unix)]
impl Signals {
    fn new() -> io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self([signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?]))
    }

    /// Waits for one.
    async fn next(&mut self) {
        let [terminate, interrupt] = &mut self.0;
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    }
}

/// Ctrl-C, which ends the server.
#[cfg(not(unix))]
struct Signals;

#[cfg(not(unix))]
impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self)
    }

    /// Waits for one.
    async fn next(&mut self) {
        let _ = tokio::signal::ctrl_c().await; // without a handler there is none to wait for
    }
}
