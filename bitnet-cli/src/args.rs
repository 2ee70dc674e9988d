//! The command line: what the user typed, not yet resolved.

use std::{io::IsTerminal, num::NonZeroUsize};

use anyhow::{Context, bail};
use bitnet_model::{
    kernels::{self, KERNEL_VARIABLE},
    threads,
};
use candle_core::Device;
use clap::{Args, Parser, Subcommand, ValueEnum};
use tracing_subscriber::EnvFilter;

use crate::{commands, device::DeviceChoice};

/// Run, train and inspect 1.58-bit language models.
#[derive(Parser)]
#[command(name = "bitnet", version, about, max_term_width = 100, arg_required_else_help = true)]
pub struct Cli {
    /// What holds for every command.
    #[command(flatten)]
    pub global: Global,
    /// The verb.
    #[command(subcommand)]
    pub command: Command,
}

/// Heading of the options of every command.
const GLOBAL: &str = "Global options";

/// Options of every command.
#[derive(Args, Clone, Debug)]
pub struct Global {
    /// Threads to compute with; `bench` takes several, separated by commas [default: one a core]
    #[arg(long, short, global = true, help_heading = GLOBAL, value_name = "N", value_delimiter = ',')]
    pub threads: Vec<usize>,
    /// The instruction set to compute with, as `bitnet info` names it [default: the fastest there is]
    #[arg(long, global = true, help_heading = GLOBAL, value_name = "NAME", env = KERNEL_VARIABLE)]
    pub kernel: Option<String>,
    /// Where to compute: `cpu`, `cuda` or `cuda:N` (builds with the feature `cuda`), or `auto` for what is there
    #[arg(long, global = true, help_heading = GLOBAL, value_name = "DEVICE", default_value = "cpu")]
    pub device: String,
    /// No progress bars and no statistics on stderr
    #[arg(long, short, global = true, help_heading = GLOBAL)]
    pub quiet: bool,
    /// What to log to stderr: error, warn, info, debug, trace, or a tracing filter
    #[arg(long, global = true, help_heading = GLOBAL, value_name = "FILTER", default_value = "warn")]
    pub log: String,
    /// How log lines look
    #[arg(long, global = true, help_heading = GLOBAL, value_name = "FORMAT", default_value = "text")]
    pub log_format: LogFormat,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum LogFormat {
    /// For people
    Text,
    /// An object a line, with the time, for programs
    Json,
}

/// The verbs, one module each.
#[derive(Subcommand)]
pub enum Command {
    /// Continue a prompt
    Generate(commands::generate::Args),
    /// Talk with a model
    Chat(commands::chat::Args),
    /// Answer clients of OpenAI's API over HTTP
    Serve(Box<commands::serve::Args>),
    /// Answer a file of requests in OpenAI's Batch format
    Batch(Box<commands::batch::Args>),
    /// Measure speed and memory, and how close they come to what the machine allows
    Bench(Box<commands::bench::Args>),
    /// Examine this machine: what it has, whether all back ends compute the same, and what to set
    Doctor(commands::doctor::Args),
    /// Try a back end
    #[command(hide = true)]
    Trial,
    /// Say what a model is and what it needs
    Info(commands::info::Args),
    /// Fetch a model from the Hub into the cache
    Download(commands::download::Args),
    /// Train a model
    #[command(subcommand)]
    Train(commands::train::Command),
    /// Draw the curves of training runs
    Plot(commands::plot::Args),
    /// Rewrite a checkpoint in another form
    Convert(commands::convert::Args),
    /// Say how two models differ, tensor by tensor
    Diff(commands::diff::Args),
    /// Add adapters into a model's weights, and say what that did
    Merge(commands::merge::Args),
    /// Write the logits of every position of a text
    Logits(commands::logits::Args),
    /// Say how well a model foresees a text
    Perplexity(commands::perplexity::Args),
    /// Ask a model the questions of well-known benchmarks
    Eval(Box<commands::eval::Args>),
    /// Show the tokens of a text, or the text of tokens
    Tokenize(commands::tokenize::Args),
    /// Become another program, confined
    #[command(hide = true)]
    Sandboxed(commands::sandboxed::Args),
    /// Print a completion script for a shell
    Completions(commands::completions::Args),
}

impl Command {
    /// Whether it runs, or trains, its model where `--device` says.
    fn computes_on_devices(&self) -> bool {
        matches!(
            self,
            Self::Generate(_)
                | Self::Chat(_)
                | Self::Serve(_)
                | Self::Batch(_)
                | Self::Bench(_)
                | Self::Logits(_)
                | Self::Perplexity(_)
                | Self::Eval(_)
                | Self::Train(_)
                | Self::Trial
        )
    }
}

impl Global {
    /// The kernel that was asked for; an empty variable asks for none.
    pub fn kernel(&self) -> Option<&str> {
        self.kernel.as_deref().filter(|name| !name.is_empty())
    }

    fn device_choice(&self) -> anyhow::Result<DeviceChoice> {
        self.device
            .parse::<DeviceChoice>()
            .with_context(|| format!("--device `{}` is not available", self.device))
    }

    /// Opens the device to compute on.
    pub fn device(&self) -> anyhow::Result<Device> {
        self.device_choice()?.open()
    }

    /// Starts logging, sizes the thread pool and chooses the kernel; refuses a device that the command cannot use.
    pub fn apply(&self, command: &Command) -> anyhow::Result<()> {
        let filter = EnvFilter::try_new(&self.log)
            .with_context(|| format!("--log `{}` is no log filter", self.log))?;
        let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
        // They would be told to stderr, and who reads that may have gone: a request must not end with it.
        let log = log.log_internal_errors(false);
        match self.log_format {
            LogFormat::Text => log.with_ansi(std::io::stderr().is_terminal()).without_time().init(),
            LogFormat::Json => log.json().flatten_event(true).init(),
        }
        if self.device_choice()? != DeviceChoice::Cpu && !command.computes_on_devices() {
            let device = &self.device;
            match command {
                Command::Doctor(_) => bail!("--device {device}: `bitnet doctor` tries them all"),
                _ => bail!("--device {device}: this command computes on `cpu` only so far"),
            }
        }
        if let Some(kernel) = self.kernel() {
            kernels::choose(kernel).with_context(|| format!("--kernel {kernel}"))?;
        }
        if self.threads.len() > 1 && !matches!(command, Command::Bench(_)) {
            bail!("--threads takes one number here; only `bitnet bench` measures several");
        }
        if self.threads.contains(&0) {
            bail!("--threads 0 cannot compute: give at least 1");
        }
        let most = self.threads.iter().copied().max().and_then(NonZeroUsize::new);
        let Some(threads) = most else { return Ok(()) };
        threads::set_count(threads);
        rayon::ThreadPoolBuilder::new()
            .num_threads(threads.get())
            .build_global()
            .context("the thread pool could not be started")
    }
}
