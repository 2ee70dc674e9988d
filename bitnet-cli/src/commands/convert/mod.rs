//! `bitnet convert IN OUT --to FORM`: a model or an adapter rewritten in another form, read back and compared before it appears.

mod checked;
mod folder_form;
mod gguf;
mod lora;
mod onnx;
mod place;
mod size;

use std::{
    fs,
    io::{self, Write},
    path::PathBuf,
};

use anyhow::{Context, bail};
use bitnet_model::{
    checkpoint::{
        export::Target,
        gguf::{FloatType, ProjectionType, Types},
        onnx::OnnxWeights,
    },
    config::Config,
    hub::Hub,
    pretrained::{Origin, Precision, Source, default_files},
};
use clap::ValueEnum;

use crate::{args::Global, card::Card, damage, folder, progress};

/// Options of `bitnet convert`.
#[derive(clap::Args)]
#[command(
    after_long_help = "packed: 2-bit codes with a bf16 scale a matrix, everything else bf16: what microsoft/bitnet-b1.58-2B-4T (BitNet) or \
Falcon3-1.58bit (Llama) look like. A model of 1bitLLM becomes a BitNet.
latent: bf16 masters, for training, that quantize to the same codes and scales. Masters that are there already are copied \
as they are. A packed Llama without input norms gets a plain configuration, so run the result with --ternarize.

i2_s, tq1_0, tq2_0, f16: one GGUF file with ternary weights of this type, with the vocabulary and the chat template; i2_s is for \
bitnet.cpp, the others for llama.cpp. f16 spends 16 bits on −scale, 0 or scale, for what knows no ternary type; such a program \
computes without the 8-bit activations that the model was trained with. llama.cpp has no BitNet with relu² (2B-4T): a warning \
says which engine runs what is written.
onnx: a graph for ONNX Runtime, with the inputs and outputs that Hugging Face's optimum gives decoders, and OUT.data with the \
weights. Without tokenizer and settings.
lora: the GGUF file that llama.cpp takes beside a model (`--lora`), of an adapter in PEFT's format.

Tokenizer and generation settings are copied, and a model card is written: README.md of a folder, NAME.md beside a file. Every \
ternary matrix is read back and compared before OUT appears: codes must be equal, scales up to the rounding to bf16 or f16."
)]
pub struct Args {
    /// Hub repo id (org/name), folder, .safetensors or .gguf file, or `default`; with --to lora, an adapter
    #[arg(value_name = "IN")]
    input: String,
    /// Folder to write, or GGUF or ONNX file
    #[arg(value_name = "OUT")]
    output: PathBuf,
    /// The form to write
    #[arg(long, value_name = "FORM")]
    to: Form,
    /// What a GGUF file has as embedding, and as head if the model has none of its own [default: as in IN]
    #[arg(long, value_name = "TYPE")]
    token_embedding_type: Option<Floats>,
    /// What a GGUF file has as a head of its own [default: as in IN]
    #[arg(long, value_name = "TYPE")]
    output_tensor_type: Option<Floats>,
    /// How --to onnx writes ternary weights [default: int2]
    #[arg(long, value_name = "TYPE")]
    onnx_weights: Option<OnnxType>,
    /// Cut the weights of a folder into files of at most this size, such as 5GB or 500MB [default: one file]
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    max_shard_size: Option<u64>,
    /// The model that an adapter is for, with --to lora [default: the one its configuration names]
    #[arg(long, value_name = "MODEL")]
    base: Option<String>,
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
    /// GGUF with F16
    F16,
    /// ONNX
    Onnx,
    /// An adapter as GGUF
    Lora,
}

/// What `--onnx-weights` takes.
#[derive(Clone, Copy, ValueEnum)]
enum OnnxType {
    /// 2 bits a weight, for ONNX Runtime's MatMulNBits
    Int2,
    /// A byte a weight, for ONNX's own MatMulInteger
    Int8,
}

/// What `--token-embedding-type` and `--output-tensor-type` take: llama-quantize's names.
#[derive(Clone, Copy, ValueEnum)]
enum Floats {
    /// 32 bits
    F32,
    /// 16 bits
    F16,
    /// 16 bits, as the Hub has them
    Bf16,
    /// 8.5 bits
    #[value(name = "q8_0")]
    Q8_0,
    /// 6.6 bits
    #[value(name = "q6_k")]
    Q6K,
}

impl Floats {
    fn name(self) -> String {
        self.to_possible_value().map_or(String::new(), |value| value.get_name().into())
    }
}

impl From<Floats> for FloatType {
    fn from(floats: Floats) -> Self {
        match floats {
            Floats::F32 => Self::F32,
            Floats::F16 => Self::F16,
            Floats::Bf16 => Self::Bf16,
            Floats::Q8_0 => Self::Q8_0,
            Floats::Q6K => Self::Q6K,
        }
    }
}

/// What a model is written as.
enum Plan {
    Folder(Target),
    Gguf(Types),
    Onnx(OnnxWeights),
}

/// What was written.
struct Written {
    tensors: usize,
    bytes: u64,
}

impl Args {
    /// Refuses options that say nothing of the form.
    fn check(&self) -> anyhow::Result<()> {
        let is_gguf = matches!(self.to, Form::I2S | Form::Tq1_0 | Form::Tq2_0 | Form::F16);
        let has_types = self.token_embedding_type.is_some() || self.output_tensor_type.is_some();
        if has_types && !is_gguf {
            bail!(
                "--token-embedding-type and --output-tensor-type are of a model's GGUF file: choose another --to"
            );
        }
        if self.base.is_some() && !matches!(self.to, Form::Lora) {
            bail!("--base is of an adapter: give it with --to lora");
        }
        if matches!(self.to, Form::Lora) && (self.ternarize || self.i_know) {
            bail!("--ternarize and --i-know are of a model: --to lora writes an adapter");
        }
        if self.onnx_weights.is_some() && !matches!(self.to, Form::Onnx) {
            bail!("--onnx-weights goes with --to onnx");
        }
        if self.i_know && matches!(self.to, Form::Onnx) {
            bail!("--i-know runs what was written, and ONNX is not read: write --to packed first");
        }
        if self.max_shard_size.is_some() && !matches!(self.to, Form::Packed | Form::Latent) {
            bail!("--max-shard-size goes with the forms that are folders, packed and latent");
        }
        Ok(())
    }

    /// What a model is written as; `None` for an adapter.
    fn plan(&self) -> Option<Plan> {
        let gguf = |projections| {
            Plan::Gguf(Types {
                projections,
                embedding: self.token_embedding_type.map(FloatType::from),
                head: self.output_tensor_type.map(FloatType::from),
            })
        };
        Some(match self.to {
            Form::Packed => Plan::Folder(Target::Packed),
            Form::Latent => Plan::Folder(Target::Latent),
            Form::I2S => gguf(ProjectionType::I2S),
            Form::Tq1_0 => gguf(ProjectionType::Tq1_0),
            Form::Tq2_0 => gguf(ProjectionType::Tq2_0),
            Form::F16 => gguf(ProjectionType::F16),
            Form::Onnx => Plan::Onnx(match self.onnx_weights {
                None | Some(OnnxType::Int2) => OnnxWeights::Int2,
                Some(OnnxType::Int8) => OnnxWeights::Int8,
            }),
            Form::Lora => return None,
        })
    }

    /// The card of what was written.
    fn card<'a>(
        &'a self,
        source: &'a Source,
        config: &'a Config,
        types: &'a [(&'a str, String)],
        bytes: u64,
    ) -> Card<'a> {
        let (form, options) = (self.form(), self.options());
        Card { source, config, form, options, types, bytes, output: &self.output }
    }

    /// The options that shaped what was written, as they are given.
    fn options(&self) -> String {
        let types = [
            ("--token-embedding-type", self.token_embedding_type),
            ("--output-tensor-type", self.output_tensor_type),
        ];
        let mut options = if self.ternarize { String::from(" --ternarize") } else { String::new() };
        for (name, floats) in types {
            if let Some(floats) = floats {
                options += &format!(" {name} {}", floats.name());
            }
        }
        if let Some(OnnxType::Int8) = self.onnx_weights {
            options += " --onnx-weights int8";
        }
        if let Some(bytes) = self.max_shard_size {
            options += &format!(" --max-shard-size {bytes}");
        }
        options
    }

    /// The form by its name.
    fn form(&self) -> String {
        self.to.to_possible_value().map_or(String::new(), |form| form.get_name().into())
    }

    /// Prints what was done.
    fn report(
        &self,
        read: u64,
        written: &Written,
        damage: Option<(f64, f64)>,
    ) -> anyhow::Result<()> {
        let Written { tensors, bytes } = *written;
        let out = &mut io::stdout().lock();
        if self.json {
            let place = match self.to {
                Form::Packed | Form::Latent => "folder",
                _ => "file",
            };
            let mut summary = serde_json::json!({
                place: self.output.display().to_string(), "form": self.form(), "tensors": tensors,
                "bytes_read": read, "bytes_written": bytes,
            });
            if let Some((before, after)) = damage {
                summary["perplexity_before"] = before.into();
                summary["perplexity_after"] = after.into();
            }
            writeln!(out, "{summary:#}")?;
            return Ok(());
        }
        let (read, bytes) = (progress::bytes(read), progress::bytes(bytes));
        writeln!(out, "{}: {tensors} tensors, {read} → {bytes}", self.output.display())?;
        if let Some((before, after)) = damage {
            writeln!(out, "perplexity {before:.4} before, {after:.4} after")?;
        }
        Ok(())
    }
}

/// Writes the folder or the file.
pub fn run(args: &Args, global: &Global) -> anyhow::Result<()> {
    args.check()?;
    let plan = args.plan();
    folder::place(&args.output)?;
    match plan {
        Some(Plan::Folder(_)) => folder::check_free(&args.output, args.force)?,
        Some(Plan::Gguf(_)) | None => gguf::check_free(&args.output, args.force)?,
        Some(Plan::Onnx(_)) => onnx::check_free(&args.output, args.force)?,
    }
    let hub = Hub::from_env().progress(!global.quiet);
    let hub = match &args.revision {
        Some(revision) => hub.revision(revision),
        None => hub,
    };
    let Some(plan) = plan else {
        let (read, written) = lora::convert(args, &hub)?;
        return args.report(read, &written, None);
    };
    let precision = match args.ternarize || args.i_know {
        true => Precision::Ternarize,
        false => Precision::AsFound,
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
    let written = match plan {
        Plan::Gguf(types) => gguf::convert(&source, types, args, global)?,
        Plan::Onnx(weights) => onnx::convert(&source, weights, args, global)?,
        Plan::Folder(target) => folder_form::convert(&source, target, args, global)?,
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
    args.report(size(&source)?, &written, damage)
}

/// Bytes of the weights of `source`.
fn size(source: &Source) -> anyhow::Result<u64> {
    match &source.origin {
        Origin::Embedded => {
            let files = default_files();
            let weights = files.iter().filter(|(name, _)| *name == "model.safetensors");
            Ok(weights.map(|(_, data)| data.len() as u64).sum())
        }
        Origin::Synthetic => Ok(0),
        Origin::Files(files) => sizes(&files.weights),
        Origin::Gguf(gguf) => sizes(&[gguf.path().into()]),
    }
}

fn sizes(files: &[PathBuf]) -> anyhow::Result<u64> {
    let size =
        |path: &PathBuf| Ok(fs::metadata(path).with_context(|| path.display().to_string())?.len());
    files.iter().map(size).sum()
}
