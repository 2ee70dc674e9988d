//! TQ1_0: 256 codes in 52 bytes and an f16 scale. Five codes a byte, the last sixteen four a byte.
//!
//! The codes of a byte are the digits of a fraction in base 3, `byte / 256 ≈ 0.d₀d₁d₂d₃d₄`: multiplying it by 3 moves
//! the next digit in front of the point. The first 32 bytes hold the codes j, 32 + j, …, 128 + j of the first 160, the
//! next 16 the codes j, 16 + j, …, 64 + j of the next 80, the last 4 the codes j, 4 + j, 8 + j, 12 + j of the rest.

pub(super) const WEIGHTS: usize = 256;
pub(super) const BYTES: usize = 54;
pub(super) const SCALE: usize = 52;

pub(super) fn codes(block: &[u8], codes: &mut [u8]) {
    let (first, rest) = codes.split_at_mut(160);
    let (second, third) = rest.split_at_mut(80);
    for (bytes, codes) in
        [(&block[..32], first), (&block[32..48], second), (&block[48..SCALE], third)]
    {
        let mut power = 1u8;
        for codes in codes.chunks_exact_mut(bytes.len()) {
            for (code, byte) in codes.iter_mut().zip(bytes) {
                *code = ((u16::from(byte.wrapping_mul(power)) * 3) >> 8) as u8;
            }
            power = power.wrapping_mul(3); // 3⁵ = 243 still fits
        }
    }
}

/// Rounded up, a byte's fraction lies above the number it stands for by less than its last digit.
pub(super) fn pack(codes: &[u8], bytes: &mut [u8]) {
    let (first, rest) = bytes.split_at_mut(32);
    let (second, third) = rest.split_at_mut(16);
    for (bytes, codes) in
        [(first, &codes[..160]), (second, &codes[160..240]), (third, &codes[240..])]
    {
        for j in 0..bytes.len() {
            let digits = codes[j..].iter().step_by(bytes.len()).chain(&[0]).take(5);
            let number = digits.fold(0, |number, digit| 3 * number + u32::from(*digit));
            bytes[j] = (number * 256).div_ceil(243) as u8;
        }
    }
}
