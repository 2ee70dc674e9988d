//! The command line of `bitnet train qat`, and the recipe it makes.

use std::path::{Path, PathBuf};

use bitnet_train::recipe::Recipe;

/// Options of `bitnet train qat`.
#[derive(clap::Args)]
#[command(
    after_help = "See --help for what a run writes, how it is resumed, and examples.",
    after_long_help = "THE RECIPE is a TOML file with the tables [model], [data], [train], [optimizer] and [output]; its paths are relative to \
itself. A vocabulary is trained on the training text unless data.tokenizer names one. Options override the recipe: those with a name of their \
own win over --set. --print-recipe shows what comes of it, with every default.

TEXT comes from .txt, .jsonl, .json and .parquet files (.gz too, but for .parquet), named one by one, by directory, by pattern, or in a \
dataset repository: hf://datasets/OWNER/NAME/PATTERN. It is encoded once, into the folder tokens of the output folder or into \
data.cache; a corpus may be larger than memory.

INSTRUCTIONS AND CONVERSATIONS: with data.format (auto, messages, conversations, instruction, prompt-completion, input-output, text) \
records become examples that are never cut by a window, written with the tokenizer's chat template (or data.chat_template, a Jinja file; \
none for Alpaca's prompts). Only answers are trained, with their ends, or everything with data.loss_on = \"all\". Also data.packing \
(true), data.max_samples, data.skip_bad. --show-data 3 shows what comes of it, with what is trained marked.

OTHER WAYS OF TRAINING: [init] model = \"MODEL\" goes on from a full-precision Llama or from latent masters of a BitNet, whose geometry and \
tokenizer take the place of [model] and data.tokenizer; sub_norms = true inserts BitNet's norms. [quantization] chooses weights (absmean, \
sign, none), activations (int8, int4, none), hadamard ([\"o_proj\", \"down_proj\"]) and lambda_steps, over which quantization comes in \
(lambda_schedule: linear, sigmoid, exponential, cosine, step). [distillation] names a teacher of the same vocabulary, with temperature, \
logits_weight, attention_weight, attention_layer, relation_heads and balance (auto, manual). Evaluations are always of the quantized model.

THE OUTPUT FOLDER gets recipe.toml (the complete recipe), metrics.jsonl (a line for each update, evaluation and census of the codes: \
`bitnet plot` draws them), the vocabulary, checkpoints (step-N, the last train.save_total_limit of them), and at the end the weights of the \
best evaluation as two models in the Hub's layout: packed/ (2-bit codes) and latent/ (f32 masters). With output.tensorboard = true there \
is an event file for TensorBoard too.

STOPPING AND RESUMING: Ctrl-C saves a checkpoint and ends with status 130. A run that was interrupted or killed goes on with --resume, \
from its newest checkpoint, to the same bits as an uninterrupted one; with another recipe or other data it is refused. A loss that is no \
number, one that has risen and stays high, and predictions that have collapsed to a few tokens end the run with status 1 and a line that \
names the last good checkpoint. The latter two can be switched off (train.stop_on_divergence, train.stop_on_collapse); [train.limits] says \
what counts.

ON A DEVICE: built with `--features cuda`, --device cuda trains there, in one process, to the processor's bits; a run may go on elsewhere.

SEVERAL PROCESSES: built with `--features mpi`, `mpirun -n N bitnet train qat RECIPE` trains on N of them: train.batch_size counts the \
windows of each, gradients are summed, the first process writes and reports. Add `--mca odls_base_sigkill_timeout 10` for a \
model that Ctrl-C cannot save in a second; a job that lost a process goes on with --resume.

EXAMPLES

  What would it train, how much memory and how long would that take?
    bitnet train qat recipe.toml --dry-run

  Train; go on after a crash:
    bitnet train qat recipe.toml
    bitnet train qat recipe.toml --resume

  Teach latent masters to answer; see first what is trained:
    bitnet train qat instruct.toml --show-data 3
    bitnet train qat instruct.toml

  Three learning rates, side by side in a picture:
    for lr in 5e-4 1e-3 2e-3; do bitnet train qat recipe.toml --peak-lr $lr -o runs/lr-$lr; done
    bitnet plot runs/lr-* -o rates.png

  The full-precision twin, twice as long, with any other key changed:
    bitnet train qat recipe.toml --precision full --epochs 8 --set optimizer.beta2=0.99 -o runs/full"
)]
pub struct QatArgs {
    /// The recipe, a TOML file
    #[arg(value_name = "RECIPE")]
    recipe: PathBuf,
    /// Folder of checkpoints, metrics and results, instead of output.dir
    #[arg(long, short, value_name = "DIR")]
    output: Option<PathBuf>,
    #[command(flatten)]
    keys: Keys,
    /// Override any key of the recipe, such as optimizer.beta2=0.99; may be repeated
    #[arg(long, value_name = "KEY=VALUE", value_parser = setting)]
    set: Vec<(String, String)>,
    #[command(flatten)]
    pub run: RunArgs,
}

/// What is asked of a run, whatever is trained.
#[derive(clap::Args, Clone, Copy)]
pub struct RunArgs {
    /// Go on from the newest checkpoint of the output folder; start if there is none
    #[arg(long)]
    pub resume: bool,
    /// Print the complete recipe as TOML, with options and defaults, and do not train
    #[arg(long, conflicts_with_all = ["dry_run", "json"])]
    pub print_recipe: bool,
    /// Say what would be trained and how long it would take, measured in a few updates; write nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Print the first N examples, with what is trained of them marked, and do not train
    #[arg(long, value_name = "N", conflicts_with_all = ["dry_run", "print_recipe"])]
    pub show_data: Option<usize>,
    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
}

/// Keys of the recipe with an option of their own.
#[derive(clap::Args)]
#[command(next_help_heading = "Keys of the recipe")]
struct Keys {
    /// train.steps, instead of train.epochs: updates in all, at least 1
    #[arg(long, value_name = "N", conflicts_with = "epochs")]
    steps: Option<usize>,
    /// train.epochs, instead of train.steps: passes over the training data, more than 0
    #[arg(long, value_name = "X")]
    epochs: Option<f64>,
    /// train.batch_size: windows in a forward pass, at least 1
    #[arg(long, value_name = "N")]
    batch_size: Option<usize>,
    /// train.gradient_accumulation: forward passes in an update, at least 1
    #[arg(long, value_name = "N")]
    gradient_accumulation: Option<usize>,
    /// data.sequence_length: tokens in a window
    #[arg(long, value_name = "N")]
    sequence_length: Option<usize>,
    /// train.seed: seed of the initial weights and of the order of the data
    #[arg(long, value_name = "SEED")]
    seed: Option<u64>,
    /// optimizer.peak_lr: learning rate after the warm-up, more than 0
    #[arg(long, value_name = "RATE")]
    peak_lr: Option<f64>,
    /// optimizer.warmup_steps: updates over which the learning rate rises
    #[arg(long, value_name = "N")]
    warmup_steps: Option<usize>,
    /// optimizer.schedule: shape of the learning rate, such as `two-stage`
    #[arg(long, value_name = "NAME")]
    schedule: Option<String>,
    /// optimizer.weight_decay: between 0 and 1
    #[arg(long, value_name = "X")]
    weight_decay: Option<f64>,
    /// train.max_grad_norm: the norm of all gradients is clipped to this
    #[arg(long, value_name = "NORM")]
    max_grad_norm: Option<f64>,
    /// train.eval_every: updates between evaluations
    #[arg(long, value_name = "N")]
    eval_every: Option<usize>,
    /// train.save_every: updates between checkpoints
    #[arg(long, value_name = "N")]
    save_every: Option<usize>,
    /// train.save_total_limit: checkpoints that are kept
    #[arg(long, value_name = "N")]
    save_total_limit: Option<usize>,
    /// train.early_stop_patience: stop after so many evaluations in a row that were not the best
    #[arg(long, value_name = "N")]
    early_stop_patience: Option<usize>,
    /// model.precision: `bitnet`, or `full` for the full-precision twin
    #[arg(long, value_name = "PRECISION")]
    precision: Option<String>,
    /// train.backward: precision of the products of the backward pass, `f32` or `bf16`
    #[arg(long, value_name = "PRECISION")]
    backward: Option<String>,
    /// init.model: go on from this checkpoint, a folder, a .safetensors file or a Hub repo id
    #[arg(long, value_name = "MODEL")]
    init: Option<String>,
    /// distillation.teacher: learn from this model, a folder, a .safetensors file or a Hub repo id
    #[arg(long, value_name = "MODEL")]
    teacher: Option<String>,
    /// quantization.lambda_steps: updates over which quantization comes in, 0 for all at once
    #[arg(long, value_name = "N")]
    lambda_steps: Option<usize>,
    /// output.tensorboard: write an event file for TensorBoard
    #[arg(long)]
    tensorboard: bool,
}

pub(super) fn setting(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.trim().is_empty() => {
            Ok((key.trim().into(), value.trim().into()))
        }
        _ => Err("expected KEY=VALUE, such as train.eval_every=50".into()),
    }
}

/// A model or file as a value of the recipe: a path of the command line does not start at the recipe's folder.
pub(super) fn model(name: &str) -> String {
    let path = Path::new(name);
    let name = match path.exists() {
        true => std::path::absolute(path).unwrap_or(path.into()).display().to_string(),
        false => name.to_owned(),
    };
    format!("{name:?}") // quoted: it may look like another kind of value
}

impl QatArgs {
    /// The recipe with the options laid over it, validated.
    pub fn resolve(&self) -> anyhow::Result<Recipe> {
        let settings = [self.set.clone(), self.keys.settings()].concat();
        let mut recipe = Recipe::from_file_with(&self.recipe, &settings)?;
        if let Some(output) = &self.output {
            recipe.output.dir.clone_from(output);
        }
        Ok(recipe)
    }
}

impl Keys {
    /// The keys that were given, as settings.
    fn settings(&self) -> Vec<(String, String)> {
        let count = |value: Option<usize>| value.map(|n| n.to_string());
        // With a point or an exponent: TOML's floats are no integers.
        let float = |value: Option<f64>| value.map(|x| format!("{x:?}"));
        let options = [
            ("train.steps", count(self.steps)),
            ("train.epochs", float(self.epochs)),
            ("train.batch_size", count(self.batch_size)),
            ("train.gradient_accumulation", count(self.gradient_accumulation)),
            ("data.sequence_length", count(self.sequence_length)),
            ("train.seed", self.seed.map(|seed| seed.to_string())),
            ("optimizer.peak_lr", float(self.peak_lr)),
            ("optimizer.warmup_steps", count(self.warmup_steps)),
            ("optimizer.schedule", self.schedule.clone()),
            ("optimizer.weight_decay", float(self.weight_decay)),
            ("train.max_grad_norm", float(self.max_grad_norm)),
            ("train.eval_every", count(self.eval_every)),
            ("train.save_every", count(self.save_every)),
            ("train.save_total_limit", count(self.save_total_limit)),
            ("train.early_stop_patience", count(self.early_stop_patience)),
            ("model.precision", self.precision.clone()),
            ("train.backward", self.backward.clone()),
            ("init.model", self.init.as_deref().map(model)),
            ("distillation.teacher", self.teacher.as_deref().map(model)),
            ("quantization.lambda_steps", count(self.lambda_steps)),
            ("output.tensorboard", self.tensorboard.then(|| "true".into())),
        ];
        options.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?))).collect()
    }
}
