//! `[data]`: what is trained and evaluated on.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{Model, validate::at_least_one};
use crate::{
    Error, Result,
    batch::Attend,
    dataset::{Source, vocabulary},
};

/// `[data]`: text files.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Data {
    /// `[[data.train]]`: what is trained on, and what the vocabulary is trained on.
    pub train: Vec<Source>,
    /// `[[data.validation]]`: held-out text.
    pub validation: Vec<Source>,
    /// Only about this many bytes of held-out text are used.
    pub validation_bytes: Option<usize>,
    /// Tokens in a window.
    pub sequence_length: usize,
    /// Whether a token attends to its `window` (the default) or to its `document` alone.
    #[serde(default)]
    pub attend: Attend,
    /// A `tokenizer.json` to use instead of training a vocabulary.
    pub tokenizer: Option<PathBuf>,
}

impl Data {
    /// Says which key has a value that cannot be used.
    pub(super) fn validate(&self, model: &Model) -> Result<()> {
        at_least_one("data.sequence_length", self.sequence_length)?;
        if self.sequence_length > model.max_position_embeddings {
            let (sequence, most) = (self.sequence_length, model.max_position_embeddings);
            let reason = format!("{sequence} is more than `model.max_position_embeddings`, {most}");
            return Err(Error::recipe("data.sequence_length", reason));
        }
        if self.attend == Attend::Document && self.sequence_length == 1 {
            let reason =
                "a window of 1 token holds nothing of its document to attend to; use at least 2";
            return Err(Error::recipe("data.sequence_length", reason));
        }
        if self.train.is_empty() {
            return Err(Error::recipe("data.train", "names no text"));
        }
        if self.validation.is_empty() {
            return Err(Error::recipe("data.validation", "names no text"));
        }
        if self.validation_bytes == Some(0) {
            return Err(Error::recipe("data.validation_bytes", "must be at least 1"));
        }
        if self.tokenizer.is_none() && model.vocab_size < vocabulary::MIN_SIZE {
            let reason =
                format!("{} is less than {}, the least", model.vocab_size, vocabulary::MIN_SIZE);
            return Err(Error::recipe("model.vocab_size", reason));
        }
        Ok(())
    }
}
