//! Panels of values in single precision, and of pairs of bfloat16.

use bytemuck::Pod;

use crate::kernels::{self, Bf16Panels, PanelProduct, PanelWidths};

/// How panels are stored and multiplied.
pub trait Panels: Sync {
    type Value: Pod + Default + Send + Sync;
    /// Depths in a value.
    const PAIR: usize;
    /// Indices of a panel.
    fn widths(&self) -> PanelWidths;
    /// The values of one index over the depth, [`PAIR`](Self::PAIR) to a value.
    fn convert(&self, line: &[f32], out: &mut [Self::Value]);
    /// The values of an index at [`PAIR`](Self::PAIR) depths.
    fn join(&self, low: f32, high: f32) -> Self::Value;
    /// As [`join`](Self::join), of the weights `code − 1` of two ternary codes.
    fn join_codes(&self, low: u32, high: u32) -> Self::Value;
    /// As [`join`](Self::join), of two bfloat16.
    fn join_bf16(&self, low: u16, high: u16) -> Self::Value;
    /// Adds the product of panels `a` and `b` to `out`, or puts it there.
    fn multiply(
        &self,
        a: &[Self::Value],
        b: &[Self::Value],
        product: PanelProduct,
        out: &mut [f32],
    );
}

/// Single precision; with `true`, of values rounded to bfloat16.
pub(super) struct F32Panels(pub &'static kernels::Kernel, pub bool);

impl Panels for F32Panels {
    type Value = f32;
    const PAIR: usize = 1;

    fn widths(&self) -> PanelWidths {
        self.0.panel_widths()
    }

    #[inline(always)]
    fn convert(&self, line: &[f32], out: &mut [f32]) {
        for (value, out) in line.iter().zip(out) {
            *out = self.join(*value, 0.);
        }
    }

    #[inline(always)]
    fn join(&self, value: f32, _: f32) -> f32 {
        if self.1 { to_bf16(value) } else { value }
    }

    #[inline(always)]
    fn join_bf16(&self, value: u16, _: u16) -> f32 {
        f32::from_bits(u32::from(value) << 16)
    }

    #[inline(always)]
    fn join_codes(&self, code: u32, _: u32) -> f32 {
        code as f32 - 1.
    }

    fn multiply(&self, a: &[f32], b: &[f32], product: PanelProduct, out: &mut [f32]) {
        self.0.multiply_panels(a, b, product, out);
    }
}

impl Panels for Bf16Panels {
    type Value = u32;
    const PAIR: usize = 2;

    fn widths(&self) -> PanelWidths {
        Bf16Panels::widths(*self)
    }

    #[inline(always)]
    fn convert(&self, line: &[f32], out: &mut [u32]) {
        for (pair, out) in line.as_chunks::<2>().0.iter().zip(out) {
            *out = bf16_pair(pair[0], pair[1]);
        }
    }

    #[inline(always)]
    fn join(&self, low: f32, high: f32) -> u32 {
        bf16_pair(low, high)
    }

    #[inline(always)]
    fn join_bf16(&self, low: u16, high: u16) -> u32 {
        u32::from(low) | u32::from(high) << 16
    }

    /// In halves of 16 bits: 1 is 0x3f80 = 0x4000 − 0x80, and −1 has the sign as well.
    #[inline(always)]
    fn join_codes(&self, low: u32, high: u32) -> u32 {
        let codes = low | high << 16;
        let is_odd = codes & 0x0001_0001;
        let is_even = is_odd ^ 0x0001_0001;
        let is_minus = is_even & !(codes >> 1);
        ((is_even << 14) - (is_even << 7)) | is_minus << 15
    }

    fn multiply(&self, a: &[u32], b: &[u32], product: PanelProduct, out: &mut [f32]) {
        Bf16Panels::multiply(*self, a, b, product, out);
    }
}

/// The bfloat16 nearest to `x`, half to even; a NaN stays one.
#[inline(always)]
fn bf16_bits(x: f32) -> u32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    if x.is_nan() { 0x7fc0 } else { rounded }
}

#[inline(always)]
fn bf16_pair(low: f32, high: f32) -> u32 {
    bf16_bits(low) | bf16_bits(high) << 16
}

#[inline(always)]
fn to_bf16(x: f32) -> f32 {
    f32::from_bits(bf16_bits(x) << 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_to_bfloat16_is_halfs() {
        for bits in (0..=u32::MAX).step_by(65_521).chain([0x7f80_0000, 0x7f7f_ffff, 0xffc0_0001]) {
            let x = f32::from_bits(bits);
            let found = half::bf16::from_bits(bf16_bits(x) as u16);
            assert!(found == half::bf16::from_f32(x) || x.is_nan() && found.is_nan(), "{x:?}");
        }
    }

    #[test]
    fn codes_become_their_weights() {
        let pairs = (0..3).flat_map(|low| (0..3).map(move |high| (low, high)));
        let single = F32Panels(kernels::active(), false);
        for (low, high) in pairs {
            let [a, b] = [low, high].map(|code| code as f32 - 1.);
            assert_eq!(single.join_codes(low, high), a);
            if let Some(panels) = Bf16Panels::new() {
                assert_eq!(panels.join_codes(low, high), bf16_pair(a, b));
            }
        }
    }
}
