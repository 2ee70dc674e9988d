//! How two models differ, tensor by tensor, whatever forms they are stored in.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};

use super::{Checkpoint, Dtype, export::ternary};
use crate::{config::Config, error::Result, weights::TernaryWeight};

/// How a tensor of one model differs from that of the other.
#[derive(Clone, Debug, PartialEq)]
pub enum Difference {
    /// Only the first model has it.
    OnlyFirst,
    /// Only the second model has it.
    OnlySecond,
    /// They have other dimensions.
    Shape(Vec<usize>, Vec<usize>),
    /// Ternary in both.
    Ternary {
        /// Weights in all.
        weights: usize,
        /// Weights with another code.
        changed: usize,
        /// Of these, those that turned from −1 to 1 or back.
        flipped: usize,
        /// What multiplies the codes.
        scales: (f32, f32),
    },
    /// Numbers in one of them at least.
    Float {
        /// Numbers in all.
        values: usize,
        /// Those that are not the same.
        changed: usize,
        /// The largest |a − b|; infinite where one of them is no number.
        largest: f32,
        /// The mean |a − b|.
        mean: f64,
        /// How they are stored.
        dtypes: (Dtype, Dtype),
    },
}

impl Difference {
    /// Whether there is none: the tensor is the same in both models.
    pub fn is_none(&self) -> bool {
        match self {
            Self::OnlyFirst | Self::OnlySecond | Self::Shape(..) => false,
            Self::Ternary { changed, scales, .. } => *changed == 0 && scales.0 == scales.1,
            Self::Float { changed, .. } => *changed == 0,
        }
    }
}

/// A model's configuration and tensors.
pub type Side<'a> = (&'a Config, &'a Checkpoint);

/// Compares all tensors by name and hands out each difference, none included. Ternary matrices are compared by code and scale,
/// others by value. Two tensors are in memory at a time.
///
/// # Errors
/// A tensor that cannot be read, or what `on_tensor` returns.
pub fn compare(
    first: Side<'_>,
    second: Side<'_>,
    mut on_tensor: impl FnMut(&str, Difference) -> Result<()>,
) -> Result<()> {
    let (a, b) = (names(first.1), names(second.1));
    let shapes = [first, second].map(|(config, _)| BTreeMap::from_iter(config.projections()));
    let all = a.keys().chain(b.keys().filter(|name| !a.contains_key(*name)));
    for name in all {
        let difference = match (a.get(name), b.get(name)) {
            (Some(_), None) => Difference::OnlyFirst,
            (None, _) => Difference::OnlySecond,
            (Some(a), Some(b)) => match shapes.each_ref().map(|shapes| shapes.get(name).copied()) {
                [Some(a), Some(b)] if a != b => Difference::Shape(vec![a.0, a.1], vec![b.0, b.1]),
                [shape, _] => of((first, a), (second, b), shape)?,
            },
        };
        on_tensor(name, difference)?;
    }
    Ok(())
}

/// The tensors but for scales, which belong to matrices, under the names that most families have.
fn names(checkpoint: &Checkpoint) -> BTreeMap<String, &str> {
    let tensors = checkpoint.names().filter(|name| !name.ends_with(".weight_scale"));
    let common = |name: &str| {
        name.replace(".inner_attn_ln.", ".attn_sub_norm.")
            .replace(".ffn_layernorm.", ".ffn_sub_norm.")
    };
    tensors.map(|name| (common(name), name)).collect()
}

/// Of a tensor that both have; `shape` if it is a projection.
fn of(
    (first, a): (Side<'_>, &str),
    (second, b): (Side<'_>, &str),
    shape: Option<(usize, usize)>,
) -> Result<Difference> {
    let codes = |(config, checkpoint): Side<'_>, name: &str| {
        let quantization = config.quantization.filter(|quantization| {
            !matches!(quantization.weights, crate::config::WeightForm::Latent)
                || quantization.scheme.weight(quantization.rounding).is_some()
        });
        let pair = shape.zip(quantization);
        pair.map(|(shape, quantization)| ternary(checkpoint, name, shape, quantization)).transpose()
    };
    let dtype = |checkpoint: &Checkpoint, name: &str| {
        checkpoint.get(name).map_or(Dtype::F32, |info| info.dtype)
    };
    let dtypes = (dtype(first.1, a), dtype(second.1, b));
    match (codes(first, a)?, codes(second, b)?) {
        (Some(a), Some(b)) => Ok(codes_differ(&a, &b)),
        (x, y) => {
            let read = |weight: Option<TernaryWeight>, checkpoint: &Checkpoint, name: &str| {
                weight.map_or_else(|| checkpoint.read(name), |weight| values(&weight))
            };
            let (x, y) = (read(x, first.1, a)?, read(y, second.1, b)?);
            if x.dims() != y.dims() {
                return Ok(Difference::Shape(x.dims().to_vec(), y.dims().to_vec()));
            }
            values_differ(&x, &y, dtypes)
        }
    }
}

fn codes_differ(a: &TernaryWeight, b: &TernaryWeight) -> Difference {
    let (rows, cols) = (a.out_features(), a.in_features());
    let (mut changed, mut flipped) = (0, 0);
    if !a.has_codes_of(b) {
        for row in 0..rows {
            for col in 0..cols {
                let distance = a.code(row, col).abs_diff(b.code(row, col));
                changed += usize::from(distance > 0);
                flipped += usize::from(distance > 1);
            }
        }
    }
    let scales = (a.scale(), b.scale());
    Difference::Ternary { weights: rows * cols, changed, flipped, scales }
}

/// What a ternary matrix multiplies with.
fn values(weight: &TernaryWeight) -> Result<Tensor> {
    let (rows, cols) = (weight.out_features(), weight.in_features());
    let value = |row, col| (f32::from(weight.code(row, col)) - 1.) * weight.scale();
    let all = (0..rows).flat_map(|row| (0..cols).map(move |col| value(row, col)));
    Ok(Tensor::from_iter(all, &candle_core::Device::Cpu)?.reshape((rows, cols))?)
}

fn values_differ(a: &Tensor, b: &Tensor, dtypes: (Dtype, Dtype)) -> Result<Difference> {
    /// Values that are compared at a time: tensors stay as they are stored, and only these become f32.
    const AT_ONCE: usize = 1 << 20;
    let (a, b) = (a.flatten_all()?, b.flatten_all()?);
    let values = a.elem_count();
    let (mut changed, mut largest, mut sum) = (0, 0f32, 0f64);
    for start in (0..values).step_by(AT_ONCE) {
        let part = |tensor: &Tensor| -> Result<Vec<f32>> {
            let part = tensor.narrow(0, start, AT_ONCE.min(values - start))?;
            Ok(part.to_dtype(DType::F32)?.to_vec1()?)
        };
        for (a, b) in part(&a)?.into_iter().zip(part(&b)?) {
            if a.to_bits() == b.to_bits() || a == b {
                continue;
            }
            let difference = (a - b).abs();
            changed += 1;
            largest = largest.max(if difference.is_nan() { f32::INFINITY } else { difference });
            sum += f64::from(difference);
        }
    }
    Ok(Difference::Float { values, changed, largest, mean: sum / values.max(1) as f64, dtypes })
}
