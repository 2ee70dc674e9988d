//! Q4_K: 256 nibbles in eight groups of 32, each with a scale and a minimum of 6 bits, and an f16 factor for either:
//! `weight = scale · nibble − minimum`.
//!
//! Two groups share 32 bytes, the even one has the low bits. Of the twelve bytes of scales, `s[g]` and `s[4 + g]` hold in
//! their low six bits scale and minimum of group g < 4; those of group 4 + g have their low four bits in the two halves
//! of `s[8 + g]` and their high two bits on top of `s[g]` and `s[4 + g]`.

pub(super) const WEIGHTS: usize = 256;
pub(super) const BYTES: usize = 144;

/// Scale and minimum of a group.
fn factors(s: &[u8], group: usize) -> (u8, u8) {
    match group.checked_sub(4) {
        None => (s[group] & 63, s[4 + group] & 63),
        Some(g) => (s[8 + g] & 15 | s[g] >> 6 << 4, s[8 + g] >> 4 | s[4 + g] >> 6 << 4),
    }
}

pub(super) fn dequantize(block: &[u8], weights: &mut [f32]) {
    let (scale, minimum) = (super::half(block, 0), super::half(block, 2));
    let (factors_of, nibbles) = block[4..].split_at(12);
    for (group, weights) in weights.chunks_exact_mut(32).enumerate() {
        let (s, m) = factors(factors_of, group);
        let (scale, minimum) = (scale * f32::from(s), minimum * f32::from(m));
        for (weight, byte) in weights.iter_mut().zip(&nibbles[group / 2 * 32..]) {
            *weight = scale * f32::from(byte >> (group % 2 * 4) & 15) - minimum;
        }
    }
}
