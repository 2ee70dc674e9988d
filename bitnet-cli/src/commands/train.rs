//! (in progress)
use crate::args::Global;
/// Kinds of training.
#[derive(clap::Subcommand)]
pub enum Command {
    /// Quantization-aware training from a recipe
    Qat,
}
/// Runs it.
pub fn run(_command: Command, _global: &Global) -> anyhow::Result<()> {
    Ok(())
}
