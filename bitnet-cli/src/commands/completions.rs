//! `bitnet completions SHELL`.

use std::io::{self, Write};

use clap::CommandFactory;

use crate::args::Cli;

/// Options of `bitnet completions`.
#[derive(clap::Args)]
pub struct Args {
    /// The shell to complete in
    pub shell: clap_complete::Shell,
}

/// Prints the script to stdout.
pub fn run(args: Args) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "bitnet", &mut script);
    Ok(io::stdout().write_all(&script)?)
}
