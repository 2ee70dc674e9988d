//! `bitnet logits`: the logits of every position, for comparison with another implementation.

use std::{
    io::{self, Write},
    path::PathBuf,
    sync::{Arc, atomic::Ordering},
};

use anyhow::{Context, bail, ensure};
use bitnet_model::{
    checkpoint::{Dtype, SafetensorsWriter, TensorSpec},
    kv_cache::KvCache,
    model::Model,
    ops::KvType,
    sampler::argmax,
};
use candle_core::Tensor;

use crate::{
    adapter::{self, AdapterArgs},
    args::Global,
    interrupt,
    model::ModelArgs,
    progress,
};

/// The tensor's name in the file.
const NAME: &str = "logits";

/// Positions run at once: 64 · 128256 · 4 bytes = 33 MB of logits for the largest vocabulary. The
/// model's results do not depend on it.
const CHUNK: usize = 64;

/// Options of `bitnet logits`.
#[derive(clap::Args)]
#[command(
    after_long_help = "The file holds one tensor, `logits`, f32, (tokens, vocabulary): row i is what the model predicts after \
token i. It appears when it is complete.\n\n\
With --log bitnet_model::activations=trace, fingerprints of the 8-bit codes of all activations are logged: the beginning of the \
SHA-256 of the codes of each token, product by product. The first that differs from another implementation's tells where the two part."
)]
#[command(group(clap::ArgGroup::new("input").required(true)))]
pub struct Args {
    /// The model
    #[command(flatten)]
    model: ModelArgs,
    /// Adapters.
    #[command(flatten)]
    adapters: AdapterArgs,
    /// Token ids to run, separated by commas, at most the model's context; nothing is added to them
    #[arg(long, group = "input", value_delimiter = ',', value_name = "IDS")]
    tokens: Option<Vec<u32>>,
    /// Text to run, with the special tokens its tokenizer adds
    #[arg(long, group = "input", value_name = "TEXT")]
    text: Option<String>,
    /// File to write
    #[arg(long, short, value_name = "FILE.safetensors")]
    output: PathBuf,
    /// Print the shape, the tokens, and the most likely next token of every position as JSON
    #[arg(long)]
    json: bool,
}

/// Writes the file.
pub fn run(args: Args, global: &Global) -> anyhow::Result<()> {
    let source = args.model.open(global)?;
    let tokens = match (args.tokens, args.text) {
        (Some(tokens), _) => tokens,
        (None, text) => {
            let tokenizer = source.tokenizer()?.with_context(|| {
                format!("{}: has no tokenizer.json: give --tokens instead of --text", source.name)
            })?;
            tokenizer.encode(&text.unwrap_or_default(), true)?
        }
    };
    let config = &source.config;
    let (vocab_size, context) = (config.vocab_size, config.max_position_embeddings);
    ensure!(!tokens.is_empty(), "there are no tokens to run");
    if tokens.len() > context {
        bail!(
            "{} tokens are more than the model's context of {context}; shorten the text",
            tokens.len()
        );
    }
    if let Some(id) = tokens.iter().find(|&&id| id as usize >= vocab_size) {
        bail!("token id {id} is outside the model's vocabulary of {vocab_size}");
    }
    let adaptation = args.adapters.read(&source, global)?;
    let interrupted = interrupt::flag()?;
    let model = adapter::beside(Arc::new(source.load(&global.device()?)?), adaptation.as_ref())?;
    let spec = TensorSpec::new(NAME, Dtype::F32, [tokens.len(), vocab_size]);
    let mut writer = SafetensorsWriter::create(&args.output, vec![spec])?;
    let bar = progress::bar(global, tokens.len(), "{bar:30} {pos}/{len} tokens {eta}");
    let mut cache = model.cache(KvType::F32, 1);
    let mut best = Vec::with_capacity(tokens.len());
    for chunk in tokens.chunks(CHUNK) {
        if interrupted.load(Ordering::Relaxed) {
            bail!("interrupted: {} was not written", args.output.display());
        }
        for row in logits(&model, chunk, &mut cache)? {
            best.push(argmax(&row));
            let bytes: Vec<u8> = row.iter().flat_map(|logit| logit.to_le_bytes()).collect();
            writer.append(NAME, &bytes)?;
        }
        bar.inc(chunk.len() as u64);
    }
    writer.finish()?;
    bar.finish_and_clear();
    if args.json {
        let shape = [tokens.len(), vocab_size];
        let output = args.output.display().to_string();
        let summary = serde_json::json!({
            "file": output, "shape": shape, "tokens": tokens, "argmax": best,
        });
        writeln!(io::stdout(), "{summary:#}")?;
    } else if !global.quiet {
        eprintln!("{}: {} × {vocab_size} logits", args.output.display(), tokens.len());
    }
    Ok(())
}

/// The logits after each token of `chunk`, which continues what `cache` holds.
pub fn logits(model: &Model, chunk: &[u32], cache: &mut KvCache) -> anyhow::Result<Vec<Vec<f32>>> {
    let input = Tensor::new(chunk, model.device())?.unsqueeze(0)?;
    let hidden = model.hidden_states(&input, Some(cache))?; // (1, seq, hidden_size)
    Ok(model.logits(&hidden.squeeze(0)?)?.to_vec2()?)
}
