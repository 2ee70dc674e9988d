//! What every form of a model has in common: it is written, read back and compared, under one bar.

use bitnet_model::{
    checkpoint::{Checkpoint, export},
    config::Config,
    pretrained::Source,
};
use indicatif::ProgressBar;

use crate::{args::Global, progress};

/// Hears how many steps are done, and of how many.
pub type Step<'a> = &'a mut dyn FnMut(usize, usize);

/// The bar of a conversion.
pub struct Bar(ProgressBar);

impl Bar {
    /// Nothing is done yet.
    pub fn new(global: &Global) -> Self {
        Self(progress::bar(global, 0, "{msg:8} {bar:30} {pos}/{len} {eta}"))
    }

    /// So much is written.
    pub fn writing(&self, done: usize, all: usize) {
        self.show("writing", done, all);
    }

    /// So much is compared.
    pub fn checking(&self, done: usize, all: usize) {
        self.show("checking", done, all);
    }

    fn show(&self, what: &'static str, done: usize, all: usize) {
        self.0.set_message(what);
        self.0.set_length(all as u64);
        self.0.set_position(done as u64);
    }

    /// All is done.
    pub fn finish(self) {
        self.0.finish_and_clear();
    }
}

/// Calls `write`, then compares `source` with what `reopen` finds of its result. Returns that result, and the configuration of
/// what was found.
///
/// # Errors
/// Those of the two, and the first tensor that is not as it was.
pub fn write<T>(
    source: &Source,
    global: &Global,
    write: impl FnOnce(Step<'_>) -> anyhow::Result<T>,
    reopen: impl FnOnce(&T) -> anyhow::Result<(Config, Checkpoint)>,
) -> anyhow::Result<(T, Config)> {
    let bar = Bar::new(global);
    let result = write(&mut |done, all| bar.writing(done, all))?;
    let (config, written) = reopen(&result)?;
    let checked = |done, all| bar.checking(done, all);
    export::verify((&source.config, &source.checkpoint), (&config, &written), checked)?;
    bar.finish();
    Ok((result, config))
}
