//! `bitnet perplexity`: how well a model foresees a text.

use std::{
    fs,
    io::{self, Write},
    num::NonZeroUsize,
    ops::ControlFlow,
    path::PathBuf,
    sync::atomic::Ordering,
    time::Instant,
};

use anyhow::{Context, bail};
use bitnet_model::{
    nn::HeadPrecision,
    ops::KvType,
    score::{self, Windows},
};
use serde_json::json;

use crate::{
    adapter::{self, AdapterArgs},
    args::Global,
    interrupt,
    model::{ModelArgs, kv_type},
    progress,
};

/// Options of `bitnet perplexity`.
#[derive(clap::Args)]
#[command(
    after_long_help = "Every token but the first is scored once. The text is tokenized as a whole, with the special tokens that its \
tokenizer adds, and run in windows that overlap: with --window 512 --stride 256 each token has 256 tokens or more before it, \
except at the beginning of the text. Figures compare only if model, text, window and stride are the same."
)]
pub struct Args {
    /// The text
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Tokens that the model sees at once [default: 512, or the model's context if that is shorter]
    #[arg(long, value_name = "TOKENS")]
    window: Option<NonZeroUsize>,
    /// Tokens from one window to the next [default: half a window]
    #[arg(long, value_name = "TOKENS")]
    stride: Option<NonZeroUsize>,
    /// Score only the first tokens of the text
    #[arg(long, value_name = "N")]
    max_tokens: Option<usize>,
    /// How keys and values are stored [default: f16, with --low-memory int8]
    #[arg(long, value_name = "TYPE", value_parser = kv_type)]
    kv_cache: Option<KvType>,
    /// Print one JSON object: `perplexity`, `nll` (the mean, in nats), `tokens`, `window`, `stride`, `lm_head`,
    /// `kv_cache`, `seconds`
    #[arg(long)]
    json: bool,
    /// The model
    #[command(flatten)]
    model: ModelArgs,
    /// Adapters.
    #[command(flatten)]
    adapters: AdapterArgs,
}

/// Runs it.
pub fn run(args: &Args, global: &Global) -> anyhow::Result<()> {
    let source = args.model.open(global)?;
    let name = || args.file.display().to_string();
    let text = fs::read_to_string(&args.file).with_context(name)?;
    let window = args
        .window
        .or(NonZeroUsize::new(source.config.max_position_embeddings.min(512)))
        .context("the model has no context")?;
    let stride = args.stride.or(NonZeroUsize::new(window.get() / 2));
    let stride =
        stride.context("a window of one token scores nothing: give at least --window 2")?;
    let kv_type = args.kv_cache.unwrap_or_else(|| args.model.kv_type());
    let adaptation = args.adapters.read(&source, global)?;
    let mut model = source.into_pretrained(&global.device()?)?;
    model.model = adapter::beside(model.model, adaptation.as_ref())?;
    let Some(tokenizer) = &model.tokenizer else {
        bail!("{}: has no tokenizer, so it cannot read a text", model.name);
    };
    let mut tokens = tokenizer.encode(&text, true)?;
    tokens.truncate(args.max_tokens.unwrap_or(usize::MAX));

    let interrupt = interrupt::flag()?;
    let bar =
        progress::bar(global, tokens.len().saturating_sub(1), "{bar:30} {pos}/{len} tokens {eta}");
    let start = Instant::now();
    let windows = Windows { window, stride, kv_type };
    let result = score::perplexity(&model.model, &tokens, windows, |sum| {
        bar.set_position(sum.tokens as u64);
        match interrupt.load(Ordering::Relaxed) {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    });
    bar.finish_and_clear();
    let result = result.with_context(name)?;
    let seconds = start.elapsed().as_secs_f64();
    if interrupt.load(Ordering::Relaxed) {
        interrupt::exit();
    }
    let head = HeadPrecision::from(args.model.lm_head()).name();
    let (perplexity, tokens) = (result.value(), result.tokens);
    let mut out = io::stdout().lock();
    match args.json {
        true => writeln!(
            out,
            "{}",
            json!({
                "perplexity": perplexity, "nll": perplexity.ln(), "tokens": tokens, "window": window, "stride": stride,
                "lm_head": head, "kv_cache": kv_type.name(), "seconds": seconds,
            })
        )?,
        false => writeln!(
            out,
            "perplexity {perplexity:.4} over {tokens} tokens (window {window}, stride {stride}, head {head}, \
             cache {}), {:.1} tokens/s",
            kv_type.name(),
            tokens as f64 / seconds
        )?,
    }
    Ok(())
}
