//! The crate's one error type. Every variant names the thing that is wrong: file, key, parameter, value.

use std::{
    io,
    path::{Path, PathBuf},
};

/// What went wrong, and where.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused to read or write a file.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A recipe is not TOML, or has an unknown or missing key.
    #[error("{}: {reason}", path.display())]
    RecipeSyntax {
        /// The recipe.
        path: PathBuf,
        /// The parser's message: line, key and reason.
        reason: String,
    },
    /// A key of the recipe has a value that cannot be used.
    #[error("recipe: `{key}`: {reason}")]
    Recipe {
        /// The dotted key: `train.batch_size`.
        key: &'static str,
        /// Why its value cannot be used, with the value, and what to do.
        reason: String,
    },
    /// A text file of the corpus cannot be used.
    #[error("{}: {reason}", path.display())]
    Corpus {
        /// The file or directory.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The corpus as a whole cannot be trained or evaluated on.
    #[error("dataset: {0}")]
    Dataset(String),
    /// A vocabulary could not be trained, read, written or applied.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// A checkpoint of the training run cannot be resumed from.
    #[error("{}: {reason}", path.display())]
    Checkpoint {
        /// The file or directory.
        path: PathBuf,
        /// What is wrong with it and what to do.
        reason: String,
    },
    /// One tensor of a checkpoint of the training run is absent or unusable.
    #[error("{}: tensor `{name}`: {reason}", path.display())]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The tensor's full name.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The backward pass left out a trainable parameter.
    #[error(
        "no gradient reached parameter `{name}`: an operation between it and the loss has no backward pass"
    )]
    NoGradient {
        /// The parameter.
        name: String,
    },
    /// The loss or the gradient is no longer a finite number.
    #[error(
        "step {step}: {what} is {value}; lower `optimizer.peak_lr` or lengthen `optimizer.warmup_steps`{}",
        good_checkpoint(last_good.as_deref())
    )]
    Diverged {
        /// The step that failed, counted from 1. An update with such a gradient is not applied.
        step: usize,
        /// `loss`, `gradient norm` or `held-out loss`.
        what: &'static str,
        /// NaN or an infinity.
        value: f64,
        /// The newest checkpoint on disk.
        last_good: Option<PathBuf>,
    },
    /// The caller asked to stop while text was read or encoded.
    #[error("interrupted while the text was read; nothing was trained yet")]
    Interrupted,
    /// The loss is finite, but the run has gone wrong.
    #[error(
        "step {step}: {reason}; {advice}{}",
        good_checkpoint(last_good.as_deref())
    )]
    WentWrong {
        /// Updates made.
        step: usize,
        /// What was seen, with its numbers.
        reason: String,
        /// What to change, and how to go on nevertheless.
        advice: &'static str,
        /// The newest checkpoint from before the trouble.
        last_good: Option<PathBuf>,
    },
    /// The ranks of a job no longer hold the same.
    #[error(
        "rank {rank} and rank 0 have different {what}; ranks need the same program, recipe, files and kind of processor"
    )]
    Disagreement {
        /// What differs: `runs` (recipe, data or checkpoint) or `weights`.
        what: &'static str,
        /// The first rank that differs.
        rank: usize,
    },
    /// The ranks of a job cannot work together.
    #[error("distributed training: {0}")]
    Distributed(String),
    /// An argument of a call is out of range.
    #[error("{0}")]
    Input(String),
    /// The model crate refused.
    #[error(transparent)]
    Model(#[from] bitnet_model::Error),
    /// Candle refused an operation.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

/// The end of a message about a run that has gone wrong.
fn good_checkpoint(path: Option<&Path>) -> String {
    match path {
        Some(path) => format!("; last good checkpoint: {}", path.display()),
        None => "; there is no checkpoint from before that".into(),
    }
}

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An [`Error::Io`] about `path`; for `map_err`.
    pub fn io(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }

    /// An [`Error::Recipe`] about `key`.
    pub(crate) fn recipe(key: &'static str, reason: impl Into<String>) -> Self {
        Self::Recipe { key, reason: reason.into() }
    }
}
