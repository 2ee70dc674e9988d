//! `bitnet sandboxed`, which `bitnet eval` starts: becomes another program, behind walls.

use std::path::PathBuf;

/// What to build and to become.
#[derive(clap::Args)]
pub struct Args {
    /// Seconds of processor time
    #[arg(long)]
    seconds: u64,
    /// The process that waits
    #[arg(long)]
    parent: u32,
    /// An empty folder
    #[arg(long)]
    scratch: PathBuf,
    /// Folders that may be read
    #[arg(long)]
    readable: Vec<PathBuf>,
    /// Goes on without namespaces
    #[arg(long)]
    without_namespaces: bool,
    /// The program and its arguments
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

/// Comes back only if that fails.
#[cfg(target_os = "linux")]
pub fn run(args: Args) -> anyhow::Result<()> {
    use std::{os::unix::process::CommandExt, process::Command};

    use anyhow::Context;

    use crate::sandbox::walls::{Walls, build};

    let Args { seconds, parent, scratch, readable, without_namespaces, command } = args;
    build(&Walls { seconds, parent, scratch, readable, without_namespaces })?;
    let (program, arguments) = command.split_first().context("no program")?;
    let error = Command::new(program).args(arguments).exec();
    Err(error).with_context(|| program.clone())
}

/// There are no walls to build.
#[cfg(not(target_os = "linux"))]
pub fn run(_: Args) -> anyhow::Result<()> {
    anyhow::bail!("programs are confined on Linux only")
}
