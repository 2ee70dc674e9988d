//! Packed ⇄ latent: a checkpoint rewritten in the other form, one matrix at a time.
//!
//! - **packed**: 2-bit codes and a bf16 `weight_scale`, everything else bf16, as the Hub has 2B-4T
//!   (BitNet, 1bitLLM under BitNet's names) or Falcon3-1.58bit (Llama);
//! - **latent**: bf16 masters that quantize online to the same codes and the same scale; masters
//!   that are there already stay as they are.

use std::{fs, path::PathBuf};

use candle_core::{DType, Tensor};
use half::slice::HalfFloatSliceExt;

use super::{Checkpoint, Dtype, Output, TensorSpec, shards::Shards, write_atomic};
use crate::{
    Error, Result,
    config::{Config, Family, PROJECTIONS, Quantization, ScaleConvention, WeightForm},
    kernels::TileFormat,
    quant::{Rounding, Scheme},
    storage::with_slice,
    weights::TernaryWeight,
};

/// The form to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// 2-bit codes.
    Packed,
    /// Float masters.
    Latent,
}

/// What [`convert`] wrote.
#[derive(Clone, Debug, PartialEq)]
pub struct Converted {
    /// The new configuration.
    pub config: Config,
    /// The files of the weights.
    pub files: Vec<PathBuf>,
}

/// Writes `config.json` and the weights of `checkpoint` to the folder of `out` in the form `target`; `on_tensor` hears of
/// each tensor written and how many there are.
///
/// The weights appear only when complete, and the configuration after them.
///
/// # Errors
/// A full-precision model, which is not ternary in either form; tensors that do not fit the
/// configuration; a folder that cannot be written.
pub fn convert<'a>(
    config: &Config,
    checkpoint: &Checkpoint,
    out: impl Into<Output<'a>>,
    target: Target,
    mut on_tensor: impl FnMut(usize, usize),
) -> Result<Converted> {
    let out = out.into();
    config.check_tensors(checkpoint)?;
    let Some(quantization) = config.quantization else {
        return Err(Error::Config {
            path: checkpoint.path().into(),
            field: "quantization_config".into(),
            reason: "is absent: a full-precision model has no ternary weights to convert".into(),
        });
    };
    let converted = converted(config, quantization, target);
    let tensors: Vec<Plan> = checkpoint
        .names()
        .filter(|name| !name.ends_with(".weight_scale"))
        .filter(|name| !(config.tie_word_embeddings && *name == "lm_head.weight"))
        .map(|name| Plan::new(name, config, &converted, checkpoint))
        .collect();
    let specs = tensors.iter().flat_map(|plan| plan.specs(target)).collect();
    fs::create_dir_all(out.folder).map_err(Error::io(out.folder))?;
    let mut writer = Shards::create(out, specs)?;
    for (index, plan) in tensors.iter().enumerate() {
        plan.write(&mut writer, checkpoint, quantization, converted.quantization)?;
        on_tensor(index + 1, tensors.len());
    }
    let files = writer.finish()?;
    let json = format!("{:#}\n", converted.to_json());
    write_atomic(&out.folder.join("config.json"), json.as_bytes())?;
    Ok(Converted { config: converted, files })
}

/// How a model of b1.58 is quantized, for formats that have a place for nothing else; `other` says that of other quantizers.
///
/// # Errors
/// Full precision, or other quantizers.
pub(super) fn b158(config: &Config, checkpoint: &Checkpoint, other: &str) -> Result<Quantization> {
    let reason = match config.quantization {
        Some(quantization) if quantization.scheme == Scheme::B158 => return Ok(quantization),
        Some(_) => other,
        None => "is absent: a full-precision model has no ternary weights to write",
    };
    let (path, field) = (checkpoint.path().into(), "quantization_config".into());
    Err(Error::Config { path, field, reason: reason.into() })
}

/// The configuration of the converted model.
fn converted(config: &Config, quantization: Quantization, target: Target) -> Config {
    let weights = match (target, config.family) {
        (Target::Latent, _) => WeightForm::Latent,
        // Llama's packed files divide by their scale, BitNet's multiply.
        (Target::Packed, Family::Llama) => WeightForm::Packed(ScaleConvention::Divide),
        (Target::Packed, _) => WeightForm::Packed(ScaleConvention::Multiply),
    };
    // A packed file says half to even. Masters keep what they have; those made of a packed Llama get
    // the plain configuration that is usual for them, unless their norms must be told.
    let rounding = match (target, quantization.weights, config.family) {
        (Target::Packed, ..) => Rounding::HalfEven,
        (Target::Latent, WeightForm::Packed(_), Family::Llama)
            if quantization.input_norm_eps.is_none() =>
        {
            Rounding::HalfUp
        }
        (Target::Latent, ..) => quantization.rounding,
    };
    let family = match (target, config.family) {
        (Target::Packed, Family::OneBitLlm) => Family::BitNet,
        (_, family) => family,
    };
    let quantization = Some(Quantization { weights, rounding, ..quantization });
    Config { family, quantization, ..config.clone() }
}

/// One tensor of the source and what becomes of it.
struct Plan {
    source: String,
    name: String,
    kind: Kind,
    /// Of everything but codes and scales.
    dtype: Dtype,
}

enum Kind {
    Projection { out_features: usize, in_features: usize },
    Other { shape: Vec<usize> },
}

impl Plan {
    fn new(source: &str, config: &Config, converted: &Config, checkpoint: &Checkpoint) -> Self {
        let mut name = source.to_string();
        if converted.family == Family::BitNet && config.family == Family::OneBitLlm {
            name = name.replace(".inner_attn_ln.", ".attn_sub_norm.");
            name = name.replace(".ffn_layernorm.", ".ffn_sub_norm.");
        }
        let shape = checkpoint.get(source).map(|info| info.shape.to_vec()).unwrap_or_default();
        let is_projection = source.strip_suffix(".weight").is_some_and(|path| {
            PROJECTIONS.iter().any(|projection| path.ends_with(&format!(".{projection}")))
        });
        let kind = match *shape {
            [rows, in_features] if is_projection => {
                let is_packed = checkpoint.get(source).is_some_and(|i| i.dtype == Dtype::U8);
                let out_features = if is_packed { 4 * rows } else { rows };
                Kind::Projection { out_features, in_features }
            }
            _ => Kind::Other { shape },
        };
        let is_latent =
            |config: &Config| config.quantization.is_some_and(|q| q.weights == WeightForm::Latent);
        let dtype = match checkpoint.get(source) {
            Some(info) if is_latent(config) && is_latent(converted) => info.dtype,
            _ => Dtype::BF16,
        };
        Self { source: source.into(), name, kind, dtype }
    }

    fn scale_name(name: &str) -> String {
        format!("{name}_scale")
    }

    fn specs(&self, target: Target) -> Vec<TensorSpec> {
        match (&self.kind, target) {
            (Kind::Other { shape }, _) => {
                vec![TensorSpec::new(&self.name, self.dtype, shape.clone())]
            }
            (Kind::Projection { out_features, in_features }, Target::Packed) => vec![
                TensorSpec::new(&self.name, Dtype::U8, [out_features.div_ceil(4), *in_features]),
                TensorSpec::new(Self::scale_name(&self.name), Dtype::BF16, [1]),
            ],
            (Kind::Projection { out_features, in_features }, Target::Latent) => {
                vec![TensorSpec::new(&self.name, self.dtype, [*out_features, *in_features])]
            }
        }
    }

    fn write(
        &self,
        writer: &mut Shards,
        checkpoint: &Checkpoint,
        from: Quantization,
        to: Option<Quantization>,
    ) -> Result<()> {
        let is_latent = |q: Quantization| q.weights == WeightForm::Latent;
        let (out_features, in_features) = match self.kind {
            Kind::Projection { out_features, in_features }
                if !(is_latent(from) && to.is_some_and(is_latent)) =>
            {
                (out_features, in_features)
            }
            _ if checkpoint.get(&self.source).is_some_and(|info| info.dtype == self.dtype) => {
                return checkpoint
                    .bytes_in_pieces(&self.source, |bytes| writer.append(&self.name, bytes));
            }
            _ => {
                let mut rounded = Vec::new();
                return checkpoint.floats_in_pieces(&self.source, 1, |floats| {
                    rounded.resize(floats.len(), half::bf16::ZERO);
                    rounded.convert_from_f32_slice(floats);
                    writer.append(&self.name, bytemuck::cast_slice(rounded.reinterpret_cast()))
                });
            }
        };
        let weight = ternary(checkpoint, &self.source, (out_features, in_features), from)?;
        match to.map(|to| to.weights) {
            Some(WeightForm::Packed(convention)) => {
                let codes = weight
                    .to_packed()
                    .map_err(|e| checkpoint.wrong(&self.source, e.to_string()))?;
                writer.write(&self.name, &codes)?;
                let scale = match convention {
                    ScaleConvention::Multiply => weight.scale(),
                    ScaleConvention::Divide => 1. / weight.scale(),
                };
                let scale = half::bf16::from_f32(scale);
                writer.write(&Self::scale_name(&self.name), &scale.to_le_bytes())
            }
            _ => {
                let shape = (out_features, in_features);
                let latent = Tensor::from_vec(latent(&weight), shape, &candle_core::Device::Cpu)?;
                writer.write_tensor(&self.name, &latent)
            }
        }
    }
}

/// The matrix `name` of `shape` (out_features, in_features), as `quantization` says it lies in
/// `checkpoint`.
pub(crate) fn ternary(
    checkpoint: &Checkpoint,
    name: &str,
    (out_features, in_features): (usize, usize),
    quantization: Quantization,
) -> Result<TernaryWeight> {
    match quantization.weights {
        WeightForm::Latent => {
            let Some(quantizer) = quantization.scheme.weight(quantization.rounding) else {
                return Err(checkpoint.wrong(name, "stays unquantized: it has no codes".into()));
            };
            let latent = checkpoint.read(name)?.to_dtype(DType::F32)?;
            let mut bad = None;
            let weight = with_slice::<f32, _>(&latent, |w| {
                bad = w.iter().position(|w| !w.is_finite()).map(|at| (at, w[at]));
                Ok(TernaryWeight::from_latent(
                    w,
                    (out_features, in_features),
                    quantizer,
                    TileFormat::TwoBit,
                ))
            })?;
            match bad {
                None => Ok(weight),
                Some((at, value)) => {
                    let (row, col) = (at / in_features, at % in_features);
                    Err(checkpoint.wrong(name, format!("row {row}, column {col} is {value}")))
                }
            }
        }
        WeightForm::Packed(convention) => {
            let scale = checkpoint.read_scale(&Plan::scale_name(name))?;
            let scale = match convention {
                ScaleConvention::Multiply => scale,
                ScaleConvention::Divide => 1. / scale,
            };
            let bytes = checkpoint.read_bytes(name)?;
            TernaryWeight::from_packed(
                &bytes,
                (out_features, in_features),
                scale,
                TileFormat::TwoBit,
            )
            .map_err(|e| checkpoint.wrong(name, e.to_string()))
        }
    }
}

/// bf16 has 8 significant bits: its rounding errs by at most 2⁻⁹, twice if the scale is inverted.
const SCALE_TOLERANCE: f32 = 1. / 256.;

/// Reads back what [`convert`] wrote and compares every ternary matrix: equal codes, and scales equal
/// up to the rounding to bf16. `on_matrix` hears of each matrix compared and how many there are.
///
/// # Errors
/// The first tensor that is not as it was.
pub fn verify(
    (from, source): (&Config, &Checkpoint),
    (to, written): (&Config, &Checkpoint),
    mut on_matrix: impl FnMut(usize, usize),
) -> Result<()> {
    to.check_tensors(written)?;
    let (Some(from), Some(to_quantization)) = (from.quantization, to.quantization) else {
        return Err(written.wrong("model", "a full-precision model has no ternary weights".into()));
    };
    let matrices: Vec<(String, (usize, usize))> = to.projections().collect();
    for (index, (name, shape)) in matrices.iter().enumerate() {
        let old = ternary(source, name, *shape, from)?;
        let new = ternary(written, name, *shape, to_quantization)?;
        if !new.has_codes_of(&old) {
            return Err(written.wrong(name, "read back, its codes are not the source's".into()));
        }
        let difference = (new.scale() / old.scale() - 1.).abs();
        // Without a weight that is not 0 the scale multiplies nothing, and masters cannot tell it.
        if difference > SCALE_TOLERANCE && !is_zero(&old) {
            let (old, new) = (old.scale(), new.scale());
            let reason = format!("read back, its scale is {new} and the source's is {old}");
            return Err(written.wrong(name, reason));
        }
        on_matrix(index + 1, matrices.len());
    }
    Ok(())
}

/// Whether all weights are 0.
fn is_zero(weight: &TernaryWeight) -> bool {
    let (rows, cols) = (weight.out_features(), weight.in_features());
    (0..rows).all(|row| (0..cols).all(|col| weight.code(row, col) == 1))
}

/// Masters that ternarize to the codes and the scale of `weight`.
///
/// The mean of `|w|` must be the scale s, so with a fraction d of non-zero codes those are ±s/d. As
/// s/d is rarely a bf16 number, its two neighbours alternate so that the mean comes out.
fn latent(weight: &TernaryWeight) -> Vec<half::bf16> {
    let codes = || {
        (0..weight.out_features())
            .flat_map(|row| (0..weight.in_features()).map(move |col| weight.code(row, col)))
    };
    let total = weight.out_features() * weight.in_features();
    let nonzero = codes().filter(|&code| code != 1).count();
    let value = f64::from(weight.scale()) * total as f64 / nonzero.max(1) as f64;
    let (low, high) = neighbours(value);
    let mut owed = 0.; // what the values so far fall short of `value` each
    codes()
        .map(|code| {
            if code == 1 {
                return half::bf16::ZERO;
            }
            owed += value;
            let next =
                if owed - low.to_f64() > (high.to_f64() - low.to_f64()) / 2. { high } else { low };
            owed -= next.to_f64();
            if code == 2 { next } else { -next }
        })
        .collect()
}

/// The bf16 numbers on both sides of a positive `value`.
fn neighbours(value: f64) -> (half::bf16, half::bf16) {
    let near = half::bf16::from_f64(value);
    match near.to_f64() <= value {
        true => (near, half::bf16::from_bits(near.to_bits() + 1)),
        false => (half::bf16::from_bits(near.to_bits() - 1), near),
    }
}
