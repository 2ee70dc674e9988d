//! Watching: counters and histograms for Prometheus, `/stats` for people, alerts.

pub mod alerts;
mod process;
mod record;
mod windows;

use std::{
    fmt::Write,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicI64, AtomicU64},
    },
    time::{Duration, Instant},
};

use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::{Registry, Unit},
};
use serde_json::{Value, json};

pub use self::record::Record;
use self::{
    alerts::{Alerts, Readings, Thresholds},
    process::Cpu,
    windows::{Happening, Windows},
};
use super::engine::{Observer, State};

/// Upper bounds of the buckets of durations, in seconds.
const SECONDS: [f64; 18] = [
    0.001, 0.002, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.2, 0.5, 1., 2., 5., 10., 30., 60.,
    300.,
];
/// Of the numbers of sequences in a step.
const SEQUENCES: [f64; 8] = [1., 2., 4., 8., 16., 32., 64., 128.];

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct RouteCode {
    route: String,
    code: u16,
}

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct Named {
    adapter: String,
}

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct Reason {
    reason: &'static str,
}

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct KvState {
    state: &'static str,
}

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct AlertName {
    name: &'static str,
}

type Level = Gauge<i64, AtomicI64>;
type Seconds = Counter<f64, AtomicU64>;

/// What is known of all requests.
pub struct Watch {
    start: Instant,
    registry: Registry,
    requests: Family<RouteCode, Counter>,
    in_flight: Level,
    first_token: Histogram,
    next_token: Histogram,
    request: Histogram,
    batch: Histogram,
    adapters: Family<Named, Counter>,
    blocked: Family<Reason, Counter>,
    cache_hits: Counter,
    audit_lost: Counter,
    sampled: Sampled,
    windows: Mutex<Windows>,
    seen: Mutex<Seen>,
}

/// Read off when they are asked for.
#[derive(Default)]
struct Sampled {
    queued: Level,
    running: Level,
    kv: Family<KvState, Level>,
    kv_limit: Level,
    prompt_tokens: Counter,
    new_tokens: Counter,
    prefix_hits: Counter,
    prefix_tokens: Counter,
    resident: Level,
    cpu: Seconds,
    alerts: Family<AlertName, Level>,
}

/// What was found at the last look.
#[derive(Default)]
struct Seen {
    alerts: Alerts,
    cpu: Cpu,
    cpu_percent: Option<f64>,
    /// By code.
    codes: std::collections::BTreeMap<u16, u64>,
    /// By reason.
    blocked: std::collections::BTreeMap<&'static str, u64>,
}

impl Watch {
    /// Nothing happened yet.
    pub fn new(thresholds: Thresholds) -> Self {
        let seconds = || Histogram::new(SECONDS);
        let mut watch = Self {
            start: Instant::now(),
            registry: Registry::with_prefix("bitnet"),
            requests: Family::default(),
            in_flight: Level::default(),
            first_token: seconds(),
            next_token: seconds(),
            request: seconds(),
            batch: Histogram::new(SEQUENCES),
            adapters: Family::default(),
            blocked: Family::default(),
            cache_hits: Counter::default(),
            audit_lost: Counter::default(),
            sampled: Sampled::default(),
            windows: Mutex::new(Windows::new(Instant::now())),
            seen: Mutex::new(Seen { alerts: Alerts::new(thresholds), ..Seen::default() }),
        };
        watch.register();
        watch
    }

    fn register(&mut self) {
        let (r, s) = (&mut self.registry, &self.sampled);
        r.register("requests", "Requests by route and status", self.requests.clone());
        r.register("requests_in_flight", "Requests being answered", self.in_flight.clone());
        r.register("queue_length", "Sequences that wait", s.queued.clone());
        r.register("running_sequences", "Sequences in the batch", s.running.clone());
        r.register("batch_size", "Sequences in a step", self.batch.clone());
        let mut seconds = |name, help, metric: &Histogram| {
            r.register_with_unit(name, help, Unit::Seconds, metric.clone());
        };
        seconds("time_to_first_token", "From the request to its first token", &self.first_token);
        seconds("inter_token", "Between tokens of a sequence", &self.next_token);
        seconds("request", "From the request to the end of its answer", &self.request);
        r.register("prompt_tokens", "Tokens of prompts that were run", s.prompt_tokens.clone());
        r.register("new_tokens", "Tokens added", s.new_tokens.clone());
        let help = "Sequences that took over the beginning of an earlier one";
        r.register("prefix_hits", help, s.prefix_hits.clone());
        let help = "Tokens of prompts that were taken over";
        r.register("prefix_tokens", help, s.prefix_tokens.clone());
        let help = "Answers that were kept from an equal request";
        r.register("response_cache_hits", help, self.cache_hits.clone());
        let mut bytes = |name, help, metric: &Level| {
            r.register_with_unit(name, help, Unit::Bytes, metric.clone());
        };
        bytes("kv_limit", "The most memory for keys and values", &s.kv_limit);
        bytes("resident", "Memory of this process", &s.resident);
        let help = "Memory of keys and values";
        r.register_with_unit("kv", help, Unit::Bytes, s.kv.clone());
        let help = "Seconds of all cores so far";
        r.register_with_unit("cpu", help, Unit::Seconds, s.cpu.clone());
        r.register("adapter_requests", "Requests by adapter", self.adapters.clone());
        r.register(
            "blocked",
            "Requests that were not let through, by reason",
            self.blocked.clone(),
        );
        r.register(
            "audit_lost",
            "Lines of the audit log that could not be written",
            self.audit_lost.clone(),
        );
        r.register("alert", "1 while a value is beyond its threshold", s.alerts.clone());
    }

    /// A request was not let through, or an answer was cut.
    pub fn blocked(&self, reason: &'static str) {
        self.blocked.get_or_create(&Reason { reason }).inc();
        *lock(&self.seen).blocked.entry(reason).or_default() += 1;
    }

    /// A request goes to an adapter.
    pub fn adapter(&self, name: &str) {
        self.adapters.get_or_create(&Named { adapter: name.to_owned() }).inc();
    }

    /// An answer was kept from an equal request.
    pub fn cache_hit(&self) {
        self.cache_hits.inc();
    }

    /// A line of the audit log could not be written.
    pub fn audit_lost(&self) {
        self.audit_lost.inc();
    }

    fn request_begins(&self) {
        self.in_flight.inc();
    }

    fn request_ends(&self, route: &str, code: u16, took: Duration) {
        self.in_flight.dec();
        self.requests.get_or_create(&RouteCode { route: route.to_owned(), code }).inc();
        self.request.observe(took.as_secs_f64());
        *lock(&self.seen).codes.entry(code).or_default() += 1;
        // Refusals while loading, draining or full are what is asked of us; they count as errors of none.
        let is_error = code >= 500 && code != 503;
        self.push(Happening::Request { is_error, took });
    }

    fn push(&self, happening: Happening) {
        lock(&self.windows).push(Instant::now(), happening);
    }

    /// Looks whether anything is beyond its threshold. Call it every second or so.
    pub fn look(&self, state: State) {
        let now = Instant::now();
        let window = lock(&self.windows).shortest(now);
        let seen = &mut *lock(&self.seen);
        seen.cpu_percent = seen.cpu.look(now).or(seen.cpu_percent);
        seen.alerts.look(Readings {
            window: &window,
            resident_bytes: process::resident_bytes(),
            cpu_percent: seen.cpu_percent,
            running: state.usage.running,
        });
    }

    /// All metrics, in the text format of OpenMetrics.
    pub fn metrics(&self, state: State, kv_limit: usize) -> String {
        let (s, usage) = (&self.sampled, state.usage);
        s.queued.set(state.queued as i64);
        s.running.set(usage.running as i64);
        let kv = |state, bytes: usize| s.kv.get_or_create(&KvState { state }).set(bytes as i64);
        kv("running", usage.running_bytes);
        kv("kept", usage.kept_bytes);
        s.kv_limit.set(kv_limit as i64);
        let raise = |counter: &Counter, to: u64| {
            counter.inc_by(to.saturating_sub(counter.get()));
        };
        raise(&s.prompt_tokens, usage.prompt_tokens);
        raise(&s.new_tokens, usage.new_tokens);
        raise(&s.prefix_hits, usage.prefix_hits);
        raise(&s.prefix_tokens, usage.prefix_tokens);
        s.resident.set(process::resident_bytes().unwrap_or_default() as i64);
        let cpu = process::cpu_seconds().unwrap_or_default();
        s.cpu.inc_by((cpu - s.cpu.get()).max(0.));
        let alerts = lock(&self.seen).alerts.raised();
        s.alerts.clear();
        for alert in alerts {
            s.alerts.get_or_create(&AlertName { name: alert.name }).set(1);
        }
        let mut text = String::new();
        if encode(&mut text, &self.registry).is_err() {
            let _ = text.write_str("# EOF\n"); // a String takes all that is written
        }
        text
    }

    /// What `/stats` says beside the state of the engine.
    pub fn stats(&self) -> Value {
        let now = Instant::now();
        let windows = lock(&self.windows).at(now);
        let seen = lock(&self.seen);
        let total: u64 = seen.codes.values().sum();
        let codes = seen.codes.iter().map(|(code, count)| (code.to_string(), json!(count)));
        json!({
            "uptime_seconds": (now - self.start).as_secs_f64(),
            "requests": {
                "total": total,
                "in_flight": self.in_flight.get(),
                "by_code": Value::Object(codes.collect()),
                "response_cache_hits": self.cache_hits.get(),
            },
            "blocked": seen.blocked,
            "windows": windows,
            "process": {"rss_bytes": process::resident_bytes(), "cpu_percent": seen.cpu_percent},
            "alerts": seen.alerts.raised(),
        })
    }
}

impl Observer for Arc<Watch> {
    fn first_token(&self, after: Duration) {
        self.first_token.observe(after.as_secs_f64());
        self.push(Happening::FirstToken(after));
    }

    fn next_token(&self, after: Duration) {
        self.next_token.observe(after.as_secs_f64());
        self.push(Happening::NextToken(after));
    }

    fn step(&self, sequences: usize) {
        self.batch.observe(sequences as f64);
    }

    fn joined(&self, prompt_tokens: usize, reused: usize) {
        self.push(Happening::Prompt(prompt_tokens - reused));
    }
}

/// What panicked while it held the lock left counts at worst.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
