//! The training loop: batch → model → loss → backward → clip → update, with evaluations, checkpoints and an exact
//! resume.
//!
//! The loop knows no model: it is given a [`Task`] and the variables behind it. Every bit of a run follows from the recipe, the dataset and the initial weights, so a run that is killed and resumed ends with
//! the same weights and metrics (but for timings) as one that was not.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::atomic::{AtomicBool, Ordering},
    time::Instant,
};

use bitnet_model::checkpoint::write_atomic;
use candle_core::Var;

use crate::{
    Error, Result,
    batch::{Batch, Batches, Cut, evaluation},
    checkpoint::{self, Best, Checkpoints, TrainerState},
    codes::Census,
    dataset::{Content, Dataset},
    detector::{Collapse, Finding, effective_number},
    distributed::{Communicator, Exchange, Single, hash_parameters, hash_text},
    metrics::{self, Diversity, EvaluationRecord, Metrics, Record, SamplesRecord, TrainRecord},
    optimizer::{AdamW, Schedule, Update, clip_factor, global_norm},
    recipe::{Recipe, difference},
    task::{Gradients, Part, Task},
};

mod event;

pub use event::{Event, Outcome};

/// The recipe of a run, complete, in its output folder.
pub const RECIPE: &str = "recipe.toml";

/// The term of the loss that says how well a model foresees.
const CROSS_ENTROPY: &str = "cross_entropy";

const DIVERGED: &str = "lower `optimizer.peak_lr` or lengthen `optimizer.warmup_steps`; to go on nevertheless, set `train.stop_on_divergence=false` and resume";
const COLLAPSED: &str = "lower `optimizer.peak_lr` (below 100 M parameters 5e-4 to 1e-3 is sound), or give a slow run more updates in `train.limits.collapse_after`; to go on nevertheless, set `train.stop_on_collapse=false` and resume";

/// Updates between two checks that the ranks of a job hold the same weights; they are checked before every checkpoint
/// too.
const AGREE_EVERY: usize = 50;

/// A run of a recipe.
#[derive(Debug)]
pub struct Trainer {
    recipe: Recipe,
    steps: usize,
    schedule: Schedule,
    batches: Batches,
    validation: Content,
    parameters: Vec<(String, Var)>,
    optimizer: AdamW,
    checkpoints: Checkpoints,
    /// Of rank 0, which alone writes.
    metrics: Option<Metrics>,
    census: Census,
    state: TrainerState,
    communicator: Box<dyn Communicator>,
    exchange: Exchange,
}

impl Trainer {
    /// A run from its beginning, with the weights that `parameters` hold now. An output directory with a checkpoint
    /// in it is refused.
    pub fn start(
        recipe: &Recipe,
        dataset: Dataset,
        parameters: Vec<(String, Var)>,
    ) -> Result<Self> {
        Self::open(recipe, dataset, parameters, false, Box::new(Single::default()))
    }

    /// A run from its beginning, or with `resume` from its newest checkpoint, as the rank of a job that `communicator` is.
    /// An update takes `train.batch_size` windows of every rank.
    pub fn open(
        recipe: &Recipe,
        dataset: Dataset,
        parameters: Vec<(String, Var)>,
        resume: bool,
        mut communicator: Box<dyn Communicator>,
    ) -> Result<Self> {
        // Opening clears away what a killed process left half-written, and the other ranks must not see that.
        if communicator.rank() == 0 {
            checkpoints(recipe)?;
        }
        communicator.barrier()?;
        let checkpoints = checkpoints(recipe)?;
        if let (false, Some(path)) = (resume, checkpoints.latest()?) {
            let reason =
                "is a checkpoint of an earlier run; resume it, or choose another `output.dir`"
                    .into();
            return Err(Error::Checkpoint { path, reason });
        }
        Self::new(recipe, dataset, parameters, checkpoints, communicator)
    }

    /// A run from its newest checkpoint, or from its beginning if there is none yet. A checkpoint of another recipe
    /// or dataset is refused.
    pub fn resume(
        recipe: &Recipe,
        dataset: Dataset,
        parameters: Vec<(String, Var)>,
    ) -> Result<Self> {
        Self::open(recipe, dataset, parameters, true, Box::new(Single::default()))
    }

    fn new(
        recipe: &Recipe,
        dataset: Dataset,
        parameters: Vec<(String, Var)>,
        checkpoints: Checkpoints,
        mut communicator: Box<dyn Communicator>,
    ) -> Result<Self> {
        let size = communicator.size();
        let Dataset { vocabulary, train, validation, .. } = dataset;
        if parameters.is_empty() {
            return Err(Error::Input("the model has no trainable parameter".into()));
        }
        let mut optimizer = AdamW::new(&parameters, recipe.adamw())?;
        let mut state = TrainerState {
            step: 0,
            position: Default::default(),
            tokens: 0,
            best: None,
            evaluations_since_best: 0,
            divergence: Default::default(),
            collapse: Default::default(),
            recipe: recipe.identity(size)?,
            dataset: [train.fingerprint(), validation.fingerprint()],
        };
        let cut = recipe.cut();
        let batch_size = cut.batch_size.saturating_mul(size);
        let mut batches = Batches::new(train, Cut { batch_size, ..cut }, recipe.train.seed)?;
        let steps = recipe.steps(batches.per_epoch())?;
        let mut census = Census::default();
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
            census = Census::load(&path)?;
            batches.seek(saved.position);
            state = saved;
        }
        let dir = &recipe.output.dir;
        if size > 1 {
            communicator.agree("runs", hash_text(&format!("{state:?}")))?;
            communicator.agree("weights", hash_parameters(&parameters)?)?;
        }
        let mut metrics = None;
        if communicator.rank() == 0 {
            vocabulary.save(dir)?;
            write_atomic(&dir.join(RECIPE), recipe.to_toml()?.as_bytes())?;
            metrics = Some(Metrics::open(dir, state.step, recipe.output.tensorboard)?);
        }
        communicator.barrier()?; // who reads the metrics now sees none from after this step
        let exchange = Exchange::new(parameters.len());
        let schedule = recipe.schedule(steps);
        let recipe = recipe.clone();
        Ok(Self {
            recipe,
            steps,
            schedule,
            batches,
            validation,
            parameters,
            optimizer,
            checkpoints,
            metrics,
            census,
            state,
            communicator,
            exchange,
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
    pub fn run(
        &mut self,
        task: &dyn Task,
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
            let record = self.update(task)?;
            let (step, steps) = (record.step, self.steps);
            let eta = started.elapsed().mul_f64((steps - step) as f64 / (step - first) as f64);
            observe(Event::Update { record: &record, steps, eta });
            let finding = self.watch(&record);
            self.log(&Record::Train(record))?;
            self.stop_for(finding, self.recipe.train.stop_on_divergence, DIVERGED)?;

            let is_last = step == steps;
            let codes_every = self.recipe.train.codes_every.unwrap_or(self.recipe.train.eval_every);
            if step == 1 || is_last || step.is_multiple_of(codes_every) {
                self.count_codes(task)?;
            }
            if is_last || step.is_multiple_of(self.recipe.train.eval_every) {
                let (record, is_best) = self.evaluate(task)?;
                observe(Event::Evaluation { record: &record, is_best });
                let finding = self.watch_predictions(task, &record);
                self.log(&Record::Evaluation(record))?;
                self.sample(task, observe)?;
                self.stop_for(finding, self.recipe.train.stop_on_collapse, COLLAPSED)?;
            }
            let interrupted = self.communicator.any(interrupted.load(Ordering::Relaxed))?;
            let is_due = step.is_multiple_of(self.recipe.train.save_every);
            let is_saved = is_last || is_due || interrupted || self.is_out_of_patience();
            if is_saved || step.is_multiple_of(AGREE_EVERY) {
                self.agree()?;
            }
            // A trial, of which no checkpoint is kept, writes none.
            if is_saved
                && self.recipe.train.save_total_limit > 0
                && let Some(metrics) = &mut self.metrics
            {
                metrics.sync()?;
                let path = self.checkpoints.save(
                    &self.state,
                    &self.parameters,
                    &self.optimizer,
                    &self.census,
                )?;
                observe(Event::Saved(&path));
            }
            if interrupted && !is_last {
                return Ok(Outcome::Interrupted);
            }
        }
    }

    /// Ends a run that has come to its [`Outcome`]: waits for the other ranks. A rank that ends without it has failed.
    pub fn leave(mut self) -> Result<()> {
        self.communicator.leave()
    }

    fn log(&mut self, record: &Record) -> Result<()> {
        self.metrics.as_mut().map_or(Ok(()), |metrics| metrics.write(record))
    }

    /// Makes sure that all ranks hold the same weights.
    fn agree(&mut self) -> Result<()> {
        match self.communicator.size() {
            1 => Ok(()),
            _ => self.communicator.agree("weights", hash_parameters(&self.parameters)?),
        }
    }

    fn is_out_of_patience(&self) -> bool {
        self.recipe
            .train
            .early_stop_patience
            .is_some_and(|most| self.state.evaluations_since_best >= most)
    }

    /// Looks for divergence in the cross-entropy, or in the loss as a whole where it is no term: the weights of
    /// other terms may change.
    fn watch(&mut self, record: &TrainRecord) -> Option<Finding> {
        let loss = *record.terms.get(CROSS_ENTROPY).unwrap_or(&record.loss);
        let is_settling = record.lambda.is_some_and(|lambda| lambda < 1.);
        let limits = self.recipe.train.limits.divergence();
        self.state.divergence.observe(record.step, loss, is_settling, limits)
    }

    /// Looks for collapse, except while quantization is coming in: evaluations are of the model fully quantized, which
    /// may be good for nothing yet.
    fn watch_predictions(&mut self, task: &dyn Task, record: &EvaluationRecord) -> Option<Finding> {
        if task.lambda().is_some_and(|lambda| lambda < 1.) {
            self.state.collapse = Collapse::default();
            return None;
        }
        let mut limits = self.recipe.train.limits.collapse();
        limits.after += self.recipe.optimizer.warmup_steps;
        self.state.collapse.observe(record.step, record.nats_per_token, record.diversity?, limits)
    }

    fn stop_for(&self, finding: Option<Finding>, stops: bool, advice: &'static str) -> Result<()> {
        let Some(Finding { reason, since }) = finding.filter(|_| stops) else { return Ok(()) };
        let last_good = self.checkpoints.newest_below(since)?;
        Err(Error::WentWrong { step: self.state.step, reason, advice, last_good })
    }

    /// Rank 0 asks: all hold the same.
    fn sample(&mut self, task: &dyn Task, observe: &mut dyn FnMut(Event)) -> Result<()> {
        if self.metrics.is_none() {
            return Ok(());
        }
        let (step, samples) = (self.state.step, task.samples()?);
        if samples.is_empty() {
            return Ok(());
        }
        observe(Event::Samples(&samples));
        self.log(&Record::Samples(SamplesRecord { step, samples }))
    }

    /// Rank 0 counts: all hold the same.
    fn count_codes(&mut self, task: &dyn Task) -> Result<()> {
        if self.metrics.is_none() {
            return Ok(());
        }
        let codes = |name: &str, latent: &[f32]| task.codes(name, latent);
        let record = self.census.take(self.state.step, &self.parameters, codes)?;
        if record.layers.is_empty() {
            return Ok(());
        }
        self.log(&Record::Codes(record))
    }

    /// One update from `gradient_accumulation` batches. The mean is over the tokens of all of them.
    fn update(&mut self, task: &dyn Task) -> Result<TrainRecord> {
        let started = Instant::now();
        let step = self.state.step + 1;
        task.begin(self.state.step)?;
        let batches: Vec<Batch> =
            (0..self.recipe.train.gradient_accumulation).map(|_| self.batches.draw()).collect();
        let items = batches.iter().map(Batch::items).sum();
        let (rank, size) = (self.communicator.rank(), self.communicator.size());
        let (mut loss, mut weights) = (0., BTreeMap::new());
        let mut terms = BTreeMap::<String, f64>::new();
        let communicator = self.communicator.as_mut();
        let mut gradients =
            Gradients::new(&self.parameters).over_ranks(&mut self.exchange, communicator);
        for (index, batch) in batches.iter().enumerate() {
            gradients.begin_pass(index + 1 == batches.len());
            let share = batch.share(rank, size);
            for Part { name, value, weight } in task.pass(&share, items, &mut gradients)? {
                loss += weight * value;
                *terms.entry(name.to_owned()).or_default() += value;
                if weight != 1. {
                    weights.insert(name.to_owned(), weight);
                }
            }
        }
        let gradients = gradients.finish()?;
        let values: Vec<f64> = [loss].into_iter().chain(terms.values().copied()).collect();
        let values = self.communicator.sum(&values)?;
        let loss = values[0];
        terms.values_mut().zip(&values[1..]).for_each(|(term, sum)| *term = *sum);
        self.check_finite(step, "loss", loss)?;
        let grad_norm = global_norm(&gradients)?;
        self.check_finite(step, "gradient norm", grad_norm)?;
        let rates = self.schedule.at(self.state.step);
        let grad_factor = clip_factor(grad_norm, self.recipe.train.max_grad_norm);
        self.optimizer.step(&gradients, Update { rates, grad_factor })?;
        task.end(&terms);

        let tokens: usize = batches.iter().map(Batch::tokens).sum();
        self.state.step = step;
        self.state.position = self.batches.position();
        self.state.tokens += tokens as u64;
        Ok(TrainRecord {
            step,
            loss,
            terms,
            weights,
            lr: rates.lr,
            weight_decay: rates.weight_decay,
            lambda: task.lambda(),
            grad_norm,
            clip_factor: Some(grad_factor),
            tokens: self.state.tokens,
            tokens_per_second: tokens as f64 / started.elapsed().as_secs_f64(),
            memory: metrics::memory(),
        })
    }

    fn check_finite(&self, step: usize, what: &'static str, value: f64) -> Result<()> {
        if value.is_finite() {
            return Ok(());
        }
        // What update n finds is of the weights after n − 1.
        let since = self.state.trouble().map_or(step - 1, |since| since.min(step - 1));
        let last_good = self.checkpoints.newest_below(since)?;
        Err(Error::Diverged { step, what, value, last_good })
    }

    /// Measures held-out loss, keeps the weights if it is the best, and says whether it is.
    fn evaluate(&mut self, task: &dyn Task) -> Result<(EvaluationRecord, bool)> {
        let started = Instant::now();
        let step = self.state.step;
        let (rank, size) = (self.communicator.rank(), self.communicator.size());
        let (mut nats, mut tokens, mut hits) = (0., 0., 0.);
        let [mut predicted, mut labels] =
            [vec![0; self.recipe.model.vocab_size], vec![0; self.recipe.model.vocab_size]];
        let batches = evaluation(&self.validation, self.recipe.cut());
        for batch in batches.skip(rank).step_by(size) {
            let predictions = task.evaluate(&batch)?;
            nats += predictions.iter().map(|prediction| f64::from(prediction.nats)).sum::<f64>();
            tokens += predictions.len() as f64;
            let counted = batch.labels.iter().filter_map(|&label| u32::try_from(label).ok());
            for (prediction, label) in predictions.iter().zip(counted) {
                count(&mut predicted, prediction.token);
                count(&mut labels, label);
                hits += f64::from(u8::from(prediction.token == label));
            }
        }
        let sums = self.communicator.sum(&[nats, tokens, hits])?;
        let (nats, tokens, hits) = (sums[0], sums[1] as usize, sums[2]);
        let (predicted, labels) =
            (self.communicator.sum_counts(&predicted)?, self.communicator.sum_counts(&labels)?);
        let nats_per_byte = nats / self.validation.bytes() as f64;
        self.check_finite(step, "held-out loss", nats_per_byte)?;
        let is_best = self.state.best.is_none_or(|best| nats_per_byte < best.nats_per_byte);
        if is_best {
            self.state.best = Some(Best { step, nats_per_byte });
            self.state.evaluations_since_best = 0;
            if rank == 0 {
                self.checkpoints.save_best(&self.parameters)?;
            }
        } else {
            self.state.evaluations_since_best += 1;
        }
        let (nats_per_token, seconds) = (nats / tokens as f64, started.elapsed().as_secs_f64());
        let diversity = Some(Diversity {
            predicted_tokens: effective_number(&predicted),
            label_tokens: effective_number(&labels),
        });
        let record = EvaluationRecord {
            step,
            nats_per_token,
            nats_per_byte,
            tokens,
            token_accuracy: Some(hits / tokens as f64),
            diversity,
            seconds,
        };
        Ok((record, is_best))
    }
}

/// Counts one more `token` of the vocabulary.
fn count(counts: &mut [u64], token: u32) {
    if let Some(count) = counts.get_mut(token as usize) {
        *count += 1;
    }
}

fn checkpoints(recipe: &Recipe) -> Result<Checkpoints> {
    Checkpoints::open(&recipe.output.dir, Some(recipe.train.save_total_limit))
}

#[cfg(test)]
#[path = "trainer_tests.rs"]
mod tests;
