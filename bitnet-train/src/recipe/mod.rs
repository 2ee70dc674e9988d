//! The recipe of a training run: a TOML file that says everything but where the processor stands.
//!
//! ```toml
//! [model]
//! hidden_size = 256
//! intermediate_size = 768
//! num_hidden_layers = 6
//! num_attention_heads = 4
//! num_key_value_heads = 2
//! vocab_size = 2048
//! max_position_embeddings = 512
//!
//! [data]
//! sequence_length = 256
//! [[data.train]]
//! path = "stories.txt"
//! documents = "separator:<|endoftext|>"
//! [[data.validation]]
//! path = "held_out.txt"
//! documents = "line"
//!
//! [train]
//! batch_size = 8
//! epochs = 4
//!
//! [optimizer]
//! peak_lr = 1e-3
//!
//! [output]
//! dir = "run"
//! ```
//!
//! All keys of `[data]` are in [`data`](Data). Paths are relative to the recipe. Unknown keys are errors. Fields may be changed after reading; [`Recipe::validate`]
//! then says whether they still make sense.

use std::path::PathBuf;

use bitnet_model::ops::gemm::Precision as GemmPrecision;
use serde::{Deserialize, Serialize};

use crate::{
    Error, Result,
    batch::Cut,
    optimizer::{AdamWConfig, Decay, Schedule, ScheduleKind},
};

mod data;
mod distillation;
mod identity;
mod init;
mod limits;
mod lora;
mod quantization;
mod read;
mod samples;
mod validate;
mod write;

pub use data::Data;
pub use distillation::Distillation;
pub(crate) use identity::difference;
pub use init::Init;
pub use limits::Limits;
pub use lora::Lora;
pub use quantization::{Activations, Quantization, Rotated, Weights};
pub use samples::Samples;

/// A training run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// `[model]`: the model's geometry.
    pub model: Model,
    /// `[init]`: the checkpoint whose weights it starts from, which then also says the geometry.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init: Option<Init>,
    /// `[lora]`: the adapter that is trained beside that model, which then stays as it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora: Option<Lora>,
    /// `[quantization]`: what its projections compute with.
    #[serde(default, skip_serializing_if = "is_default")]
    pub quantization: Quantization,
    /// `[distillation]`: the teacher it learns from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub distillation: Option<Distillation>,
    /// `[data]`: what it is trained and evaluated on.
    pub data: Data,
    /// `[train]`: how long and how.
    pub train: Train,
    /// `[optimizer]`: the update.
    pub optimizer: Optimizer,
    /// `[samples]`: what the model is asked at every evaluation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub samples: Option<Samples>,
    /// `[output]`: where the results go.
    pub output: Output,
}

/// What the projections compute with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Precision {
    /// Quantized as `[quantization]` says: by default ternary weights and 8-bit activations.
    Bitnet,
    /// The twin of the same architecture with f32 projections, for comparison.
    Full,
}

/// `[model]`: sizes as in the Hub's `config.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward layer.
    pub intermediate_size: usize,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    /// Number of query heads.
    pub num_attention_heads: usize,
    /// Number of key and value heads.
    pub num_key_value_heads: usize,
    /// Width of a head; by default the heads share `hidden_size`, as they must without `[init]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub head_dim: Option<usize>,
    /// Tokens of the vocabulary that is trained, or of `data.tokenizer`.
    pub vocab_size: usize,
    /// The longest sequence the model is made for.
    pub max_position_embeddings: usize,
    /// Logits use the embedding.
    #[serde(default = "default_true")]
    pub tie_word_embeddings: bool,
    /// Base of the rotary embedding.
    #[serde(default = "default_rope_theta")]
    pub rope_theta: f64,
    /// Epsilon of the norms.
    #[serde(default = "default_rms_norm_eps")]
    pub rms_norm_eps: f64,
    /// What the projections compute with.
    #[serde(default = "default_precision")]
    pub precision: Precision,
}

/// The precision of the products of the backward pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Backward {
    /// Single precision.
    #[default]
    F32,
    /// Gradients are rounded to bfloat16 before they are multiplied, and added up in single precision: faster on
    /// processors with AVX-512 BF16.
    Bf16,
}

impl From<Backward> for GemmPrecision {
    fn from(backward: Backward) -> Self {
        match backward {
            Backward::F32 => Self::F32,
            Backward::Bf16 => Self::Bf16,
        }
    }
}

/// `[train]`: the loop.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Train {
    /// Windows in a forward pass.
    pub batch_size: usize,
    /// Forward passes in an update.
    #[serde(default = "default_one")]
    pub gradient_accumulation: usize,
    /// Updates in all; either this or `epochs`.
    pub steps: Option<usize>,
    /// Passes over the training data; either this or `steps`.
    pub epochs: Option<f64>,
    /// Precision of the products of the backward pass.
    #[serde(default)]
    pub backward: Backward,
    /// Compute blocks again in the backward pass: a third more time, most of the activations' memory saved.
    #[serde(default)]
    pub recompute_blocks: bool,
    /// Seed of the initial weights and of the order of the data.
    #[serde(default)]
    pub seed: u64,
    /// The norm of all gradients together is clipped to this.
    #[serde(default = "default_one_f64")]
    pub max_grad_norm: f64,
    /// Updates between evaluations; the last update is always followed by one.
    #[serde(default = "default_eval_every")]
    pub eval_every: usize,
    /// Updates between checkpoints; the last update is always followed by one.
    #[serde(default = "default_eval_every")]
    pub save_every: usize,
    /// Checkpoints that are kept.
    #[serde(default = "default_save_total_limit")]
    pub save_total_limit: usize,
    /// Stop after this many evaluations in a row that were not the best.
    pub early_stop_patience: Option<usize>,
    /// Updates between censuses of the ternary codes, made also after the first and the last; `eval_every` if absent.
    pub codes_every: Option<usize>,
    /// Stop when the loss has risen and stays high, by `limits`.
    #[serde(default = "default_true")]
    pub stop_on_divergence: bool,
    /// Stop when the predictions have collapsed to a few tokens, by `limits`.
    #[serde(default = "default_true")]
    pub stop_on_collapse: bool,
    /// `[train.limits]`: what counts as divergence and as collapse.
    #[serde(default)]
    pub limits: Limits,
}

/// `[optimizer]`: AdamW and its schedule.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Optimizer {
    /// Learning rate after the warm-up. Below 100 M parameters 5e-4 to 1e-3 is sound.
    pub peak_lr: f64,
    /// Peak of the second stage of the two-stage schedule; two thirds of `peak_lr` if absent.
    pub second_peak_lr: Option<f64>,
    /// Shape of the learning rate.
    #[serde(default = "default_schedule")]
    pub schedule: ScheduleKind,
    /// Updates over which the learning rate rises to its peak.
    #[serde(default)]
    pub warmup_steps: usize,
    /// The same as a part of all updates; either this or `warmup_steps`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warmup_ratio: Option<f64>,
    /// Decoupled weight decay.
    #[serde(default = "default_weight_decay")]
    pub weight_decay: f64,
    /// Which parameters decay.
    #[serde(default = "default_decay")]
    pub decay: Decay,
    /// Decay rate of the first moment.
    #[serde(default = "default_beta1")]
    pub beta1: f64,
    /// Decay rate of the second moment.
    #[serde(default = "default_beta2")]
    pub beta2: f64,
    /// Added to the root of the second moment.
    #[serde(default = "default_eps")]
    pub eps: f64,
}

/// `[output]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Output {
    /// Directory of checkpoints, metrics and tokenizer.
    pub dir: PathBuf,
    /// Write an event file for TensorBoard beside the metrics.
    #[serde(default)]
    pub tensorboard: bool,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

fn default_true() -> bool {
    true
}

fn default_one() -> usize {
    1
}

fn default_one_f64() -> f64 {
    1.
}

fn default_rope_theta() -> f64 {
    10_000.
}

fn default_rms_norm_eps() -> f64 {
    1e-5
}

fn default_precision() -> Precision {
    Precision::Bitnet
}

fn default_eval_every() -> usize {
    100
}

fn default_save_total_limit() -> usize {
    2
}

fn default_schedule() -> ScheduleKind {
    ScheduleKind::TwoStage
}

fn default_weight_decay() -> f64 {
    0.1
}

fn default_decay() -> Decay {
    Decay::Matrices
}

fn default_beta1() -> f64 {
    0.9
}

fn default_beta2() -> f64 {
    0.95
}

fn default_eps() -> f64 {
    1e-8
}

impl Model {
    /// Width of a head.
    pub fn head_dim(&self) -> usize {
        self.head_dim.unwrap_or(self.hidden_size / self.num_attention_heads.max(1))
    }
}

impl Recipe {
    /// Updates in all, where an epoch has `per_epoch` batches.
    pub fn steps(&self, per_epoch: usize) -> Result<usize> {
        let steps = match (self.train.steps, self.train.epochs) {
            (Some(steps), None) => steps,
            (None, Some(epochs)) => {
                // A float-to-integer cast saturates.
                (epochs * per_epoch as f64 / self.train.gradient_accumulation as f64) as usize
            }
            _ => {
                return Err(Error::recipe(
                    "train.steps",
                    "give either `train.steps` or `train.epochs`",
                ));
            }
        };
        if steps == 0 {
            return Err(Error::recipe("train.epochs", "the run would have no update; lengthen it"));
        }
        if self.optimizer.warmup_steps > steps {
            let reason = format!(
                "{} is more than the {steps} updates of the run",
                self.optimizer.warmup_steps
            );
            return Err(Error::recipe("optimizer.warmup_steps", reason));
        }
        Ok(steps)
    }

    /// The learning rate and weight decay of a run of `steps` updates.
    pub fn schedule(&self, steps: usize) -> Schedule {
        let Optimizer { peak_lr, second_peak_lr, schedule, warmup_steps, weight_decay, .. } =
            self.optimizer;
        let second_peak_lr = second_peak_lr.unwrap_or(peak_lr * 2. / 3.);
        let ratio = self.optimizer.warmup_ratio.unwrap_or(0.);
        let warmup_steps = warmup_steps.max((ratio * steps as f64).ceil() as usize);
        Schedule { kind: schedule, peak_lr, second_peak_lr, warmup_steps, steps, weight_decay }
    }

    /// How the data is cut into batches.
    pub fn cut(&self) -> Cut {
        Cut {
            batch_size: self.train.batch_size,
            sequence_length: self.data.sequence_length,
            attend: self.data.attend,
            packing: self.data.packing.unwrap_or(true),
        }
    }

    /// The optimizer's constants.
    pub fn adamw(&self) -> AdamWConfig {
        let Optimizer { beta1, beta2, eps, decay, .. } = self.optimizer;
        AdamWConfig { beta1, beta2, eps, decay }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::*;

    pub(super) const TEXT: &str = r#"
        [model]
        hidden_size = 256
        intermediate_size = 768
        num_hidden_layers = 6
        num_attention_heads = 4
        num_key_value_heads = 2
        vocab_size = 2048
        max_position_embeddings = 512
        [data]
        sequence_length = 256
        train = [{ path = "a.txt", documents = "line" }]
        validation = [{ path = "/b.txt", documents = "separator:<|endoftext|>" }]
        [train]
        batch_size = 8
        epochs = 1.5
        [optimizer]
        peak_lr = 1e-3
        [output]
        dir = "run"
    "#;

    fn read(text: &str) -> Result<Recipe> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("recipe.toml");
        fs::write(&path, text).unwrap();
        let recipe = Recipe::from_file(&path)?;
        assert_eq!(recipe.data.train[0].path, dir.path().join("a.txt"));
        assert_eq!(recipe.data.validation[0].path, Path::new("/b.txt"));
        assert_eq!(recipe.output.dir, dir.path().join("run"));
        Ok(recipe)
    }

    #[test]
    fn defaults_are_the_published_ones() {
        let recipe = read(TEXT).unwrap();
        assert_eq!(recipe.model.precision, Precision::Bitnet);
        assert_eq!(recipe.steps(100).unwrap(), 150);
        let schedule = recipe.schedule(150);
        assert_eq!((schedule.kind, schedule.weight_decay), (ScheduleKind::TwoStage, 0.1));
        assert_eq!((recipe.adamw().beta1, recipe.adamw().beta2), (0.9, 0.95));
    }

    #[test]
    fn errors_name_the_key() {
        for (from, to, key) in [
            ("epochs = 1.5", "epochs = 1.5\nepoch = 2", "`epoch`"),
            ("hidden_size = 256", "", "`hidden_size`"),
            ("batch_size = 8", "batch_size = -8", "batch_size"),
            ("batch_size = 8", "batch_size = 0", "`train.batch_size`"),
            ("epochs = 1.5", "epochs = nan", "`train.epochs`"),
            ("epochs = 1.5", "epochs = 1\nsteps = 1", "`train.steps`"),
            ("epochs = 1.5", "", "`train.steps`"),
            ("hidden_size = 256", "hidden_size = 260", "`model.hidden_size`"),
            ("num_key_value_heads = 2", "num_key_value_heads = 3", "`model.num_key_value_heads`"),
            ("intermediate_size = 768", "intermediate_size = 770", "`model.intermediate_size`"),
            ("vocab_size = 2048", "vocab_size = 100", "`model.vocab_size`"),
            ("sequence_length = 256", "sequence_length = 513", "`data.sequence_length`"),
            ("sequence_length = 256", "sequence_length = 256\nattend = \"all\"", "`document`"),
            (
                "sequence_length = 256",
                "sequence_length = 1\nattend = \"document\"",
                "`data.sequence_length`",
            ),
            ("[data]", "[data]\nvalidation_split = 0.1", "`data.validation_split`"),
            (
                "validation = [{ path = \"/b.txt\", documents = \"separator:<|endoftext|>\" }]",
                "validation_split = 1.0",
                "`data.validation_split`: is 1; must be",
            ),
            ("\"line\"", "\"lines\"", "unknown kind of documents `lines`"),
            ("peak_lr = 1e-3", "peak_lr = inf", "`optimizer.peak_lr`"),
            ("peak_lr = 1e-3", "peak_lr = 1e-3\nbeta2 = 1", "`optimizer.beta2`"),
            ("peak_lr = 1e-3", "peak_lr = 1e-3\nschedule = \"two\"", "two-stage"),
            ("dir = \"run\"", "dir = 5", "dir"),
            ("[model]", "[model", "recipe.toml"),
        ] {
            assert!(TEXT.contains(from));
            let message = read(&TEXT.replace(from, to)).unwrap_err().to_string();
            assert!(message.contains(key), "{to}: {message}");
        }
    }

    #[test]
    fn lengths_that_make_no_run_are_refused() {
        let mut recipe = read(TEXT).unwrap();
        assert!(recipe.steps(0).unwrap_err().to_string().contains("no update"));
        recipe.optimizer.warmup_steps = 151;
        let message = recipe.steps(100).unwrap_err().to_string();
        assert!(
            message.contains("`optimizer.warmup_steps`: 151 is more than the 150"),
            "{message}"
        );
    }
}
