//! What a change of its weights does to a model: its loss on a text.

use std::{fs, num::NonZeroUsize, ops::ControlFlow, path::Path};

use anyhow::{Context, bail};
use bitnet_model::{
    model::Model,
    ops::KvType,
    perplexity::{self, Cut, Run, Window},
    pretrained::Source,
};
use candle_core::Device;

/// A text in a model's tokens, and how it is cut: windows of 512 tokens (or the model's context, if that is shorter) that
/// overlap by half.
pub struct Text {
    name: String,
    tokens: Vec<u32>,
    windows: Vec<Window>,
}

impl Text {
    /// Reads the file `path` for the model of `source`.
    pub fn read(source: &Source, path: &Path) -> anyhow::Result<Self> {
        let name = path.display().to_string();
        let content = fs::read_to_string(path).with_context(|| name.clone())?;
        let size = source.config.max_position_embeddings.min(512);
        let window = NonZeroUsize::new(size).context("the model has no context")?;
        let stride =
            NonZeroUsize::new(size / 2).context("a context of one token cannot be measured")?;
        let Some(tokenizer) = source.tokenizer()? else {
            bail!("{}: has no tokenizer, so it cannot read {name}", source.name);
        };
        let tokens = tokenizer.encode(&content, true)?;
        let cut = Cut::Sliding { window, stride };
        let windows = cut.windows(tokens.len()).with_context(|| name.clone())?;
        Ok(Self { name, tokens, windows })
    }

    /// The perplexity of `model` on it; its logarithm is the loss, in nats a token.
    pub fn perplexity(&self, model: &Model) -> anyhow::Result<f64> {
        let run = Run { kv_type: KvType::default(), begin: None };
        let go_on = |_: &Window, _: f64| ControlFlow::Continue(());
        let result = perplexity::perplexity(model, &self.tokens, &self.windows, run, go_on);
        Ok(result.with_context(|| self.name.clone())?.value())
    }
}

/// Perplexity of the model on the text, a file.
pub fn perplexity(source: &Source, text: &Path) -> anyhow::Result<f64> {
    let text = Text::read(source, text)?;
    text.perplexity(&source.load(&Device::Cpu)?)
}
