//! Half-precision numbers, and conversions as PTX rounds them.

/// The value of an IEEE half.
pub fn from_f16(bits: u16) -> f32 {
    let (sign, exponent, fraction) =
        (u32::from(bits >> 15) << 31, u32::from(bits >> 10 & 31), u32::from(bits & 0x3ff));
    match exponent {
        // A subnormal is fraction · 2⁻²⁴, which an f32 holds exactly.
        0 => f32::from_bits((fraction as f32 * 2f32.powi(-24)).to_bits() | sign),
        31 => f32::from_bits(sign | 0x7f80_0000 | fraction << 13),
        _ => f32::from_bits(sign | (exponent + 112) << 23 | fraction << 13),
    }
}

/// The nearest IEEE half, ties to even.
pub fn to_f16(x: f32) -> u16 {
    let (sign, magnitude) = ((x.to_bits() >> 16 & 0x8000) as u16, x.abs());
    if magnitude.is_nan() {
        return 0x7fff;
    }
    // Between 2ᵉ and 2ᵉ⁺¹ halves are 2ᵉ⁻¹⁰ apart, and nowhere closer than 2⁻²⁴; the quotient and its rounding are exact.
    let exponent = ((magnitude.to_bits() >> 23) as i32 - 127).max(-14);
    let steps = (magnitude / 2f32.powi(exponent - 10)).round_ties_even();
    let bits = if exponent > 15 { 0x7c00 } else { ((exponent + 14) as u32 * 1024) + steps as u32 };
    sign | bits.min(0x7c00) as u16
}

/// The value of a bfloat16.
pub fn from_bf16(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// The nearest bfloat16, ties to even.
pub fn to_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    if x.is_nan() { 0x7fff } else { ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_survives_and_halfway_goes_to_even() {
        for bits in 0..=u16::MAX {
            let half = from_f16(bits);
            if half.is_nan() {
                assert_eq!(to_f16(half), 0x7fff);
                continue;
            }
            assert_eq!(to_f16(half), bits);
            let next = from_f16(bits.wrapping_add(1));
            if half.is_finite()
                && next.is_finite()
                && half.is_sign_positive() == next.is_sign_positive()
            {
                let even = if bits & 1 == 0 { bits } else { bits + 1 };
                assert_eq!(to_f16((half + next) / 2.), even, "between {half} and {next}");
            }
        }
        assert_eq!([65519., 65520., 1e30].map(to_f16), [0x7bff, 0x7c00, 0x7c00]);
    }

    #[test]
    fn bfloat16_rounds_to_even() {
        let cases = [
            (1.0f32, 0x3f80),
            (1. + 1. / 256., 0x3f80),
            (1. + 3. / 256., 0x3f82),
            (f32::MAX, 0x7f80),
        ];
        for (x, bits) in cases {
            assert_eq!(to_bf16(x), bits);
        }
    }
}
