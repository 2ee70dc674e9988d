//! `bitnet batch`: files of requests in OpenAI's Batch format, answered offline.

mod files;
mod work;

use std::{
    io::{self, Write},
    path::PathBuf,
    sync::atomic::Ordering,
};

use bitnet_model::{grammar::GrammarFactory, session::PREFILL_CHUNK};

use self::{
    files::{Answered, Input, Output, Shard},
    work::Work,
};
use crate::{
    adapter::{self, NamedAdapter},
    args::Global,
    batching::{self, BatchingArgs},
    interrupt,
    model::ModelArgs,
    openai::{Lengths, Reader},
    progress,
};

/// Options of `bitnet batch`.
#[derive(clap::Args)]
#[command(
    after_long_help = "A line of the input is a request in OpenAI's Batch format: {\"custom_id\": \"a\", \"method\": \"POST\", \"url\": \
\"/v1/chat/completions\", \"body\": {\"messages\": [...]}}, or with the url \"/v1/completions\" and a \"prompt\" in the body. A line of \
the output is {\"id\", \"custom_id\", \"response\": {\"status_code\", \"request_id\", \"body\"}, \"error\"}, in the order in which \
requests are done; a request that cannot be answered has the status 400 and the reason. What a request does not say is as \
in `bitnet generate`: the model's generation_config.json, else greedy.

Requests run together, and each gets the answer it would get alone. Run the same command again after it was interrupted: \
requests whose answers are in the output are passed over. With --shard I/N, N machines or jobs share a file: each answers \
its own lines, into an output of its own."
)]
pub struct Args {
    /// File of requests, JSON Lines
    #[arg(long, short, value_name = "FILE")]
    input: PathBuf,
    /// File of answers; what it has already is kept
    #[arg(long, short, value_name = "FILE")]
    output: PathBuf,
    /// Answer only every Nth request, from the Ith on: 0/4 to 3/4
    #[arg(long, value_name = "I/N", default_value = "0/1", value_parser = Shard::parse)]
    shard: Shard,
    #[command(flatten)]
    batching: BatchingArgs,
    /// The model
    #[command(flatten)]
    model: ModelArgs,
    /// LoRA adapter in PEFT's format, folder or Hub repo id. With a name it is beside the model for requests whose `model` is
    /// NAME or ends in `:NAME`; without one, for all. Repeatable: those without a name are summed
    #[arg(long = "adapter", value_name = "[NAME=]DIR[:SCALE]", value_parser = NamedAdapter::parse)]
    adapters: Vec<NamedAdapter>,
}

/// Answers the file.
pub fn run(args: &Args, global: &Global) -> anyhow::Result<()> {
    let source = args.model.open(global)?;
    let adapters = adapter::read_all(&args.adapters, &source, global)?;
    let answered = Answered::read(&args.output)?;
    let input = Input::open(&args.input, args.shard, &answered.custom_ids)?;
    let (config, generation) = (source.config.clone(), source.generation.clone());
    let name = source.name.clone();
    let (network, adapters, tokenizer) = batching::load(source, adapters, &global.device()?)?;
    let limits = args.batching.limits(&args.model, PREFILL_CHUNK);
    let reader = Reader {
        model: &name,
        adapters: &adapters,
        tokenizer: &tokenizer,
        grammars: &GrammarFactory::new(&tokenizer, config.vocab_size),
        config: &config,
        generation: &generation,
        limits: Lengths::ANY,
    };
    let mut output = Output::open(&args.output, &answered)?;
    let bar = progress::bar(global, input.left(), "{bar:30} {pos}/{len} requests {eta}");
    let passed = input.passed();
    let mut work = Work::new(network, limits, &reader);
    let interrupted = interrupt::flag()?;
    for request in input {
        work.take(request?, &mut output)?;
        while work.is_full() && !interrupted.load(Ordering::Relaxed) {
            work.step(&mut output)?;
            bar.set_position(output.written());
        }
        if interrupted.load(Ordering::Relaxed) {
            break;
        }
    }
    while !work.is_done() && !interrupted.load(Ordering::Relaxed) {
        work.step(&mut output)?;
        bar.set_position(output.written());
    }
    output.sync()?;
    bar.finish_and_clear();
    if !global.quiet {
        let (written, refused) = (output.written(), output.refused());
        let before =
            if passed > 0 { format!(", {passed} had been answered before") } else { String::new() };
        let _ = writeln!(
            io::stderr(),
            "{written} requests answered, {refused} of them refused{before}"
        );
    }
    if interrupted.load(Ordering::Relaxed) {
        let _ = writeln!(io::stderr(), "interrupted; the same command goes on");
        interrupt::exit();
    }
    Ok(())
}
