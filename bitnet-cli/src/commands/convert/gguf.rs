//! A model written as one GGUF file: whole under its name, or not at all.

use std::path::Path;

use anyhow::bail;
use bitnet_model::{
    checkpoint::{
        Checkpoint,
        gguf::{Contents, Gguf, Types, write},
    },
    config::Config,
    pretrained::Source,
};

use super::{
    Args, Floats, Written, checked,
    place::{self, Place, card_path},
};
use crate::{args::Global, engines};

const EMBEDDING: &str = "model.embed_tokens.weight";

/// Refuses an `output` that is no GGUF file by its name, or that is there.
pub fn check_free(output: &Path, force: bool) -> anyhow::Result<()> {
    if !Gguf::is_named_so(output) {
        bail!("{}: is to be a GGUF file: give it a name that ends in .gguf", output.display());
    }
    place::check_free(output, &[], force)
}

/// Writes the file of `args`.
pub fn convert(
    source: &Source,
    types: Types,
    args: &Args,
    global: &Global,
) -> anyhow::Result<Written> {
    let (output, card_output) = (&*args.output, card_path(&args.output));
    let place = Place::new(output)?;
    let file = place.of(output);
    let text = source.text_files()?;
    let contents = Contents {
        name: source.name.rsplit('/').next().unwrap_or(&source.name),
        config: &source.config,
        checkpoint: &source.checkpoint,
        text: text.as_ref(),
    };
    let mut tensors = 0;
    let reopen = |(): &()| -> anyhow::Result<(Config, Checkpoint)> {
        let written = Gguf::open(&file)?;
        tensors = written.tensors();
        Ok((written.config().clone(), written.checkpoint()?))
    };
    let write = |step: checked::Step<'_>| -> anyhow::Result<()> {
        Ok(write(contents, types, &file, step)?)
    };
    let ((), config) = checked::write(source, global, write, reopen)?;
    let bytes = place.bytes(output)?;
    let kept = |name: &str, chosen: Option<Floats>| match (chosen, source.checkpoint.get(name)) {
        (Some(floats), _) => floats.name().to_uppercase(),
        (None, Some(info)) if name == EMBEDDING || !config.tie_word_embeddings => {
            format!("{}, as in the source", info.dtype)
        }
        _ => "the embedding".into(),
    };
    let types = [
        ("projections", args.form().to_uppercase()),
        ("embedding", kept(EMBEDDING, args.token_embedding_type)),
        ("head", kept("lm_head.weight", args.output_tensor_type)),
        ("norms", "F32".into()),
    ];
    args.card(source, &config, &types, bytes).write(&place.of(&card_output))?;
    place.publish(&[output, &card_output])?;
    if let Err(reason) = engines::llama_cpp(&config, &args.form()) {
        tracing::warn!("{}: llama.cpp does not run it: {reason}", output.display());
    }
    Ok(Written { tensors, bytes })
}
