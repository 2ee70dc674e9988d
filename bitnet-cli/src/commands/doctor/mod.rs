//! `bitnet doctor`: what this machine has, whether every back end computes the same on it, and what to set.
//!
//! ```text
//! the system's files → facts, back ends tried, limits measured → advice, warnings, problems → text | JSON
//! ```

mod advice;
mod back_ends;
mod cuda;
mod hub;
mod memory;
mod processor;
mod text;
pub mod trial;

use std::{
    io::{self, Write},
    num::NonZeroUsize,
    path::Path,
    thread,
};

use anyhow::{Context, bail};
use bitnet_model::{
    kernels::{self, Kernel, TileFormat},
    threads,
};
use serde::Serialize;

use self::{
    advice::Advice, back_ends::BackEnd, cuda::Cuda, hub::HubFacts, memory::Memory,
    processor::Processor,
};
use crate::{
    args::Global,
    limits::{Limits, buffer_bytes},
    machine::Machine,
};

/// Options of `bitnet doctor`.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES, after_long_help = MANUAL)]
pub struct Args {
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

const EXAMPLES: &str = "Examples:
  bitnet doctor
  bitnet doctor --json > doctor.json";

// Lines of more than 95 columns would be broken.
const MANUAL: &str = "\
What it looks at:
  processor    processors of the machine, those that the affinity of this process and its control
               group leave, the instructions that each kernel needs, and which of them are missing
  memory       what there is and is left, and the part of weights that gets pages of 2 MiB, tried
  speed        what the machine can do with some numbers of threads: bytes read a second from
               large pages and from small ones, ternary weights multiplied by one token from the
               second-level cache and from memory. `bitnet bench` explains these limits
  hub          the folder of downloads, whether it can be written, and which variables are set.
               A token is not shown, and no request is made
  cuda         the driver's library and kernel module, and the devices it has
  back ends    every kernel of this processor, and every device of a build with the feature
               `cuda`, continues a text with the embedded model in a process of its own. All bits
               of all logits must be those of the portable kernel, `scalar`, each of three times

What it says: settings with what to type and why, warnings, and problems.

It takes some seconds, needs neither a network nor a file, and leaves nothing behind. With
--threads it measures and tries that number alone; with --kernel the limits are that kernel's.

Exit status: 0; or 1 if a back end fails or computes other results than `scalar`.

Examples:
  bitnet doctor
      for you
  bitnet doctor --json > doctor.json
      for a program, or to be sent with a report of a bug";

/// Tells a report from other JSON.
const FORMAT: &str = "bitnet-doctor";

/// Goes up when a field changes its meaning.
const VERSION: u32 = 1;

/// Columns of the weights that are multiplied to measure, as 2B-4T has them.
const IN_FEATURES: usize = 2560;

/// What was found out.
#[derive(Debug, Serialize)]
struct Found {
    processor: Processor,
    memory: Memory,
    /// For each number of threads; empty if memory is too scarce to measure.
    limits: Vec<Limits>,
    hub: HubFacts,
    cuda: Cuda,
    back_ends: Vec<BackEnd>,
}

/// What was found out, and what follows.
#[derive(Debug, Serialize)]
struct Report {
    format: &'static str,
    version: u32,
    /// Version of this program.
    bitnet: &'static str,
    /// What it was built with beside what all builds have.
    features: Vec<&'static str>,
    #[serde(flatten)]
    found: Found,
    advice: Vec<Advice>,
    warnings: Vec<String>,
    problems: Vec<String>,
}

/// Runs it.
pub fn run(args: &Args, global: &Global) -> anyhow::Result<()> {
    let say = |what: &str| {
        if !global.quiet {
            // Whoever reads this may have gone.
            let _ = writeln!(io::stderr(), "{what}");
        }
    };
    let report = Report::of(Found::examine(Path::new("/"), global, say)?);
    let text = match args.json {
        true => format!("{:#}\n", serde_json::to_value(&report)?),
        false => text::text(&report),
    };
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()?;
    match &report.problems[..] {
        [] => Ok(()),
        [problem] => bail!("{problem}"),
        [problem, others @ ..] => bail!("{problem} (and {} more)", others.len()),
    }
}

impl Found {
    /// All there is to find; the system's files lie below `root`.
    fn examine(root: &Path, global: &Global, say: impl Fn(&str)) -> anyhow::Result<Self> {
        say("looking around");
        let machine = Machine::under(root);
        let processor = Processor::examine(root, &machine, global.kernel().is_some());
        let memory = Memory::examine(root, &machine);
        let (hub, cuda) = (HubFacts::examine(), Cuda::examine(root));
        let kernels: Vec<_> = kernels::available().map(Kernel::name).collect();
        let devices: Vec<_> = cuda.devices.iter().map(|device| device.name.clone()).collect();
        let back_ends = BackEnd::try_all(&kernels, (&devices, processor.kernel), global, &say);
        say("measuring");
        let limits = limits(&memory, &global.threads)?;
        Ok(Self { processor, memory, limits, hub, cuda, back_ends })
    }
}

/// What the machine can do with the threads that were `asked` for, or with some numbers of them.
fn limits(memory: &Memory, asked: &[usize]) -> anyhow::Result<Vec<Limits>> {
    // The buffer is made twice, one time after the other, and something else may need memory too.
    if memory.available_bytes.is_some_and(|bytes| bytes / 2 < buffer_bytes() as u64) {
        return Ok(Vec::new());
    }
    let threads = threads::count();
    let usable = thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let mut counts = match asked {
        [] => vec![1, usable.div_ceil(2), usable, threads],
        _ => asked.to_vec(),
    };
    counts.sort_unstable();
    counts.dedup();
    Limits::measure(&counts, IN_FEATURES, TileFormat::default())
        .context("cannot measure the limits of the machine")
}

impl Report {
    fn of(found: Found) -> Self {
        let features = [("cuda", cfg!(feature = "cuda")), ("mpi", cfg!(feature = "mpi"))];
        Self {
            format: FORMAT,
            version: VERSION,
            bitnet: env!("CARGO_PKG_VERSION"),
            features: features
                .into_iter()
                .filter(|feature| feature.1)
                .map(|(name, _)| name)
                .collect(),
            advice: advice::advise(&found),
            warnings: advice::warnings(&found),
            problems: advice::problems(&found.back_ends),
            found,
        }
    }
}
