//! `[data]`: what is trained and evaluated on.

use std::path::{Path, PathBuf};

use bitnet_model::pretrained::DEFAULT;
use serde::{Deserialize, Serialize};

use super::{Model, validate::at_least_one};
use crate::{
    Error, Result,
    batch::Attend,
    dataset::{Source, vocabulary},
    sft::{Format, LossOn, Template},
};

/// `[data]`: text and records.
///
/// ```toml
/// [data]
/// sequence_length = 256          # tokens in a window
/// attend = "document"            # "window" (default): a token also sees the documents before its own
/// tokenizer = "tokenizer.json"   # instead of a vocabulary trained on the text
/// cache = "tokens"               # instead of `tokens` in the output folder; may be shared by runs
/// validation_split = 0.01        # of the documents are held out; or give [[data.validation]]
/// validation_bytes = 100000      # of held-out text are used
///
/// [[data.train]]                 # text: a file, or with * and ** several
/// path = "stories/**/*.txt.gz"
/// documents = "separator:<|endoftext|>"  # or "file", "line", "blank-line", "gutenberg"
/// [[data.train]]                 # records: .jsonl, .json, .parquet
/// path = "web.jsonl"
/// field = "content"              # the key or column of the text, "text" unless given
/// [[data.train]]                 # a directory with all below it: .txt, .jsonl, .json, .parquet
/// path = "mixed"
/// documents = "file"             # of its text
/// [[data.train]]                 # files of a dataset repository, downloaded into the Hub's cache
/// path = "hf://datasets/roneneldan/TinyStories@main/data/train-*.parquet"
/// ```
///
/// With `format` the records are instructions and conversations, from which a model learns to answer:
///
/// ```toml
/// [data]
/// sequence_length = 512          # tokens of the longest example; what is longer is cut at its end
/// format = "auto"                # or "messages", "conversations", "instruction", "prompt-completion", "input-output", "text"
/// loss_on = "assistant"          # the default: replies, outputs and completions; or "all"
/// chat_template = "chat.jinja"   # instead of the tokenizer's own; "none" for plain prompts
/// packing = true                 # the default: several examples share a row and do not see each other
/// max_samples = 1000             # only the first records are trained on
/// skip_bad = true                # malformed records are left out and counted; else they are errors
/// validation_split = 0.1
/// train = [{ path = "mine.jsonl" }]
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Data {
    /// `[[data.train]]`: what is trained on, and what the vocabulary is trained on.
    pub train: Vec<Source>,
    /// `[[data.validation]]`: held-out text; either this or `validation_split`.
    #[serde(default)]
    pub validation: Vec<Source>,
    /// The share of the training documents that is held out instead: more than 0, less than 1. `train.seed` decides
    /// which, and neither the model nor the vocabulary is trained on them.
    pub validation_split: Option<f64>,
    /// Only about this many bytes of held-out text are used.
    pub validation_bytes: Option<usize>,
    /// Tokens in a window.
    pub sequence_length: usize,
    /// Whether a token attends to its `window` (the default) or to its `document` alone.
    #[serde(default)]
    pub attend: Attend,
    /// A `tokenizer.json` to use instead of training a vocabulary; `default` is that of the model inside this library.
    pub tokenizer: Option<PathBuf>,
    /// Folder of encoded text, which runs may share; nothing in it is deleted. Unless given, `tokens` in the output
    /// folder, which holds what the run uses and no more.
    pub cache: Option<PathBuf>,
    /// The form of the records, which become examples; without it all is one stream of text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format: Option<Format>,
    /// Of examples: what the loss is taken of, `assistant` unless given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss_on: Option<LossOn>,
    /// Of examples: a Jinja file to write conversations with, or `none`; the tokenizer's own template unless given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chat_template: Option<Template>,
    /// Of examples: whether several share a row, `true` unless given; else each has its own, padded to the longest of the
    /// batch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub packing: Option<bool>,
    /// Of examples: how many records of the training files are read, from the first on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_samples: Option<usize>,
    /// Of examples: whether malformed records are left out and counted, `false` unless given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub skip_bad: Option<bool>,
}

impl Data {
    /// The folder of encoded text of a run with this output folder.
    pub fn cache_dir(&self, output: &Path) -> PathBuf {
        self.cache.clone().unwrap_or_else(|| output.join("tokens"))
    }

    /// Makes relative paths start at `dir`.
    pub(super) fn start_at(&mut self, dir: &Path) {
        for source in self.train.iter_mut().chain(&mut self.validation) {
            source.start_at(dir);
        }
        for path in self.tokenizer.iter_mut().chain(&mut self.cache) {
            if path.as_os_str() != DEFAULT {
                *path = dir.join(&*path);
            }
        }
        if let Some(Template::File(path)) = &mut self.chat_template {
            *path = dir.join(&*path);
        }
    }

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
        match (self.validation.is_empty(), self.validation_split) {
            (true, None) => {
                let reason = "names no text; give `[[data.validation]]` or `data.validation_split`";
                return Err(Error::recipe("data.validation", reason));
            }
            (false, Some(_)) => {
                let reason = "give either `data.validation_split` or `[[data.validation]]`";
                return Err(Error::recipe("data.validation_split", reason));
            }
            (true, Some(share)) if !(share > 0. && share < 1.) => {
                let reason = format!("is {share}; must be more than 0 and less than 1");
                return Err(Error::recipe("data.validation_split", reason));
            }
            _ => {}
        }
        if self.validation_bytes == Some(0) {
            return Err(Error::recipe("data.validation_bytes", "must be at least 1"));
        }
        self.validate_examples()?;
        if self.tokenizer.is_none() && model.vocab_size < vocabulary::MIN_SIZE {
            let reason =
                format!("{} is less than {}, the least", model.vocab_size, vocabulary::MIN_SIZE);
            return Err(Error::recipe("model.vocab_size", reason));
        }
        Ok(())
    }
    /// The keys of examples, and those that examples have no use for.
    fn validate_examples(&self) -> Result<()> {
        let Some(format) = self.format else {
            let given = [
                ("data.loss_on", self.loss_on.is_some()),
                ("data.chat_template", self.chat_template.is_some()),
                ("data.packing", self.packing.is_some()),
                ("data.max_samples", self.max_samples.is_some()),
                ("data.skip_bad", self.skip_bad.is_some()),
            ];
            return match given.into_iter().find(|(_, is_given)| *is_given) {
                Some((key, _)) => {
                    let reason = "is about records of instructions; give `data.format`, such as \"auto\", or leave it out";
                    Err(Error::recipe(key, reason))
                }
                None => Ok(()),
            };
        };
        if self.tokenizer.is_none() {
            let reason = "instructions are for a model that has a tokenizer; name it, or go on from a model with `[init]`";
            return Err(Error::recipe("data.tokenizer", reason));
        }
        if self.validation_bytes.is_some() {
            let reason =
                "is about a stream of text, and `data.format` makes examples; leave one out";
            return Err(Error::recipe("data.validation_bytes", reason));
        }
        if self.cache.is_some() {
            let reason = "examples are encoded anew every time; leave it out, or `data.format`";
            return Err(Error::recipe("data.cache", reason));
        }
        if (format, self.loss_on) == (Format::Text, Some(LossOn::Assistant)) {
            let reason = "the format `text` has no assistant: all of a text is trained";
            return Err(Error::recipe("data.loss_on", reason));
        }
        match self.max_samples {
            Some(count) => at_least_one("data.max_samples", count),
            None => Ok(()),
        }
    }
}
