//! One file a verb: each has its `Args` and a `run`.

pub mod batch;
pub mod bench;
pub mod chat;
pub mod completions;
pub mod convert;
pub mod diff;
pub mod doctor;
pub mod download;
pub mod eval;
pub mod generate;
pub mod info;
pub mod logits;
pub mod merge;
pub mod perplexity;
pub mod plot;
pub mod sandboxed;
pub mod serve;
pub mod tokenize;
pub mod train;

use crate::args::{Command, Global};

/// Runs the verb.
pub fn run(command: Command, global: &Global) -> anyhow::Result<()> {
    match command {
        Command::Generate(args) => generate::run(args, global),
        Command::Chat(args) => chat::run(args, global),
        Command::Batch(args) => batch::run(&args, global),
        Command::Serve(args) => serve::run(args, global),
        Command::Bench(args) => bench::run(&args, global),
        Command::Doctor(args) => doctor::run(&args, global),
        Command::Trial => doctor::trial::run(global),
        Command::Info(args) => info::run(args, global),
        Command::Download(args) => download::run(args, global),
        Command::Train(command) => train::run(command, global),
        Command::Plot(args) => plot::run(&args),
        Command::Convert(args) => convert::run(&args, global),
        Command::Diff(args) => diff::run(&args, global),
        Command::Merge(args) => merge::run(&args, global),
        Command::Logits(args) => logits::run(args, global),
        Command::Perplexity(args) => perplexity::run(&args, global),
        Command::Eval(args) => eval::run(&args, global),
        Command::Tokenize(args) => tokenize::run(args, global),
        Command::Sandboxed(args) => sandboxed::run(args),
        Command::Completions(args) => completions::run(args),
    }
}
