//! Q8_0: an f16 scale and 32 signed bytes.

pub(super) const WEIGHTS: usize = 32;
pub(super) const BYTES: usize = 34;

pub(super) fn dequantize(block: &[u8], weights: &mut [f32]) {
    let scale = super::half(block, 0);
    for (weight, byte) in weights.iter_mut().zip(&block[2..]) {
        *weight = scale * f32::from(*byte as i8);
    }
}
