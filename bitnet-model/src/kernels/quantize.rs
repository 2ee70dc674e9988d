//! Activations to int8, one scale a row: `a = 127 / max(max|x|, 1e-5)`, `code = round(x · a)` (arXiv:2402.17764,
//! eq. 4–5, with the rounding of the checkpoint's own software).

/// Adding 1.5 · 2²³ to `y`, `|y| < 2²²`, rounds it half to even and leaves the integer in the low bits.
const MAGIC: f32 = 12_582_912.;

#[inline(always)]
pub(super) fn quantize_row(x: &[f32], half_up: bool, codes: &mut [i8]) -> (f32, i32) {
    let (codes, padding) = codes.split_at_mut(x.len());
    padding.fill(0);
    // Without the sign, the bits of floats are ordered as the floats are, infinity above them and NaN above that.
    let absmax = x.iter().fold(0, |max, x| (x.to_bits() & i32::MAX as u32).max(max));
    let absmax = f32::from_bits(absmax);
    if !absmax.is_finite() {
        codes.fill(0);
        return (f32::NAN, 0);
    }
    let a = 127. / absmax.max(1e-5);
    let mut sum = 0;
    for (code, x) in codes.iter_mut().zip(x) {
        // a and x · a are each off by at most 2⁻²⁴ of themselves: |y| < 127.0001, so no code leaves [−127, 127].
        let y = x * a;
        let y = if half_up { (y + 0.5).floor() } else { y };
        *code = (y + MAGIC).to_bits() as i8;
        sum += i32::from(*code);
    }
    (a, sum)
}
