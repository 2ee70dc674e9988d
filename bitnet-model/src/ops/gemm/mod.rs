//! Products of large matrices on all threads, for training: `out = scale · a·b`, blocked for the caches.
//!
//! Both factors are brought into panels, block of the depth by block; tasks have some of the rows or some of the columns. An
//! output is one chain of fused products for each block, the blocks added in order: its bits depend on its own operands alone.

use std::ops::Range;

use crate::kernels::{self, Bf16Panels, Order, PanelProduct};

mod factor;
mod panels;
mod scratch;
mod tasks;
mod ternary;

pub use factor::{Bf16Factor, Factor, plain};
use panels::{F32Panels, Panels};
use tasks::{by_columns, by_rows};
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

/// A part of a factor that goes into neighbouring panels.
pub struct Part {
    /// Rows of the left factor or columns of the right one.
    pub indices: Range<usize>,
    /// Depths, of which the first is a multiple of 512, at most 512.
    pub depth: Range<usize>,
    /// Indices of a whole panel.
    pub width: usize,
    /// In which a panel's values go.
    pub order: Order,
}

impl Part {
    /// The indices of each panel, and its values in those of all.
    fn panels<'a, T>(&self, out: &'a mut [T]) -> impl Iterator<Item = (Range<usize>, &'a mut [T])> {
        let Range { start, end } = self.indices;
        let starts = (start..end).step_by(self.width);
        let len = out.len() / starts.len();
        let width = self.width;
        starts.map(move |start| start..end.min(start + width)).zip(out.chunks_exact_mut(len))
    }
}

/// A factor of a product, which can be brought into panels.
pub trait Operand: Sync {
    /// The order in which panels of it take least to make, as a left factor.
    fn order(&self) -> Order {
        Order::Depths
    }

    /// Writes the values of `part` as `panels` have them, panel after panel, in the part's order: [`Order::Depths`] or
    /// [that](Self::order) of the factor. What is beyond the indices may be anything. Must be `#[inline(always)]`.
    fn pack<P: Panels>(&self, panels: &P, part: &Part, out: &mut [P::Value]);
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
    let order = a.order();
    product(PanelProduct { rows, cols, depth, scale, add: false, order }, a, b, precision, out);
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
    let order = a.order();
    product(PanelProduct { rows, cols, depth, scale, add: true, order }, a, b, precision, out);
}

fn product<A: Operand, B: Operand>(
    shape: PanelProduct,
    a: A,
    b: B,
    precision: Precision,
    out: &mut [f32],
) {
    assert_eq!(out.len(), shape.rows * shape.cols, "product outside its slice");
    if shape.depth == 0 {
        if !shape.add {
            out.fill(0.);
        }
        return;
    }
    match (precision, Bf16Panels::new()) {
        (Precision::F32, _) => tasks(shape, (a, b), &F32Panels(kernels::active(), false), out),
        (Precision::Bf16, None) => tasks(shape, (a, b), &F32Panels(kernels::active(), true), out),
        (Precision::Bf16, Some(panels)) => tasks(shape, (a, b), &panels, out),
    }
}

fn tasks<A: Operand, B: Operand, P: Panels>(
    shape: PanelProduct,
    factors: (A, B),
    panels: &P,
    out: &mut [f32],
) {
    match (shape.rows, shape.cols) {
        (0, _) | (_, 0) => (),
        (rows, cols) if rows >= cols => by_rows(shape, factors, panels, out),
        _ => by_columns(shape, factors, panels, out),
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
        for (rows, cols, depth) in [
            (1, 1, 1),
            (13, 37, 5),
            (12, 32, 512),
            (50, 33, 513),
            (97, 100, 1030),
            (3, 1200, 6),
            (130, 7, 3),
            (400, 410, 5),
        ] {
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
