//! `bitnet eval`: well-known benchmarks, as lm-evaluation-harness runs them.

mod identity;
mod items;
mod protocol;
mod report;
mod requests;
mod work;

use std::{
    io::{self, Write},
    num::NonZeroUsize,
    path::PathBuf,
    sync::atomic::Ordering,
    time::Instant,
};

use anyhow::{Context, bail, ensure};
use bitnet_model::{ops::KvType, text::Tokenizer};
use bitnet_train::eval::{
    Task,
    tasks::{Asking, Prepared},
};

use crate::{
    adapter::{self, AdapterArgs},
    args::Global,
    interrupt,
    model::{ModelArgs, kv_type},
    progress,
};
use items::Items;
use protocol::Protocol;
use report::Result;
use work::Work;

/// Options of `bitnet eval`.
#[derive(clap::Args)]
#[command(
    after_long_help = "Tasks: arc_easy, arc_challenge, boolq, winogrande, piqa, hellaswag, lambada_openai, wikitext, gsm8k, minerva_math500. The \
data is read from --data, nothing is fetched: arc_easy from arc_easy.jsonl, arc_easy_test.jsonl and the like, examples for it from \
arc_easy_train.jsonl. See docs/evaluation.md."
)]
pub struct Args {
    /// What to evaluate on, separated by commas
    #[arg(long, value_name = "TASKS", value_delimiter = ',', required_unless_present = "protocol")]
    tasks: Vec<String>,
    /// Folder of data files; given several times, the first that has a file counts
    #[arg(long, value_name = "DIR", required = true)]
    data: Vec<PathBuf>,
    /// Ask as a publication did and print its figures beside: report, the technical report of BitNet b1.58 2B4T
    #[arg(long, value_name = "NAME", conflicts_with_all = ["tasks", "num_fewshot", "apply_chat_template"])]
    protocol: Option<Protocol>,
    /// Examples before each question [default: what the task says]
    #[arg(long, value_name = "K")]
    num_fewshot: Option<usize>,
    /// Ask only the first questions of each task
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Questions that run together; changes no result
    #[arg(long, value_name = "N", default_value = "16")]
    batch: NonZeroUsize,
    /// Of the drawing of examples
    #[arg(long, value_name = "SEED", default_value_t = 1234)]
    seed: u64,
    /// Ask in a conversation, with the model's chat template; examples are its earlier turns
    #[arg(long)]
    apply_chat_template: bool,
    /// The most tokens of a written answer [default: 256, with --protocol 1024]
    #[arg(long, value_name = "N")]
    max_new_tokens: Option<NonZeroUsize>,
    /// Draws for the standard error of a perplexity, in thousands; 0 for no standard errors at all
    #[arg(long, value_name = "N", default_value = "100000")]
    bootstrap: usize,
    /// Write every question's result to this file, a line each. If it is there already, its questions are passed over: the
    /// same command goes on
    #[arg(long, short, value_name = "FILE.jsonl")]
    output: Option<PathBuf>,
    /// Run no model: write what it would be asked, as text and as tokens
    #[arg(long, value_name = "FILE.jsonl", conflicts_with_all = ["output", "json"])]
    requests_only: Option<PathBuf>,
    /// Print one JSON object: `results`, `versions`, `n-shot`, `n-samples`, `data`, `config`, `seconds`
    #[arg(long)]
    json: bool,
    /// How keys and values are stored [default: f16, with --low-memory int8]
    #[arg(long, value_name = "TYPE", value_parser = kv_type)]
    kv_cache: Option<KvType>,
    /// The model
    #[command(flatten)]
    model: ModelArgs,
    /// Adapters.
    #[command(flatten)]
    adapters: AdapterArgs,
}

/// Runs it.
pub fn run(args: &Args, global: &Global) -> anyhow::Result<()> {
    let tasks = args.tasks.iter().map(|name| Ok(Task::by_name(name)?));
    let tasks = tasks.collect::<anyhow::Result<Vec<_>>>()?;
    for (index, task) in tasks.iter().enumerate() {
        let is_twice = tasks[..index].iter().any(|other| other.name == task.name);
        ensure!(!is_twice, "--tasks: `{}` is there twice", task.name);
    }
    let source = args.model.open(global)?;
    let Some(tokenizer) = source.tokenizer()? else {
        bail!("{}: has no tokenizer, so it cannot be asked anything", source.name);
    };
    let prepared = args.prepare(&tasks, &tokenizer)?;
    if let Some(path) = &args.requests_only {
        return requests::write(path, &prepared, &tokenizer);
    }
    let kv_type = args.kv_cache.unwrap_or_else(|| args.model.kv_type());
    let identity = identity::Identity::new((&source, &tokenizer), args, kv_type, global)?;
    let mut items = Items::open(args.output.as_deref(), &identity, &prepared)?;
    let adaptation = args.adapters.read(&source, global)?;
    let mut model = source.into_pretrained(&global.device()?)?;
    model.model = adapter::beside(model.model, adaptation.as_ref())?;

    let interrupt = interrupt::flag()?;
    let all: usize = prepared.iter().map(|prepared| prepared.items.len()).sum();
    let bar = progress::bar(global, all, "{bar:30} {pos}/{len} {msg} {eta}");
    bar.set_position(items.found() as u64);
    let start = Instant::now();
    let work = Work {
        model: &model.model,
        tokenizer: &tokenizer,
        kv_type,
        batch: args.batch,
        max_new_tokens: args.max_new_tokens(),
        eos_token_ids: work::eos_token_ids(&tokenizer, &model.generation),
        interrupt: &interrupt,
    };
    for (index, prepared) in prepared.iter().enumerate() {
        bar.set_message(prepared.task.name);
        if interrupt.load(Ordering::Relaxed) {
            break;
        }
        while let Some(batch) = items.next(index, args.batch) {
            let responses = work.run(prepared, &batch)?;
            if interrupt.load(Ordering::Relaxed) {
                break;
            }
            for (item, (responses, notes)) in batch.into_iter().zip(responses) {
                items.take(index, item, &responses, notes)?;
                bar.inc(1);
            }
        }
    }
    bar.finish_and_clear();
    if interrupt.load(Ordering::Relaxed) {
        if let Some(path) = &args.output {
            let path = path.display();
            let _ = writeln!(io::stderr(), "interrupted; the same command goes on with {path}");
        }
        interrupt::exit();
    }
    let results = Vec::from_iter(prepared.iter().enumerate().map(|(index, prepared)| {
        Result::new(prepared, items.values(index), items.cut(index), args.bootstrap)
    }));
    let seconds = start.elapsed().as_secs_f64();
    if !global.quiet {
        let _ = io::stderr().write_all(report::cut(&results).as_bytes());
    }
    let mut out = io::stdout().lock();
    if args.json {
        let config = identity.config(args);
        writeln!(out, "{}", report::json(&results, config, args.protocol, seconds))?;
        return Ok(());
    }
    write!(out, "{}", report::table(&results))?;
    if let Some(protocol) = args.protocol {
        write!(out, "\n{}", protocol.table(&results))?;
    }
    if !global.quiet && items.found() > 0 {
        let _ =
            writeln!(io::stderr(), "{} of {all} questions had been answered before", items.found());
    }
    Ok(())
}

impl Args {
    /// Reads all data and makes all requests.
    fn prepare(
        &self,
        tasks: &[&'static Task],
        tokenizer: &Tokenizer,
    ) -> anyhow::Result<Vec<Prepared>> {
        let chat = || -> anyhow::Result<_> {
            let template = tokenizer.chat_template()?;
            template.context("the model has no chat template to ask with")
        };
        let asking = Asking {
            folders: &self.data,
            shots: self.num_fewshot,
            seed: self.seed,
            limit: self.limit,
            template: None,
        };
        match self.protocol {
            Some(protocol) => protocol
                .tasks()
                .map(|asked| {
                    let template = if asked.chat { Some(chat()?) } else { None };
                    let asking = Asking { shots: Some(asked.shots), template, ..asking };
                    Ok(Task::by_name(asked.name)?.prepare(&asking)?)
                })
                .collect(),
            None => {
                let template = if self.apply_chat_template { Some(chat()?) } else { None };
                let asking = Asking { template, ..asking };
                tasks.iter().map(|task| Ok(task.prepare(&asking)?)).collect()
            }
        }
    }

    /// The most tokens of a written answer.
    fn max_new_tokens(&self) -> usize {
        /// Of the harness.
        const DEFAULT: usize = 256;
        /// Solutions of conversational models are long.
        const LONG: usize = 1024;
        let default = if self.protocol.is_some() { LONG } else { DEFAULT };
        self.max_new_tokens.map_or(default, NonZeroUsize::get)
    }
}
