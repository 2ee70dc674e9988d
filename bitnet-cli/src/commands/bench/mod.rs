//! `bitnet bench`: how fast a model is here, and how much faster it could be.
//!
//! ```text
//! flags → plan → limits of the machine, tests → bounds → report → table | JSON | CSV | Markdown
//! ```

mod bounds;
mod compare;
mod energy;
mod memory;
mod plan;
mod presets;
mod report;
mod runner;
mod tables;

use std::{
    io::{self, Write},
    path::PathBuf,
    sync::atomic::Ordering,
    time::Instant,
};

use bitnet_model::{
    checkpoint, kernels,
    model::Model,
    nn::{BitLinears, DenseLinears},
    ops::KvType,
    pretrained::Source,
};
use candle_core::Device;
use clap::ArgGroup;

use self::{
    bounds::Work,
    compare::Comparison,
    energy::Energy,
    plan::Plan,
    presets::{Level, Preset},
    report::{Findings, Report},
    runner::Runner,
};
use crate::{
    args::Global,
    device, interrupt,
    machine::Machine,
    model::{ModelArgs, kv_type},
};

/// Options of `bitnet bench`.
#[derive(clap::Args)]
#[command(group(ArgGroup::new("format")), after_help = EXAMPLES, after_long_help = MANUAL)]
pub struct Args {
    /// The model.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Lengths of the prompts to time, separated by commas; 0: none
    #[arg(long, short = 'p', value_name = "N,M", value_delimiter = ',', default_value = "512")]
    pub n_prompt: Vec<usize>,
    /// How many tokens to generate, separated by commas; 0: none
    #[arg(long, short = 'n', value_name = "N,M", value_delimiter = ',', default_value = "128")]
    pub n_gen: Vec<usize>,
    /// Tokens that are there before generating begins, separated by commas [default: 0]
    #[arg(long, short, value_name = "N,M", value_delimiter = ',')]
    pub depth: Vec<usize>,
    /// Sequences that generate together, separated by commas [default: 1]
    #[arg(long, short, value_name = "N,M", value_delimiter = ',')]
    pub batch: Vec<usize>,
    /// Samples of each test, after one that is not counted
    #[arg(long, short, value_name = "N", default_value_t = 5)]
    pub repetitions: usize,
    /// How keys and values are stored: f32, f16, bf16 or int8 [default: f16]
    #[arg(long, value_name = "TYPE", value_parser = kv_type)]
    pub kv_cache: Option<KvType>,
    /// Threads, memory, context and batch of a kind of machine; see --help
    #[arg(long, value_name = "KIND")]
    pub preset: Option<Preset>,
    /// How much of what makes the program fast is used; see --help
    #[arg(long, value_name = "LEVEL", default_value = "optimized")]
    pub level: Level,
    /// Print one JSON object with every sample
    #[arg(long, group = "format")]
    pub json: bool,
    /// Print a line for each test, with a heading
    #[arg(long, group = "format")]
    pub csv: bool,
    /// Print tables in Markdown
    #[arg(long, group = "format")]
    pub markdown: bool,
    /// Write to FILE, when all is measured, instead of stdout
    #[arg(long, short, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Compare with an earlier run, written by --json
    #[arg(long, value_name = "OLD.json", conflicts_with = "csv")]
    pub compare: Option<PathBuf>,
}

const EXAMPLES: &str = "Examples:
  bitnet bench -p 64 -n 32
  bitnet bench -m synthetic:2b-4t -t 1,2 -d 0,2048
  bitnet bench -m synthetic:2b-4t -p 0 -n 64 -b 1,8 --json -o new.json --compare old.json";

// Lines of more than 95 columns would be broken.
const MANUAL: &str = "\
Tests:
  pp512       read a prompt of 512 tokens, one sequence, up to the logits after its last token
  tg128       generate 128 tokens, each the best of the output head's after the one before
  tg128@2048  the same behind 2048 tokens, whose reading is not counted
  With --batch 8, eight sequences generate together; tokens/s counts the tokens of all.
  Figures are medians. The spread is the difference of the best and the worst sample, in percent
  of the median.

Limits, measured before and after the tests, the better of the two:
  memory      bytes read a second from pages of 2 MiB, in which weights lie, divided by the bytes
              that a token reads: the ternary weights as stored, the head with the rows that were
              multiplied again, keys and values. Several sequences, or the tokens of a prompt,
              share the weights. Without effect where all weights fit the last-level cache.
  cache       ternary weights a second that the kernel multiplies by one token, from the
              second-level cache, divided by the ternary weights. For one sequence.
  multiply    the kernel's multiply instruction on registers, divided by the ternary weights and
              the weights of the head for each row of logits. Attention is not counted.
  A device is not measured: with --device there are speeds and no limits.
  For comparison: bytes read from pages of 4 KiB, and the ternary kernel on weights in memory.
  `reached` is the speed divided by what the tightest of these allows.

Presets set --threads where it is not given, and --batch and --depth where neither is. C is the
number of processors that this process may use, M the available memory:
              threads        memory limit        context   most sequences
  mobile      C, at most 4   M/2, at most 2 GiB     2048                1
  edge        C, at most 8   M/2, at most 8 GiB     4096                4
  server      C              3/4 M                  8192               32
  cloud       C              9/10 M                 8192              128
  The context is the model's if that is shorter. The batch is the number of sequences given here,
  halved until keys and values of full contexts fit the limit beside the model. Generating is
  measured for one sequence, with empty context and at the end of the context, and for the batch
  with empty context. A model that exceeds the limit is refused.

Levels:
  baseline    the portable kernel, keys and values in f32, every row of the output head
              multiplied as it is stored
  optimized   the defaults: the fastest kernel, keys and values in f16, an exact head that is
              screened where it is large
  aggressive  the fastest kernel, keys and values in int8, a head of 4 bits: less exact
  --kernel, --kv-cache, --lm-head and --low-memory override the level. No level speculates: what
  that gains depends on the text.

Ctrl-C ends the run: what was measured until then is printed, and the exit status is 130.

Examples:
  bitnet bench -p 64 -n 32
      the embedded model, a few seconds
  bitnet bench -m synthetic:2b-4t -t 1,2 -d 0,2048
      random weights of a real geometry, without a download
  bitnet bench -m synthetic:2b-4t -p 0 -n 64 -b 1,8 --json -o new.json --compare old.json
      the speed of eight sequences together, beside that of an earlier run
  bitnet bench -m synthetic:llama3-8b --preset edge --markdown
  bitnet bench -m synthetic:2b-4t --kernel avx2 -r 3 --csv";

/// Runs it.
pub fn run(args: &Args, global: &Global) -> anyhow::Result<()> {
    let machine = Machine::here();
    let device = global.device()?;
    let old = args.compare.as_deref().map(compare::read).transpose()?;
    let load_start = Instant::now();
    let mut source = args.model.open(global)?;
    let open_time = load_start.elapsed();
    if args.model.lm_head.is_none() && !args.model.low_memory {
        source.lm_head = args.level.lm_head();
    }
    let plan = Plan::new(args, &global.threads, &source)?;
    if let (Level::Baseline, None) = (args.level, global.kernel()) {
        kernels::choose(presets::PORTABLE)?;
    }
    source.tile_format = Some(source.tile_format());
    let interrupt = interrupt::flag()?;
    let mut runner = Runner::new(&plan, &interrupt, global.quiet);
    // Where the peak of memory cannot be reset, it would count the buffers of this measurement.
    if device.is_cpu() && memory::reset_peak() {
        runner.measure_limits(&source)?;
        memory::reset_peak();
    }

    runner.say("loading");
    let start = Instant::now();
    let model = match plan.screened {
        true => source.load(&device)?,
        false => load_unscreened(&source, &device)?,
    };
    let load_time = open_time + start.elapsed();
    let work = Work::of(&model, plan.kv_type);
    let energy = Energy::open();
    let run = runner.run(&model, load_time, &energy)?;
    drop(model);
    if device.is_cpu() {
        runner.measure_limits(&source)?;
    }

    let findings = Findings {
        device: device::name(&device),
        machine,
        work,
        run,
        limits: runner.limits(),
        energy: &energy,
    };
    let mut report = Report::new(&source, &plan, args, findings);
    report.interrupted = interrupt.load(Ordering::Relaxed);
    if let Some(old) = old {
        report.comparison = Some(Comparison::new(&report, &old));
    }
    let text = match (args.json, args.csv, args.markdown) {
        (true, ..) => format!("{:#}\n", serde_json::to_value(&report)?),
        (_, true, _) => tables::csv(&report),
        (.., true) => tables::markdown(&report),
        _ => tables::plain(&report),
    };
    match &args.output {
        Some(path) => checkpoint::write_atomic(path, text.as_bytes())?,
        None => {
            let mut stdout = io::stdout().lock();
            stdout.write_all(text.as_bytes())?;
            stdout.flush()?;
        }
    }
    match report.interrupted {
        true => interrupt::exit(),
        false => Ok(()),
    }
}

/// The model with embedding and head as tensors: every row of the head is multiplied as it is stored.
fn load_unscreened(source: &Source, device: &Device) -> anyhow::Result<Model> {
    Ok(match source.config.quantization {
        Some(quantization) => {
            let linears = BitLinears::new(quantization).with_format(source.tile_format());
            source.load_with(&linears, device)?
        }
        None => source.load_with(&DenseLinears, device)?,
    })
}
