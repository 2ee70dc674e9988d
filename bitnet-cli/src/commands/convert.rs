//! `bitnet convert IN OUT --to FORM`: a model rewritten in another form, read back and
//! compared before it appears.

use std::{
    fs,
    io::{self, Write},
    path::PathBuf,
};

use anyhow::{Context, bail};
use bitnet_model::{
    checkpoint::{
        Checkpoint, Output,
        export::{self, Target},
        gguf::TernaryType,
        onnx::OnnxWeights,
    },
    config::Config,
    pretrained::{Origin, Precision, Source, default_files},
};
use clap::ValueEnum;

use crate::{args::Global, damage, folder, gguf, onnx, progress};

/// Options of `bitnet convert`.
#[derive(clap::Args)]
#[command(
    after_long_help = "packed: 2-bit codes with a bf16 scale a matrix, everything else bf16: what microsoft/bitnet-b1.58-2B-4T (BitNet) or \
Falcon3-1.58bit (Llama) look like. A model of 1bitLLM becomes a BitNet.
latent: bf16 masters, for training, that quantize to the same codes and scales. Masters that are there already are copied \
as they are. A packed Llama without input norms gets a plain configuration, so run the result with --ternarize.

i2_s, tq1_0, tq2_0: one GGUF file with ternary weights of this type, with the vocabulary and the chat template; i2_s is for \
bitnet.cpp, the others for llama.cpp.

onnx: a graph for ONNX Runtime, with the inputs and outputs that Hugging Face's optimum gives decoders, and OUT.data with the \
weights. Without tokenizer and settings.

Tokenizer and generation settings are copied. Every ternary matrix is read back and compared before OUT appears: \
codes must be equal, scales up to the rounding to bf16."
)]
pub struct Args {
    /// Hub repo id (org/name), folder, .safetensors or .gguf file, or `default`
    #[arg(value_name = "IN")]
    input: String,
    /// Folder to write, or GGUF or ONNX file
    #[arg(value_name = "OUT")]
    output: PathBuf,
    /// The form to write
    #[arg(long, value_name = "FORM")]
    to: Form,
    /// How --to onnx writes ternary weights [default: int2]
    #[arg(long, value_name = "TYPE")]
    onnx_weights: Option<OnnxType>,
    /// Cut the weights into files of at most this size, such as 5GB or 500MB [default: one file]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    max_shard_size: Option<u64>,
    /// Branch, tag or commit of a Hub repo [default: main]
    #[arg(long, value_name = "REVISION")]
    revision: Option<String>,
    /// Take float weights without a quantization_config for masters of a 1.58-bit model (Falcon-E prequantized)
    #[arg(long)]
    ternarize: bool,
    /// Round full-precision weights that were never trained for it, although that destroys a model, and say how much
    #[arg(long, requires = "text", conflicts_with = "ternarize")]
    i_know: bool,
    /// Text on which --i-know measures perplexity before and after
    #[arg(long, value_name = "FILE", requires = "i_know")]
    text: Option<PathBuf>,
    /// Replace OUT if it is a model's folder, or a GGUF or ONNX file
    #[arg(long)]
    force: bool,
    /// Print folder, forms and sizes in bytes as JSON
    #[arg(long)]
    json: bool,
}

/// Why a full-precision model is not converted.
const UNTRAINED: &str = "has no quantization_config, so these are full-precision weights. Rounding them to three values \
    destroys the model: it takes training with quantization in the loop, as `bitnet train qat` does from a checkpoint with \
    a table [init] in its recipe. Pass --ternarize if they are masters that were trained so (Falcon-E prequantized), or \
    --i-know --text FILE to round them all the same and measure what is left on a text";

/// What `--to` takes.
#[derive(Clone, Copy, ValueEnum)]
enum Form {
    /// 2-bit codes
    Packed,
    /// Float masters
    Latent,
    /// GGUF with I2_S
    #[value(name = "i2_s")]
    I2S,
    /// GGUF with TQ1_0
    #[value(name = "tq1_0")]
    Tq1_0,
    /// GGUF with TQ2_0
    #[value(name = "tq2_0")]
    Tq2_0,
    /// ONNX
    Onnx,
}

/// What `--onnx-weights` takes.
#[derive(Clone, Copy, ValueEnum)]
enum OnnxType {
    /// 2 bits a weight, for ONNX Runtime's MatMulNBits
    Int2,
    /// A byte a weight, for ONNX's own MatMulInteger
    Int8,
}

/// What a form is written as.
enum Plan {
    Folder(Target),
    Gguf(TernaryType),
    Onnx(OnnxWeights),
}

impl Form {
    fn plan(self, onnx: Option<OnnxType>) -> Plan {
        match self {
            Self::Onnx => Plan::Onnx(match onnx {
                None | Some(OnnxType::Int2) => OnnxWeights::Int2,
                Some(OnnxType::Int8) => OnnxWeights::Int8,
            }),
            Self::Packed => Plan::Folder(Target::Packed),
            Self::Latent => Plan::Folder(Target::Latent),
            Self::I2S => Plan::Gguf(TernaryType::I2S),
            Self::Tq1_0 => Plan::Gguf(TernaryType::Tq1_0),
            Self::Tq2_0 => Plan::Gguf(TernaryType::Tq2_0),
        }
    }
}

/// Writes the folder.
pub fn run(args: Args, global: &Global) -> anyhow::Result<()> {
    let (parent, name) = folder::place(&args.output)?;
    let plan = args.to.plan(args.onnx_weights);
    match plan {
        Plan::Folder(_) => folder::check_free(&args.output, args.force)?,
        Plan::Gguf(_) => gguf::check_free(&args.output, args.force)?,
        Plan::Onnx(_) => onnx::check_free(&args.output, args.force)?,
    }
    match plan {
        Plan::Onnx(_) if args.i_know => {
            bail!("--i-know runs what was written, and ONNX is not read: write --to packed first");
        }
        Plan::Folder(_) | Plan::Gguf(_) if args.onnx_weights.is_some() => {
            bail!("--onnx-weights goes with --to onnx");
        }
        Plan::Gguf(_) | Plan::Onnx(_) if args.max_shard_size.is_some() => {
            bail!("--max-shard-size goes with the forms that are folders, packed and latent");
        }
        _ => {}
    }
    let precision = match args.ternarize || args.i_know {
        true => Precision::Ternarize,
        false => Precision::AsFound,
    };
    let hub = bitnet_model::hub::Hub::from_env().progress(!global.quiet);
    let hub = match &args.revision {
        Some(revision) => hub.revision(revision),
        None => hub,
    };
    let source = Source::open(&args.input, precision, &hub)?;
    if source.config.quantization.is_none() {
        bail!("{}: {UNTRAINED}", args.input);
    }
    let before = match &args.text {
        Some(text) => {
            let full = Source::open(&args.input, Precision::Full, &hub)?;
            Some((text, damage::perplexity(&full, text)?))
        }
        None => None,
    };
    let (tensors, written) = match plan {
        Plan::Gguf(ternary) => gguf::convert(&source, ternary, &args.output, global)?,
        Plan::Onnx(weights) => onnx::convert(&source, weights, &args.output, global)?,
        Plan::Folder(target) => {
            let folder = folder::temporary(&parent, &name)?;
            let output = Output { folder: folder.path(), max_shard_bytes: args.max_shard_size };
            let written = write(&source, output, target, global)?;
            folder::publish(folder, &args.output)?;
            written
        }
    };

    let read: u64 = match &source.origin {
        Origin::Embedded => default_files()
            .iter()
            .filter(|(n, _)| *n == "model.safetensors")
            .map(|(_, d)| d.len() as u64)
            .sum(),
        Origin::Synthetic => 0,
        Origin::Files(files) => sizes(&files.weights)?,
        Origin::Gguf(gguf) => sizes(&[gguf.path().into()])?,
    };
    let damage = match before {
        Some((text, before)) => {
            let path = args.output.display().to_string();
            let after = match args.to {
                Form::Latent => Precision::Ternarize, // a Llama's masters have a plain configuration
                _ => Precision::AsConfigured,
            };
            let after = Source::open(&path, after, &hub)?;
            Some((before, damage::perplexity(&after, text)?))
        }
        None => None,
    };
    let out = &mut io::stdout().lock();
    if args.json {
        let form = args.to.to_possible_value();
        let form = form.as_ref().map_or("", |form| form.get_name());
        let place = match plan {
            Plan::Folder(_) => "folder",
            Plan::Gguf(_) | Plan::Onnx(_) => "file",
        };
        let mut summary = serde_json::json!({
            place: args.output.display().to_string(), "form": form, "tensors": tensors,
            "bytes_read": read, "bytes_written": written,
        });
        if let Some((before, after)) = damage {
            summary["perplexity_before"] = before.into();
            summary["perplexity_after"] = after.into();
        }
        writeln!(out, "{summary:#}")?;
    } else {
        let (read, written) = (progress::bytes(read), progress::bytes(written));
        writeln!(out, "{}: {tensors} tensors, {read} → {written}", args.output.display())?;
        if let Some((before, after)) = damage {
            writeln!(out, "perplexity {before:.4} before, {after:.4} after")?;
        }
    }
    Ok(())
}

/// Writes a whole model to the folder of `output`, reads it back and compares. Returns how many tensors and bytes of weights
/// it has.
fn write(
    source: &Source,
    output: Output,
    target: Target,
    global: &Global,
) -> anyhow::Result<(usize, u64)> {
    let bar = progress::bar(global, 0, "{msg:8} {bar:30} {pos}/{len} {eta}");
    let step = |position: usize, len: usize| {
        bar.set_length(len as u64);
        bar.set_position(position as u64);
    };
    bar.set_message("writing");
    let converted = export::convert(&source.config, &source.checkpoint, output, target, step)?;
    folder::copy_beside(source, output.folder)?;
    bar.set_message("checking");
    let path = output.folder.join("config.json");
    let mut config = Config::from_file(&path)?;
    if config.quantization.is_none() {
        config = config.ternarize(&path)?;
    }
    if config != converted.config {
        bail!(
            "{}: read back, it is not what was written; this is a mistake in this program",
            path.display()
        );
    }
    let written = Checkpoint::open(&converted.files)?;
    export::verify((&source.config, &source.checkpoint), (&config, &written), step)?;
    bar.finish_and_clear();
    Ok((written.names().len(), sizes(&converted.files)?))
}

fn sizes(files: &[PathBuf]) -> anyhow::Result<u64> {
    let size =
        |path: &PathBuf| Ok(fs::metadata(path).with_context(|| path.display().to_string())?.len());
    files.iter().map(size).sum()
}

/// Bytes, with a unit that is a power of ten or of two.
fn size(text: &str) -> Result<u64, String> {
    const UNITS: [(&str, u64); 7] = [
        ("KB", 1_000),
        ("MB", 1_000_000),
        ("GB", 1_000_000_000),
        ("KiB", 1 << 10),
        ("MiB", 1 << 20),
        ("GiB", 1 << 30),
        ("B", 1),
    ];
    let (number, unit) =
        text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let unit = if unit.is_empty() { "B" } else { unit.trim() };
    let factor = UNITS.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit));
    let bytes = number.parse::<u64>().ok().zip(factor).and_then(|(n, (_, f))| n.checked_mul(*f));
    bytes.filter(|bytes| *bytes > 0).ok_or_else(|| {
        "a size is a whole number of B, KB, MB, GB, KiB, MiB or GiB, such as 5GB".into()
    })
}
