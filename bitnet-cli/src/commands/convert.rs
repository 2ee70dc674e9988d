//! (in progress)
use crate::args::Global;
/// Options.
#[derive(clap::Args)]
pub struct Args {}
/// Runs it.
pub fn run(_args: Args, _global: &Global) -> anyhow::Result<()> {
    Ok(())
}
