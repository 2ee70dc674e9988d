//! The output head in 8, 6 or 4 bits a weight, and activations of 13 bits: one layout for every instruction set.
//!
//! Sixteen rows are a band. A [`Line`] of 64 bytes is one AVX-512 register whose 32-bit lane `r` belongs to row `r`, so
//! products of unsigned codes with four broadcast activations need no horizontal sum. A group of 32 columns takes
//!
//! * `Q8`: eight lines; byte `4·r + j` of line `l` is the code of column `4·l + j`. One scale a row.
//! * `Q4`: four lines; byte `4·r + j` of line `l` holds columns `8·l + j` (low nibble) and `8·l + 4 + j`. One scale a
//!   row and group.
//! * `Q6`: twice (sixteen columns each) two lines of the low four bits as in `Q4` and one line of the high two, in
//!   which column `4·l + j` has bits `2·l..2·l + 2` of byte `4·r + j`. One scale a row and group.
//!
//! A code is the quantized weight plus [`HeadFormat::offset`]; a weight is `scale · (code − offset)`. The scales of
//! groups are bfloat16: they widen exactly on every instruction set, have the range of f32, and codes are chosen for
//! the scale as rounded.
//!
//! An activation is `x = 64·hi + lo` with `hi` in [−64, 63] and `lo` in [−32, 31]. So the pair sums of `maddubs` with
//! 8-bit codes are at most 255 · 64 · 2 = 32640 < 2¹⁵ and never saturate, and x, at most [`ACTIVATION_MAX`], is fine
//! enough that its error is small beside that of 8-bit weights.
//!
//! The sum of a group is an integer, exact in 32 bits and, with at most 6-bit weights, in 24:
//! 32 · 4063 · 32 < 2²³. `Q8` sums all columns in integers: |Σ code·hi| ≤ 255 · 64 · cols < 2³¹ up to
//! [`MAX_HEAD_COLS`]. With `Q6` and `Q4` the sums of groups are added by fused multiply-add in the order of columns.

#[cfg(target_arch = "x86_64")]
pub(super) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(super) mod avx512vnni;
#[cfg(target_arch = "x86_64")]
pub(super) mod avxvnni;
#[cfg(target_arch = "aarch64")]
pub(super) mod neondot;
pub(super) mod portable;
#[cfg(test)]
mod tests;

use super::{Kernel, ROWS};

/// Four bytes for each of sixteen rows.
pub type Line = [u8; 64];

/// Columns that lines and scales come for.
pub const GROUP: usize = 32;

/// The most columns of a head: 255 · 64 · 2¹⁷ < 2³¹.
pub const MAX_HEAD_COLS: usize = 1 << 17;

/// The largest activation code: 64 · 63 + 31, so that `hi` fits [−64, 63].
pub const ACTIVATION_MAX: i16 = 4063;

/// Bits of a stored weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadFormat {
    /// 8 bits, a scale a row.
    Q8,
    /// 6 bits, a scale a group: 6.5 bits in all.
    Q6,
    /// 4 bits, a scale a group: 4.5 bits in all.
    Q4,
}

impl HeadFormat {
    /// Lines of a band's group of columns.
    pub const fn lines_per_group(self) -> usize {
        match self {
            Self::Q8 => 8,
            Self::Q6 => 6,
            Self::Q4 => 4,
        }
    }

    /// A code is the quantized weight plus this.
    pub const fn offset(self) -> u8 {
        match self {
            Self::Q8 => 128,
            Self::Q6 => 32,
            Self::Q4 => 8,
        }
    }

    /// Quantized weights are in [−limit, limit].
    pub const fn limit(self) -> i8 {
        self.offset().wrapping_sub(1) as i8
    }
}

/// Sixteen rows of a head.
#[derive(Clone, Copy, Debug)]
pub enum HeadBand<'a> {
    /// 8 bits.
    Q8 {
        /// Lines of the band.
        lines: &'a [Line],
        /// Of each row.
        scales: &'a [f32; ROWS],
    },
    /// 6 bits.
    Q6 {
        /// Lines of the band.
        lines: &'a [Line],
        /// bfloat16, of each group and row.
        scales: &'a [[u16; ROWS]],
    },
    /// 4 bits.
    Q4 {
        /// Lines of the band.
        lines: &'a [Line],
        /// bfloat16, of each group and row.
        scales: &'a [[u16; ROWS]],
    },
}

/// Rows of quantized hidden states.
#[derive(Clone, Copy, Debug)]
pub struct HeadActivations<'a> {
    /// (tokens, cols / 4): `hi` of four columns, then `lo` of the same four.
    pub quads: &'a [[i8; 8]],
    /// (tokens, cols / [`GROUP`]): the sum of the activations of a group.
    pub sums: &'a [i32],
    /// (tokens): a hidden state is `scale · x`, up to rounding.
    pub scales: &'a [f32],
}

impl<'a> HeadActivations<'a> {
    /// The rows of `count` tokens from `first` on.
    pub fn tokens(self, first: usize, count: usize) -> Self {
        let tokens = self.scales.len();
        let (quads, groups) = (self.quads.len() / tokens.max(1), self.sums.len() / tokens.max(1));
        Self {
            quads: &self.quads[first * quads..][..count * quads],
            sums: &self.sums[first * groups..][..count * groups],
            scales: &self.scales[first..][..count],
        }
    }
}

/// One instruction set's products of a band with tokens.
#[derive(Clone, Copy)]
pub(super) struct HeadRoutines {
    /// `sums[token] = [Σ code·hi, Σ code·lo]` of each row.
    pub q8: unsafe fn(lines: &[Line], x: &[[i8; 8]], sums: &mut [PlaneSums]),
    /// `out[token][row]` before the activation's scale.
    pub q6: GroupedProduct,
    /// As `q6`.
    pub q4: GroupedProduct,
}

/// The sums over `hi` and over `lo`, of each row.
pub(super) type PlaneSums = [[i32; ROWS]; 2];

/// `out[token][row]` of `sums[token]`, with the scales of the rows.
pub(super) type FinishQ8 =
    unsafe fn(&[PlaneSums], &[f32; ROWS], HeadActivations<'_>, &mut [[f32; ROWS]]);

type GroupedProduct = unsafe fn(&[Line], &[[u16; ROWS]], HeadActivations<'_>, &mut [[f32; ROWS]]);

/// Calls `many` with the outputs of each `N` tokens and the number of the first of them, and `one` with each of the others.
#[inline(always)]
fn in_blocks<const N: usize, T>(
    out: &mut [T],
    many: impl Fn(usize, &mut [T; N]),
    one: impl Fn(usize, &mut [T; 1]),
) {
    let (blocks, rest) = out.as_chunks_mut::<N>();
    let after = N * blocks.len();
    for (i, out) in blocks.iter_mut().enumerate() {
        many(N * i, out);
    }
    for (i, out) in rest.iter_mut().enumerate() {
        one(after + i, std::array::from_mut(out));
    }
}

/// Tokens that share one pass over a band.
const TOKENS: usize = 8;

impl Kernel {
    /// `out[token][row] = Σ weight[row][·] · hidden[token][·]` for the rows of a band, with weights and hidden states
    /// as quantized.
    ///
    /// # Panics
    /// Unless `x` has one row for each of `out`, of as many columns as the band, at most [`MAX_HEAD_COLS`], and the
    /// band as many lines and scales as it has groups.
    pub fn head_product(
        &self,
        band: HeadBand<'_>,
        x: HeadActivations<'_>,
        out: &mut [[f32; ROWS]],
    ) {
        let (format, lines, scales) = match band {
            HeadBand::Q8 { lines, .. } => (HeadFormat::Q8, lines, None),
            HeadBand::Q6 { lines, scales } => (HeadFormat::Q6, lines, Some(scales)),
            HeadBand::Q4 { lines, scales } => (HeadFormat::Q4, lines, Some(scales)),
        };
        let (groups, tokens) = (lines.len() / format.lines_per_group(), out.len());
        assert_eq!(lines.len(), groups * format.lines_per_group(), "lines of whole groups");
        assert!(scales.is_none_or(|scales| scales.len() == groups), "one scale a row and group");
        assert!(groups <= MAX_HEAD_COLS / GROUP, "too many columns for 32-bit sums");
        assert_eq!(x.scales.len(), tokens, "one scale a token");
        assert_eq!(x.sums.len(), tokens * groups, "one sum a token and group");
        assert_eq!(x.quads.len(), tokens * groups * GROUP / 4, "activations of the band's columns");
        for (i, out) in out.chunks_mut(TOKENS).enumerate() {
            let x = x.tokens(i * TOKENS, out.len());
            match band {
                HeadBand::Q8 { lines, scales } => {
                    let mut sums = [[[0; ROWS]; 2]; TOKENS];
                    let sums = &mut sums[..out.len()];
                    // SAFETY: `self` came from `available`, which checked the processor; the lengths are checked above.
                    unsafe {
                        (self.head.q8)(lines, x.quads, sums);
                        (self.routines.finish_q8)(sums, scales, x, out);
                    }
                    continue;
                }
                // SAFETY: as above.
                HeadBand::Q6 { lines, scales } => unsafe {
                    (self.head.q6)(lines, scales, x, out);
                },
                // SAFETY: as above.
                HeadBand::Q4 { lines, scales } => unsafe {
                    (self.head.q4)(lines, scales, x, out);
                },
            }
            for (out, scale) in out.iter_mut().zip(x.scales) {
                out.iter_mut().for_each(|out| *out *= scale);
            }
        }
    }
}

impl Kernel {
    /// A row of a head to 8 bits: `codes[i] = round(w[i] · 127 / max|w|) + 128`, and 128 behind the row.
    ///
    /// A row that holds NaN or an infinity has code 128 everywhere and is NaN in all fields of the result.
    ///
    /// # Panics
    /// If there are fewer codes than weights.
    pub fn quantize_head_row(&self, w: &[f32], codes: &mut [u8]) -> QuantizedRow {
        assert!(codes.len() >= w.len(), "{} codes for {} weights", codes.len(), w.len());
        // SAFETY: `self` came from `available`, which checked the processor.
        unsafe { (self.routines.quantize_head_row)(w, codes) }
    }
}

/// `Σ weight·x = row scale · scale · (64·Σ code·hi + Σ code·lo − 128·Σ x)`: the integer is exact in 64 bits, then three
/// roundings.
#[inline(always)]
pub(super) fn finish_q8(
    sums: &[PlaneSums],
    scales: &[f32; ROWS],
    x: HeadActivations<'_>,
    out: &mut [[f32; ROWS]],
) {
    let groups = x.sums.len() / x.scales.len().max(1);
    for (token, ([hi, lo], out)) in sums.iter().zip(out).enumerate() {
        let group_sums = &x.sums[token * groups..][..groups];
        let offset = 128 * group_sums.iter().map(|sum| i64::from(*sum)).sum::<i64>();
        for row in 0..ROWS {
            let sum = 64 * i64::from(hi[row]) + i64::from(lo[row]) - offset;
            out[row] = sum as f32 * scales[row] * x.scales[token];
        }
    }
}

/// One hidden state to activations: `scale = max|h| / 4063`, `x[i] = round(h[i] / scale)`, zero behind the row.
/// Returns the scale; NaN, and zeros, for a row that holds NaN or an infinity.
///
/// # Panics
/// Unless `quads` and `sums` hold the same number of whole groups, at least as many columns as `hidden`.
pub fn quantize_hidden(hidden: &[f32], quads: &mut [[i8; 8]], sums: &mut [i32]) -> f32 {
    assert_eq!(quads.len() * 4, sums.len() * GROUP, "sums of whole groups");
    assert!(hidden.len() <= quads.len() * 4, "{} columns for {}", quads.len() * 4, hidden.len());
    // Without the sign, the bits of floats are ordered as the floats are, infinity above them and NaN above that.
    let absmax = hidden.iter().fold(0, |max, h| (h.to_bits() & i32::MAX as u32).max(max));
    let absmax = f32::from_bits(absmax);
    quads.fill([0; 8]);
    sums.fill(0);
    if !absmax.is_finite() {
        return f32::NAN;
    }
    // Rows smaller than that become zeros; the factor stays finite.
    let absmax = absmax.max(1e-30);
    let factor = f32::from(ACTIVATION_MAX) / absmax;
    for (i, h) in hidden.iter().enumerate() {
        // The factor and the product are each off by at most 2⁻²⁴ of themselves: |y| < 4063.001.
        let x = (h * factor).round_ties_even() as i32;
        let hi = (x + 32) >> 6;
        quads[i / 4][i % 4] = hi as i8;
        quads[i / 4][4 + i % 4] = (x - 64 * hi) as i8;
        sums[i / GROUP] += x;
    }
    absmax / f32::from(ACTIVATION_MAX)
}

/// Puts the codes of a row's group of columns into the band's lines of that group.
///
/// # Panics
/// If `lines` are not those of one group or the band has no such row.
#[inline(always)]
pub fn set_group(format: HeadFormat, lines: &mut [Line], row: usize, codes: &[u8; GROUP]) {
    assert_eq!(lines.len(), format.lines_per_group(), "lines of one group");
    let bytes = 4 * row..4 * row + 4;
    let quads = codes.as_chunks::<4>().0;
    match format {
        HeadFormat::Q8 => {
            for (line, quad) in lines.iter_mut().zip(quads) {
                line[bytes.clone()].copy_from_slice(quad);
            }
        }
        HeadFormat::Q4 => {
            for (line, pair) in lines.iter_mut().zip(quads.as_chunks::<2>().0) {
                set_nibbles(&mut line[bytes.clone()], pair);
            }
        }
        HeadFormat::Q6 => {
            for (lines, quads) in
                lines.as_chunks_mut::<3>().0.iter_mut().zip(quads.as_chunks::<4>().0)
            {
                set_nibbles(&mut lines[0][bytes.clone()], &[quads[0], quads[1]]);
                set_nibbles(&mut lines[1][bytes.clone()], &[quads[2], quads[3]]);
                for (j, high) in lines[2][bytes.clone()].iter_mut().enumerate() {
                    *high = (0..4).fold(0, |high, lane| high | quads[lane][j] >> 4 << (2 * lane));
                }
            }
        }
    }
}

#[inline(always)]
fn set_nibbles(bytes: &mut [u8], [low, high]: &[[u8; 4]; 2]) {
    for (j, byte) in bytes.iter_mut().enumerate() {
        *byte = low[j] & 15 | high[j] << 4;
    }
}

/// The codes of a row's group of columns: the inverse of [`set_group`].
///
/// # Panics
/// As there.
pub fn group(format: HeadFormat, lines: &[Line], row: usize) -> [u8; GROUP] {
    assert_eq!(lines.len(), format.lines_per_group(), "lines of one group");
    std::array::from_fn(|col| {
        let (lane, byte) = (col / 4, 4 * row + col % 4);
        let nibble = |lines: &[Line], lane: usize| lines[lane / 2][byte] >> (4 * (lane % 2)) & 15;
        match format {
            HeadFormat::Q8 => lines[lane][byte],
            HeadFormat::Q4 => nibble(lines, lane),
            HeadFormat::Q6 => {
                let lines = &lines[3 * (lane / 4)..];
                nibble(lines, lane % 4) | (lines[2][byte] >> (2 * (lane % 4)) & 3) << 4
            }
        }
    })
}

/// A row in 8 bits.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct QuantizedRow {
    /// `max|w| / 127`: a weight is `scale · (code − 128)`, up to rounding.
    pub scale: f32,
    /// At least `‖w − scale·q‖₂`.
    pub error: f32,
    /// At least `‖scale·q‖₂`.
    pub norm: f32,
}

/// [`Kernel::quantize_head_row`].
#[inline(always)]
pub(super) fn quantize_head_row(w: &[f32], codes: &mut [u8]) -> QuantizedRow {
    /// Adding 1.5 · 2²³ to `y`, `|y| < 2²²`, rounds it half to even and leaves the integer in the low bits.
    const MAGIC: f32 = 12_582_912.;
    const LANES: usize = 16;
    let absmax = w.iter().fold(0, |max, w| (w.to_bits() & i32::MAX as u32).max(max));
    let absmax = f32::from_bits(absmax);
    if !absmax.is_finite() {
        codes.fill(128);
        return QuantizedRow { scale: f32::NAN, error: f32::NAN, norm: f32::NAN };
    }
    // Not smaller, so that the factor is finite and every value a normal number.
    let absmax = absmax.max(1e-30);
    let (scale, factor) = (absmax / 127., 127. / absmax);
    let (mut errors, mut norms) = ([0f32; LANES], [0f32; LANES]);
    let mut lane_sums = |w: &[f32; LANES], codes: &mut [u8; LANES]| {
        for l in 0..LANES {
            // |y| < 127.0001: no code leaves [1, 255].
            let y = w[l] * factor + MAGIC;
            codes[l] = (y.to_bits() as u8).wrapping_add(128);
            let value = (y - MAGIC) * scale;
            let error = w[l] - value;
            errors[l] += error * error;
            norms[l] += value * value;
        }
    };
    let (w, w_rest) = w.as_chunks::<LANES>();
    let (codes, codes_rest) = codes.split_at_mut(w.len() * LANES);
    for (w, codes) in w.iter().zip(codes.as_chunks_mut::<LANES>().0) {
        lane_sums(w, codes);
    }
    let (mut last, mut last_codes) = ([0.; LANES], [128; LANES]);
    last[..w_rest.len()].copy_from_slice(w_rest);
    lane_sums(&last, &mut last_codes);
    codes_rest.fill(128);
    let rest = w_rest.len();
    codes_rest[..rest].copy_from_slice(&last_codes[..rest]);
    let (error, norm) = row_bounds(w.len() + 1, errors.iter().sum(), norms.iter().sum());
    QuantizedRow { scale, error, norm }
}

/// Upper bounds of `‖w − scale·q‖₂` and `‖scale·q‖₂`, from their squares as [`quantize_head_row`] sums them.
///
/// With u = 2⁻²⁴: a value is off by u of itself, its square by 3 u, an error's square by u of the error as computed, a
/// sum of `chunks` and then 16 non-negative terms by (chunks + 15) u, and each square by 2⁻¹⁵⁰ if it underflows. An
/// error as computed is off by u of itself and by the value's own u.
fn row_bounds(chunks: usize, error_squares: f32, norm_squares: f32) -> (f32, f32) {
    const U: f64 = 1. / (1 << 24) as f64;
    // Twice what is needed: that covers the products of these factors.
    let slack = 1. + 2. * (chunks + 20) as f64 * U;
    let underflow = chunks as f64 * 16. * 2f64.powi(-149);
    let norm = (f64::from(norm_squares) * slack + underflow).sqrt();
    let error =
        (f64::from(error_squares) * slack + underflow).sqrt() * (1. + 2. * U) + 2. * U * norm;
    ((error as f32).next_up(), (norm as f32).next_up())
}
