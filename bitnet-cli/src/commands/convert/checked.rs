//! What every form of a model has in common: it is written, read back and compared, under one bar.

use bitnet_model::{
    checkpoint::{Checkpoint, export},
    config::Config,
    pretrained::Source,
};

use crate::{args::Global, progress};

/// Hears how many steps are done, and of how many.
pub type Step<'a> = &'a mut dyn FnMut(usize, usize);

/// Calls `write`, then compares `source` with what `reopen` finds, whose configuration is returned.
///
/// # Errors
/// Those of the two, and the first tensor that is not as it was.
pub fn write(
    source: &Source,
    global: &Global,
    write: impl FnOnce(Step<'_>) -> anyhow::Result<()>,
    reopen: impl FnOnce() -> anyhow::Result<(Config, Checkpoint)>,
) -> anyhow::Result<Config> {
    let bar = progress::bar(global, 0, "{msg:8} {bar:30} {pos}/{len} {eta}");
    let mut step = |position: usize, len: usize| {
        bar.set_length(len as u64);
        bar.set_position(position as u64);
    };
    bar.set_message("writing");
    write(&mut step)?;
    bar.set_message("checking");
    let (config, written) = reopen()?;
    export::verify((&source.config, &source.checkpoint), (&config, &written), step)?;
    bar.finish_and_clear();
    Ok(config)
}
