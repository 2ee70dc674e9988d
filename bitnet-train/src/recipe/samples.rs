//! `[samples]`: what the model is asked at every evaluation.

use serde::{Deserialize, Serialize};

use super::validate::at_least_one;
use crate::{Error, Result};

/// `[samples]`: prompts that are continued at every evaluation, by the most probable token each time. They are shown and
/// kept in the metrics.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Samples {
    /// What is asked: with `data.format` and a chat template what a user says, else the beginning of a text.
    pub prompts: Vec<String>,
    /// The most tokens of an answer.
    #[serde(default = "default_max_new_tokens")]
    pub max_new_tokens: usize,
}

fn default_max_new_tokens() -> usize {
    64
}

impl Samples {
    /// Says which key has a value that cannot be used.
    pub(super) fn validate(&self) -> Result<()> {
        if self.prompts.iter().any(|prompt| prompt.trim().is_empty()) {
            return Err(Error::recipe("samples.prompts", "has an empty prompt"));
        }
        at_least_one("samples.max_new_tokens", self.max_new_tokens)
    }
}
