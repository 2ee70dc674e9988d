//! Products of large matrices on all threads, for training: `out = scale · a·b`, blocked for the caches.
//!
//! Blocks of columns, and of these blocks of the depth, are multiplied one after the other. Of each, the right factor is brought into panels once, and the
//! left one by every task for some of its rows at a time. An output is one chain of fused products for each block of the depth, the
//! blocks added in order: its bits depend on its own operands alone.

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

/// Values of the depth that are in panels at a time: a panel of the left factor then fits the first-level cache.
const DEPTH: usize = 512;
/// Rows whose panels are in the second-level cache together: the right panels are then used often enough.
const ROWS: usize = 48;
/// Columns whose panels are there at a time: the vocabulary of a large model in one piece would take as much memory as its
/// head, and be read from there for every group of rows.
const COLS: usize = 8192;
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
    product(
        PanelProduct { rows, cols, depth, stride: cols, scale, add: false },
        a,
        b,
        precision,
        out,
    );
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
    product(
        PanelProduct { rows, cols, depth, stride: cols, scale, add: true },
        a,
        b,
        precision,
        out,
    );
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
    let PanelProduct { cols, depth, stride, .. } = shape;
    let widths = panels.widths();
    let panel_len = |depth: usize, width: usize| depth.div_ceil(P::PAIR) * width;
    let most_panels = COLS.min(cols).div_ceil(widths.cols);
    let mut right =
        vec![P::Value::default(); most_panels * panel_len(DEPTH.min(depth), widths.cols)];
    let group_rows = ROWS.next_multiple_of(widths.rows);
    let groups = shape.rows.div_ceil(group_rows);
    let threads = threads::count();
    let task_rows = match groups.div_ceil(threads * TASKS) {
        // Few rows: equal parts, whole panels each.
        0 | 1 => shape.rows.div_ceil(threads).max(1).next_multiple_of(widths.rows),
        groups => groups * group_rows,
    };
    let starts = |len: usize, step: usize| (0..len).step_by(step);
    for (first_col, start) in
        starts(cols, COLS).flat_map(|col| starts(depth, DEPTH).map(move |depth| (col, depth)))
    {
        let (cols, block) = (COLS.min(cols - first_col), start..depth.min(start + DEPTH));
        let len = panel_len(block.len(), widths.cols);
        let right = &mut right[..cols.div_ceil(widths.cols) * len];
        threads::for_each_chunk(right, len, |panel, out| {
            let (first, width) = (panel * widths.cols, widths.cols);
            let indices = first_col + first..first_col + cols.min(first + width);
            let panel = Panel { indices, depth: block.clone(), width };
            vectorized(Pack { panels, operand: &b, panel, out });
        });
        let right = &*right;
        threads::for_each_chunk(out, task_rows * stride, |task, out| {
            let len = panel_len(block.len(), widths.rows);
            let mut left = vec![P::Value::default(); group_rows / widths.rows * len];
            for (group, out) in out.chunks_mut(group_rows * stride).enumerate() {
                let (first, rows) = (task * task_rows + group * group_rows, out.len() / stride);
                for (panel, out) in
                    left.chunks_exact_mut(len).take(rows.div_ceil(widths.rows)).enumerate()
                {
                    let from = first + panel * widths.rows;
                    let indices = from..(first + rows).min(from + widths.rows);
                    let panel = Panel { indices, depth: block.clone(), width: widths.rows };
                    vectorized(Pack { panels, operand: &a, panel, out });
                }
                let (depth, add) = (block.len().div_ceil(P::PAIR), shape.add || start > 0);
                let product = PanelProduct { rows, cols, depth, add, ..shape };
                panels.multiply(&left, right, product, &mut out[first_col..]);
            }
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
