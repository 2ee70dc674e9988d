//! Q6_K: 256 values of 6 bits, value + 32, a signed byte as the scale of each sixteen, and an f16 factor.
//!
//! Of each half, 64 bytes hold the low four bits, of weights j in the low and of 64 + j in the high nibble of byte j, and
//! 32 bytes the high two, of weights j, 32 + j, 64 + j and 96 + j in byte j, low bits first.

use half::f16;

pub(super) const WEIGHTS: usize = 256;
pub(super) const BYTES: usize = 210;

/// Weights that share a scale.
const GROUP: usize = 16;
const GROUPS: usize = WEIGHTS / GROUP;
/// Where the scales stand, and behind them the factor.
const SCALES: usize = 192;
const FACTOR: usize = SCALES + GROUPS;
/// ggml takes smaller numbers for 0.
const TINY: f32 = 1e-15;

pub(super) fn dequantize(block: &[u8], weights: &mut [f32]) {
    let (low, rest) = block.split_at(128);
    let (high, rest) = rest.split_at(64);
    let factor = super::half(rest, 16);
    for (half, weights) in weights.chunks_exact_mut(128).enumerate() {
        let (low, high, scales) = (&low[64 * half..], &high[32 * half..], &rest[8 * half..]);
        for (i, weight) in weights.iter_mut().enumerate() {
            let four = low[i % 64] >> (i / 64 * 4) & 15;
            let two = high[i % 32] >> (i / 32 * 2) & 3;
            let scale = factor * f32::from(scales[i / 16] as i8);
            *weight = scale * (f32::from(four | two << 4) - 32.);
        }
    }
}

/// The block that ggml makes of the weights: a scale for every group by [`fit`], the scales themselves in units of −1/128 of
/// the largest, and the values once more for the scales as they are then.
pub(super) fn quantize(weights: &[f32], block: &mut [u8]) {
    block.fill(0);
    let mut values = [0i8; WEIGHTS];
    let mut scales = [0f32; GROUPS];
    for ((group, values), scale) in groups(weights, &mut values).zip(&mut scales) {
        *scale = fit(group, values);
    }
    let largest = scales.iter().fold(0f32, |a, b| if b.abs() > a.abs() { *b } else { a });
    if largest.abs() < TINY {
        return;
    }
    let inverse = -128. / largest;
    let factor = f16::from_f32(1. / inverse);
    block[FACTOR..].copy_from_slice(&factor.to_le_bytes());
    for (index, (group, values)) in groups(weights, &mut values).enumerate() {
        let scale = (inverse * scales[index]).round_ties_even().min(127.);
        block[SCALES + index] = scale as i8 as u8;
        let step = factor.to_f32() * scale;
        if step != 0. {
            for (value, weight) in values.iter_mut().zip(group) {
                *value = nearest(weight / step);
            }
        }
    }
    for (i, value) in values.into_iter().enumerate() {
        let (half, i) = (i / 128, i % 128);
        let value = (value + 32) as u8;
        block[64 * half + i % 64] |= (value & 15) << (i / 64 * 4);
        block[128 + 32 * half + i % 32] |= value >> 4 << (i / 32 * 2);
    }
}

fn groups<'a>(
    weights: &'a [f32],
    values: &'a mut [i8; WEIGHTS],
) -> impl Iterator<Item = (&'a [f32], &'a mut [i8])> {
    weights.chunks_exact(GROUP).zip(values.chunks_exact_mut(GROUP))
}

/// The value of a weight in units of its scale.
fn nearest(quotient: f32) -> i8 {
    quotient.round_ties_even().clamp(-32., 31.) as i8
}

/// The scale, of 19 around the one that makes the largest weight −32, whose values leave the least Σ w²(w − scale·value)²; its
/// values are put into `values`.
///
/// For given values the best scale is Σ w³v / Σ w²v², and leaves Σ w⁴ less the square of the numerator by the denominator.
fn fit(weights: &[f32], values: &mut [i8]) -> f32 {
    let largest = weights.iter().fold(0f32, |a, b| if b.abs() > a.abs() { *b } else { a });
    if largest.abs() < TINY {
        values.fill(-32); // what ggml stores; their scale is 0
        return 0.;
    }
    let (mut best, mut scale) = (0., 0.);
    for step in std::iter::once(0).chain((-9..=9).filter(|step| *step != 0)) {
        let inverse = -(32. + 0.1 * step as f32) / largest;
        let (mut numerator, mut denominator) = (0f32, 0f32);
        for weight in weights {
            let value = f32::from(nearest(inverse * weight));
            let importance = weight * weight;
            numerator += importance * weight * value;
            denominator += importance * value * value;
        }
        let is_better = denominator > 0. && numerator * numerator > best * denominator;
        if step == 0 || is_better {
            scale = if denominator > 0. { numerator / denominator } else { 0. };
            best = scale * numerator;
            for (value, weight) in values.iter_mut().zip(weights) {
                *value = nearest(inverse * weight);
            }
        }
    }
    scale
}
