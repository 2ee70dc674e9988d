//! Q8_0: an f16 scale and 32 signed bytes.

use half::f16;

pub(super) const WEIGHTS: usize = 32;
pub(super) const BYTES: usize = 34;

pub(super) fn dequantize(block: &[u8], weights: &mut [f32]) {
    let scale = super::half(block, 0);
    for (weight, byte) in weights.iter_mut().zip(&block[2..]) {
        *weight = scale * f32::from(*byte as i8);
    }
}

/// As ggml rounds: with the scale before it became an f16, half away from zero.
pub(super) fn quantize(weights: &[f32], block: &mut [u8]) {
    let largest = weights.iter().fold(0f32, |largest, weight| largest.max(weight.abs()));
    let scale = largest / 127.;
    let inverse = if scale == 0. { 0. } else { 1. / scale };
    block[..2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
    for (byte, weight) in block[2..].iter_mut().zip(weights) {
        *byte = (weight * inverse).round() as i8 as u8;
    }
}
