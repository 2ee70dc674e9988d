//! What a conversion does to a model: its perplexity on a text.

use std::{fs, num::NonZeroUsize, ops::ControlFlow, path::Path};

use anyhow::{Context, bail};
use bitnet_model::{
    ops::KvType,
    pretrained::Source,
    score::{self, Windows},
};
use candle_core::Device;

/// Perplexity of the model on the text, a file, in windows of 512 tokens (or the model's context, if that is shorter) that
/// overlap by half.
pub fn perplexity(source: Source, text: &Path) -> anyhow::Result<f64> {
    let name = || text.display().to_string();
    let content = fs::read_to_string(text).with_context(name)?;
    let size = source.config.max_position_embeddings.min(512);
    let window = NonZeroUsize::new(size).context("the model has no context")?;
    let stride =
        NonZeroUsize::new(size / 2).context("a context of one token cannot be measured")?;
    let model = source.into_pretrained(&Device::Cpu)?;
    let Some(tokenizer) = &model.tokenizer else {
        bail!("{}: has no tokenizer, so it cannot read {}", model.name, name());
    };
    let tokens = tokenizer.encode(&content, true)?;
    let windows = Windows { window, stride, kv_type: KvType::default() };
    let result = score::perplexity(&model.model, &tokens, windows, |_| ControlFlow::Continue(()));
    Ok(result.with_context(name)?.value())
}
