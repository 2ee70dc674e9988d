//! The mathematics of BitNet b1.58 quantization, written once and to be read.
//!
//! - weights: ternary by absolute mean, `clip(round(w / β), -1, 1)`, `β = max(mean|w|, ε)`
//!   (arXiv:2402.17764, equations 1–3);
//! - activations: int8 by absolute maximum per token, `clip(round(x · a), -128, 127)`,
//!   `a = 127 / max(max|x|, ε)` (equation 4);
//! - all are trained straight through: the gradient passes the rounding unchanged, and none flows
//!   through `β` or `a`.
//!
//! Its relatives, which the same integer kernels run:
//!
//! - binary weights, `sign(w − mean(w)) · mean|w|`, of the first BitNet (arXiv:2310.11453);
//! - 4-bit activations, `clip(round(x · 7 / max|x|), -8, 7)`, as BitNet a4.8 and v2 have them but with the absolute
//!   maximum in place of the mean;
//! - activations rotated by a [`hadamard()`] transform before they are rounded (arXiv:2504.18415).
//!
//! [`Quantizer`] is what they have in common; a [`Scheme`] says which of them each projection has.
//!
//! All arithmetic is f32. As in the reference implementation the weight is multiplied by the
//! reciprocal `1/β`, not divided by `β`, and `ε` clamps the mean instead of being added to it.

use candle_core::{Result, Tensor};

use crate::threads;

mod hadamard;
mod quantizer;
mod scheme;

pub use hadamard::{hadamard, hadamard_block};
pub use quantizer::{
    ActivationCodes, ActivationQuantizer, Quantizer, WeightCodes, WeightQuantizer,
};
pub use scheme::{InputKind, InputWidth, Scheme, WeightKind};

/// Smallest `mean|w|` and `max|x|`: below it, everything rounds to 0.
pub const EPSILON: f32 = 1e-5;

/// Where a value exactly between two integers goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rounding {
    /// To the even neighbour (`torch.round`): Microsoft's and 1bitLLM's checkpoints.
    HalfEven,
    /// Upwards, `floor(x + 0.5)`: models trained with onebitllms (Falcon-E).
    HalfUp,
}

impl Rounding {
    /// Rounds `x` to an integer value.
    #[inline]
    pub fn round(self, x: f32) -> f32 {
        match self {
            Self::HalfEven => x.round_ties_even(),
            Self::HalfUp => (x + 0.5).floor(),
        }
    }
}

/// `β = max(mean|w|, ε)`: the scale of a ternary matrix. Summed in f64, so the f32 result does not
/// depend on the order of the sum.
pub fn weight_scale(weights: &[f32]) -> f32 {
    mean(weights, |w| f64::from(w.abs())).max(EPSILON)
}

fn mean(weights: &[f32], of: impl Fn(f32) -> f64 + Sync) -> f32 {
    // Fixed chunks, added up in order: the same bits whatever the number of threads.
    const CHUNK: usize = 1 << 16;
    let mut chunks = vec![0f64; weights.len().div_ceil(CHUNK)];
    threads::for_each_chunk(&mut chunks, 1, |index, sum| {
        let chunk = &weights[index * CHUNK..weights.len().min((index + 1) * CHUNK)];
        // Eight sums side by side: one alone would wait for each addition.
        let mut sums = [0f64; 8];
        for eight in chunk.chunks(8) {
            sums.iter_mut().zip(eight).for_each(|(sum, &w)| *sum += of(w));
        }
        sum[0] = sums.iter().sum();
    });
    (chunks.iter().sum::<f64>() / weights.len().max(1) as f64) as f32
}

/// The ternary value, −1, 0 or 1, of one weight; `inverse_scale` is `1/β`.
#[inline]
pub fn ternary(weight: f32, inverse_scale: f32, rounding: Rounding) -> i8 {
    // clamp(round(x), −1, 1) without a call to the rounding function: the halves decide.
    let x = weight * inverse_scale;
    match rounding {
        Rounding::HalfEven => i8::from(x > 0.5) - i8::from(x < -0.5),
        Rounding::HalfUp => i8::from(x + 0.5 >= 1.) - i8::from(x + 0.5 < 0.),
    }
}

/// `a = 127 / max(max|x|, ε)` of one token's activations.
pub fn activation_factor(row: &[f32]) -> f32 {
    127. / absmax(row).max(EPSILON)
}

fn absmax(row: &[f32]) -> f32 {
    row.iter().fold(0f32, |max, x| max.max(x.abs()))
}

/// The int8 code of one activation; `factor` is `a`.
#[inline]
pub fn int8(x: f32, factor: f32, rounding: Rounding) -> i8 {
    rounding.round(x * factor).clamp(-128., 127.) as i8
}

/// `round(x · 7 / max|x|)`, clipped to −8 … 7: the 4-bit code of one activation; `factor` is `7 / max(max|x|, ε)`.
#[inline]
pub fn int4(x: f32, factor: f32, rounding: Rounding) -> i8 {
    rounding.round(x * factor).clamp(-8., 7.) as i8
}

/// `7 / max(max|x|, ε)` of one token's activations, for [`int4`].
pub fn int4_factor(row: &[f32]) -> f32 {
    7. / absmax(row).max(EPSILON)
}

/// The mean of a matrix, around which [`sign`] looks. Summed as [`weight_scale`].
pub fn weight_mean(weights: &[f32]) -> f32 {
    mean(weights, f64::from)
}

/// `sign(w − mean(w))`, −1 or 1, of one weight; as in the paper a weight that is the mean becomes −1.
#[inline]
pub fn sign(weight: f32, mean: f32) -> i8 {
    if weight > mean { 1 } else { -1 }
}

/// [`WeightQuantizer::Absmean`] as an operation on tensors. Shape and dtype (f32) of `weight`; its gradient is identity.
pub fn fake_quantize_weight(weight: &Tensor, rounding: Rounding) -> Result<Tensor> {
    WeightQuantizer::Absmean(rounding).blend(weight, 1.)
}

/// [`ActivationCodes::Int8`] as an operation on tensors: `code / a` per row of the last dimension. Shape and dtype
/// (f32) of `x`; its gradient is identity.
pub fn fake_quantize_activation(x: &Tensor, rounding: Rounding) -> Result<Tensor> {
    ActivationCodes::Int8(rounding).blend(x, 1.)
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor, Var};

    use super::*;

    #[test]
    fn halves_round_as_named() {
        let halves = [-1.5f32, -0.5, 0.5, 1.5, 2.5];
        assert_eq!(halves.map(|x| Rounding::HalfEven.round(x)), [-2., 0., 0., 2., 2.]);
        assert_eq!(halves.map(|x| Rounding::HalfUp.round(x)), [-1., 0., 1., 2., 3.]);
    }

    #[test]
    fn ternary_is_the_clamped_round() {
        let halves = [0.5f32, -0.5, 1.5, -1.5, 0., -0., 3., -3., f32::INFINITY];
        let near = halves.iter().flat_map(|x| [*x, x.next_up(), x.next_down()]);
        for x in near.chain((-300..300).map(|i| i as f32 * 0.0117)) {
            for rounding in [Rounding::HalfEven, Rounding::HalfUp] {
                let want = rounding.round(x).clamp(-1., 1.) as i8;
                assert_eq!(ternary(x, 1., rounding), want, "{x:?} {rounding:?}");
            }
        }
    }

    #[test]
    fn a_matrix_becomes_three_values() {
        // mean|w| = (0.2 + 0.6 + 0 + 1.2) / 4 = 0.5
        let w = Tensor::new(&[[0.2f32, -0.6], [0., 1.2]], &Device::Cpu).unwrap();
        let q = fake_quantize_weight(&w, Rounding::HalfEven).unwrap();
        assert_eq!(q.to_vec2::<f32>().unwrap(), [[0., -0.5], [0., 0.5]]);
    }

    #[test]
    fn a_zero_row_stays_zero() {
        assert_eq!(activation_factor(&[0., 0.]), 127. / EPSILON);
        let x = Tensor::zeros((2, 4), candle_core::DType::F32, &Device::Cpu).unwrap();
        let q = fake_quantize_activation(&x, Rounding::HalfEven).unwrap();
        assert_eq!(q.to_vec2::<f32>().unwrap(), [[0.; 4]; 2]);
    }

    #[test]
    fn gradients_pass_straight_through() {
        let x = Var::new(&[0.3f32, -0.7, 2.], &Device::Cpu).unwrap();
        let seed = Tensor::new(&[1f32, 2., 3.], &Device::Cpu).unwrap();
        for y in [
            fake_quantize_weight(&x, Rounding::HalfEven).unwrap(),
            fake_quantize_activation(&x, Rounding::HalfUp).unwrap(),
        ] {
            let grads = (y * &seed).unwrap().sum_all().unwrap().backward().unwrap();
            assert_eq!(grads.get(&x).unwrap().to_vec1::<f32>().unwrap(), [1., 2., 3.]);
        }
    }
}
