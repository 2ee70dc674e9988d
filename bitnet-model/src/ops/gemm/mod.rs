//! Products of large matrices on all threads, for training: `out = scale · a·b`, blocked for the caches.
//!
//! The left factor is brought into panels once, by all threads. A task has some of the columns: it brings the right factor's
//! into panels block of the depth by block, multiplies them, and keeps their sums, so that none of it leaves the caches of its
//! thread. An output is one chain of fused products for each block of the depth, the blocks added in order: its bits depend on
//! its own operands alone.

use std::ops::Range;

use crate::{
    kernels::{self, Bf16Panels, Loop, PanelProduct, vectorized},
    threads,
};

mod factor;
mod panels;
mod ternary;

pub use factor::{Bf16Factor, Factor, plain};
use panels::{F32Panels, Panels};
pub use ternary::TernaryRows;

/// In which precision products are multiplied; sums are f32 in either.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// Single precision.
    #[default]
    F32,
    /// Factors are rounded to bfloat16. Integers up to 256 stay what they are.
    Bf16,
}

/// Values of the depth that are in panels together: a panel of the left factor then fits the first-level cache.
const DEPTH: usize = 512;
/// Columns of a task, at least and at most: their panels, which the task makes for itself, fit the second-level cache, with the
/// sums of some hundred rows.
const COLS: (usize, usize) = (64, 256);
/// Rows of a pass over the right factor: more would not make up for the room their sums take.
const ROWS: usize = 4096;
/// Values of the left factor that are in panels together, which all tasks read.
const LEFT: usize = 4 << 20;
/// Tasks a thread should have, for all to finish together.
const TASKS: usize = 4;

/// A part of a factor.
pub struct Panel {
    /// Rows of the left factor or columns of the right one.
    pub indices: Range<usize>,
    /// Depths, of which the first is a multiple of 512.
    pub depth: Range<usize>,
    /// Indices of a whole panel.
    pub width: usize,
}

/// A factor of a product, which can be brought into panels.
pub trait Operand: Sync {
    /// Writes the values of `panel` in the order of `panels`: of a depth (or pair of depths) all indices are neighbours. What is
    /// beyond the indices may be anything. Must be `#[inline(always)]`.
    fn pack<P: Panels>(&self, panels: &P, panel: Panel, out: &mut [P::Value]);
}

struct Pack<'a, O, P: Panels> {
    panels: &'a P,
    operand: &'a O,
    panel: Panel,
    out: &'a mut [P::Value],
}

impl<O: Operand, P: Panels> Loop for Pack<'_, O, P> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        self.operand.pack(self.panels, self.panel, self.out);
    }
}

/// `out[i][j] = scale · Σ_d a[i][d] · b[d][j]` for `rows` × `cols` outputs.
///
/// # Panics
/// If `out` is of another size.
pub fn gemm<A: Operand, B: Operand>(
    (rows, cols, depth): (usize, usize, usize),
    a: A,
    b: B,
    scale: f32,
    precision: Precision,
    out: &mut [f32],
) {
    product(PanelProduct { rows, cols, depth, scale, add: false }, a, b, precision, out);
}

/// `out[i][j] += scale · Σ_d a[i][d] · b[d][j]` for `rows` × `cols` outputs.
///
/// # Panics
/// If `out` is of another size.
pub fn gemm_add<A: Operand, B: Operand>(
    (rows, cols, depth): (usize, usize, usize),
    a: A,
    b: B,
    scale: f32,
    precision: Precision,
    out: &mut [f32],
) {
    product(PanelProduct { rows, cols, depth, scale, add: true }, a, b, precision, out);
}

fn product<A: Operand, B: Operand>(
    shape: PanelProduct,
    a: A,
    b: B,
    precision: Precision,
    out: &mut [f32],
) {
    assert_eq!(out.len(), shape.rows * shape.cols, "product outside its slice");
    if shape.depth == 0 && !shape.add {
        out.fill(0.);
    }
    match (precision, Bf16Panels::new()) {
        (Precision::F32, _) => blocks(shape, a, b, &F32Panels(kernels::active(), false), out),
        (Precision::Bf16, None) => blocks(shape, a, b, &F32Panels(kernels::active(), true), out),
        (Precision::Bf16, Some(panels)) => blocks(shape, a, b, &panels, out),
    }
}

fn blocks<A: Operand, B: Operand, P: Panels>(
    shape: PanelProduct,
    a: A,
    b: B,
    panels: &P,
    out: &mut [f32],
) {
    let PanelProduct { cols, depth, .. } = shape;
    if shape.rows == 0 || cols == 0 {
        return;
    }
    let (widths, threads) = (panels.widths(), threads::count());
    let panel_len = |depth: usize, width: usize| depth.div_ceil(P::PAIR) * width;
    let width = (cols / (threads * TASKS)).clamp(COLS.0, COLS.1).next_multiple_of(widths.cols);
    let cuts: Vec<usize> = (0..cols).step_by(width).chain([cols]).collect();
    // Few columns: tasks have some of the rows each.
    let parts = (2 * threads).div_ceil(cuts.len() - 1);
    for (chunk, out) in out.chunks_mut(ROWS * cols).enumerate() {
        let (first_row, rows) = (chunk * ROWS, out.len() / cols);
        let task_rows = rows.div_ceil(parts).next_multiple_of(widths.rows);
        let left_len = rows.div_ceil(widths.rows) * panel_len(DEPTH, widths.rows);
        let span_len = (LEFT / left_len).max(1) * DEPTH;
        for start in (0..depth).step_by(span_len) {
            let span = start..depth.min(start + span_len);
            let blocks = || {
                let starts = span.clone().step_by(DEPTH);
                starts.map(|start| start..span.end.min(start + DEPTH))
            };
            let mut left = vec![P::Value::default(); span.len().div_ceil(DEPTH) * left_len];
            for (block, left) in blocks().zip(left.chunks_mut(left_len)) {
                let len = panel_len(block.len(), widths.rows);
                let left = &mut left[..rows.div_ceil(widths.rows) * len];
                threads::for_each_chunk(left, len, |panel, out| {
                    let (from, width) = (panel * widths.rows, widths.rows);
                    let indices = first_row + from..first_row + rows.min(from + width);
                    let panel = Panel { indices, depth: block.clone(), width };
                    vectorized(Pack { panels, operand: &a, panel, out });
                });
            }
            threads::for_each_block(out, task_rows, &cuts, |(row, j), mut out| {
                let (rows, cols) = (out.rows(), cuts[j + 1] - cuts[j]);
                let mut sums = vec![0f32; rows * cols];
                let add = shape.add || start > 0;
                if add {
                    sums.chunks_mut(cols).enumerate().for_each(|(r, sums)| {
                        sums.copy_from_slice(out.row(r));
                    });
                }
                let most = panel_len(DEPTH.min(span.len()), widths.cols);
                let mut right = vec![P::Value::default(); cols.div_ceil(widths.cols) * most];
                for (index, (block, left)) in blocks().zip(left.chunks(left_len)).enumerate() {
                    let len = panel_len(block.len(), widths.cols);
                    let right = &mut right[..cols.div_ceil(widths.cols) * len];
                    for (panel, out) in right.chunks_mut(len).enumerate() {
                        let (from, width) = (panel * widths.cols, widths.cols);
                        let indices = cuts[j] + from..cuts[j] + cols.min(from + width);
                        let panel = Panel { indices, depth: block.clone(), width };
                        vectorized(Pack { panels, operand: &b, panel, out });
                    }
                    let left = &left[row / widths.rows * panel_len(block.len(), widths.rows)..];
                    let (depth, add) = (block.len().div_ceil(P::PAIR), add || index > 0);
                    let product = PanelProduct { rows, cols, depth, add, ..shape };
                    panels.multiply(left, right, product, &mut sums);
                }
                for (r, sums) in sums.chunks(cols).enumerate() {
                    out.row(r).copy_from_slice(sums);
                }
            });
        }
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
            [(1, 1, 1), (13, 37, 5), (12, 32, 512), (50, 33, 513), (97, 100, 1030), (3, 8200, 6)]
        {
            let (a, b) = (values(rows * depth, 0.1), values(depth * cols, 0.7));
            let at = |order: bool, (i, d): (usize, usize), indices: usize| match order {
                true => i * depth + d,
                false => d * indices + i,
            };
            for (a_order, b_order) in [(true, false), (false, true), (true, true), (false, false)] {
                let mut out = vec![f32::NAN; rows * cols];
                let factor_a = match a_order {
                    true => Factor::depth_inner(depth, &a, plain),
                    false => Factor::index_inner(rows, &a, plain),
                };
                let factor_b = match b_order {
                    true => Factor::depth_inner(depth, &b, plain),
                    false => Factor::index_inner(cols, &b, plain),
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
        for precision in [Precision::F32, Precision::Bf16] {
            let product = |rows: Range<usize>| {
                let mut out = vec![0.; rows.len() * cols];
                let (a, b) = (
                    Factor::depth_inner(depth, &a[rows.start * depth..], plain),
                    Factor::index_inner(cols, &b, plain),
                );
                gemm((rows.len(), cols, depth), a, b, 1., precision, &mut out);
                out
            };
            let all = product(0..rows);
            for row in [0, 11, 60] {
                assert!(product(row..row + 1) == all[row * cols..][..cols], "row {row}");
            }
        }
    }
}
