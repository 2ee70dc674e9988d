//! Which model, and how to sample from it: the options that several commands share.

use std::sync::Arc;

use bitnet_model::{
    hub::Hub,
    model::Model,
    ops::KvType,
    pretrained::{DEFAULT, Precision, Source},
    session::Session,
};
use clap::{Args, ValueEnum};

use crate::args::Global;

/// Options that name a model.
#[derive(Args, Clone, Debug)]
pub struct ModelArgs {
    /// Hub repo id (org/name), folder, .safetensors file, `default` for the model inside this program, or
    /// random weights of a known geometry, for measuring: synthetic:2b-4t, synthetic:llama3-8b,
    /// synthetic:falcon3-10b
    #[arg(long, short, value_name = "MODEL", default_value = DEFAULT)]
    pub model: String,
    /// Branch, tag or commit of a Hub repo
    #[arg(long, value_name = "REVISION")]
    pub revision: Option<String>,
    /// Take float weights without a quantization_config for masters of a 1.58-bit model (Falcon-E prequantized)
    #[arg(long, conflicts_with = "full_precision")]
    pub ternarize: bool,
    /// Run float weights without a quantization_config as they are, in full precision
    #[arg(long)]
    pub full_precision: bool,
}

/// How a generating command runs its model.
#[derive(Args, Clone, Copy, Debug)]
pub struct SessionArgs {
    /// How keys and values are stored: f32 as computed; f16, half the memory and read in half the time; bf16, for
    /// values that f16 refuses; int8, half of that again, less exact
    #[arg(long, value_name = "TYPE", default_value = "f16", value_parser = kv_type)]
    pub kv_cache: KvType,
    /// Draft what followed the last tokens before, and verify it at once: the same text, sooner where it repeats itself
    /// (summaries, edits, code)
    #[arg(long, value_name = "HOW")]
    pub speculate: Option<Speculate>,
}

/// Where drafts come from.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Speculate {
    /// Earlier occurrences of the last two to four tokens
    Ngram,
}

impl SessionArgs {
    /// An empty session.
    pub fn session(self, model: &Arc<Model>) -> Session {
        let session = Session::with_cache(model.clone(), self.kv_cache);
        match self.speculate {
            Some(Speculate::Ngram) => session.speculating(),
            None => session,
        }
    }
}

fn kv_type(name: &str) -> Result<KvType, String> {
    KvType::ALL.into_iter().find(|kv_type| kv_type.name() == name).ok_or_else(|| {
        let names = KvType::ALL.map(KvType::name).join(", ");
        format!("there is no cache of type `{name}`: take one of {names}")
    })
}

impl ModelArgs {
    /// Finds the model and checks everything but the weights' values.
    pub fn open(&self, global: &Global) -> anyhow::Result<Source> {
        let precision = match (self.ternarize, self.full_precision) {
            (true, _) => Precision::Ternarize,
            (_, true) => Precision::Full,
            _ => Precision::AsConfigured,
        };
        Ok(Source::open(&self.model, precision, &self.hub(global))?)
    }

    /// The Hub as the environment and the options have it.
    pub fn hub(&self, global: &Global) -> Hub {
        let hub = Hub::from_env();
        let hub = if global.quiet { hub.progress(false) } else { hub };
        match &self.revision {
            Some(revision) => hub.revision(revision),
            None => hub,
        }
    }
}
