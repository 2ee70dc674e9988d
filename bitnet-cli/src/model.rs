//! Which model, and how to sample from it: the options that several commands share.

use std::{num::NonZeroUsize, sync::Arc};

use bitnet_model::{
    hub::Hub,
    kernels::{TileFormat, head::HeadFormat},
    model::Model,
    nn::HeadPrecision,
    ops::KvType,
    pretrained::{DEFAULT, Precision, Source},
    session::Session,
};
use clap::{Args, ValueEnum};

use crate::args::Global;

/// Options that name a model.
#[derive(Args, Clone, Debug)]
pub struct ModelArgs {
    /// Hub repo id (org/name), folder, .safetensors or .gguf file, `default` for the model inside this program, or
    /// random weights of a known geometry, for measuring: synthetic:2b-4t, synthetic:llama3-8b,
    /// synthetic:falcon3-10b
    #[arg(long, short, value_name = "MODEL", default_value = DEFAULT)]
    pub model: String,
    /// Branch, tag or commit of a Hub repo
    #[arg(long, value_name = "REVISION")]
    pub revision: Option<String>,
    /// Take float weights without a quantization_config for masters of a 1.58-bit model (Falcon-E prequantized)
    #[arg(long, conflicts_with = "full_precision")]
    pub ternarize: bool,
    /// Run float weights without a quantization_config as they are, in full precision
    #[arg(long)]
    pub full_precision: bool,
    /// The output head: exact, bit for bit, of which large ones are screened in 8 bits and kept in the file; or its rows
    /// in 8, 6 or 4 bits instead, less exact and smaller [default: exact, with --low-memory q4]
    #[arg(long, value_name = "PRECISION")]
    pub lm_head: Option<LmHead>,
    /// How ternary weights lie in memory, with the same results: 2bit is quickly unpacked, 1.6bit (five weights in a
    /// byte) is a fifth smaller; auto takes the faster, by a short measurement
    #[arg(long, value_name = "FORMAT", default_value = "auto")]
    pub weight_format: WeightFormat,
    /// Take less memory, for less exact results: the output head in 4 bits, keys and values in int8 and ternary weights in
    /// 1.6 bits, unless --lm-head, --kv-cache and --weight-format say otherwise, and prompts in shorter pieces
    #[arg(long)]
    pub low_memory: bool,
}

/// The values of `--weight-format`.
#[derive(ValueEnum, Clone, Copy, Debug)]
pub enum WeightFormat {
    /// The faster one here
    Auto,
    /// Four weights in a byte
    #[value(name = "2bit")]
    TwoBit,
    /// Five weights in a byte
    #[value(name = "1.6bit")]
    Trits,
}

/// The values of `--lm-head`.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum LmHead {
    /// As in the checkpoint
    Exact,
    /// 8 bits a weight
    Q8,
    /// 6.5 bits a weight
    Q6,
    /// 4.5 bits a weight
    Q4,
}

impl From<LmHead> for HeadPrecision {
    fn from(head: LmHead) -> Self {
        match head {
            LmHead::Exact => Self::Exact,
            LmHead::Q8 => Self::Quantized(HeadFormat::Q8),
            LmHead::Q6 => Self::Quantized(HeadFormat::Q6),
            LmHead::Q4 => Self::Quantized(HeadFormat::Q4),
        }
    }
}

impl LmHead {
    /// As it is given.
    pub fn name(self) -> &'static str {
        HeadPrecision::from(self).name()
    }
}

/// How a generating command runs its model.
#[derive(Args, Clone, Copy, Debug)]
pub struct SessionArgs {
    /// How keys and values are stored: f32 as computed; f16, half the memory and read in half the time; bf16, for
    /// values that f16 refuses; int8, half of that again, less exact [default: f16, with --low-memory int8]
    #[arg(long, value_name = "TYPE", value_parser = kv_type)]
    pub kv_cache: Option<KvType>,
    /// Draft what followed the last tokens before, and verify it at once: the same text, sooner where it repeats itself
    /// (summaries, edits, code)
    #[arg(long, value_name = "HOW")]
    pub speculate: Option<Speculate>,
}

/// Where drafts come from.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Speculate {
    /// Earlier occurrences of the last two to four tokens
    Ngram,
}

impl SessionArgs {
    /// An empty session.
    pub fn session(self, model: &Arc<Model>, args: &ModelArgs) -> Session {
        /// As many tokens as pass over a band of tiles together. Activations of 2B-4T take a tenth of what 512 tokens take.
        const SHORT_PIECES: NonZeroUsize = NonZeroUsize::new(64).unwrap();
        let kv_type = self.kv_cache.unwrap_or_else(|| args.kv_type());
        let session = Session::with_cache(model.clone(), kv_type);
        let session = match args.low_memory {
            true => session.prompt_pieces(SHORT_PIECES),
            false => session,
        };
        match self.speculate {
            Some(Speculate::Ngram) => session.speculating(),
            None => session,
        }
    }
}

/// The cache type of this name.
pub fn kv_type(name: &str) -> Result<KvType, String> {
    KvType::ALL.into_iter().find(|kv_type| kv_type.name() == name).ok_or_else(|| {
        let names = KvType::ALL.map(KvType::name).join(", ");
        format!("there is no cache of type `{name}`: take one of {names}")
    })
}

impl ModelArgs {
    /// Finds the model and checks everything but the weights' values.
    pub fn open(&self, global: &Global) -> anyhow::Result<Source> {
        let precision = match (self.ternarize, self.full_precision) {
            (true, _) => Precision::Ternarize,
            (_, true) => Precision::Full,
            _ => Precision::AsConfigured,
        };
        self.open_as(precision, global)
    }

    /// [`open`](Self::open) with float weights taken as `precision` says, whatever the options say of it.
    pub fn open_as(&self, precision: Precision, global: &Global) -> anyhow::Result<Source> {
        let mut source = Source::open(&self.model, precision, &self.hub(global))?;
        source.lm_head = self.lm_head().into();
        source.tile_format = self.tile_format();
        Ok(source)
    }

    /// How the output head is stored.
    pub fn lm_head(&self) -> LmHead {
        self.lm_head.unwrap_or(if self.low_memory { LmHead::Q4 } else { LmHead::Exact })
    }

    /// How ternary weights lie in memory, if it is not to be measured.
    fn tile_format(&self) -> Option<TileFormat> {
        match self.weight_format {
            WeightFormat::Auto => self.low_memory.then_some(TileFormat::Trits),
            WeightFormat::TwoBit => Some(TileFormat::TwoBit),
            WeightFormat::Trits => Some(TileFormat::Trits),
        }
    }

    /// How keys and values are stored if nothing else is said.
    pub fn kv_type(&self) -> KvType {
        if self.low_memory { KvType::Int8 } else { KvType::default() }
    }

    /// The Hub as the environment and the options have it.
    pub fn hub(&self, global: &Global) -> Hub {
        let hub = Hub::from_env();
        let hub = if global.quiet { hub.progress(false) } else { hub };
        match &self.revision {
            Some(revision) => hub.revision(revision),
            None => hub,
        }
    }
}
