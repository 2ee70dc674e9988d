//! `bitnet eval`: well-known benchmarks, as lm-evaluation-harness runs them.

mod chart;
mod compare;
mod identity;
mod items;
mod page;
mod protocol;
mod report;
mod requests;
mod work;

use std::{
    ffi::OsString,
    io::{self, Write},
    num::NonZeroUsize,
    path::PathBuf,
    sync::atomic::Ordering,
    time::Instant,
};

use anyhow::{Context, bail, ensure};
use bitnet_model::{hub::Hub, ops::KvType, text::Tokenizer};
use bitnet_train::eval::{
    Ask, Task,
    data::DataSource,
    tasks::{Asking, Item, Prepared},
};

use crate::{
    adapter::{self, AdapterArgs},
    args::Global,
    interrupt,
    model::{ModelArgs, kv_type},
    progress,
    sandbox::{Limits, Sandbox},
};
use items::Items;
use page::Files;
use protocol::Protocol;
use report::Result;
use work::Work;

/// Options of `bitnet eval`.
#[derive(clap::Args)]
#[command(
    after_long_help = "Tasks: arc_easy, arc_challenge, boolq, winogrande, piqa, hellaswag, lambada_openai, wikitext, gsm8k, minerva_math500, \
humaneval_plus. Their data is read from the folders of --data: arc_easy from arc_easy.jsonl, arc_easy_test.jsonl and the like, examples for it from \
arc_easy_train.jsonl. --data hub fetches it from the Hub, once. See docs/evaluation.md."
)]
pub struct Args {
    /// What to evaluate on, separated by commas
    #[arg(long, value_name = "TASKS", value_delimiter = ',', required_unless_present_any = ["protocol", "compare"])]
    tasks: Vec<String>,
    /// Folder of data files, or `hub` for the data sets of the Hub, which are fetched unless its cache has them; given several times,
    /// the first that has a file counts
    #[arg(long, value_name = "DIR|hub", required_unless_present = "compare")]
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
    /// The most tokens of a written answer [default: 256, of a program and with --protocol 1024]
    #[arg(long, value_name = "N")]
    max_new_tokens: Option<NonZeroUsize>,
    /// Draws for the standard error of a perplexity, in thousands, 0 for no standard errors at all; with --compare for all that it
    /// says [default: 100000, with --compare 10000]
    #[arg(long, value_name = "N")]
    bootstrap: Option<usize>,
    /// Write every question's result to this file, a line each. If it is there already, its questions are passed over: the
    /// same command goes on
    #[arg(long, short, value_name = "FILE.jsonl")]
    output: Option<PathBuf>,
    /// Run the programs that the model writes, which humaneval_plus needs: in a sandbox, without network, files and other
    /// processes
    #[arg(long)]
    allow_code_execution: bool,
    /// Run them where the system permits no namespaces, too: then network, files and processes are kept from them by filters of
    /// system calls and by Landlock alone
    #[arg(long, requires = "allow_code_execution")]
    without_namespaces: bool,
    /// Seconds of processor time for each of them, and ten times as many by the clock
    #[arg(long, value_name = "SECONDS", default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=3600))]
    code_timeout: u64,
    /// What runs them; the tests of humaneval_plus need numpy
    #[arg(long, value_name = "PROGRAM", default_value = "python3")]
    python: OsString,
    /// Run no model: write what it would be asked, as text and as tokens
    #[arg(long, value_name = "FILE.jsonl", conflicts_with_all = ["output", "json"])]
    requests_only: Option<PathBuf>,
    /// Run no model: say how two finished runs, files of --output or folders of one, differ, question by question. Refused if they
    /// were not asked the same
    #[arg(long, num_args = 2, value_names = ["A", "B"], conflicts_with_all = ["data", "protocol", "output", "requests_only", "limit"])]
    compare: Vec<PathBuf>,
    /// Write what comes out to this file, too: a page (.html), Markdown (.md) or the object of --json (.json); repeatable
    #[arg(long, value_name = "FILE", conflicts_with = "requests_only")]
    report: Vec<PathBuf>,
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
    let reports = Files::new(&args.report)?;
    if !args.compare.is_empty() {
        return compare::run(&args.compare, &reports, args);
    }
    let tasks = args.tasks.iter().map(|name| Ok(Task::by_name(name)?));
    let tasks = tasks.collect::<anyhow::Result<Vec<_>>>()?;
    for (index, task) in tasks.iter().enumerate() {
        let is_twice = tasks[..index].iter().any(|other| other.name == task.name);
        ensure!(!is_twice, "--tasks: `{}` is there twice", task.name);
    }
    args.check_programs(&tasks)?;
    let source = args.model.open(global)?;
    let Some(tokenizer) = source.tokenizer()? else {
        bail!("{}: has no tokenizer, so it cannot be asked anything", source.name);
    };
    let prepared = args.prepare(&tasks, &tokenizer, !global.quiet)?;
    if let Some(path) = &args.requests_only {
        return requests::write(path, &prepared, &tokenizer);
    }
    let sandbox = args.sandbox(&prepared)?;
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
        sandbox: sandbox.as_ref(),
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
        Result::new(prepared, items.values(index), items.cut(index), args.bootstrap())
    }));
    let seconds = start.elapsed().as_secs_f64();
    if !global.quiet {
        let _ = io::stderr().write_all(report::cut(&results).as_bytes());
    }
    let json = report::json(&results, identity.config(args), args.protocol, seconds);
    reports.write(&json, || report::page(&results, &json["config"], args.protocol, seconds))?;
    let mut out = io::stdout().lock();
    if args.json {
        writeln!(out, "{json}")?;
        return Ok(());
    }
    write!(out, "{}", report::table(&results).markdown())?;
    if let Some(protocol) = args.protocol {
        write!(out, "\n{}", protocol.table(&results).markdown())?;
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
        progress: bool,
    ) -> anyhow::Result<Vec<Prepared>> {
        let chat = || -> anyhow::Result<_> {
            let template = tokenizer.chat_template()?;
            template.context("the model has no chat template to ask with")
        };
        let sources = Vec::from_iter(self.data.iter().map(|name| match name.to_str() {
            Some("hub") => DataSource::Hub(Hub::from_env().progress(progress)),
            _ => DataSource::Folder(name.clone()),
        }));
        let asking = Asking {
            sources: &sources,
            shots: self.num_fewshot,
            seed: self.seed,
            limit: self.limit,
            template: None,
        };
        match self.protocol {
            Some(protocol) => protocol
                .tasks()
                .filter(|asked| self.allow_code_execution || !asked.runs_programs())
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

    /// Draws for standard errors.
    fn bootstrap(&self) -> usize {
        /// Of the harness.
        const DEFAULT: usize = 100_000;
        self.bootstrap.unwrap_or(DEFAULT)
    }

    /// The most tokens of a written answer, if not what the task says.
    fn max_new_tokens(&self) -> Option<usize> {
        /// Solutions of conversational models are long.
        const LONG: usize = 1024;
        self.max_new_tokens.map(NonZeroUsize::get).or(self.protocol.map(|_| LONG))
    }

    /// Refuses tasks that run programs unless that was said to be right.
    fn check_programs(&self, tasks: &[&Task]) -> anyhow::Result<()> {
        let is_refused = |task: &&&Task| task.runs_programs && !self.allow_code_execution;
        if let Some(task) = tasks.iter().find(is_refused)
            && self.requests_only.is_none()
        {
            bail!(
                "{} runs programs that the model writes: pass --allow-code-execution to run them in a sandbox",
                task.name
            );
        }
        Ok(())
    }

    /// Where programs run, if any do.
    fn sandbox(&self, prepared: &[Prepared]) -> anyhow::Result<Option<Sandbox>> {
        let mut tests = prepared.iter().filter(|prepared| prepared.task.runs_programs).peekable();
        if tests.peek().is_none() {
            return Ok(None);
        }
        let limits =
            Limits { seconds: self.code_timeout, without_namespaces: self.without_namespaces };
        let takes_numpy = |item: &Item| matches!(&item.document.ask, Ask::Program { test } if test.contains("import numpy"));
        let need_numpy = tests.any(|prepared| prepared.items.iter().any(takes_numpy));
        Ok(Some(Sandbox::new(&self.python, limits, need_numpy)?))
    }
}
