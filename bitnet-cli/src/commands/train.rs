//! `bitnet train qat RECIPE`: quantization-aware training with a progress bar.

use std::{
    io::{self, IsTerminal, Write},
    path::PathBuf,
    time::{Duration, Instant},
};

use bitnet_train::{
    batch::Batches,
    dataset::Dataset,
    distributed,
    experiment::{self, Summary},
    metrics::{EvaluationRecord, TrainRecord},
    recipe::Recipe,
    trainer::{Event, Outcome},
};
use indicatif::ProgressBar;
use serde_json::json;

use crate::{
    args::Global,
    interrupt,
    progress::{self, bytes, count, duration},
};

/// Without a terminal, time between two lines about updates.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

/// What the program, the vocabulary and a few megabytes of text take beside a run's tensors.
const PROCESS_BYTES: u64 = 30_000_000;

/// Kinds of training.
#[derive(clap::Subcommand)]
pub enum Command {
    /// Train a BitNet from scratch, with quantization in every step
    Qat(QatArgs),
}

/// Options of `bitnet train qat`.
#[derive(clap::Args)]
#[command(
    after_long_help = "The recipe is a TOML file with the tables [model], [data], [train], [optimizer] and [output]; its paths are relative to \
itself. A vocabulary is trained on the training text unless data.tokenizer names one. Options override the recipe.

The output folder gets checkpoints (step-N), metrics.jsonl, and at the end the weights of the best evaluation as two \
models in the Hub's layout: packed/ (2-bit codes) and latent/ (f32 masters). A run that was interrupted or killed goes \
on with --resume, from its newest checkpoint, to the same bits as an uninterrupted one. Ctrl-C saves a checkpoint and \
ends with status 130.

Built with `--features mpi`, `mpirun -n N bitnet train qat RECIPE` trains on N processes: train.batch_size counts the \
windows of each, gradients are summed, the first process writes and reports. Add `--mca odls_base_sigkill_timeout 10` \
for a model that Ctrl-C cannot save in a second; a job that lost a process goes on with --resume."
)]
pub struct QatArgs {
    /// The recipe, a TOML file
    #[arg(value_name = "RECIPE")]
    recipe: PathBuf,
    /// Go on from the newest checkpoint of the output folder; start if there is none
    #[arg(long)]
    resume: bool,
    /// Folder of checkpoints, metrics and results, instead of output.dir
    #[arg(long, short, value_name = "DIR")]
    output: Option<PathBuf>,
    /// Updates in all, at least 1, instead of train.steps or train.epochs
    #[arg(long, value_name = "N", conflicts_with = "epochs")]
    steps: Option<usize>,
    /// Passes over the training data, more than 0, instead of train.steps or train.epochs
    #[arg(long, value_name = "X")]
    epochs: Option<f64>,
    /// Windows in a forward pass, at least 1, instead of train.batch_size
    #[arg(long, value_name = "N")]
    batch_size: Option<usize>,
    /// Seed of the initial weights and of the order of the data, instead of train.seed
    #[arg(long, value_name = "SEED")]
    seed: Option<u64>,
    /// Learning rate after the warm-up, more than 0, instead of optimizer.peak_lr
    #[arg(long, value_name = "RATE")]
    peak_lr: Option<f64>,
    /// `bitnet`, or `full` for the full-precision twin, instead of model.precision
    #[arg(long, value_name = "PRECISION")]
    precision: Option<String>,
    /// Override any key of the recipe, such as optimizer.warmup_steps=50; may be repeated
    #[arg(long, value_name = "KEY=VALUE", value_parser = setting)]
    set: Vec<(String, String)>,
    /// Say what would be trained, and do not train
    #[arg(long)]
    dry_run: bool,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

fn setting(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.trim().is_empty() => {
            Ok((key.trim().into(), value.trim().into()))
        }
        _ => Err("expected KEY=VALUE, such as train.eval_every=50".into()),
    }
}

/// Trains, and prints how it ended to stdout.
pub fn run(command: Command, global: &Global) -> anyhow::Result<()> {
    let Command::Qat(args) = command;
    let recipe = args.resolve()?;
    if args.dry_run {
        return dry_run(&recipe, args.json);
    }
    let communicator = distributed::connect()?;
    let (is_first, ranks) = (communicator.rank() == 0, communicator.size());
    let interrupted = interrupt::flag()?;
    let mut display = Display::new(global);
    display.is_quiet |= !is_first;
    let mut observe = |event: Event| display.show(event);
    let summary =
        experiment::run_as(communicator, &recipe, args.resume, &mut observe, &interrupted)?;
    display.finish();
    if !is_first {
        // Also when interrupted: at the first failure `mpirun` would end rank 0, which has to report.
        return Ok(());
    }
    report(&recipe, &summary, args.json)?;
    if summary.outcome == Outcome::Interrupted {
        let _ = writeln!(io::stderr(), "interrupted; go on with: {}", resume_command(ranks));
        interrupt::exit();
    }
    Ok(())
}

impl QatArgs {
    /// The recipe with the options laid over it, validated.
    fn resolve(&self) -> anyhow::Result<Recipe> {
        let options = [
            ("train.steps", self.steps.map(|n| n.to_string())),
            // With a point or an exponent: TOML's floats are no integers.
            ("train.epochs", self.epochs.map(|x| format!("{x:?}"))),
            ("train.batch_size", self.batch_size.map(|n| n.to_string())),
            ("train.seed", self.seed.map(|seed| seed.to_string())),
            ("optimizer.peak_lr", self.peak_lr.map(|rate| format!("{rate:?}"))),
            ("model.precision", self.precision.clone()),
        ];
        let named = options.into_iter().filter_map(|(key, value)| Some((key.to_string(), value?)));
        let settings: Vec<(String, String)> = self.set.iter().cloned().chain(named).collect();
        let mut recipe = Recipe::from_file_with(&self.recipe, &settings)?;
        if let Some(output) = &self.output {
            recipe.output.dir.clone_from(output);
        }
        Ok(recipe)
    }
}

/// The command line of this process, one of `ranks`, with `--resume`.
fn resume_command(ranks: usize) -> String {
    let quote = |arg: String| {
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,+@%".contains(c);
        match !arg.is_empty() && arg.chars().all(is_plain) {
            true => arg,
            false => format!("'{}'", arg.replace('\'', r"'\''")),
        }
    };
    let mut args: Vec<String> =
        std::env::args_os().map(|arg| quote(arg.to_string_lossy().into_owned())).collect();
    if !args.iter().any(|arg| arg == "--resume") {
        args.push("--resume".into());
    }
    let command = args.join(" ");
    if ranks > 1 { format!("mpirun -n {ranks} {command}") } else { command }
}

/// Updates and evaluations on stderr: a bar on a terminal, else a line now and then.
struct Display {
    bar: ProgressBar,
    is_quiet: bool,
    is_terminal: bool,
    last_line: Option<Instant>,
}

impl Display {
    fn new(global: &Global) -> Self {
        let template = "{bar:24} {pos}/{len}  {msg}";
        Self {
            bar: progress::bar(global, 0, template),
            is_quiet: global.quiet,
            is_terminal: io::stderr().is_terminal(),
            last_line: None,
        }
    }

    fn show(&mut self, event: Event) {
        if self.is_quiet {
            return;
        }
        match event {
            Event::Update { record, steps, eta } => self.update(record, steps, eta),
            Event::Evaluation { record, is_best } => {
                self.line(&evaluation(record, is_best));
            }
            Event::Saved(path) => tracing::info!("checkpoint {}", path.display()),
        }
    }

    fn update(&mut self, record: &TrainRecord, steps: usize, eta: Duration) {
        let TrainRecord { step, loss, lr, tokens_per_second, .. } = record;
        let rate = count(*tokens_per_second as u64);
        let text = format!("loss {loss:.4}  lr {lr:.2e}  {rate} tokens/s  {} left", duration(eta));
        if self.is_terminal {
            self.bar.set_length(steps as u64);
            self.bar.set_position(*step as u64);
            self.bar.set_message(text);
            return;
        }
        let is_due = self.last_line.is_none_or(|last| last.elapsed() >= LOG_INTERVAL);
        if is_due || *step == steps {
            self.last_line = Some(Instant::now());
            self.line(&format!("update {step}/{steps}  {text}"));
        }
    }

    /// A line above the bar. That stderr is gone is no reason to stop training.
    fn line(&self, text: &str) {
        self.bar.suspend(|| {
            let _ = writeln!(io::stderr(), "{text}");
        });
    }

    fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

fn evaluation(record: &EvaluationRecord, is_best: bool) -> String {
    let EvaluationRecord { step, nats_per_token, nats_per_byte, .. } = record;
    let best = if is_best { ", the best so far" } else { "" };
    format!(
        "evaluation after {step}: {nats_per_byte:.4} nats/byte, {nats_per_token:.4} nats/token{best}"
    )
}

/// How the run ended, to stdout.
fn report(recipe: &Recipe, summary: &Summary, json: bool) -> anyhow::Result<()> {
    let Summary { outcome, step, best, parameters } = summary;
    let outcome = match outcome {
        Outcome::Finished => "finished",
        Outcome::EarlyStopped => "early-stopped",
        Outcome::Interrupted => "interrupted",
    };
    let folder = |name: &str| {
        let path = recipe.output.dir.join(name);
        path.is_dir().then(|| path.display().to_string())
    };
    let is_over = summary.outcome != Outcome::Interrupted;
    let [packed, latent] = ["packed", "latent"].map(|name| folder(name).filter(|_| is_over));
    let out = &mut io::stdout().lock();
    if json {
        let best = best.map(|b| json!({"step": b.step, "nats_per_byte": b.nats_per_byte}));
        let summary = json!({
            "outcome": outcome, "step": step, "best": best, "parameters": parameters,
            "output": recipe.output.dir.display().to_string(), "packed": packed, "latent": latent,
        });
        return Ok(writeln!(out, "{summary:#}")?);
    }
    writeln!(out, "{:12}{outcome} after {step} updates", "outcome")?;
    if let Some(best) = best {
        let nats = best.nats_per_byte;
        writeln!(out, "{:12}{nats:.4} nats/byte after {} updates", "best", best.step)?;
    }
    writeln!(out, "{:12}{}", "parameters", count(*parameters as u64))?;
    writeln!(out, "{:12}{}", "output", recipe.output.dir.display())?;
    for (name, folder) in [("packed", packed), ("latent", latent)] {
        if let Some(folder) = folder {
            writeln!(out, "{name:12}{folder}")?;
        }
    }
    Ok(())
}

/// What a run of `recipe` would be, to stdout.
fn dry_run(recipe: &Recipe, json: bool) -> anyhow::Result<()> {
    let dataset = Dataset::open(recipe)?;
    let (train_tokens, validation_tokens) = (dataset.train.len(), dataset.validation.len());
    let (batch, sequence) = (recipe.train.batch_size, recipe.data.sequence_length);
    let batches = Batches::new(dataset.train, recipe.cut(), recipe.train.seed)?;
    let steps = recipe.steps(batches.per_epoch())?;
    let tokens_per_step = batch * sequence * recipe.train.gradient_accumulation;
    let tokens = tokens_per_step as u64 * steps as u64;
    let epochs = tokens as f64 / train_tokens as f64;
    let parameters = experiment::config(recipe, &dataset.vocabulary).parameters();
    let memory = memory(recipe, parameters);
    let out = &mut io::stdout().lock();
    if json {
        let summary = json!({
            "parameters": parameters, "steps": steps, "tokens_per_step": tokens_per_step,
            "tokens": tokens, "epochs": epochs, "train_tokens": train_tokens,
            "validation_tokens": validation_tokens, "memory_bytes": memory,
            "output": recipe.output.dir.display().to_string(),
        });
        return Ok(writeln!(out, "{summary:#}")?);
    }
    for (name, value) in [
        ("parameters", count(parameters)),
        (
            "data",
            format!(
                "{} tokens, {} held out",
                count(train_tokens as u64),
                count(validation_tokens as u64)
            ),
        ),
        ("updates", format!("{steps} of {tokens_per_step} tokens")),
        ("tokens", format!("{}, {epochs:.2} epochs", count(tokens))),
        ("memory", format!("about {}", bytes(memory))),
        ("output", recipe.output.dir.display().to_string()),
    ] {
        writeln!(out, "{name:12}{value}")?;
    }
    Ok(())
}

/// A rough estimate of the bytes a run takes: weights, gradients and two moments a parameter, and what
/// a forward pass keeps for the backward pass.
fn memory(recipe: &Recipe, parameters: u64) -> u64 {
    let model = &recipe.model;
    let key_value = model.hidden_size / model.num_attention_heads * model.num_key_value_heads;
    // Values a token and layer: the stream and its sums, norms, projections and their quantized
    // inputs. Attention keeps no scores; of the logits there are two copies and their gradient.
    let layer = 10 * model.hidden_size + 4 * model.intermediate_size + 4 * key_value;
    let token = model.num_hidden_layers * layer + 3 * model.vocab_size;
    let tokens = recipe.train.batch_size * recipe.data.sequence_length;
    PROCESS_BYTES + 4 * (4 * parameters + (tokens * token) as u64)
}
