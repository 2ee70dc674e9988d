//! Q4_0: an f16 scale and 32 nibbles, value + 8. Byte `j` holds weights j, in its low bits, and 16 + j.

pub(super) const WEIGHTS: usize = 32;
pub(super) const BYTES: usize = 18;

pub(super) fn dequantize(block: &[u8], weights: &mut [f32]) {
    let scale = super::half(block, 0);
    let (low, high) = weights.split_at_mut(16);
    for ((low, high), byte) in low.iter_mut().zip(high).zip(&block[2..]) {
        *low = scale * (f32::from(byte & 15) - 8.);
        *high = scale * (f32::from(byte >> 4) - 8.);
    }
}
