//! From files to tokens: `source` finds the files, `reader` reads their documents one at a time, `vocabulary` is trained
//! on them, `shards` keep them encoded on the disk, `tokens` are read from there, `stream` packs them in some order.
//! Memory does not grow with the corpus, but for a few bytes a document.

mod cache;
mod content;
mod corpus;
mod documents;
pub(crate) mod reader;
mod sample;
mod shards;
mod source;
mod split;
pub mod stream;
pub mod tokens;
pub mod vocabulary;

use std::ops::ControlFlow;

use bitnet_model::hub::Hub;

use self::{cache::Cache, split::Split};
pub use self::{
    content::Content,
    documents::Documents,
    source::Source,
    stream::{Stream, Window},
    tokens::Tokens,
    vocabulary::Vocabulary,
};
pub(crate) use self::{
    corpus::Corpus,
    reader::{
        read_records,
        record::{RecordSink, Refusal, keys, kind},
    },
};
use crate::{Error, Result, recipe::Recipe, sft};

/// What a recipe trains and evaluates on.
#[derive(Clone, Debug)]
pub struct Dataset {
    /// Trained on the training documents, or read from `data.tokenizer`.
    pub vocabulary: Vocabulary,
    /// Trained on.
    pub train: Content,
    /// Held out.
    pub validation: Content,
    /// What became of the records, if `data.format` makes examples of them.
    pub report: Option<sft::Report>,
}

/// How far the reading of a corpus has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// What for.
    pub stage: Stage,
    /// Bytes read from the disk.
    pub done: u64,
    /// Bytes of the files.
    pub total: u64,
}

/// Why a corpus is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// To train the vocabulary.
    Vocabulary,
    /// To encode the text that is trained on.
    Train,
    /// To encode held-out text.
    Validation,
}

impl Dataset {
    /// As [`open_with`](Self::open_with), with the Hub of the environment and nobody watching.
    pub fn open(recipe: &Recipe) -> Result<Self> {
        Self::open_with(recipe, &Hub::from_env(), &mut |_| ControlFlow::Continue(()))
    }

    /// What `[data]` says, read and encoded unless the cache has it. The same files give the same dataset. `hub` is
    /// asked for the files of dataset repositories; `observe` is told of every few megabytes that are read, and may break
    /// off.
    ///
    /// # Errors
    /// [`Error::Interrupted`] if `observe` broke off; text that cannot be read, with its file and line.
    pub fn open_with(
        recipe: &Recipe,
        hub: &Hub,
        observe: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<Self> {
        let data = &recipe.data;
        let dataset = match data.format {
            Some(_) => sft::open(recipe, hub, observe)?,
            None => Self::stream(recipe, hub, observe)?,
        };
        let (size, vocab_size) = (dataset.vocabulary.size(), recipe.model.vocab_size);
        if size > vocab_size {
            let reason = format!("{vocab_size} is less than the {size} tokens of `data.tokenizer`");
            return Err(Error::recipe("model.vocab_size", reason));
        }
        Ok(dataset)
    }

    /// A stream of text, encoded into the cache.
    fn stream(
        recipe: &Recipe,
        hub: &Hub,
        observe: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<Self> {
        let data = &recipe.data;
        let split = data.validation_split.map(|share| Split { share, seed: recipe.train.seed });
        let train = Corpus::open(&data.train, hub)?;
        let mut cache = Cache::open(&data.cache_dir(&recipe.output.dir), observe)?;
        let vocab_size = recipe.model.vocab_size;
        let vocabulary = match &data.tokenizer {
            Some(path) => Vocabulary::from_file(path)?,
            None => cache.vocabulary(&train, vocab_size, split)?,
        };
        let train = cache.tokens(&train, &vocabulary, None, Stage::Train)?;
        let (train, validation) = match split {
            Some(split) => train.split(split, data.validation_bytes)?,
            None => {
                let validation = Corpus::open(&data.validation, hub)?;
                let limit = data.validation_bytes;
                (train, cache.tokens(&validation, &vocabulary, limit, Stage::Validation)?)
            }
        };
        if data.cache.is_none() {
            cache.clear_unused()?;
        }
        Ok(Self { vocabulary, train: train.into(), validation: validation.into(), report: None })
    }
}

#[cfg(test)]
mod tests;
