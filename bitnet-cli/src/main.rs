//! `bitnet`: run, train and inspect 1.58-bit language models.

mod adapter;
mod args;
mod batching;
mod card;
mod commands;
mod continuation;
mod damage;
mod device;
mod engines;
mod folder;
mod interrupt;
mod limits;
mod machine;
mod model;
mod openai;
mod picture;
mod progress;
mod sampling;
mod sandbox;
mod serve;
mod statistics;
mod table;

use std::{io, process::ExitCode};

use bitnet_model::{pages, threads};
use clap::{Parser, error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand};

use crate::args::Cli;

fn main() -> ExitCode {
    pages::keep_freed_memory();
    threads::keep_candle_from_spinning();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return explain(&error),
    };
    let result =
        cli.global.apply(&cli.command).and_then(|()| commands::run(cli.command, &cli.global));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", causes(&error));
            ExitCode::FAILURE
        }
    }
}

/// The error and what caused it, in one line; a cause that its effect already quotes is not repeated.
fn causes(error: &anyhow::Error) -> String {
    error.chain().map(ToString::to_string).fold(String::new(), |said, cause| {
        match said.contains(&cause) {
            _ if said.is_empty() => cause,
            true => said,
            false => format!("{said}: {cause}"),
        }
    })
}

/// Help and version go to stdout; a mistake becomes one line on stderr, with clap's suggestion.
fn explain(error: &clap::Error) -> ExitCode {
    /// Exit status of a command line that cannot be understood, as clap and shells have it.
    const EXIT_USAGE: u8 = 2;
    if !error.use_stderr() || error.kind() == DisplayHelpOnMissingArgumentOrSubcommand {
        // A reader that has gone away wants no help.
        let _ = error.print();
        return if error.use_stderr() { ExitCode::from(EXIT_USAGE) } else { ExitCode::SUCCESS };
    }
    let message = error.render().to_string();
    let is_advice = |line: &str| line.starts_with("Usage:") || line.starts_with("For more");
    let said = message.lines().map(str::trim).take_while(|line| !is_advice(line));
    let said: Vec<&str> = said.filter(|line| !line.is_empty()).collect();
    eprintln!("{} (see --help)", said.join(" "));
    ExitCode::from(EXIT_USAGE)
}

/// Whoever read our output has seen enough: `bitnet generate … | head`.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe)
    })
}
