//! `--dry-run`: what a run would be, with its speed measured in a few real updates that leave nothing behind.

use std::{
    io::{self, Write},
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use anyhow::Context;
use bitnet_train::{
    batch::Batches,
    dataset::Content,
    experiment::{self, Place},
    metrics::Memory,
    recipe::Recipe,
    trainer::Event,
};
use candle_core::Device;
use serde_json::json;

use super::{display::Display, show};
use crate::progress::{bytes, count, duration};

/// What the program, the vocabulary and a few megabytes of text take beside a run's tensors.
const PROCESS_BYTES: u64 = 30_000_000;

/// Updates of the trial; the first, which pages memory in, does not count.
const TRIAL_UPDATES: usize = 4;

/// The trial ends earlier after this time.
const TRIAL_TIME: Duration = Duration::from_secs(30);

/// Time of a forward pass in terms of that of an update: its backward pass is two.
const FORWARD_PART: f64 = 1. / 3.;

/// Says to stdout what a run of `recipe` would be.
pub fn print(
    recipe: &Recipe,
    device: &Device,
    display: &mut Display,
    interrupted: &AtomicBool,
    json: bool,
) -> anyhow::Result<()> {
    let mut recipe = recipe.clone();
    // What a run left is used; else nothing is left behind.
    let scratch = tempfile::tempdir().context("no temporary folder for the encoded text")?;
    let cache = recipe.data.cache_dir(&recipe.output.dir);
    recipe.data.cache = Some(if cache.is_dir() { cache } else { scratch.path().to_owned() });
    let recipe = &recipe;
    let mut plan = Plan::new(recipe, display, interrupted)?;
    let trial = Trial::new(recipe, device, plan.steps)?;
    plan.parameters = trial.parameters as u64;
    if let (Some(_), Some(memory)) = (&recipe.lora, trial.memory) {
        // Most of it is the base, as it lies in memory: what was measured says it best.
        plan.memory = memory.peak_bytes;
    }
    let time = plan.time(recipe, trial.seconds);
    let out = &mut io::stdout().lock();
    if json {
        let summary = json!({
            "parameters": plan.parameters, "steps": plan.steps,
            "tokens_per_step": plan.tokens_per_step, "tokens": plan.tokens(),
            "epochs": plan.epochs(), "train_tokens": plan.train_tokens,
            "validation_tokens": plan.validation_tokens, "memory_bytes": plan.memory,
            "trial_peak_memory_bytes": trial.memory.map(|memory| memory.peak_bytes),
            "seconds_per_step": trial.seconds,
            "tokens_per_second": plan.tokens_per_step as f64 / trial.seconds,
            "seconds": time.as_secs_f64(), "output": recipe.output.dir.display().to_string(),
        });
        return Ok(writeln!(out, "{summary:#}")?);
    }
    let (train, held_out) = (plan.train_tokens as u64, plan.validation_tokens as u64);
    let measured = trial
        .memory
        .map_or_else(String::new, |memory| format!(", {} in the trial", bytes(memory.peak_bytes)));
    let speed = count((plan.tokens_per_step as f64 / trial.seconds) as u64);
    for (name, value) in [
        ("parameters", count(plan.parameters)),
        ("data", format!("{} tokens, {} held out", count(train), count(held_out))),
        ("updates", format!("{} of {} tokens", plan.steps, plan.tokens_per_step)),
        ("tokens", format!("{}, {:.2} epochs", count(plan.tokens()), plan.epochs())),
        ("memory", format!("about {}{measured}", bytes(plan.memory))),
        ("speed", format!("{:.3} s an update, {speed} tokens/s", trial.seconds)),
        ("time", format!("about {}, evaluations included", duration(time))),
        ("output", recipe.output.dir.display().to_string()),
    ] {
        writeln!(out, "{name:12}{value}")?;
    }
    Ok(())
}

/// What follows from recipe and data.
struct Plan {
    steps: usize,
    tokens_per_step: usize,
    train_tokens: usize,
    validation_tokens: usize,
    parameters: u64,
    memory: u64,
}

impl Plan {
    fn new(
        recipe: &Recipe,
        display: &mut Display,
        interrupted: &AtomicBool,
    ) -> anyhow::Result<Self> {
        let dataset = show::open(recipe, display, interrupted)?;
        let (train_tokens, validation_tokens) =
            (dataset.train.tokens(), dataset.validation.tokens());
        let (batch, sequence) = (recipe.train.batch_size, recipe.data.sequence_length);
        let is_stream = matches!(dataset.train, Content::Stream(_));
        let batches = Batches::new(dataset.train, recipe.cut(), recipe.train.seed)?;
        let tokens_per_batch = match is_stream {
            true => batch * sequence,
            // Rows of examples are as long as the longest of their batch.
            false => train_tokens.div_ceil(batches.per_epoch()),
        };
        let parameters = experiment::config(recipe, &dataset.vocabulary)?.parameters();
        Ok(Self {
            steps: recipe.steps(batches.per_epoch())?,
            tokens_per_step: tokens_per_batch * recipe.train.gradient_accumulation,
            train_tokens,
            validation_tokens,
            parameters,
            memory: memory(recipe, parameters),
        })
    }

    fn tokens(&self) -> u64 {
        self.tokens_per_step as u64 * self.steps as u64
    }

    fn epochs(&self) -> f64 {
        self.tokens() as f64 / self.train_tokens as f64
    }

    /// How long the run takes when an update takes `seconds`.
    fn time(&self, recipe: &Recipe, seconds: f64) -> Duration {
        let evaluations = self.steps.div_ceil(recipe.train.eval_every);
        let updates = self.validation_tokens as f64 / self.tokens_per_step as f64 * FORWARD_PART;
        let updates = self.steps as f64 + evaluations as f64 * updates;
        Duration::try_from_secs_f64(updates * seconds).unwrap_or(Duration::MAX)
    }
}

/// What a few updates took.
struct Trial {
    /// Values that are trained.
    parameters: usize,
    seconds: f64,
    memory: Option<Memory>,
}

impl Trial {
    /// Makes the first updates of a run of `steps` without a checkpoint or an evaluation, in a folder that goes away.
    fn new(recipe: &Recipe, device: &Device, steps: usize) -> anyhow::Result<Self> {
        let dir = tempfile::tempdir().context("no temporary folder for the trial")?;
        let mut recipe = recipe.clone();
        recipe.output.dir = dir.path().to_owned();
        recipe.output.tensorboard = false;
        // The last update would be followed by an evaluation.
        (recipe.train.steps, recipe.train.epochs) = (Some(steps.max(TRIAL_UPDATES + 1)), None);
        (recipe.train.eval_every, recipe.train.save_every) = (usize::MAX, usize::MAX);
        recipe.train.save_total_limit = 0;
        let is_enough = AtomicBool::new(false);
        let (mut times, mut memory) = (Vec::new(), None);
        let (started, mut last) = (Instant::now(), Instant::now());
        let mut observe = |event: Event| {
            let Event::Update { record, .. } = event else { return };
            times.push(last.elapsed().as_secs_f64());
            last = Instant::now();
            memory = record.memory;
            if times.len() >= TRIAL_UPDATES || started.elapsed() > TRIAL_TIME {
                is_enough.store(true, Ordering::Relaxed);
            }
        };
        let place = Place { device: device.clone(), ..Place::default() };
        let summary = experiment::run_as(place, &recipe, false, &mut observe, &is_enough)?;
        let parameters = summary.parameters;
        // The time to the first update is that of reading the data.
        let times = if times.len() > 1 { &times[1..] } else { &times[..] };
        let seconds = times.iter().sum::<f64>() / times.len() as f64;
        Ok(Self { parameters, seconds, memory })
    }
}

/// A rough estimate of the bytes a run takes: weights, gradients and two moments a parameter, and what
/// a forward pass keeps for the backward pass.
fn memory(recipe: &Recipe, parameters: u64) -> u64 {
    let model = &recipe.model;
    let key_value = model.head_dim() * model.num_key_value_heads;
    // Values a token and layer: the stream and its sums, norms, projections and their quantized
    // inputs. Attention keeps no scores; of the logits there are two copies and their gradient.
    let layer = 10 * model.hidden_size + 4 * model.intermediate_size + 4 * key_value;
    let token = model.num_hidden_layers * layer + 3 * model.vocab_size;
    let tokens = recipe.train.batch_size * recipe.data.sequence_length;
    PROCESS_BYTES + 4 * (4 * parameters + (tokens * token) as u64)
}
