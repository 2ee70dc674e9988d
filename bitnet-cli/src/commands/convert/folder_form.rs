//! A model written as a folder in the Hub's layout.

use anyhow::bail;
use bitnet_model::{
    checkpoint::{
        Checkpoint, Output,
        export::{self, Converted, Target},
    },
    config::Config,
    pretrained::Source,
};

use super::{Args, Written, checked, sizes};
use crate::{args::Global, folder};

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
    let output = Output { folder: path, max_shard_bytes: args.max_shard_size };
    let mut tensors = 0;
    let write = |step: checked::Step<'_>| -> anyhow::Result<Converted> {
        let converted = export::convert(&source.config, &source.checkpoint, output, target, step)?;
        folder::copy_beside(source, path)?;
        Ok(converted)
    };
    let reopen = |converted: &Converted| -> anyhow::Result<(Config, Checkpoint)> {
        let file = path.join("config.json");
        let mut config = Config::from_file(&file)?;
        if config.quantization.is_none() {
            config = config.ternarize(&file)?;
        }
        let written = Checkpoint::open(&converted.files)?;
        tensors = written.names().len();
        Ok((config, written))
    };
    let (converted, config) = checked::write(source, global, write, reopen)?;
    if converted.config != config {
        bail!(
            "{}: read back, it is not what was written; this is a mistake in this program",
            args.output.display()
        );
    }
    let bytes = sizes(&converted.files)?;
    let projections = match target {
        Target::Packed => "2-bit codes, four a byte",
        Target::Latent => "float masters, which become ternary when they are loaded",
    };
    let types = [
        ("projections", projections.into()),
        ("all else", "BF16, unless masters were others".into()),
    ];
    args.card(source, &config, &types, bytes).write(&path.join("README.md"))?;
    folder::publish(folder, &args.output)?;
    Ok(Written { tensors, bytes })
}
