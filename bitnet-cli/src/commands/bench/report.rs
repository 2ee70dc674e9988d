//! The result of a run: what `--json` prints and the tables show.

use bitnet_model::{kernels, pretrained::Source};
use serde::Serialize;

use super::{
    Args,
    bounds::Work,
    compare::Comparison,
    energy::Energy,
    plan::Plan,
    presets::{Level, Preset},
    runner::{Measurement, Run},
};
use crate::{limits::Limits, machine::Machine};

/// Tells a report from other JSON.
pub const FORMAT: &str = "bitnet-bench";

/// Goes up when a field changes its meaning.
pub const VERSION: u32 = 1;

/// Everything.
#[derive(Debug, Serialize)]
pub struct Report {
    /// [`FORMAT`].
    pub format: &'static str,
    /// [`VERSION`].
    pub version: u32,
    /// Version of this program.
    pub bitnet: &'static str,
    /// The model.
    pub model: ModelInfo,
    /// Where the model computes: `cpu` or `cuda:N`.
    pub device: String,
    /// Instruction set.
    pub kernel: &'static str,
    /// Output head: `exact`, `q8`, `q6` or `q4`.
    pub lm_head: &'static str,
    /// Keys and values.
    pub kv_cache: &'static str,
    /// `--level`.
    pub level: Level,
    /// `--preset`.
    pub preset: Option<Preset>,
    /// The memory that the preset allows.
    pub memory_limit_bytes: Option<u64>,
    /// What was measured.
    pub machine: Machine,
    /// What a token costs.
    pub work: Work,
    /// What the processor can do, for each number of threads; empty if a device computes.
    pub limits: Vec<Limits>,
    /// Finding, reading and checking the model.
    pub load_seconds: f64,
    /// Loading, a prompt of 16 tokens and the choice of the next.
    pub first_token_seconds: f64,
    /// The most resident memory of loading and of all tests, without the buffers of the limits.
    pub peak_rss_bytes: Option<u64>,
    /// Keys and values, the most of any test; part of `peak_rss_bytes`.
    pub kv_cache_bytes: usize,
    /// Why there is no `joules_per_token`, if so.
    pub energy_unavailable: Option<String>,
    /// Whether Ctrl-C ended the run before all was measured.
    pub interrupted: bool,
    /// One for each test.
    pub results: Vec<Row>,
    /// With `--compare`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub comparison: Option<Comparison>,
}

/// The model's name and size.
#[derive(Debug, Serialize)]
pub struct ModelInfo {
    /// As the user named it.
    pub name: String,
    /// Weights of every kind.
    pub parameters: u64,
    /// `config.json`, as this project writes it.
    pub config: serde_json::Value,
}

/// A test.
#[derive(Debug, Serialize)]
pub struct Row {
    /// `pp512`, `tg128`, `tg128@2048`.
    pub test: String,
    /// Threads.
    pub threads: usize,
    /// Sequences at once.
    pub batch: usize,
    /// The median of `samples`.
    pub tokens_per_second: f64,
    /// Tokens of all sequences a second, in the order measured.
    pub samples: Vec<f64>,
    /// The difference of the best and the worst sample, as a part of the median.
    pub spread: f64,
    /// Bytes read from memory for each token.
    pub bytes_per_token: Option<f64>,
    /// `memory`, `cache` or `multiply`: the tightest limit.
    pub limit: Option<&'static str>,
    /// What it allows.
    pub limit_tokens_per_second: Option<f64>,
    /// `tokens_per_second / limit_tokens_per_second`.
    pub limit_fraction: Option<f64>,
    /// Rows of the head multiplied again for each row of logits, if it is screened.
    pub rescored_rows: Option<f64>,
    /// The most resident memory while the test ran and, unless another test had done so, the tokens before it were read.
    pub peak_rss_bytes: Option<u64>,
    /// Keys and values.
    pub kv_cache_bytes: usize,
    /// Of the processor packages.
    pub joules_per_token: Option<f64>,
}

/// What a run found out.
#[derive(Debug)]
pub struct Findings<'a> {
    /// What computed.
    pub device: String,
    /// Where it ran.
    pub machine: Machine,
    /// What a token costs.
    pub work: Work,
    /// The tests.
    pub run: Run,
    /// What the machine can do.
    pub limits: &'a [Limits],
    /// Whether energy was measured.
    pub energy: &'a Energy,
}

impl Report {
    /// Puts the parts together.
    pub fn new(source: &Source, plan: &Plan, args: &Args, findings: Findings<'_>) -> Self {
        let Findings { device, machine, work, run, limits, energy } = findings;
        let cache = machine.cache_bytes;
        let mut rows: Vec<Row> = run
            .measurements
            .iter()
            .map(|measurement| Row::new(measurement, &work, limits, cache))
            .collect();
        rows.sort_by_key(|row| row.threads);
        Self {
            format: FORMAT,
            version: VERSION,
            bitnet: env!("CARGO_PKG_VERSION"),
            model: ModelInfo {
                name: source.name.clone(),
                parameters: source.config.parameters(),
                config: source.config.to_json(),
            },
            device,
            kernel: kernels::active().name(),
            lm_head: source.lm_head.name(),
            kv_cache: plan.kv_type.name(),
            level: args.level,
            preset: args.preset,
            memory_limit_bytes: plan.memory_limit,
            machine,
            work,
            limits: limits.to_vec(),
            load_seconds: run.load_time.as_secs_f64(),
            first_token_seconds: run.first_token.as_secs_f64(),
            peak_rss_bytes: run.peak_rss,
            kv_cache_bytes: rows.iter().map(|row| row.kv_cache_bytes).max().unwrap_or(0),
            energy_unavailable: energy.reason().map(str::to_owned),
            interrupted: false,
            results: rows,
            comparison: None,
        }
    }
}

impl Row {
    fn new(
        measurement: &Measurement,
        work: &Work,
        limits: &[Limits],
        cache: Option<usize>,
    ) -> Self {
        let Measurement { test, samples, .. } = measurement;
        let rescored = measurement.rescored.unwrap_or(0.);
        let tokens_per_second = median(samples);
        let limits = limits.iter().find(|limits| limits.threads == test.threads);
        let bound = limits.and_then(|limits| work.bound(test, limits, rescored, cache));
        let (worst, best) =
            samples.iter().fold((f64::INFINITY, 0f64), |(low, high), &x| (low.min(x), high.max(x)));
        Self {
            test: test.name(),
            threads: test.threads,
            batch: test.batch,
            tokens_per_second,
            samples: samples.clone(),
            spread: (best - worst) / tokens_per_second,
            bytes_per_token: work.bytes_a_token(test, rescored),
            limit: bound.map(|bound| bound.limit.name()),
            limit_tokens_per_second: bound.map(|bound| bound.tokens_per_second),
            limit_fraction: bound.map(|bound| tokens_per_second / bound.tokens_per_second),
            rescored_rows: measurement.rescored,
            peak_rss_bytes: measurement.peak_rss,
            kv_cache_bytes: measurement.kv_bytes,
            joules_per_token: measurement.joules,
        }
    }
}

/// The middle one, or the mean of the two in the middle.
fn median(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() % 2 {
        0 => (sorted[middle - 1] + sorted[middle]) / 2.,
        _ => sorted[middle],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&[3.]), 3.);
        assert_eq!(median(&[3., 1.]), 2.);
        assert_eq!(median(&[9., 1., 2.]), 2.);
    }
}
