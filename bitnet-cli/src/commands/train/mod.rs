//! `bitnet train qat RECIPE` and `bitnet train lora`: training with a progress bar.

use std::io::{self, Write};

use bitnet_train::{
    distributed,
    experiment::{self, Place},
    trainer::{Event, Outcome},
};

use crate::{args::Global, interrupt};

mod args;
mod display;
mod lora;
mod plan;
mod report;
mod show;

use args::QatArgs;
use display::Display;
use lora::LoraArgs;

/// Kinds of training.
#[derive(clap::Subcommand)]
pub enum Command {
    /// Train a BitNet from scratch, or go on from a checkpoint, with quantization in every step
    Qat(Box<QatArgs>),
    /// Train an adapter beside a model that stays as it is: fine-tuning in little memory
    Lora(Box<LoraArgs>),
}

/// Trains, and prints how it ended to stdout.
pub fn run(command: Command, global: &Global) -> anyhow::Result<()> {
    let (recipe, mode) = match command {
        Command::Qat(args) => (args.resolve()?, args.run),
        Command::Lora(args) => (args.resolve()?, args.run),
    };
    if mode.print_recipe {
        return Ok(write!(io::stdout().lock(), "{}", recipe.to_toml()?)?);
    }
    let (interrupted, device) = (interrupt::flag()?, global.device()?);
    let mut display = Display::new(global);
    if let Some(count) = mode.show_data {
        return show::print(&recipe, count, &mut display, &interrupted, mode.json)
            .map_err(exit_if_interrupted);
    }
    if mode.dry_run {
        return plan::print(&recipe, &device, &mut display, &interrupted, mode.json)
            .map_err(exit_if_interrupted);
    }
    let communicator = distributed::connect()?;
    let (is_first, ranks) = (communicator.rank() == 0, communicator.size());
    display.be_quiet_unless(is_first);
    let mut observe = |event: Event| display.show(event);
    let place = Place { communicator, device };
    let result = experiment::run_as(place, &recipe, mode.resume, &mut observe, &interrupted);
    display.finish();
    let summary = result.map_err(|error| exit_if_interrupted(error.into()))?;
    if !is_first {
        // Also when interrupted: at the first failure `mpirun` would end rank 0, which has to report.
        return Ok(());
    }
    report::print(&recipe, &summary, mode.json)?;
    if summary.outcome == Outcome::Interrupted {
        let _ = writeln!(io::stderr(), "interrupted; go on with: {}", resume_command(ranks));
        interrupt::exit();
    }
    Ok(())
}

/// Ends the program if the error is that it was asked to end before it trained.
fn exit_if_interrupted(error: anyhow::Error) -> anyhow::Error {
    if matches!(error.downcast_ref(), Some(bitnet_train::Error::Interrupted)) {
        let _ = writeln!(io::stderr(), "{error}");
        interrupt::exit();
    }
    error
}

/// The command line of this process, one of `ranks`, with `--resume`.
fn resume_command(ranks: usize) -> String {
    let quote = |arg: String| {
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,+@%".contains(c);
        match !arg.is_empty() && arg.chars().all(is_plain) {
            true => arg,
            false => format!("'{}'", arg.replace('\'', r"'\''")),
        }
    };
    let mut args: Vec<String> =
        std::env::args_os().map(|arg| quote(arg.to_string_lossy().into_owned())).collect();
    if !args.iter().any(|arg| arg == "--resume") {
        args.push("--resume".into());
    }
    let command = args.join(" ");
    if ranks > 1 { format!("mpirun -n {ranks} {command}") } else { command }
}
