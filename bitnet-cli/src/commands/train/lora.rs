//! The command line of `bitnet train lora`, and the recipe it makes.

use std::path::{Path, PathBuf};

use bitnet_train::recipe::Recipe;

use super::args::{RunArgs, model, setting};

/// Options of `bitnet train lora`.
#[derive(clap::Args)]
#[command(
    after_help = "See --help for the data, what a run writes, how it is used and resumed, and examples.",
    after_long_help = "THE MODEL stays as it is, packed if it is packed: a low-rank pair of matrices beside each projection is trained \
(LoRA). Masters of a BitNet may be trained on with lora.mode=qat: the pairs are then added to the weights before these are quantized, \
and merging them changes nothing.

THE DATA are records of instructions and conversations, one a line or row: .jsonl, .json, .parquet, or hf://datasets/OWNER/NAME/PATTERN. \
Records hold `messages`, `conversations`, `prompt` and `completion`, `instruction` and `output`, `input` and `output`, or `text`; which it \
is gets detected, unless --format says. Conversations are written by the model's chat template, and the loss is that of the replies, \
unless --loss-on all. A .txt file is text to go on training on. A tenth is held out unless --validation names files.

A RECIPE, a TOML file, may stand in front; options override it. It has the tables [init] (model), [lora], [data], [train], [optimizer], \
[samples] and [output]. --print-recipe shows what comes of it all, with every default.

THE OUTPUT FOLDER gets adapter/ (adapter_config.json and adapter_model.safetensors, as PEFT reads and writes them) with every \
evaluation that is the best so far, recipe.toml, metrics.jsonl (`bitnet plot` draws it), and checkpoints of the adapter and its \
optimizer.

STOPPING AND RESUMING: Ctrl-C saves a checkpoint and ends with status 130. A run that was interrupted or killed goes on with --resume, \
to the same bits as an uninterrupted one.

EXAMPLES

  The model inside this program, and what it makes of it:
    bitnet train lora --data mine.jsonl -o run
    bitnet generate --adapter run/adapter 'Once upon a time'

  A model of the Hub, a smaller adapter, two prompts to watch:
    bitnet train lora -m microsoft/bitnet-b1.58-2B-4T --data mine.jsonl -o run --rank 16 --alpha 32 \
--prompt 'Who are you?' --prompt 'What is 2+2?'

  What of the data is trained? How much memory and how long would it take?
    bitnet train lora --data mine.jsonl -o run --show-data 3
    bitnet train lora -m microsoft/bitnet-b1.58-2B-4T --data mine.jsonl -o run --dry-run"
)]
pub struct LoraArgs {
    /// A recipe, a TOML file; without one, --data and --output say what is needed
    #[arg(value_name = "RECIPE")]
    recipe: Option<PathBuf>,
    /// init.model: Hub repo id, folder, .safetensors file, or `default` for the model inside this program [default: default]
    #[arg(long, short, value_name = "MODEL")]
    model: Option<String>,
    /// What is trained on: .jsonl, .json, .parquet or .txt, a folder, or hf://datasets/…; may be repeated
    #[arg(long, value_name = "FILE")]
    data: Vec<String>,
    /// What is evaluated on, instead of a share of the data; may be repeated
    #[arg(long, value_name = "FILE", conflicts_with = "validation_split")]
    validation: Vec<String>,
    /// Folder of adapter, checkpoints and metrics, instead of output.dir
    #[arg(long, short, value_name = "DIR")]
    output: Option<PathBuf>,
    #[command(flatten)]
    adapter: Adapter,
    #[command(flatten)]
    keys: Keys,
    /// Override any key of the recipe, such as lora.rank_pattern={"o_proj"=64}; may be repeated
    #[arg(long, value_name = "KEY=VALUE", value_parser = setting)]
    set: Vec<(String, String)>,
    #[command(flatten)]
    pub run: RunArgs,
}

/// Keys of `[lora]`.
#[derive(clap::Args)]
#[command(next_help_heading = "The adapter")]
struct Adapter {
    /// lora.rank: rank of the pairs, at least 1 [default: 32]
    #[arg(long, value_name = "N")]
    rank: Option<usize>,
    /// lora.alpha: the pairs are multiplied by alpha / rank [default: 64]
    #[arg(long, value_name = "X")]
    alpha: Option<f64>,
    /// lora.dropout: part of the pairs' inputs that a step leaves out, less than 1 [default: 0.1]
    #[arg(long, value_name = "X")]
    dropout: Option<f64>,
    /// lora.rslora: multiply by alpha / √rank
    #[arg(long)]
    rslora: bool,
    /// lora.target_modules: projections that get a pair, of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj
    /// [default: all]
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    target_modules: Vec<String>,
    /// lora.modules_to_save: embed_tokens, lm_head or norms to train whole, by the ends of their names: `norm` is all norms,
    /// `model.norm` the last one
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    modules_to_save: Vec<String>,
    /// lora.mode: `adapter`, or `qat` to train latent masters' pairs inside the quantizer
    #[arg(long, value_name = "MODE")]
    mode: Option<String>,
    /// lora.neftune_alpha: noise on the embedded tokens of training steps, such as 5
    #[arg(long, value_name = "X")]
    neftune_alpha: Option<f64>,
}

/// Other keys of the recipe with an option of their own.
#[derive(clap::Args)]
#[command(next_help_heading = "Data and training")]
struct Keys {
    /// data.format: auto, messages, conversations, instruction, prompt-completion, input-output or text
    #[arg(long, value_name = "FORMAT")]
    format: Option<String>,
    /// data.loss_on: `assistant` for the replies, or `all`
    #[arg(long, value_name = "WHAT")]
    loss_on: Option<String>,
    /// data.chat_template: a Jinja file instead of the model's template, or `none`
    #[arg(long, value_name = "FILE")]
    chat_template: Option<String>,
    /// data.sequence_length: tokens of the longest example [default: 512, or the model's most]
    #[arg(long, value_name = "N")]
    max_length: Option<usize>,
    /// data.max_samples: only the first records are trained on
    #[arg(long, value_name = "N")]
    max_samples: Option<usize>,
    /// data.skip_bad: leave malformed records out and count them
    #[arg(long)]
    skip_bad: bool,
    /// data.validation_split: share of the data that is held out [default: 0.1]
    #[arg(long, value_name = "X")]
    validation_split: Option<f64>,
    /// How .txt files are cut into documents: file, line, blank-line, or separator:TEXT
    #[arg(long, value_name = "KIND", default_value = "file")]
    documents: String,
    /// samples.prompts: a prompt that is answered at every evaluation; may be repeated
    #[arg(long, value_name = "TEXT")]
    prompt: Vec<String>,
    /// train.epochs: passes over the data [default: 3]
    #[arg(long, value_name = "X")]
    epochs: Option<f64>,
    /// train.steps, instead of train.epochs: updates in all, at least 1
    #[arg(long, value_name = "N", conflicts_with = "epochs")]
    steps: Option<usize>,
    /// train.batch_size: rows in a forward pass [default: 1]
    #[arg(long, value_name = "N")]
    batch_size: Option<usize>,
    /// train.gradient_accumulation: forward passes in an update [default: 8]
    #[arg(long, value_name = "N")]
    gradient_accumulation: Option<usize>,
    /// optimizer.peak_lr: learning rate after the warm-up [default: 2e-4]
    #[arg(long, value_name = "RATE")]
    lr: Option<f64>,
    /// optimizer.schedule: cosine, linear, constant or two-stage [default: cosine]
    #[arg(long, value_name = "NAME")]
    schedule: Option<String>,
    /// optimizer.warmup_ratio: part of the updates over which the learning rate rises [default: 0.03]
    #[arg(long, value_name = "X")]
    warmup_ratio: Option<f64>,
    /// optimizer.weight_decay: between 0 and 1 [default: 0]
    #[arg(long, value_name = "X")]
    weight_decay: Option<f64>,
    /// train.backward: precision of the products of the backward pass, `f32` or `bf16` [default: bf16 where it is fast]
    #[arg(long, value_name = "PRECISION")]
    backward: Option<String>,
    /// train.seed: of the first adapter, of dropout and of the order of the data [default: 0]
    #[arg(long, value_name = "SEED")]
    seed: Option<u64>,
    /// train.eval_every: updates between evaluations [default: 100]
    #[arg(long, value_name = "N")]
    eval_every: Option<usize>,
    /// train.save_every: updates between checkpoints [default: 100]
    #[arg(long, value_name = "N")]
    save_every: Option<usize>,
    /// output.tensorboard: write an event file for TensorBoard
    #[arg(long)]
    tensorboard: bool,
}

impl LoraArgs {
    /// The recipe with the options laid over it, validated.
    pub fn resolve(&self) -> anyhow::Result<Recipe> {
        let settings = [self.set.clone(), self.settings()].concat();
        let mut recipe = match &self.recipe {
            Some(path) => Recipe::from_file_with(path, &settings)?,
            None => {
                anyhow::ensure!(
                    !self.data.is_empty(),
                    "what is it to be trained on? give --data FILE, or a recipe"
                );
                let output = match &self.output {
                    Some(output) => output,
                    None if self.run.show_data.is_some() => Path::new("not-written"),
                    None => anyhow::bail!("where is the adapter to go? give -o DIR, or a recipe"),
                };
                let output = format!(
                    "[init]\nmodel = \"default\"\n[lora]\n[output]\ndir = {:?}\n",
                    output.display().to_string()
                );
                Recipe::from_text_with(&output, Path::new("command line"), &settings)?
            }
        };
        if let Some(output) = &self.output {
            recipe.output.dir.clone_from(output);
        }
        anyhow::ensure!(
            recipe.lora.is_some(),
            "the recipe has no [lora] and trains a whole model: add an empty [lora], or use `bitnet train qat`"
        );
        Ok(recipe)
    }

    /// What was given, as settings of the recipe.
    fn settings(&self) -> Vec<(String, String)> {
        let (Adapter { rank, alpha, dropout, rslora, mode, neftune_alpha, .. }, keys) =
            (&self.adapter, &self.keys);
        let count = |value: Option<usize>| value.map(|n| n.to_string());
        // With a point or an exponent: TOML's floats are no integers.
        let float = |value: Option<f64>| value.map(|x| format!("{x:?}"));
        let switch = |value: bool| value.then(|| "true".to_owned());
        let names = |names: &[String]| (!names.is_empty()).then(|| format!("{names:?}"));
        let has_format = keys.format.is_some() || self.recipe.is_some();
        let format = match !has_format
            && !self.data.is_empty()
            && !self.data.iter().any(|file| is_text(file))
        {
            true => Some("auto".to_owned()),
            false => keys.format.clone(),
        };
        let options = [
            ("init.model", self.model.as_deref().map(model)),
            ("data.train", self.sources(&self.data)),
            ("data.validation", self.sources(&self.validation)),
            ("data.validation_split", float(keys.validation_split)),
            ("lora.rank", count(*rank)),
            ("lora.alpha", float(*alpha)),
            ("lora.dropout", float(*dropout)),
            ("lora.rslora", switch(*rslora)),
            ("lora.target_modules", names(&self.adapter.target_modules)),
            ("lora.modules_to_save", names(&self.adapter.modules_to_save)),
            ("lora.mode", mode.clone()),
            ("lora.neftune_alpha", float(*neftune_alpha)),
            ("data.format", format),
            ("data.loss_on", keys.loss_on.clone()),
            ("data.chat_template", keys.chat_template.as_deref().map(model)),
            ("data.sequence_length", count(keys.max_length)),
            ("data.max_samples", count(keys.max_samples)),
            ("data.skip_bad", switch(keys.skip_bad)),
            ("samples.prompts", names(&keys.prompt)),
            ("train.epochs", float(keys.epochs)),
            ("train.steps", count(keys.steps)),
            ("train.batch_size", count(keys.batch_size)),
            ("train.gradient_accumulation", count(keys.gradient_accumulation)),
            ("optimizer.peak_lr", float(keys.lr)),
            ("optimizer.schedule", keys.schedule.clone()),
            ("optimizer.warmup_ratio", float(keys.warmup_ratio)),
            ("optimizer.weight_decay", float(keys.weight_decay)),
            ("train.backward", keys.backward.clone()),
            ("train.seed", keys.seed.map(|seed| seed.to_string())),
            ("train.eval_every", count(keys.eval_every)),
            ("train.save_every", count(keys.save_every)),
            ("output.tensorboard", switch(keys.tensorboard)),
        ];
        options.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?))).collect()
    }

    /// Files as a list of sources.
    fn sources(&self, files: &[String]) -> Option<String> {
        let source = |file: &String| {
            let documents = match is_text(file) {
                true => format!(", documents = {:?}", self.keys.documents),
                false => String::new(),
            };
            format!("{{ path = {}{documents} }}", model(file))
        };
        let sources: Vec<String> = files.iter().map(source).collect();
        (!files.is_empty()).then(|| format!("[{}]", sources.join(", ")))
    }
}

/// Whether it is a text that is cut into documents, and no file of records.
fn is_text(file: &str) -> bool {
    file.ends_with(".txt") || file.ends_with(".txt.gz")
}
