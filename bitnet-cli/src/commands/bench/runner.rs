//! Runs the tests of a plan, and the limits before and after them.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use anyhow::Context;
use bitnet_model::{
    kv_cache::KvCache,
    model::Model,
    nn::{Changed, Need, Rescored},
    pretrained::Source,
    sampler::argmax,
    session::PREFILL_CHUNK,
};
use candle_core::{IndexOp, Tensor};

use super::{
    energy::Energy,
    memory,
    plan::{Kind, Plan, Test},
};
use crate::{
    limits::{Limits, set_threads},
    statistics::peak_memory,
};

/// Tokens of the prompt after which the first token is timed.
const FIRST_PROMPT: usize = 16;

/// Tokens generated before any are timed.
const WARM_UP: usize = 4;

/// What a test came to.
#[derive(Clone, Debug)]
pub struct Measurement {
    /// Which test.
    pub test: Test,
    /// Tokens a second, of all sequences.
    pub samples: Vec<f64>,
    /// Rows of the head multiplied again for each row of logits; `None` if the head is not screened.
    pub rescored: Option<f64>,
    /// The most resident memory while it ran and the tokens before it were read.
    pub peak_rss: Option<u64>,
    /// Bytes of keys and values.
    pub kv_bytes: usize,
    /// Joules of the processor packages a token, all samples together.
    pub joules: Option<f64>,
}

/// What a run came to.
#[derive(Debug)]
pub struct Run {
    /// Of the tests that ran, in the order of the plan.
    pub measurements: Vec<Measurement>,
    /// Finding, reading and checking the model.
    pub load_time: Duration,
    /// Loading, a prompt of 16 tokens and the choice of the next.
    pub first_token: Duration,
    /// The most resident memory, from the beginning of loading.
    pub peak_rss: Option<u64>,
}

/// Where a run stands.
pub struct Runner<'a> {
    plan: &'a Plan,
    interrupt: &'a AtomicBool,
    quiet: bool,
    limits: Vec<Limits>,
}

/// The end of a piece of work: `None` if Ctrl-C came first.
type Unless<T> = anyhow::Result<Option<T>>;

impl<'a> Runner<'a> {
    /// For `plan`, until `interrupt` is set.
    pub fn new(plan: &'a Plan, interrupt: &'a AtomicBool, quiet: bool) -> Self {
        Self { plan, interrupt, quiet, limits: Vec::new() }
    }

    /// Tells the user what happens.
    pub fn say(&self, what: &str) {
        if !self.quiet {
            eprintln!("{what}");
        }
    }

    /// Measures the limits of the machine, and keeps the better of this and the last measurement.
    pub fn measure_limits(&mut self, source: &Source) -> anyhow::Result<()> {
        if self.interrupted() {
            return Ok(());
        }
        self.say("limits of the machine");
        let limits =
            Limits::measure(&self.plan.threads, source.config.hidden_size, source.tile_format())
                .context("cannot measure the limits of the machine")?;
        self.limits = match self.limits.is_empty() {
            true => limits,
            false => self.limits.iter().zip(limits).map(|(old, new)| old.max(new)).collect(),
        };
        Ok(())
    }

    /// The limits, for each number of threads.
    pub fn limits(&self) -> &[Limits] {
        &self.limits
    }

    /// Times the first token and all tests.
    pub fn run(&self, model: &Model, load_time: Duration, energy: &Energy) -> anyhow::Result<Run> {
        set_threads(self.most_threads());
        let first_token = load_time + self.first_token(model)?;
        let mut peak_rss = peak_memory();
        let mut measurements = Vec::new();
        let mut state: Option<State> = None;
        for test in &self.plan.tests {
            memory::reset_peak();
            let prepared = match state.take().filter(|state| state.serves(test)) {
                Some(state) => Some(state),
                None => self.prepare(model, test)?,
            };
            let Some(mut prepared) = prepared else { break };
            let measurement = self.measure(&mut prepared, test, energy)?;
            state = Some(prepared);
            if let Some(measurement) = measurement {
                peak_rss = peak_rss.max(measurement.peak_rss);
                self.report(&measurement);
                measurements.push(measurement);
            }
            if self.interrupted() {
                break;
            }
        }
        Ok(Run { measurements, load_time, first_token, peak_rss })
    }

    fn interrupted(&self) -> bool {
        self.interrupt.load(Ordering::Relaxed)
    }

    fn most_threads(&self) -> usize {
        self.plan.threads.last().copied().unwrap_or(1)
    }

    fn report(&self, measurement: &Measurement) {
        let Measurement { test, samples, .. } = measurement;
        let mean = samples.iter().sum::<f64>() / samples.len() as f64;
        let name = test.name();
        let (threads, batch) = (test.threads, test.batch);
        self.say(&format!("{name}, {threads} threads, batch {batch}: {mean:.1} tokens/s"));
    }

    /// Reading a short prompt and choosing the next token.
    fn first_token(&self, model: &Model) -> anyhow::Result<Duration> {
        let mut state = State::new(model, self.plan, 1, 0);
        let tokens = FIRST_PROMPT.min(model.config().max_position_embeddings);
        let start = Instant::now();
        state.read(tokens, self.interrupt)?;
        Ok(start.elapsed())
    }

    /// A cache with the tokens that `test` finds there; computed on all threads, as the result does not depend on them.
    fn prepare<'m>(&self, model: &'m Model, test: &Test) -> Unless<State<'m>> {
        let depth = test.depth();
        let mut state = State::new(model, self.plan, test.batch, depth);
        if depth > 0 {
            self.say(&format!("reading {depth} tokens, batch {}", test.batch));
            set_threads(self.most_threads());
            if state.read(depth, self.interrupt)?.is_none() {
                return Ok(None);
            }
        }
        Ok(Some(state))
    }

    fn measure(&self, state: &mut State, test: &Test, energy: &Energy) -> Unless<Measurement> {
        set_threads(test.threads);
        let warm_up = match test.kind {
            Kind::Prompt { tokens } => {
                state.read(tokens.min(PREFILL_CHUNK.get()), self.interrupt)?
            }
            Kind::Generate { tokens, .. } => state.generate(tokens.min(WARM_UP), self.interrupt)?,
        };
        state.rewind();
        if warm_up.is_none() {
            return Ok(None);
        }
        let (mut samples, mut joules) = (Vec::new(), Some(0.));
        let mut tally = Rescored::default();
        for _ in 0..self.plan.repetitions {
            let before = energy.now();
            let start = Instant::now();
            let done = match test.kind {
                Kind::Prompt { tokens } => state.read(tokens, self.interrupt)?,
                Kind::Generate { tokens, .. } => state.generate(tokens, self.interrupt)?,
            };
            let seconds = start.elapsed().as_secs_f64();
            let spent = before.and_then(|before| energy.since(&before));
            state.rewind();
            let Some(counted) = done else { break };
            tally.add(counted);
            samples.push(test.tokens() as f64 / seconds);
            joules = joules.zip(spent).map(|(all, spent)| all + spent);
        }
        if samples.is_empty() {
            return Ok(None);
        }
        let tokens = (test.tokens() * samples.len()) as f64;
        Ok(Some(Measurement {
            test: *test,
            samples,
            rescored: tally.mean(),
            peak_rss: peak_memory(),
            kv_bytes: state.cache.bytes(),
            joules: joules.map(|joules| joules / tokens),
        }))
    }
}

/// Sequences that go on from the same number of tokens again and again.
struct State<'m> {
    model: &'m Model,
    cache: KvCache,
    depth: usize,
}

impl<'m> State<'m> {
    fn new(model: &'m Model, plan: &Plan, batch: usize, depth: usize) -> Self {
        Self { model, cache: model.cache(plan.kv_type, batch), depth }
    }

    /// Whether the tokens of this cache are what `test` begins with.
    fn serves(&self, test: &Test) -> bool {
        test.depth() == self.depth && test.batch == self.cache.batch()
    }

    fn rewind(&mut self) {
        self.cache.truncate(self.depth);
    }

    /// Any tokens for every sequence, other ones at other places: (batch, seq).
    fn tokens(&self, seq: usize) -> anyhow::Result<Tensor> {
        let (batch, first) = (self.cache.batch(), self.cache.len());
        let vocab_size = self.model.config().vocab_size as u64;
        // Multiples of a large odd number, Knuth's, in turn.
        let id = |place: usize| (place as u64 * 2_654_435_761 % vocab_size) as u32;
        let ids = (0..batch).flat_map(|row| (0..seq).map(move |i| 1 + row * 7919 + first + i));
        let ids: Vec<u32> = ids.map(id).collect();
        Ok(Tensor::from_vec(ids, (batch, seq), self.model.device())?)
    }

    /// Runs `tokens` (batch, seq) and chooses the next token of each sequence.
    fn next(&mut self, tokens: &Tensor, tally: &mut Rescored) -> anyhow::Result<Vec<u32>> {
        let hidden = self.model.hidden_states(tokens, Some(&mut self.cache))?;
        let last = hidden.dim(1)? - 1;
        let hidden = hidden.i((.., last))?.contiguous()?; // (batch, hidden_size)
        let best = Need::Top { k: 1, changed: Changed::default() };
        let logits = self.model.needed_logits(&hidden, &vec![best; self.cache.batch()])?;
        tally.count(&logits);
        Ok(logits.iter().map(|logits| argmax(&logits.values) as u32).collect())
    }

    /// Reads a prompt of `tokens`, in chunks as a session does, and computes the logits after it.
    fn read(&mut self, tokens: usize, interrupt: &AtomicBool) -> Unless<Rescored> {
        let chunk = (PREFILL_CHUNK.get() / self.cache.batch()).max(1);
        let mut tally = Rescored::default();
        let mut left = tokens;
        while left > 0 {
            if interrupt.load(Ordering::Relaxed) {
                return Ok(None);
            }
            let input = self.tokens(left.min(chunk))?;
            left -= left.min(chunk);
            match left {
                0 => _ = self.next(&input, &mut tally)?,
                _ => _ = self.model.hidden_states(&input, Some(&mut self.cache))?,
            }
        }
        Ok(Some(tally))
    }

    /// Generates `tokens` of every sequence.
    fn generate(&mut self, tokens: usize, interrupt: &AtomicBool) -> Unless<Rescored> {
        let mut tally = Rescored::default();
        let mut input = self.tokens(1)?;
        for _ in 0..tokens {
            if interrupt.load(Ordering::Relaxed) {
                return Ok(None);
            }
            let next = self.next(&input, &mut tally)?;
            input = Tensor::from_vec(next, (self.cache.batch(), 1), self.model.device())?;
        }
        Ok(Some(tally))
    }
}
