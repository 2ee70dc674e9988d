//! `HeadWeights`: an output head in 8, 6 or 4 bits a weight, in the order in which the kernels read it.

use rayon::prelude::*;

#[cfg(feature = "cuda")]
use crate::cuda::resident::{HeadCopy, Resident};
use crate::{
    kernels::{
        self, Kernel, ROWS,
        head::{
            GROUP, HeadActivations, HeadBand, HeadFormat, Line, MAX_HEAD_COLS, quantize_hidden,
            set_group,
        },
    },
    pages::{Arena, Pages},
    rows::{Errors, RowSource},
    threads,
};

/// A matrix (rows, cols), quantized.
#[derive(Debug)]
pub struct HeadWeights {
    /// Band after band; the last is padded with zero weights.
    lines: Pages,
    scales: Scales,
    format: HeadFormat,
    rows: usize,
    cols: usize,
    #[cfg(feature = "cuda")]
    resident: Resident<HeadCopy>,
}

#[derive(Debug)]
enum Scales {
    /// Of each band.
    Rows(Vec<BandRows>),
    /// bfloat16, of each band and group of columns.
    Groups(Vec<[u16; ROWS]>),
}

/// What belongs to the rows of a band of 8 bits.
#[derive(Clone, Debug)]
pub(crate) struct BandRows {
    scales: [f32; ROWS],
    /// At least `‖w − scale·q‖₂`; NaN for a row that holds NaN or an infinity.
    pub errors: [f32; ROWS],
    /// At least `‖scale·q‖₂`.
    pub norms: [f32; ROWS],
}

impl HeadWeights {
    /// Reads all rows, a band at a time on all threads, and quantizes them.
    ///
    /// # Errors
    /// Rows that cannot be read, more than 2¹⁷ columns, or no memory.
    pub fn quantize(source: &dyn RowSource, format: HeadFormat) -> candle_core::Result<Self> {
        let (rows, cols) = source.shape();
        if cols > MAX_HEAD_COLS {
            candle_core::bail!("a head of {cols} columns: {MAX_HEAD_COLS} are the most");
        }
        let (bands, groups) = (rows.div_ceil(ROWS), cols.div_ceil(GROUP));
        let band_bytes = groups * format.lines_per_group() * size_of::<Line>();
        let mut lines = Arena::default().zeroed(bands * band_bytes)?;
        let errors = Errors::default();
        let kernel = kernels::active();
        // The rows of a band as f32, one after the other.
        let visit_rows = |row: &mut [f32], band: usize, visit: &mut dyn FnMut(usize, &[f32])| {
            let range = band * ROWS..rows.min((band + 1) * ROWS);
            errors.note(source.with_rows(range, &mut |weights| {
                for index in 0..weights.rows() {
                    weights.widen_row(index, row);
                    visit(index, row);
                }
            }));
        };
        let scales = match format {
            HeadFormat::Q8 => {
                let zero = [0.; ROWS];
                let rows = BandRows { scales: zero, errors: zero, norms: zero };
                let mut scales = vec![rows; bands];
                let bands = lines.par_chunks_mut(band_bytes.max(1)).zip(&mut scales).enumerate();
                let buffers = || (vec![0.; cols], vec![0; groups * GROUP]);
                bands.for_each_init(buffers, |(row, codes), (band, (lines, rows))| {
                    let lines = lines.as_chunks_mut().0;
                    visit_rows(row, band, &mut |index, w| {
                        quantize_row(kernel, w, codes, (lines, index), rows);
                    });
                });
                Scales::Rows(scales)
            }
            HeadFormat::Q6 | HeadFormat::Q4 => {
                let mut scales = vec![[0; ROWS]; bands * groups];
                let scales_of_bands = scales.par_chunks_mut(groups.max(1));
                let bands =
                    lines.par_chunks_mut(band_bytes.max(1)).zip(scales_of_bands).enumerate();
                bands.for_each_init(
                    || vec![0.; cols],
                    |row, (band, (lines, scales))| {
                        let lines = lines.as_chunks_mut().0;
                        visit_rows(row, band, &mut |index, w| {
                            quantize_groups(format, w, (lines, index), scales);
                        });
                    },
                );
                Scales::Groups(scales)
            }
        };
        errors.first()?;
        Ok(Self {
            lines,
            scales,
            format,
            rows,
            cols,
            #[cfg(feature = "cuda")]
            resident: Default::default(),
        })
    }

    /// The bytes that a head of `rows` × `cols` takes.
    pub fn size(rows: usize, cols: usize, format: HeadFormat) -> usize {
        let (bands, groups) = (rows.div_ceil(ROWS), cols.div_ceil(GROUP));
        let scales = match format {
            HeadFormat::Q8 => size_of::<BandRows>(),
            HeadFormat::Q6 | HeadFormat::Q4 => groups * size_of::<[u16; ROWS]>(),
        };
        bands * (groups * format.lines_per_group() * size_of::<Line>() + scales)
    }

    /// Rows and columns.
    pub fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    /// Bits of a weight.
    pub fn format(&self) -> HeadFormat {
        self.format
    }

    /// Bytes at rest.
    pub fn bytes(&self) -> usize {
        let scales = match &self.scales {
            Scales::Rows(bands) => size_of_val(&bands[..]),
            Scales::Groups(groups) => size_of_val(&groups[..]),
        };
        self.lines.len() + scales
    }

    /// The copy on a device.
    #[cfg(feature = "cuda")]
    pub(crate) fn resident(&self) -> &Resident<HeadCopy> {
        &self.resident
    }

    /// The bounds of each band of 8 bits; none in other formats.
    pub(crate) fn bounds(&self) -> &[BandRows] {
        match &self.scales {
            Scales::Rows(bands) => bands,
            Scales::Groups(_) => &[],
        }
    }

    /// Bands of sixteen rows.
    pub(crate) fn bands(&self) -> usize {
        self.rows.div_ceil(ROWS)
    }

    /// Sixteen rows.
    pub(crate) fn band(&self, band: usize) -> HeadBand<'_> {
        let groups = self.cols.div_ceil(GROUP);
        let width = groups * self.format.lines_per_group();
        let lines = &self.lines.as_chunks().0[band * width..][..width];
        match (&self.scales, self.format) {
            (Scales::Rows(bands), _) => HeadBand::Q8 { lines, scales: &bands[band].scales },
            (Scales::Groups(scales), format) => {
                let scales = &scales[band * groups..][..groups];
                match format {
                    HeadFormat::Q4 => HeadBand::Q4 { lines, scales },
                    _ => HeadBand::Q6 { lines, scales },
                }
            }
        }
    }

    /// `hidden · Wᵀ` (tokens, rows) with weights and hidden states as quantized. NaN for a hidden state that is not
    /// finite.
    pub(crate) fn matmul(&self, kernel: &Kernel, hidden: &QuantizedHidden) -> Vec<f32> {
        /// Tokens of a task.
        const TOKENS: usize = 64;
        let tokens = hidden.tokens();
        // About 128 KiB of weights a task: enough that handing it out costs nothing.
        let width = self.lines.len() / self.rows.div_ceil(ROWS).max(1);
        let rows = ROWS * (1usize << 17).div_ceil(width.max(1));
        let cuts: Vec<usize> = (0..self.rows).step_by(rows).chain([self.rows]).collect();
        threads::written_blocks(tokens, TOKENS, &cuts, |(first, j), y| {
            let mut out = [[0f32; ROWS]; TOKENS];
            let out = &mut out[..y.rows()];
            let x = hidden.view().tokens(first, y.rows());
            let end = cuts[j + 1];
            for row in (cuts[j]..end).step_by(ROWS) {
                kernel.head_product(self.band(row / ROWS), x, out);
                for (token, out) in out.iter().enumerate() {
                    y.extend(token, &out[..ROWS.min(end - row)], |x| *x);
                }
            }
        })
    }
}

/// A row into its place in a band: 8 bits, with room for its `codes`.
fn quantize_row(
    kernel: &Kernel,
    w: &[f32],
    codes: &mut [u8],
    (lines, row): (&mut [Line], usize),
    band: &mut BandRows,
) {
    let quantized = kernel.quantize_head_row(w, codes);
    band.scales[row] = quantized.scale;
    band.errors[row] = quantized.error;
    band.norms[row] = quantized.norm;
    let groups = lines.chunks_mut(HeadFormat::Q8.lines_per_group());
    for (lines, codes) in groups.zip(codes.as_chunks::<GROUP>().0) {
        set_group(HeadFormat::Q8, lines, row, codes);
    }
}

/// A row into its place in a band: 6 or 4 bits, `scale = max|w| / limit` of each group.
fn quantize_groups(
    format: HeadFormat,
    w: &[f32],
    (lines, row): (&mut [Line], usize),
    scales: &mut [[u16; ROWS]],
) {
    /// Adding 1.5 · 2²³ to `y`, `|y| < 2²²`, rounds it half to even and leaves the integer in the low bits.
    const MAGIC: f32 = 12_582_912.;
    let (offset, limit) = (format.offset(), f32::from(format.limit()));
    let groups = lines.chunks_mut(format.lines_per_group()).zip(scales).zip(w.chunks(GROUP));
    for ((lines, scales), w) in groups {
        let mut padded = [0f32; GROUP];
        padded[..w.len()].copy_from_slice(w);
        // Without the sign, the bits of floats are ordered as the floats are, infinity above them and NaN above that.
        let absmax = padded.iter().fold(0, |max, w| (w.to_bits() & i32::MAX as u32).max(max));
        let absmax = f32::from_bits(absmax);
        // To the nearest bfloat16; the codes are those of the scale as rounded.
        let bits = half::bf16::from_f32(absmax / limit).to_bits();
        let scale = f32::from_bits(u32::from(bits) << 16);
        let factor = if scale > 0. { 1. / scale } else { 0. };
        let codes = padded.map(|w| {
            let y = (w * factor).max(-limit).min(limit) + MAGIC; // a code also for NaN
            (y.to_bits() as u8).wrapping_add(offset)
        });
        scales[row] = bits;
        set_group(format, lines, row, &codes);
    }
}

/// Hidden states as the head's kernels take them.
pub(crate) struct QuantizedHidden {
    quads: Vec<[i8; 8]>,
    sums: Vec<i32>,
    scales: Vec<f32>,
}

impl QuantizedHidden {
    /// Quantizes `hidden` (tokens, cols).
    pub fn new(hidden: &[f32], cols: usize) -> Self {
        let tokens = hidden.len().checked_div(cols).unwrap_or(0);
        let groups = cols.div_ceil(GROUP);
        let quads = groups * GROUP / 4;
        let mut new = Self {
            quads: vec![[0; 8]; tokens * quads],
            sums: vec![0; tokens * groups],
            scales: Vec::with_capacity(tokens),
        };
        for (token, hidden) in hidden.chunks(cols.max(1)).enumerate() {
            new.scales.push(quantize_hidden(
                hidden,
                &mut new.quads[token * quads..][..quads],
                &mut new.sums[token * groups..][..groups],
            ));
        }
        new
    }

    fn tokens(&self) -> usize {
        self.scales.len()
    }

    fn view(&self) -> HeadActivations<'_> {
        HeadActivations { quads: &self.quads, sums: &self.sums, scales: &self.scales }
    }

    /// `‖h − scale·x‖₂` and `‖h‖₂` of a token whose hidden state is `hidden`, in double precision.
    pub fn error_and_norm(&self, token: usize, hidden: &[f32]) -> (f64, f64) {
        let quads = self.quads.len() / self.tokens();
        let quads = &self.quads[token * quads..][..quads];
        let scale = f64::from(self.scales[token]);
        let (mut error, mut norm) = (0., 0.);
        for (h, quad) in hidden.chunks(4).zip(quads) {
            for (j, h) in h.iter().enumerate() {
                let h = f64::from(*h);
                let code = 64 * i32::from(quad[j]) + i32::from(quad[4 + j]);
                error += (h - scale * f64::from(code)).powi(2);
                norm += h * h;
            }
        }
        (error.sqrt(), norm.sqrt())
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};

    use super::*;
    use crate::{kernels::head::group, rows::TensorRows};

    /// The weights of a row as quantized.
    fn dequantize(head: &HeadWeights, row: usize) -> Vec<f32> {
        let lane = row % ROWS;
        let lines = match head.band(row / ROWS) {
            HeadBand::Q8 { lines, .. }
            | HeadBand::Q6 { lines, .. }
            | HeadBand::Q4 { lines, .. } => lines,
        };
        let scale = |group: usize| match head.band(row / ROWS) {
            HeadBand::Q8 { scales, .. } => scales[lane],
            HeadBand::Q6 { scales, .. } | HeadBand::Q4 { scales, .. } => {
                f32::from_bits(u32::from(scales[group][lane]) << 16)
            }
        };
        let offset = i16::from(head.format.offset());
        let groups = lines.chunks(head.format.lines_per_group()).enumerate();
        let weights = groups.flat_map(|(index, lines)| {
            let codes = group(head.format, lines, lane).map(|code| i16::from(code) - offset);
            codes.map(|code| f32::from(code) * scale(index))
        });
        weights.take(head.cols).collect()
    }

    #[test]
    fn products_are_those_of_the_quantized_rows() {
        for (rows, cols) in [(1, 1), (16, 32), (37, 70), (200, 96)] {
            let w = Tensor::randn(0f32, 1., (rows, cols), &Device::Cpu).unwrap();
            let values: Vec<Vec<f32>> = w.to_vec2().unwrap();
            let source = TensorRows::new(&w).unwrap();
            let hidden = Tensor::randn(0f32, 1., (3, cols), &Device::Cpu).unwrap();
            let hidden: Vec<Vec<f32>> = hidden.to_vec2().unwrap();
            for (format, step) in [
                (HeadFormat::Q8, 1. / 254.),
                (HeadFormat::Q6, 1. / 62.),
                (HeadFormat::Q4, 1. / 14.),
            ] {
                let head = HeadWeights::quantize(&source, format).unwrap();
                assert_eq!(head.bytes(), HeadWeights::size(rows, cols, format));
                let x = QuantizedHidden::new(&hidden.concat(), cols);
                let y = head.matmul(kernels::active(), &x);
                for row in 0..rows {
                    let w = dequantize(&head, row);
                    let absmax = values[row].iter().fold(0f32, |max, w| max.max(w.abs()));
                    for (w, exact) in w.iter().zip(&values[row]) {
                        // Half a step, and a little for the rounding of the scale.
                        assert!(
                            (w - exact).abs() <= 1.07 * step * absmax,
                            "{format:?} {w} {exact}"
                        );
                    }
                    for (token, hidden) in hidden.iter().enumerate() {
                        let dot: f32 = w.iter().zip(hidden).map(|(w, h)| w * h).sum();
                        let norm = |x: &[f32]| x.iter().map(|x| x * x).sum::<f32>().sqrt();
                        let slack = 1e-3 * norm(&w) * norm(hidden); // 13 bits of activation
                        assert!((y[token * rows + row] - dot).abs() <= slack, "{format:?}");
                    }
                    if let Some(band) = head.bounds().get(row / ROWS) {
                        let error = w.iter().zip(&values[row]).map(|(a, b)| (a - b).powi(2));
                        let error = error.sum::<f32>().sqrt();
                        assert!((band.errors[row % ROWS] - error).abs() < 1e-4);
                    }
                }
                for kernel in kernels::available() {
                    assert_eq!(head.matmul(kernel, &x), y, "{}", kernel.name());
                    let first = QuantizedHidden::new(&hidden[0], cols);
                    assert_eq!(head.matmul(kernel, &first), y[..rows], "alone and among others");
                }
            }
        }
    }
}
