//! What `bitnet batch` and `bitnet serve` share: texts of many requests that are continued together.

use std::{num::NonZeroUsize, sync::Arc};

use anyhow::bail;
use bitnet_model::{
    batch::Limits, model::Model, ops::KvType, pretrained::Source, session::PREFILL_CHUNK,
    text::Tokenizer,
};
use candle_core::Device;

use crate::{
    adapter::{self, Adapters, NamedAdapters},
    model::{ModelArgs, kv_type},
};

/// How many texts run together, and in how much memory.
#[derive(clap::Args)]
pub struct BatchingArgs {
    /// The most texts that are continued together
    #[arg(long, value_name = "N", default_value = "16")]
    max_batch: NonZeroUsize,
    /// The most memory for keys and values, in MiB: what is set aside for running texts, and what is kept for later ones that
    /// begin alike
    #[arg(long, value_name = "MIB", default_value = "2048")]
    kv_memory: NonZeroUsize,
    /// How keys and values are stored: f32, f16, bf16 or int8 [default: f16, with --low-memory int8]
    #[arg(long, value_name = "TYPE", value_parser = kv_type)]
    kv_cache: Option<KvType>,
}

impl BatchingArgs {
    /// As limits of a batch, which reads `beside` tokens of new prompts between two tokens of running texts.
    pub fn limits(&self, model: &ModelArgs, beside: NonZeroUsize) -> Limits {
        Limits {
            sequences: self.max_batch.get(),
            kv_bytes: self.kv_memory.get() << 20,
            prompt_tokens: PREFILL_CHUNK.get(),
            prompt_tokens_beside: beside.get(),
            kv_type: self.kv_cache.unwrap_or_else(|| model.kv_type()),
        }
    }
}

/// Reads the weights to a device: the network, with what is beside it for all requests, the adapters that single ones choose,
/// and its tokenizer.
pub fn load(
    source: Source,
    (for_all, named): Adapters,
    device: &Device,
) -> anyhow::Result<(Arc<Model>, NamedAdapters, Tokenizer)> {
    let model = source.into_pretrained(device)?;
    let Some(tokenizer) = model.tokenizer else {
        bail!("{}: has no tokenizer, so there is no text to answer with", model.name);
    };
    let moved = named.into_iter();
    let moved = moved.map(|(name, adapter)| Ok((name, Arc::new(adapter.to_device(device)?))));
    let named = moved.collect::<anyhow::Result<_>>()?;
    Ok((adapter::beside(model.model, for_all.as_ref())?, named, tokenizer))
}
