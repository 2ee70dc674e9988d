//! A model written as one GGUF file: whole under its name, or not at all.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use bitnet_model::{
    checkpoint::{
        Checkpoint,
        gguf::{Contents, Gguf, Types, write},
    },
    config::Config,
    pretrained::Source,
};

use super::{Args, Floats, Written, checked};
use crate::{
    args::Global,
    card::{self, Card},
    engines, folder,
};

const EMBEDDING: &str = "model.embed_tokens.weight";

/// Refuses an `output` that is there, or whose card is, unless it is a GGUF file and `force` is given.
pub fn check_free(output: &Path, force: bool) -> anyhow::Result<()> {
    let path = output.display();
    if !Gguf::is_named_so(output) {
        bail!("{path}: is to be a GGUF file: give it a name that ends in .gguf");
    }
    let card = card_path(output);
    for (path, is_ours) in [(output, true), (&card, card::is_card(&card))] {
        let shown = path.display();
        match path.symlink_metadata() {
            Err(_) => {}
            Ok(metadata) if !metadata.is_file() => bail!("{shown}: is there and no file"),
            Ok(_) if force && is_ours => {}
            Ok(_) if force => bail!(
                "{shown}: is there, and no card that this program wrote: choose another name, or move it away"
            ),
            Ok(_) => {
                bail!("{shown}: is there: choose another name, or pass --force to replace it")
            }
        }
    }
    Ok(())
}

/// Where the card of a GGUF file lies.
pub fn card_path(output: &Path) -> PathBuf {
    output.with_extension("md")
}

/// A folder beside `output` for it and its card until both are complete.
pub struct Place<'a> {
    folder: tempfile::TempDir,
    output: &'a Path,
    /// The file to write.
    pub file: PathBuf,
    /// The card to write.
    pub card: PathBuf,
}

impl<'a> Place<'a> {
    /// Makes the folder.
    pub fn new(output: &'a Path) -> anyhow::Result<Self> {
        let (parent, name) = folder::place(output)?;
        let folder = folder::temporary(&parent, &name)?;
        let file = folder.path().join(&name);
        Ok(Self { card: card_path(&file), file, folder, output })
    }

    /// Bytes of the file.
    pub fn bytes(&self) -> anyhow::Result<u64> {
        Ok(fs::metadata(&self.file).with_context(|| self.file.display().to_string())?.len())
    }

    /// Brings the file and its card to their names.
    pub fn publish(self) -> anyhow::Result<()> {
        let Self { folder, output, file, card } = self;
        for (from, to) in [(&file, output), (&card, &card_path(output))] {
            fs::rename(from, to).with_context(|| to.display().to_string())?;
        }
        folder.close().with_context(|| output.display().to_string())
    }
}

/// Writes the file of `args`.
pub fn convert(
    source: &Source,
    types: Types,
    args: &Args,
    global: &Global,
) -> anyhow::Result<Written> {
    let place = Place::new(&args.output)?;
    let text = source.text_files()?;
    let contents = Contents {
        name: source.name.rsplit('/').next().unwrap_or(&source.name),
        config: &source.config,
        checkpoint: &source.checkpoint,
        text: text.as_ref(),
    };
    let mut tensors = 0;
    let reopen = || -> anyhow::Result<(Config, Checkpoint)> {
        let written = Gguf::open(&place.file)?;
        tensors = written.tensors();
        Ok((written.config().clone(), written.checkpoint()?))
    };
    let write = |step: checked::Step<'_>| -> anyhow::Result<()> {
        Ok(write(contents, types, &place.file, step)?)
    };
    let config = checked::write(source, global, write, reopen)?;
    let bytes = place.bytes()?;
    let kept = |name: &str, chosen: Option<Floats>| match (chosen, source.checkpoint.get(name)) {
        (Some(floats), _) => floats.name().to_uppercase(),
        (None, Some(info)) if name == EMBEDDING || !config.tie_word_embeddings => {
            format!("{}, as in the source", info.dtype)
        }
        _ => "the embedding".into(),
    };
    let card = Card {
        source,
        config: &config,
        form: &args.form(),
        options: &args.options(),
        types: &[
            ("projections", args.form().to_uppercase()),
            ("embedding", kept(EMBEDDING, args.token_embedding_type)),
            ("head", kept("lm_head.weight", args.output_tensor_type)),
            ("norms", "F32".into()),
        ],
        bytes,
        output: &args.output,
    };
    card.write(&place.card)?;
    place.publish()?;
    if let Err(reason) = engines::llama_cpp(&config, &args.form()) {
        tracing::warn!("{}: llama.cpp does not run it: {reason}", args.output.display());
    }
    Ok(Written { tensors, bytes })
}
