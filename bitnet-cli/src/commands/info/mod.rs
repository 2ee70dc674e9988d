//! `bitnet info`: what a model is and what it needs, from its headers alone; or what an adapter is.

mod adapter;
mod onnx;

use std::{
    collections::BTreeMap,
    io::{self, Write},
    path::{Path, PathBuf},
};

use anyhow::Context;
use bitnet_model::{
    checkpoint::{Checkpoint, TensorInfo},
    config::{Activation, Config, Family, Quantization, ScaleConvention, WeightForm},
    kernels,
    kv_cache::KvCache,
    ops::KvType,
    pretrained::{Origin, Precision, Source, WeightBytes, default_files},
    quant::{Rounding, Scheme},
};
use serde::Serialize;

use self::{adapter::AdapterInfo, onnx::OnnxInfo};
use crate::{
    args::Global,
    model::ModelArgs,
    progress::{bytes, count},
};

/// Options of `bitnet info`.
#[derive(clap::Args)]
#[command(
    after_long_help = "Only the headers of the weights are read. `memory at rest` is what the loaded weights take; the cache of keys \
and values grows with the text, by `cache` for 1000 tokens. Of a folder with a LoRA adapter in PEFT's format it tells the model it \
was trained on, ranks, scales and projections; of an ONNX file its inputs, outputs and operators."
)]
pub struct Args {
    /// The model, as with --model, the folder of an adapter, or an ONNX file
    #[arg(value_name = "MODEL", conflicts_with = "model")]
    positional: Option<String>,
    /// The model
    #[command(flatten)]
    model: ModelArgs,
    /// List every tensor with element type and shape
    #[arg(long)]
    tensors: bool,
    /// Print everything, tensors included, as JSON
    #[arg(long)]
    json: bool,
}

/// Everything that is known of a model; sizes in bytes.
#[derive(Serialize)]
struct Info {
    model: String,
    path: String,
    family: &'static str,
    quantization: Option<QuantizationInfo>,
    geometry: Geometry,
    parameters: Parameters,
    bits_per_weight: BitsPerWeight,
    /// Files of the weights.
    files: BTreeMap<String, u64>,
    memory: Memory,
    tokenizer: Option<TokenizerInfo>,
    generation: serde_json::Value,
    kernel: &'static str,
    /// Tensors of each element type.
    dtypes: BTreeMap<String, usize>,
    tensors: Vec<TensorRow>,
}

#[derive(Serialize)]
struct QuantizationInfo {
    form: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    scale: Option<&'static str>,
    rounding: &'static str,
    /// What the projections compute with, unless it is b1.58's.
    #[serde(skip_serializing_if = "Option::is_none")]
    scheme: Option<String>,
    input_norm_eps: Option<f64>,
}

#[derive(Serialize)]
struct Geometry {
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: usize,
    head_dim: usize,
    hidden_act: &'static str,
    rms_norm_eps: f64,
    rope_theta: f64,
    max_position_embeddings: usize,
    tie_word_embeddings: bool,
}

#[derive(Serialize)]
struct Parameters {
    total: u64,
    ternary: u64,
    embedding: u64,
    head: u64,
    others: u64,
}

#[derive(Serialize)]
struct BitsPerWeight {
    /// Of the ternary matrices with their scales, as stored.
    ternary: Option<f64>,
    /// Of the files, or the tensors of a model without files, for all parameters.
    checkpoint: f64,
}

#[derive(Serialize)]
struct Memory {
    projections: u64,
    /// 0 if its rows stay in the file.
    embedding: u64,
    /// 0 if it is the embedding.
    head: u64,
    norms: u64,
    /// Without keys and values.
    total: u64,
    cache_per_1k_tokens: u64,
}

#[derive(Serialize)]
struct TokenizerInfo {
    vocab_size: usize,
    special_tokens: BTreeMap<&'static str, SpecialToken>,
    chat_template: bool,
}

#[derive(Serialize)]
struct SpecialToken {
    token: String,
    id: Option<u32>,
}

#[derive(Serialize)]
struct TensorRow {
    name: String,
    dtype: String,
    shape: Vec<usize>,
    bytes: usize,
}

/// Prints a table, or JSON, to stdout.
pub fn run(mut args: Args, global: &Global) -> anyhow::Result<()> {
    if let Some(model) = args.positional {
        args.model.model = model;
    }
    let out = &mut io::BufWriter::new(io::stdout().lock());
    let folder = Path::new(&args.model.model);
    if AdapterInfo::is_adapter(folder) {
        let info = AdapterInfo::of(folder)?;
        return show(&info, args.json, out, |out| info.print(args.tensors, out));
    }
    if OnnxInfo::is_onnx(folder) {
        let info = OnnxInfo::of(folder)?;
        return show(&info, args.json, out, |out| info.print(args.tensors, out));
    }
    let precision = match (args.model.ternarize, args.model.full_precision) {
        (true, _) => Precision::Ternarize,
        (_, true) => Precision::Full,
        _ => Precision::AsFound,
    };
    let source = args.model.open_as(precision, global)?;
    let info = Info::of(&source)?;
    show(&info, args.json, out, |out| info.print(args.tensors, out))
}

/// Prints what is known: as JSON, or as `print` does.
fn show<W: Write>(
    info: &impl Serialize,
    json: bool,
    out: &mut W,
    print: impl FnOnce(&mut W) -> io::Result<()>,
) -> anyhow::Result<()> {
    match json {
        true => writeln!(out, "{:#}", serde_json::to_value(info)?)?,
        false => print(out)?,
    }
    Ok(out.flush()?)
}

impl Info {
    fn of(source: &Source) -> anyhow::Result<Self> {
        let (config, checkpoint) = (&source.config, &source.checkpoint);
        let parameters = Parameters::of(config);
        let files = files(source)?;
        let tensors = TensorRow::all(checkpoint);
        let stored: usize = config
            .projections()
            .flat_map(|(name, _)| [format!("{name}_scale"), name])
            .filter_map(|name| checkpoint.get(&name))
            .map(|info| info.bytes)
            .sum();
        let is_ternary = config.quantization.is_some();
        let on_disk: u64 = match source.origin {
            Origin::Synthetic => tensors.iter().map(|tensor| tensor.bytes as u64).sum(),
            Origin::Embedded | Origin::Files(_) | Origin::Gguf(_) => files.values().sum(),
        };
        Ok(Self {
            model: source.name.clone(),
            path: match &source.origin {
                Origin::Embedded => "inside this program".into(),
                Origin::Synthetic => "random weights, made in memory".into(),
                Origin::Files(files) => files.root.display().to_string(),
                Origin::Gguf(gguf) => gguf.path().display().to_string(),
            },
            family: family(config),
            quantization: config.quantization.map(QuantizationInfo::of),
            geometry: Geometry::of(config),
            bits_per_weight: BitsPerWeight {
                ternary: is_ternary.then(|| 8. * stored as f64 / parameters.ternary as f64),
                checkpoint: 8. * on_disk as f64 / parameters.total as f64,
            },
            memory: Memory::of(source),
            parameters,
            files,
            tokenizer: tokenizer(source)?,
            generation: source.generation.to_json(),
            kernel: kernels::active().name(),
            dtypes: TensorRow::dtypes(&tensors),
            tensors,
        })
    }

    fn print(&self, with_tensors: bool, out: &mut impl Write) -> io::Result<()> {
        let Self { geometry: g, parameters: p, memory: m, .. } = self;
        let mut row = |name: &str, value: String| match name {
            "" => writeln!(out, "{:16}{value}", ""),
            _ => writeln!(out, "{name:16}{value}"),
        };
        row("model", format!("{} ({})", self.model, self.path))?;
        row("family", self.family.into())?;
        let weights = match &self.quantization {
            None => "full precision".into(),
            Some(q) => {
                let scale = q.scale.map(|scale| format!(", scale {scale}")).unwrap_or_default();
                let norm = match q.input_norm_eps {
                    Some(eps) => format!(", a norm before each projection (eps {eps:e})"),
                    None => String::new(),
                };
                let scheme = q.scheme.as_ref().map(|scheme| format!(", {scheme}"));
                let scheme = scheme.unwrap_or_default();
                format!("{}{scale}, rounding {}{norm}{scheme}", q.form, q.rounding)
            }
        };
        row("weights", weights)?;
        row(
            "geometry",
            format!(
                "{} layers, hidden {}, intermediate {}, {} heads of {} ({} for keys and values), {}",
                g.num_hidden_layers,
                g.hidden_size,
                g.intermediate_size,
                g.num_attention_heads,
                g.head_dim,
                g.num_key_value_heads,
                g.hidden_act
            ),
        )?;
        let tied = if g.tie_word_embeddings { "tied" } else { "with a head of its own" };
        row("vocabulary", format!("{}, {tied}", g.vocab_size))?;
        let (context, theta) = (g.max_position_embeddings, g.rope_theta);
        row(
            "context",
            format!("{context} tokens, rope theta {theta}, norm eps {:e}", g.rms_norm_eps),
        )?;
        let kind = if self.quantization.is_some() { "ternary" } else { "in projections" };
        let mut parts = vec![(p.ternary, kind), (p.embedding, "embedding")];
        parts.extend([(p.head, "head"), (p.others, "others")].into_iter().filter(|(n, _)| *n > 0));
        let parts: Vec<String> =
            parts.iter().map(|(n, name)| format!("{} {name}", count(*n))).collect();
        row("parameters", format!("{} ({})", count(p.total), parts.join(", ")))?;
        let ternary = self.bits_per_weight.ternary;
        let ternary =
            ternary.map(|bits| format!("{bits:.3} ternary matrices, ")).unwrap_or_default();
        row(
            "bits/weight",
            format!("{ternary}{:.2} the whole checkpoint", self.bits_per_weight.checkpoint),
        )?;
        for (index, (file, size)) in self.files.iter().enumerate() {
            row(if index == 0 { "files" } else { "" }, format!("{file}, {}", bytes(*size)))?;
        }
        let dtypes: Vec<String> = self.dtypes.iter().map(|(d, n)| format!("{n} {d}")).collect();
        row("tensors", format!("{} ({})", self.tensors.len(), dtypes.join(", ")))?;
        let parts = [(m.projections, "projections"), (m.embedding, "embedding"), (m.head, "head")];
        let parts = parts.into_iter().chain([(m.norms, "norms")]).filter(|(n, _)| *n > 0);
        let parts: Vec<String> = parts.map(|(n, name)| format!("{} {name}", bytes(n))).collect();
        row("memory at rest", format!("{} ({})", bytes(m.total), parts.join(", ")))?;
        row("cache", format!("{} for 1000 tokens, f16", bytes(m.cache_per_1k_tokens)))?;
        match &self.tokenizer {
            None => row("tokenizer", "none".into())?,
            Some(tokenizer) => {
                let chat = if tokenizer.chat_template { "a" } else { "no" };
                row("tokenizer", format!("{} tokens, {chat} chat template", tokenizer.vocab_size))?;
                for (name, SpecialToken { token, id }) in &tokenizer.special_tokens {
                    let id = id.map_or("not in the vocabulary".into(), |id| id.to_string());
                    row("", format!("{name} {} ({id})", token.escape_debug()))?;
                }
            }
        }
        let generation: Vec<String> = self
            .generation
            .as_object()
            .into_iter()
            .flatten()
            .map(|(name, value)| format!("{name} {value}"))
            .collect();
        if !generation.is_empty() {
            row("generation", generation.join(", "))?;
        }
        row("kernel", self.kernel.into())?;
        if with_tensors {
            TensorRow::print(&self.tensors, out)?;
        }
        Ok(())
    }
}

impl TensorRow {
    fn all(checkpoint: &Checkpoint) -> Vec<Self> {
        let tensors = checkpoint.names().filter_map(|name| Some((name, checkpoint.get(name)?)));
        let row = |(name, info): (&str, TensorInfo<'_>)| Self {
            name: name.into(),
            dtype: info.dtype.to_string(),
            shape: info.shape.to_vec(),
            bytes: info.bytes,
        };
        tensors.map(row).collect()
    }

    /// How many there are of each element type.
    fn dtypes(rows: &[Self]) -> BTreeMap<String, usize> {
        let mut dtypes = BTreeMap::new();
        for row in rows {
            *dtypes.entry(row.dtype.clone()).or_default() += 1;
        }
        dtypes
    }

    fn print(rows: &[Self], out: &mut impl Write) -> io::Result<()> {
        let width = rows.iter().map(|row| row.name.len()).max().unwrap_or(0);
        writeln!(out)?;
        for Self { name, dtype, shape, bytes: size } in rows {
            let (shape, size) = (format!("{shape:?}"), bytes(*size as u64));
            writeln!(out, "{name:width$}  {dtype:5} {shape:16} {size}")?;
        }
        Ok(())
    }
}

fn family(config: &Config) -> &'static str {
    match (config.family, config.quantization) {
        (Family::BitNet, Some(_)) => "BitNet b1.58 (sub-norms)",
        (Family::BitNet, None) => "BitNet, its full-precision twin (sub-norms)",
        (Family::OneBitLlm, _) => "BitNet b1.58 of 1bitLLM (sub-norms)",
        (Family::Llama, Some(_)) => "Llama, 1.58-bit",
        (Family::Llama, None) => "Llama",
    }
}

impl QuantizationInfo {
    fn of(quantization: Quantization) -> Self {
        let (form, scale) = match quantization.weights {
            WeightForm::Packed(ScaleConvention::Multiply) => ("packed", Some("multiplies")),
            WeightForm::Packed(ScaleConvention::Divide) => ("packed", Some("divides")),
            WeightForm::Latent => ("latent", None),
        };
        let rounding = match quantization.rounding {
            Rounding::HalfEven => "half to even",
            Rounding::HalfUp => "half up",
        };
        let Quantization { scheme, input_norm_eps, .. } = quantization;
        let scheme = (scheme != Scheme::B158).then(|| scheme.to_string());
        Self { form, scale, rounding, scheme, input_norm_eps }
    }
}

impl Geometry {
    fn of(config: &Config) -> Self {
        Self {
            vocab_size: config.vocab_size,
            hidden_size: config.hidden_size,
            intermediate_size: config.intermediate_size,
            num_hidden_layers: config.num_hidden_layers,
            num_attention_heads: config.num_attention_heads,
            num_key_value_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
            hidden_act: match config.hidden_act {
                Activation::Relu2 => "relu2",
                Activation::Silu => "silu",
            },
            rms_norm_eps: config.rms_norm_eps,
            rope_theta: config.rope_theta,
            max_position_embeddings: config.max_position_embeddings,
            tie_word_embeddings: config.tie_word_embeddings,
        }
    }
}

impl Parameters {
    fn of(config: &Config) -> Self {
        let embedding = (config.vocab_size * config.hidden_size) as u64;
        let head = if config.tie_word_embeddings { 0 } else { embedding };
        let ternary = config.projections().map(|(_, (out, input))| (out * input) as u64).sum();
        let (total, others) = (config.parameters(), config.norm_parameters());
        Self { total, ternary, embedding, head, others }
    }
}

impl Memory {
    fn of(source: &Source) -> Self {
        let weights = source.weight_bytes(source.reads_rows());
        let WeightBytes { projections, embedding, head, norms } = weights;
        let of_a_token = KvCache::token_bytes(&source.config, KvType::default());
        Self {
            projections,
            embedding,
            head,
            norms,
            total: weights.total(),
            cache_per_1k_tokens: 1000 * of_a_token as u64,
        }
    }
}

fn files(source: &Source) -> anyhow::Result<BTreeMap<String, u64>> {
    let files = match &source.origin {
        Origin::Embedded => {
            let weights =
                default_files().into_iter().filter(|(name, _)| name.ends_with(".safetensors"));
            return Ok(weights.map(|(name, data)| (name.into(), data.len() as u64)).collect());
        }
        Origin::Synthetic => return Ok(BTreeMap::new()),
        Origin::Files(files) => files.weights.iter().map(PathBuf::as_path).collect(),
        Origin::Gguf(gguf) => vec![gguf.path()],
    };
    let size = |path: &Path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let size = std::fs::metadata(path).with_context(|| path.display().to_string())?.len();
        Ok((name, size))
    };
    files.into_iter().map(size).collect()
}

fn tokenizer(source: &Source) -> anyhow::Result<Option<TokenizerInfo>> {
    let Some(tokenizer) = source.tokenizer()? else { return Ok(None) };
    let special_tokens = ["bos_token", "eos_token", "pad_token", "unk_token"]
        .into_iter()
        .filter_map(|name| Some((name, tokenizer.special_token(name)?)))
        .map(|(name, token)| {
            (name, SpecialToken { token: token.into(), id: tokenizer.token_to_id(token) })
        })
        .collect();
    Ok(Some(TokenizerInfo {
        vocab_size: tokenizer.vocab_size(),
        special_tokens,
        // One that cannot be compiled is there all the same; who chats hears what is wrong with it.
        chat_template: !matches!(tokenizer.chat_template(), Ok(None)),
    }))
}
