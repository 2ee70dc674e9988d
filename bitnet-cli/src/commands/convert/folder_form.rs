//! A model written as a folder in the Hub's layout.

use std::fs;

use anyhow::bail;
use bitnet_model::{
    checkpoint::{
        Checkpoint,
        export::{self, Target},
    },
    config::Config,
    pretrained::Source,
};

use super::{Args, Written, checked};
use crate::{args::Global, card::Card, folder};

/// Writes the folder of `args`.
pub fn convert(
    source: &Source,
    target: Target,
    args: &Args,
    global: &Global,
) -> anyhow::Result<Written> {
    let (parent, name) = folder::place(&args.output)?;
    let folder = folder::temporary(&parent, &name)?;
    let path = folder.path();
    let weights = path.join("model.safetensors");
    let (mut tensors, mut converted) = (0, None);
    let write = |step: checked::Step<'_>| -> anyhow::Result<()> {
        let config = export::convert(&source.config, &source.checkpoint, path, target, step)?;
        converted = Some(config);
        folder::copy_beside(source, path)
    };
    let reopen = || -> anyhow::Result<(Config, Checkpoint)> {
        let file = path.join("config.json");
        let mut config = Config::from_file(&file)?;
        if config.quantization.is_none() {
            config = config.ternarize(&file)?;
        }
        let written = Checkpoint::open(std::slice::from_ref(&weights))?;
        tensors = written.names().len();
        Ok((config, written))
    };
    let config = checked::write(source, global, write, reopen)?;
    if converted.is_some_and(|converted| converted != config) {
        bail!(
            "{}: read back, it is not what was written; this is a mistake in this program",
            args.output.display()
        );
    }
    let bytes = fs::metadata(&weights)?.len();
    let projections = match target {
        Target::Packed => "2-bit codes, four a byte",
        Target::Latent => "float masters, which become ternary when they are loaded",
    };
    let card = Card {
        source,
        config: &config,
        form: &args.form(),
        options: &args.options(),
        types: &[
            ("projections", projections.into()),
            ("all else", "BF16, unless masters were others".into()),
        ],
        bytes,
        output: &args.output,
    };
    card.write(&path.join("README.md"))?;
    folder::publish(folder, &args.output)?;
    Ok(Written { tensors, bytes })
}
