//! Products of large matrices on all threads, for training: `out = scale · a·b`, blocked for the caches.
//!
//! Blocks of [`DEPTH`] are multiplied one after the other. Of each, the right factor is brought into panels once, and the
//! left one by every task for its [`ROWS`] rows. An output is one chain of fused products for each block of the depth, the
//! blocks added in order: its bits depend on its own operands alone.

use std::ops::Range;

use crate::{
    kernels::{self, Bf16Panels, PanelProduct, PanelWidths},
    threads,
};

/// In which precision products are multiplied; sums are f32 in either.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// Single precision.
    #[default]
    F32,
    /// Factors are rounded to bfloat16. Integers up to 256 stay what they are.
    Bf16,
}

/// Values of the depth that are in panels at a time: a panel of the left factor then fits the first-level cache.
const DEPTH: usize = 512;
/// Rows of a task, at least: the right panels it reads are then used often enough.
const ROWS: usize = 48;

/// A factor of a product: its values by index (row of the left factor, column of the right one) and depth.
#[derive(Clone, Copy)]
pub struct Factor<'a, F> {
    /// Whether an index's values over the depth are neighbours, or a depth's values over the indices.
    order: Order,
    /// Values between neighbours in the other direction.
    stride: usize,
    /// The value at a place, of a depth.
    value: &'a F,
}

#[derive(Clone, Copy)]
enum Order {
    DepthInner,
    IndexInner,
}

impl<'a, F: Fn(usize, usize) -> f32 + Sync> Factor<'a, F> {
    /// The value of index `i` at depth `d` is `value(i · stride + d, d)`.
    pub fn depth_inner(stride: usize, value: &'a F) -> Self {
        Self { order: Order::DepthInner, stride, value }
    }

    /// The value of index `i` at depth `d` is `value(d · stride + i, d)`.
    pub fn index_inner(stride: usize, value: &'a F) -> Self {
        Self { order: Order::IndexInner, stride, value }
    }

    /// A panel of `width` indices: all values of one depth are neighbours. What is beyond `indices` is left as it is.
    #[inline]
    fn panel(&self, indices: Range<usize>, depth: Range<usize>, width: usize, out: &mut [f32]) {
        match self.order {
            Order::DepthInner => {
                for (i, index) in indices.enumerate() {
                    for (d, at) in depth.clone().enumerate() {
                        out[d * width + i] = (self.value)(index * self.stride + at, at);
                    }
                }
            }
            Order::IndexInner => {
                for (d, out) in depth.zip(out.chunks_exact_mut(width)) {
                    let first = d * self.stride;
                    for (index, out) in indices.clone().zip(out) {
                        *out = (self.value)(first + index, d);
                    }
                }
            }
        }
    }
}

/// `out[i][j] = scale · Σ_d a[i][d] · b[d][j]` for `rows` × `cols` outputs.
///
/// # Panics
/// If `out` is of another size.
pub fn gemm<A, B>(
    (rows, cols, depth): (usize, usize, usize),
    a: Factor<'_, A>,
    b: Factor<'_, B>,
    scale: f32,
    precision: Precision,
    out: &mut [f32],
) where
    A: Fn(usize, usize) -> f32 + Sync,
    B: Fn(usize, usize) -> f32 + Sync,
{
    assert_eq!(out.len(), rows * cols, "product outside its slice");
    if depth == 0 {
        return out.fill(0.);
    }
    let shape = PanelProduct { rows, cols, depth, scale, add: false };
    match (precision, Bf16Panels::new()) {
        (Precision::F32, _) => blocks(shape, a, b, &F32Panels(kernels::active(), false), out),
        (Precision::Bf16, None) => blocks(shape, a, b, &F32Panels(kernels::active(), true), out),
        (Precision::Bf16, Some(panels)) => blocks(shape, a, b, &panels, out),
    }
}

/// How panels are stored and multiplied.
trait Panels: Sync {
    type Value: Copy + Default + Send + Sync;
    /// Depths in a value.
    const PAIR: usize;
    fn widths(&self) -> PanelWidths;
    /// A panel of `width` indices of a factor; an odd depth is made even with zeros.
    fn pack<F: Fn(usize, usize) -> f32 + Sync>(
        &self,
        factor: &Factor<'_, F>,
        indices: Range<usize>,
        depth: Range<usize>,
        width: usize,
        out: &mut [Self::Value],
    );
    fn multiply(
        &self,
        a: &[Self::Value],
        b: &[Self::Value],
        product: PanelProduct,
        out: &mut [f32],
    );
}

/// Single precision; with `true`, of values rounded to bfloat16.
struct F32Panels(&'static kernels::Kernel, bool);

impl Panels for F32Panels {
    type Value = f32;
    const PAIR: usize = 1;

    fn widths(&self) -> PanelWidths {
        self.0.panel_widths()
    }

    fn pack<F: Fn(usize, usize) -> f32 + Sync>(
        &self,
        factor: &Factor<'_, F>,
        indices: Range<usize>,
        depth: Range<usize>,
        width: usize,
        out: &mut [f32],
    ) {
        factor.panel(indices, depth, width, out);
        if self.1 {
            for value in out {
                *value = f32::from_bits(bf16_bits(*value) << 16);
            }
        }
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

    fn pack<F: Fn(usize, usize) -> f32 + Sync>(
        &self,
        factor: &Factor<'_, F>,
        indices: Range<usize>,
        depth: Range<usize>,
        width: usize,
        out: &mut [u32],
    ) {
        /// Depths that are converted together, of the widest panel there is: they stay in the first-level cache.
        const DEPTHS: usize = 32;
        const WIDTH: usize = 48;
        let mut values = [0f32; DEPTHS * WIDTH];
        let starts = depth.clone().step_by(DEPTHS);
        for (first, out) in starts.zip(out.chunks_mut(DEPTHS / 2 * width)) {
            let depth = first..depth.end.min(first + DEPTHS);
            if depth.len() % 2 == 1 {
                values[depth.len() * width..][..width].fill(0.);
            }
            let values = &mut values[..2 * out.len()];
            factor.panel(indices.clone(), depth, width, values);
            for (values, out) in values.chunks_exact(2 * width).zip(out.chunks_exact_mut(width)) {
                let (low, high) = values.split_at(width);
                for (out, (low, high)) in out.iter_mut().zip(low.iter().zip(high)) {
                    *out = bf16_bits(*low) | bf16_bits(*high) << 16;
                }
            }
        }
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

fn blocks<A, B, P: Panels>(
    shape: PanelProduct,
    a: Factor<'_, A>,
    b: Factor<'_, B>,
    panels: &P,
    out: &mut [f32],
) where
    A: Fn(usize, usize) -> f32 + Sync,
    B: Fn(usize, usize) -> f32 + Sync,
{
    let PanelProduct { cols, depth, .. } = shape;
    let widths = panels.widths();
    let panel_len = |depth: usize, width: usize| depth.next_multiple_of(P::PAIR) / P::PAIR * width;
    let mut right = vec![
        P::Value::default();
        cols.div_ceil(widths.cols) * panel_len(DEPTH.min(depth), widths.cols)
    ];
    let task_rows = ROWS.next_multiple_of(widths.rows);
    for start in (0..depth).step_by(DEPTH) {
        let block = start..depth.min(start + DEPTH);
        let len = panel_len(block.len(), widths.cols);
        let right = &mut right[..cols.div_ceil(widths.cols) * len];
        threads::for_each_chunk(right, len, |panel, out| {
            let first = panel * widths.cols;
            let columns = first..cols.min(first + widths.cols);
            panels.pack(&b, columns, block.clone(), widths.cols, out);
        });
        let right = &*right;
        threads::for_each_chunk(out, task_rows * cols, |task, out| {
            let (first, rows) = (task * task_rows, out.len() / cols);
            let len = panel_len(block.len(), widths.rows);
            let mut left = vec![P::Value::default(); rows.div_ceil(widths.rows) * len];
            for (panel, out) in left.chunks_exact_mut(len).enumerate() {
                let from = first + panel * widths.rows;
                let indices = from..(first + rows).min(from + widths.rows);
                panels.pack(&a, indices, block.clone(), widths.rows, out);
            }
            let depth = block.len().div_ceil(P::PAIR);
            let product = PanelProduct { rows, depth, add: start > 0, ..shape };
            panels.multiply(&left, right, product, out);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(len: usize, seed: f32) -> Vec<f32> {
        (0..len).map(|i| (i as f32 * 0.37 + seed).sin()).collect()
    }

    /// Of every shape and either order of both factors, the largest error and the largest bound of it.
    fn check(precision: Precision, unit: f64) {
        for (rows, cols, depth) in
            [(1, 1, 1), (13, 37, 5), (12, 32, 512), (50, 33, 513), (97, 100, 1030)]
        {
            let (a, b) = (values(rows * depth, 0.1), values(depth * cols, 0.7));
            let at = |order: bool, (i, d): (usize, usize), indices: usize| match order {
                true => i * depth + d,
                false => d * indices + i,
            };
            for (a_order, b_order) in [(true, false), (false, true), (true, true), (false, false)] {
                let mut out = vec![f32::NAN; rows * cols];
                let (left, right) = (|at: usize, _: usize| a[at], |at: usize, _: usize| b[at]);
                let factor_a = match a_order {
                    true => Factor::depth_inner(depth, &left),
                    false => Factor::index_inner(rows, &left),
                };
                let factor_b = match b_order {
                    true => Factor::depth_inner(depth, &right),
                    false => Factor::index_inner(cols, &right),
                };
                gemm((rows, cols, depth), factor_a, factor_b, 0.5, precision, &mut out);
                for (i, j) in (0..rows).flat_map(|i| (0..cols).map(move |j| (i, j))) {
                    let terms = (0..depth).map(|d| {
                        let (a, b) = (a[at(a_order, (i, d), rows)], b[at(b_order, (j, d), cols)]);
                        f64::from(a) * f64::from(b)
                    });
                    let (sum, size) = terms.fold((0., 0.), |(s, t), x| (s + x, t + x.abs()));
                    // Two rounded factors, and a chain of at most `depth + 3` roundings of sums below Σ|terms|.
                    let bound =
                        0.5 * size * (2.1 * unit + (depth + 3) as f64 * 2f64.powi(-24)) + 1e-30;
                    let off = (f64::from(out[i * cols + j]) - 0.5 * sum).abs();
                    assert!(
                        off <= bound,
                        "{rows} × {cols} × {depth} at {i}, {j}: {off:e} > {bound:e}"
                    );
                }
            }
        }
    }

    #[test]
    fn products_are_within_their_roundings() {
        check(Precision::F32, 0.);
        check(Precision::Bf16, 2f64.powi(-8));
    }

    #[test]
    fn an_output_has_the_bits_of_its_own_row_and_column() {
        let (rows, cols, depth) = (61, 70, 700);
        let (a, b) = (values(rows * depth, 0.3), values(depth * cols, 0.9));
        let right = |at: usize, _: usize| b[at];
        for precision in [Precision::F32, Precision::Bf16] {
            let product = |rows: Range<usize>| {
                let left = |at: usize, _: usize| a[rows.start * depth + at];
                let mut out = vec![0.; rows.len() * cols];
                let (a, b) = (Factor::depth_inner(depth, &left), Factor::index_inner(cols, &right));
                gemm((rows.len(), cols, depth), a, b, 1., precision, &mut out);
                out
            };
            let all = product(0..rows);
            for row in [0, 11, 60] {
                assert!(product(row..row + 1) == all[row * cols..][..cols], "row {row}");
            }
        }
    }

    #[test]
    fn rounding_to_bfloat16_is_halfs() {
        for bits in (0..=u32::MAX).step_by(65_521).chain([0x7f80_0000, 0x7f7f_ffff, 0xffc0_0001]) {
            let x = f32::from_bits(bits);
            let found = half::bf16::from_bits(bf16_bits(x) as u16);
            assert!(found == half::bf16::from_f32(x) || x.is_nan() && found.is_nan(), "{x:?}");
        }
    }
}
