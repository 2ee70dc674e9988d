//! The training loop: batch → model → loss → backward → clip → update, with evaluations, checkpoints and an exact
//! resume.
//!
//! The loop knows no model: it is given a function from tokens to logits and the variables behind it. Every bit of a
//! run follows from the recipe, the dataset and the initial weights, so a run that is killed and resumed ends with
//! the same weights and metrics (but for timings) as one that was not.

use std::{
    path::PathBuf,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use candle_core::{D, Device, Tensor, Var};

use crate::{
    Error, Result,
    batch::{Batch, Batches, validation_windows},
    checkpoint::{self, Best, Checkpoints, TrainerState},
    dataset::{Dataset, Tokens},
    loss::{cross_entropy, row_nats},
    metrics::{EvaluationRecord, Metrics, Record, TrainRecord},
    optimizer::{AdamW, Schedule, Update, clip_factor, global_norm},
    recipe::{Recipe, difference},
};

/// What happens during a run, for a progress bar.
#[derive(Clone, Debug)]
pub enum Event<'a> {
    /// An update was made.
    Update {
        /// What is written to the metrics.
        record: &'a TrainRecord,
        /// Updates of the whole run.
        steps: usize,
        /// Time left at the speed of this process so far, evaluations and checkpoints included.
        eta: Duration,
    },
    /// An evaluation was made.
    Evaluation {
        /// What is written to the metrics.
        record: &'a EvaluationRecord,
        /// Whether it is the best so far, and its weights were written.
        is_best: bool,
    },
    /// A checkpoint was written.
    Saved(&'a PathBuf),
}

/// Why a run ended. Its last state is a checkpoint in every case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All updates were made.
    Finished,
    /// Held-out loss did not improve for `train.early_stop_patience` evaluations.
    EarlyStopped,
    /// The caller asked to stop; the run can be resumed.
    Interrupted,
}

/// A run of a recipe.
#[derive(Debug)]
pub struct Trainer {
    recipe: Recipe,
    steps: usize,
    schedule: Schedule,
    batches: Batches,
    validation: Tokens,
    parameters: Vec<(String, Var)>,
    device: Device,
    optimizer: AdamW,
    checkpoints: Checkpoints,
    metrics: Metrics,
    state: TrainerState,
}

impl Trainer {
    /// A run from its beginning, with the weights that `parameters` hold now. An output directory with a checkpoint
    /// in it is refused.
    pub fn start(
        recipe: &Recipe,
        dataset: Dataset,
        parameters: Vec<(String, Var)>,
    ) -> Result<Self> {
        let checkpoints = checkpoints(recipe)?;
        if let Some(path) = checkpoints.latest()? {
            let reason =
                "is a checkpoint of an earlier run; resume it, or choose another `output.dir`"
                    .into();
            return Err(Error::Checkpoint { path, reason });
        }
        Self::new(recipe, dataset, parameters, checkpoints)
    }

    /// A run from its newest checkpoint, or from its beginning if there is none yet. A checkpoint of another recipe
    /// or dataset is refused.
    pub fn resume(
        recipe: &Recipe,
        dataset: Dataset,
        parameters: Vec<(String, Var)>,
    ) -> Result<Self> {
        Self::new(recipe, dataset, parameters, checkpoints(recipe)?)
    }

    fn new(
        recipe: &Recipe,
        dataset: Dataset,
        parameters: Vec<(String, Var)>,
        checkpoints: Checkpoints,
    ) -> Result<Self> {
        let Dataset { vocabulary, train, validation } = dataset;
        let Some((_, first)) = parameters.first() else {
            return Err(Error::Input("the model has no trainable parameter".into()));
        };
        let device = first.device().clone();
        let mut optimizer = AdamW::new(&parameters, recipe.adamw())?;
        let mut state = TrainerState {
            step: 0,
            position: Default::default(),
            tokens: 0,
            best: None,
            evaluations_since_best: 0,
            recipe: recipe.identity()?,
            dataset: [train.fingerprint(), validation.fingerprint()],
        };
        let mut batches = Batches::new(
            train,
            recipe.train.batch_size,
            recipe.data.sequence_length,
            recipe.train.seed,
        )?;
        let steps = recipe.steps(batches.per_epoch())?;
        if let Some(path) = checkpoints.latest()? {
            let saved = checkpoint::read_state(&path)?;
            let refuse = |reason| Err(Error::Checkpoint { path: path.clone(), reason });
            if let Some(difference) = difference(&saved.recipe, &state.recipe) {
                return refuse(format!("is of another recipe: {difference}"));
            }
            if saved.dataset != state.dataset {
                return refuse(
                    "is of another dataset: the text or the tokenizer has changed".into(),
                );
            }
            checkpoint::load(&path, &parameters, &mut optimizer)?;
            batches.seek(saved.position);
            state = saved;
        }
        let dir = &recipe.output.dir;
        vocabulary.save(dir)?;
        let metrics = Metrics::open(dir, state.step, false)?;
        let schedule = recipe.schedule(steps);
        let recipe = recipe.clone();
        Ok(Self {
            recipe,
            steps,
            schedule,
            batches,
            validation,
            parameters,
            device,
            optimizer,
            checkpoints,
            metrics,
            state,
        })
    }

    /// Updates of the whole run.
    pub fn steps(&self) -> usize {
        self.steps
    }

    /// Updates made, position in the data, best evaluation.
    pub fn state(&self) -> &TrainerState {
        &self.state
    }

    /// The file that holds the weights of the best evaluation, once there was one.
    pub fn best(&self) -> PathBuf {
        self.checkpoints.best()
    }

    /// Trains until the end, or until `interrupted` is set, which is looked at after every update.
    ///
    /// `forward` makes logits `(batch · seq, vocab)` or `(batch, seq, vocab)` of tokens `(batch, seq)` through the
    /// parameters. `evaluate` makes the same without recording a graph, from variables seen through
    /// [`Var::as_detached_tensor`].
    pub fn run<E: Into<Error>>(
        &mut self,
        forward: impl Fn(&Tensor) -> Result<Tensor, E>,
        evaluate: impl Fn(&Tensor) -> Result<Tensor, E>,
        observe: &mut dyn FnMut(Event),
        interrupted: &AtomicBool,
    ) -> Result<Outcome> {
        let (started, first) = (Instant::now(), self.state.step);
        loop {
            if self.state.step >= self.steps {
                return Ok(Outcome::Finished);
            }
            if self.is_out_of_patience() {
                return Ok(Outcome::EarlyStopped);
            }
            let record = self.update(&forward)?;
            let (step, steps) = (record.step, self.steps);
            let eta = started.elapsed().mul_f64((steps - step) as f64 / (step - first) as f64);
            observe(Event::Update { record: &record, steps, eta });
            self.metrics.write(&Record::Train(record))?;

            let is_last = step == steps;
            if is_last || step.is_multiple_of(self.recipe.train.eval_every) {
                let (record, is_best) = self.evaluate(&evaluate)?;
                observe(Event::Evaluation { record: &record, is_best });
                self.metrics.write(&Record::Evaluation(record))?;
            }
            let interrupted = interrupted.load(Ordering::Relaxed);
            let is_due = step.is_multiple_of(self.recipe.train.save_every);
            if is_last || is_due || interrupted || self.is_out_of_patience() {
                self.metrics.sync()?;
                let path = self.checkpoints.save(&self.state, &self.parameters, &self.optimizer)?;
                observe(Event::Saved(&path));
            }
            if interrupted && !is_last {
                return Ok(Outcome::Interrupted);
            }
        }
    }

    fn is_out_of_patience(&self) -> bool {
        self.recipe
            .train
            .early_stop_patience
            .is_some_and(|most| self.state.evaluations_since_best >= most)
    }

    /// One update from `gradient_accumulation` batches. The mean is over the tokens of all of them.
    fn update<E: Into<Error>>(
        &mut self,
        forward: &impl Fn(&Tensor) -> Result<Tensor, E>,
    ) -> Result<TrainRecord> {
        let started = Instant::now();
        let step = self.state.step + 1;
        let batches: Vec<Batch> =
            (0..self.recipe.train.gradient_accumulation).map(|_| self.batches.draw()).collect();
        let items = batches.iter().map(Batch::items).sum();
        let mut loss = 0.;
        let mut gradients = Vec::new();
        for batch in &batches {
            let logits = logits(forward, batch, &self.device)?;
            let part = cross_entropy(&logits, &batch.labels, Some(items))?;
            loss += f64::from(part.to_scalar::<f32>()?);
            self.check_finite(step, "loss", loss)?;
            self.accumulate(&part, &mut gradients)?;
        }
        let grad_norm = global_norm(&gradients)?;
        self.check_finite(step, "gradient norm", grad_norm)?;
        let rates = self.schedule.at(self.state.step);
        let grad_factor = clip_factor(grad_norm, self.recipe.train.max_grad_norm);
        self.optimizer.step(&gradients, Update { rates, grad_factor })?;

        let tokens: usize = batches.iter().map(|batch| batch.inputs.len()).sum();
        self.state.step = step;
        self.state.position = self.batches.position();
        self.state.tokens += tokens as u64;
        Ok(TrainRecord {
            step,
            loss,
            lr: rates.lr,
            weight_decay: rates.weight_decay,
            grad_norm,
            tokens: self.state.tokens,
            tokens_per_second: tokens as f64 / started.elapsed().as_secs_f64(),
            ..TrainRecord::default()
        })
    }

    /// Adds the gradients of `loss` to `gradients`, one for each parameter in order.
    fn accumulate(&self, loss: &Tensor, gradients: &mut Vec<Tensor>) -> Result<()> {
        let mut store = loss.backward()?;
        let mut sums = std::mem::take(gradients).into_iter();
        for (name, var) in &self.parameters {
            let gradient =
                store.remove(var).ok_or_else(|| Error::NoGradient { name: name.clone() })?;
            gradients.push(match sums.next() {
                Some(sum) => (sum + gradient)?,
                None => gradient,
            });
        }
        Ok(())
    }

    fn check_finite(&self, step: usize, what: &'static str, value: f64) -> Result<()> {
        if value.is_finite() {
            return Ok(());
        }
        Err(Error::Diverged { step, what, value, last_good: self.checkpoints.latest()? })
    }

    /// Measures held-out loss, keeps the weights if it is the best, and says whether it is.
    fn evaluate<E: Into<Error>>(
        &mut self,
        forward: &impl Fn(&Tensor) -> Result<Tensor, E>,
    ) -> Result<(EvaluationRecord, bool)> {
        let started = Instant::now();
        let step = self.state.step;
        let (mut nats, mut tokens) = (0., 0);
        let windows = validation_windows(
            &self.validation,
            self.recipe.train.batch_size,
            self.recipe.data.sequence_length,
        );
        for batch in windows {
            let rows = row_nats(&logits(forward, &batch, &self.device)?, &batch.labels)?;
            nats += rows.into_iter().map(f64::from).sum::<f64>();
            tokens += batch.items();
        }
        let nats_per_byte = nats / self.validation.bytes() as f64;
        self.check_finite(step, "held-out loss", nats_per_byte)?;
        let is_best = self.state.best.is_none_or(|best| nats_per_byte < best.nats_per_byte);
        if is_best {
            self.state.best = Some(Best { step, nats_per_byte });
            self.state.evaluations_since_best = 0;
            self.checkpoints.save_best(&self.parameters)?;
        } else {
            self.state.evaluations_since_best += 1;
        }
        let (nats_per_token, seconds) = (nats / tokens as f64, started.elapsed().as_secs_f64());
        Ok((
            EvaluationRecord {
                step,
                nats_per_token,
                nats_per_byte,
                tokens,
                seconds,
                diversity: None,
            },
            is_best,
        ))
    }
}

fn checkpoints(recipe: &Recipe) -> Result<Checkpoints> {
    Checkpoints::open(&recipe.output.dir, Some(recipe.train.save_total_limit))
}

/// The model's logits as `(rows, vocab)`.
fn logits<E: Into<Error>>(
    forward: &impl Fn(&Tensor) -> Result<Tensor, E>,
    batch: &Batch,
    device: &Device,
) -> Result<Tensor> {
    let tokens = Tensor::from_slice(&batch.inputs, (batch.rows(), batch.sequence_length), device)?;
    Ok(forward(&tokens).map_err(Into::into)?.flatten_to(D::Minus2)?)
}

#[cfg(test)]
#[path = "trainer_tests.rs"]
mod tests;
