//! Q6_K: 256 values of 6 bits, value + 32, a signed byte as the scale of each sixteen, and an f16 factor.
//!
//! Of each half, 64 bytes hold the low four bits, of weights j in the low and of 64 + j in the high nibble of byte j, and
//! 32 bytes the high two, of weights j, 32 + j, 64 + j and 96 + j in byte j, low bits first.

pub(super) const WEIGHTS: usize = 256;
pub(super) const BYTES: usize = 210;

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
