//! Quantizers as values: what a weight or an activation becomes, and how training passes through it.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::{
    Rounding, activation_factor, hadamard, int4, int4_factor, int8, sign, ternary, weight_mean,
    weight_scale,
};
#[cfg(feature = "cuda")]
use crate::cuda;
use crate::storage::contiguous;

/// A map of values to a grid of few of them.
pub trait Quantizer: Copy + Send + Sync + 'static {
    /// `x`, rows of `width` values, as the matrix product sees it.
    fn grid(self, x: &[f32], width: usize) -> Vec<f32>;

    /// `x + λ·(q(x) − x)`, on the grid for λ = 1 and `x` itself for λ = 0. Shape and dtype (f32) of `x`. The gradient
    /// passes the quantization unchanged, whatever λ is.
    fn blend(self, x: &Tensor, lambda: f32) -> Result<Tensor> {
        x.apply_op1(Blend { quantizer: self, lambda })
    }

    /// [`blend`](Self::blend) of values on a device.
    #[cfg(feature = "cuda")]
    fn blend_on_cuda(self, x: (&CudaStorage, &Layout), lambda: f32)
    -> Result<(CudaStorage, Shape)>;
}

/// The op behind [`Quantizer::blend`]: backward it is the identity, the straight-through estimator.
struct Blend<Q> {
    quantizer: Q,
    lambda: f32,
}

impl<Q: Quantizer> CustomOp1 for Blend<Q> {
    fn name(&self) -> &'static str {
        "quantize"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = contiguous::<f32>(x, layout)?;
        let mut y = self.quantizer.grid(&x, layout.dims().last().copied().unwrap_or(1).max(1));
        if self.lambda != 1. {
            y.par_iter_mut().zip(&*x).for_each(|(y, x)| *y = x + self.lambda * (*y - x));
        }
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        self.quantizer.blend_on_cuda((x, layout), self.lambda)
    }

    crate::no_metal_fwd!(1);

    fn bwd(&self, _x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(dy.clone()))
    }
}

/// Integer codes of a weight matrix, with one scale for all of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightQuantizer {
    /// −1, 0, 1 by absolute mean: b1.58.
    Absmean(Rounding),
    /// −1, 1 by the sign of the distance from the mean: the first BitNet.
    Sign,
}

impl From<Rounding> for WeightQuantizer {
    fn from(rounding: Rounding) -> Self {
        Self::Absmean(rounding)
    }
}

/// What all codes of one matrix share.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct WeightCodes {
    /// `β`: multiplies a code.
    pub scale: f32,
    inverse: f32,
    mean: f32,
    quantizer: WeightQuantizer,
}

impl WeightQuantizer {
    /// Scale and thresholds of a matrix.
    pub fn codes(self, weights: &[f32]) -> WeightCodes {
        let scale = weight_scale(weights);
        let mean = match self {
            Self::Absmean(_) => 0.,
            Self::Sign => weight_mean(weights),
        };
        WeightCodes { scale, inverse: 1. / scale, mean, quantizer: self }
    }

    /// The codes nearest to weights in units of a `scale` that is given, and not theirs.
    pub fn codes_at(self, scale: f32) -> WeightCodes {
        WeightCodes { scale, inverse: 1. / scale, mean: 0., quantizer: self }
    }
}

impl WeightCodes {
    /// The code, −1, 0 or 1, of one weight of the matrix.
    #[inline]
    pub fn code(&self, weight: f32) -> i8 {
        match self.quantizer {
            WeightQuantizer::Absmean(rounding) => ternary(weight, self.inverse, rounding),
            WeightQuantizer::Sign => sign(weight, self.mean),
        }
    }
}

impl Quantizer for WeightQuantizer {
    /// `code · β`; `β` is of all of `x`.
    fn grid(self, x: &[f32], _width: usize) -> Vec<f32> {
        let codes = self.codes(x);
        x.par_iter().map(|&w| f32::from(codes.code(w)) * codes.scale).collect()
    }

    #[cfg(feature = "cuda")]
    fn blend_on_cuda(
        self,
        x: (&CudaStorage, &Layout),
        lambda: f32,
    ) -> Result<(CudaStorage, Shape)> {
        cuda::ops::blend_weights(x, self, lambda)
    }
}

/// Integer codes of activations, with one scale a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ActivationCodes {
    /// −127 … 127 by absolute maximum.
    Int8(Rounding),
    /// −7 … 7 by absolute maximum. (−8, the sixteenth code, is out of reach of a symmetric scale.)
    Int4(Rounding),
}

impl From<Rounding> for ActivationCodes {
    fn from(rounding: Rounding) -> Self {
        Self::Int8(rounding)
    }
}

impl ActivationCodes {
    /// `a` of one token: a code is `round(x · a)`. NaN if a value is not finite, so that the product is.
    pub fn factor(self, row: &[f32]) -> f32 {
        if row.iter().any(|x| !x.is_finite()) {
            return f32::NAN;
        }
        match self {
            Self::Int8(_) => activation_factor(row),
            Self::Int4(_) => int4_factor(row),
        }
    }

    /// The code of one activation of a token with this `factor`.
    #[inline]
    pub fn code(self, x: f32, factor: f32) -> i8 {
        match self {
            Self::Int8(rounding) => int8(x, factor, rounding),
            Self::Int4(rounding) => int4(x, factor, rounding),
        }
    }
}

impl Quantizer for ActivationCodes {
    /// `code / a` row by row.
    fn grid(self, x: &[f32], width: usize) -> Vec<f32> {
        let mut quantized = x.to_vec();
        quantized.par_chunks_mut(width.max(1)).for_each(|row| {
            let factor = self.factor(row);
            row.iter_mut().for_each(|x| *x = f32::from(self.code(*x, factor)) / factor);
        });
        quantized
    }

    #[cfg(feature = "cuda")]
    fn blend_on_cuda(
        self,
        x: (&CudaStorage, &Layout),
        lambda: f32,
    ) -> Result<(CudaStorage, Shape)> {
        cuda::ops::blend_rows(x, self, lambda)
    }
}

/// How a projection takes its input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ActivationQuantizer {
    /// The integers.
    pub codes: ActivationCodes,
    /// Whether the input is [rotated](hadamard()) first: outliers spread over the row, and the weight is learnt in
    /// rotated coordinates.
    pub hadamard: bool,
}

impl From<Rounding> for ActivationQuantizer {
    fn from(rounding: Rounding) -> Self {
        Self { codes: rounding.into(), hadamard: false }
    }
}

impl ActivationQuantizer {
    /// `x` (…, width) f32 in the coordinates in which it is quantized; differentiable.
    pub fn rotate(self, x: &Tensor) -> Result<Tensor> {
        if self.hadamard { hadamard(x) } else { Ok(x.clone()) }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;
    use crate::{
        activations::QuantizedActivations,
        kernels::TileFormat,
        weights::{TernaryWeight, ternary_product},
    };

    fn values(count: usize, seed: f32) -> Vec<f32> {
        (0..count).map(|i| ((i as f32 + seed) * 12.9898).sin() + 0.1).collect()
    }

    const EVEN: Rounding = Rounding::HalfEven;

    #[test]
    fn binary_weights_are_signs_around_the_mean() {
        // mean 0.25, mean |w| 0.75: what is not above the mean is negative.
        let w = [1f32, -0.5, 0.25, 0.25, 1.5, -1.];
        let grid = WeightQuantizer::Sign.grid(&w, 3);
        assert_eq!(grid, [0.75, -0.75, -0.75, -0.75, 0.75, -0.75]);
    }

    #[test]
    fn four_bit_codes_are_sevenths_of_the_largest() {
        let codes = ActivationCodes::Int4(EVEN);
        let x = [-3.5f32, 1., 0.25, 0.75, 0., 2.];
        let factor = codes.factor(&x);
        assert_eq!(factor, 2.);
        assert_eq!(x.map(|x| codes.code(x, factor)), [-7, 2, 0, 2, 0, 4]);
        assert_eq!(codes.grid(&x, 6), [-3.5, 1., 0., 1., 0., 2.]);
        assert_eq!(codes.grid(&[0.; 6], 3), [0.; 6]);
        assert!(codes.grid(&[1., f32::INFINITY], 2).iter().all(|x| x.is_nan()));
    }

    #[test]
    fn every_combination_runs_on_integers() {
        let (tokens, out, width) = (5, 24, 70);
        let (x, w) = (values(tokens * width, 0.), values(out * width, 0.5));
        for weight in [WeightQuantizer::Absmean(EVEN), WeightQuantizer::Sign] {
            for input in [ActivationCodes::Int8(EVEN), ActivationCodes::Int4(Rounding::HalfUp)] {
                for format in TileFormat::ALL {
                    let packed = TernaryWeight::from_latent(&w, (out, width), weight, format);
                    assert_eq!(packed.dequantize(), weight.grid(&w, width), "{weight:?}");
                    let (wq, xq) = (weight.grid(&w, width), input.grid(&x, width));
                    let rows = QuantizedActivations::new(&x, width, input, format);
                    for (token, xq) in xq.chunks(width).enumerate() {
                        let codes = rows.codes()[token * rows.stride()..].iter();
                        let value = |&code: &i8| f32::from(code) / rows.factors()[token];
                        assert!(xq.iter().copied().eq(codes.take(width).map(value)), "{input:?}");
                    }
                    let naive = xq.chunks(width).flat_map(|x| {
                        let dot = |w: &[f32]| x.iter().zip(w).map(|(x, w)| x * w).sum::<f32>();
                        wq.chunks(width).map(dot).collect::<Vec<_>>()
                    });
                    let product = ternary_product(&x, &[packed], input);
                    // The product is exact but for one rounding; the oracle sums 70 floats below 2, up to about 50.
                    let off = product.iter().zip(naive).map(|(y, n)| (y - n).abs());
                    assert!(off.fold(0., f32::max) < 5e-5, "{weight:?} {input:?}");
                }
            }
        }
        let packed = TernaryWeight::from_latent(&w, (out, width), EVEN, TileFormat::TwoBit);
        let product = ternary_product(&[f32::NAN; 70], &[packed], ActivationCodes::Int4(EVEN));
        assert!(product.iter().all(|y| y.is_nan()));
    }

    #[test]
    fn a_blend_goes_from_the_value_to_the_grid() {
        let x = Var::from_vec(values(12, 0.), (2, 6), &Device::Cpu).unwrap();
        let flat = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let input = ActivationCodes::Int8(EVEN);
        let (raw, grid) = (flat(&x), input.grid(&flat(&x), 6));
        assert_eq!(flat(&input.blend(&x, 0.).unwrap()), raw);
        assert_eq!(flat(&input.blend(&x, 1.).unwrap()), grid);
        let half = input.blend(&x, 0.5).unwrap();
        for ((half, raw), grid) in flat(&half).iter().zip(&raw).zip(&grid) {
            assert!((half - (raw + grid) / 2.).abs() < 1e-6);
        }
        let grads = half.sum_all().unwrap().backward().unwrap();
        assert_eq!(flat(grads.get(&x).unwrap()), [1.; 12]);
    }
}
