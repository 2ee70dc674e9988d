//! Adapters added into the weights of their base: `W + scale · B·A`.
//!
//! Masters take the sum in their own element type and are quantized anew at the next forward pass. A packed base takes the
//! codes that are nearest to what its codes stand for and the sum, in units of its own scale, which stays. Either way most
//! of an adapter is rounded away and what remains are the codes that flip: the merged model computes another function than
//! the adapter beside its base. So the flips are counted.

use std::path::Path;

use candle_core::{DType, Tensor};
use rayon::prelude::*;

use super::{Adaptation, LowRank};
use crate::{
    Result,
    checkpoint::{Checkpoint, SafetensorsWriter, TensorSpec, export},
    config::{Config, Quantization, WeightForm},
    kernels::TileFormat,
    storage::with_slice,
    weights::TernaryWeight,
};

/// What a merge did to one matrix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MergedMatrix {
    /// The tensor's name: `model.layers.0.self_attn.q_proj.weight`.
    pub name: String,
    /// Its weights.
    pub weights: usize,
    /// Those whose code is another one than before; `None` if they have no codes.
    pub flipped: Option<usize>,
}

/// Writes the tensors of `checkpoint`, with `adaptation` merged into them, to the safetensors file `out`, which appears when
/// it is complete; names, shapes and element types stay what they are. `on_tensor` hears of each tensor written and how many
/// there are. Returns the matrices that were merged into, in the order of the model.
///
/// # Errors
/// An embedding or a head that the adapter replaces while the model has one for both; sums that are not finite; a file that
/// cannot be written.
pub fn merge(
    config: &Config,
    checkpoint: &Checkpoint,
    adaptation: &Adaptation,
    out: &Path,
    mut on_tensor: impl FnMut(usize, usize),
) -> Result<Vec<MergedMatrix>> {
    config.check_tensors(checkpoint)?;
    if config.tie_word_embeddings
        && let Some(name) = adaptation
            .replaced()
            .find(|name| name.contains("embed_tokens") || name.contains("lm_head"))
    {
        let reason = "the adapter replaces it, but the model's embedding and head are tied: run the model with the \
                      adapter beside it instead";
        return Err(checkpoint.wrong(name, reason.into()));
    }
    let names = Vec::from_iter(checkpoint.names());
    let specs = names.iter().filter_map(|name| {
        let info = checkpoint.get(name)?;
        Some(TensorSpec::new(*name, info.dtype, info.shape))
    });
    let mut writer = SafetensorsWriter::create(out, specs.collect())?;
    let mut matrices = Vec::new();
    for (index, name) in names.iter().enumerate() {
        let pairs = name.strip_suffix(".weight").map_or(&[][..], |path| adaptation.pairs_at(path));
        if let Some(whole) = adaptation.whole(name) {
            let dtype = match checkpoint.get(name) {
                Some(info) => DType::try_from(info.dtype)?,
                None => whole.dtype(),
            };
            writer.write_tensor(name, &whole.to_dtype(dtype)?)?;
        } else if pairs.is_empty() {
            writer.write(name, &checkpoint.read_bytes(name)?)?;
        } else {
            let delta = sum(pairs)?;
            let (weights, flipped) = (
                delta.elem_count(),
                match config.quantization {
                    Some(Quantization { weights: WeightForm::Packed(_), .. }) => {
                        merge_packed(config, checkpoint, name, &delta, &mut writer)?
                    }
                    _ => merge_master(config, checkpoint, name, &delta, &mut writer)?,
                },
            );
            matrices.push(MergedMatrix { name: (*name).into(), weights, flipped });
        }
        on_tensor(index + 1, names.len());
    }
    writer.finish()?;
    let order = Vec::from_iter(config.projections().map(|(name, _)| name));
    matrices.sort_by_key(|matrix| order.iter().position(|name| *name == matrix.name));
    Ok(matrices)
}

/// The change that all pairs together make: (out_features, in_features) f32.
fn sum(pairs: &[LowRank]) -> Result<Tensor> {
    let deltas = pairs.iter().map(LowRank::weight_delta);
    let sum = deltas.reduce(|sum, delta| sum? + delta?);
    Ok(sum.unwrap_or_else(|| Err(candle_core::Error::Msg("no pair to merge".into())))?)
}

/// Merges into a float matrix. Returns how many of its codes flip, if it has any.
fn merge_master(
    config: &Config,
    checkpoint: &Checkpoint,
    name: &str,
    delta: &Tensor,
    writer: &mut SafetensorsWriter,
) -> Result<Option<usize>> {
    let master = checkpoint.read(name)?;
    let before = master.to_dtype(DType::F32)?;
    let merged = (&before + delta)?.to_dtype(master.dtype())?;
    let after = merged.to_dtype(DType::F32)?;
    let quantizer = config.quantization.and_then(|q| q.scheme.weight(q.rounding));
    let mut broken = None;
    let flipped = with_slice::<f32, _>(&before, |before| {
        with_slice::<f32, _>(&after, |after| {
            broken = after.iter().position(|weight| !weight.is_finite()).map(|at| after[at]);
            Ok(quantizer.map(|quantizer| {
                let (old, new) = (quantizer.codes(before), quantizer.codes(after));
                let pairs = before.par_iter().zip(after);
                pairs.filter(|&(&before, &after)| old.code(before) != new.code(after)).count()
            }))
        })
    })?;
    if let Some(weight) = broken {
        return Err(checkpoint.wrong(
            name,
            format!("merged, a weight is {weight}: the adapter's scale is too large"),
        ));
    }
    writer.write_tensor(name, &merged)?;
    Ok(flipped)
}

/// Merges into packed codes. Returns how many of them flip.
fn merge_packed(
    config: &Config,
    checkpoint: &Checkpoint,
    name: &str,
    delta: &Tensor,
    writer: &mut SafetensorsWriter,
) -> Result<Option<usize>> {
    let shape @ (out_features, in_features) = delta.dims2()?;
    let quantization = config.quantization;
    let Some((quantization, quantizer)) =
        quantization.and_then(|q| Some((q, q.scheme.weight(q.rounding)?)))
    else {
        return Err(checkpoint.wrong(name, "stays unquantized: it has no codes".into()));
    };
    let old = export::ternary(checkpoint, name, shape, quantization)?;
    let before = Tensor::from_vec(old.dequantize(), shape, delta.device())?;
    let new = with_slice::<f32, _>(&(before + delta)?, |target| {
        let rule = quantizer.codes_at(old.scale());
        Ok(TernaryWeight::from_codes(target, shape, rule, TileFormat::TwoBit))
    })?;
    let flips = |row: usize| {
        (0..in_features).filter(|&col| old.code(row, col) != new.code(row, col)).count()
    };
    let flipped = (0..out_features).into_par_iter().map(flips).sum();
    let codes = new.to_packed().map_err(|e| checkpoint.wrong(name, e.to_string()))?;
    writer.write(name, &codes)?;
    Ok(Some(flipped))
}
