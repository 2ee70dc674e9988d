//! Products of large matrices on all threads, for training: `out = scale · a·b`, blocked for the caches.
//!
//! Blocks of the depth are multiplied one after the other. Of each, the right factor is brought into panels once, and the
//! left one by every task for some of its rows at a time. An output is one chain of fused products for each block of the depth, the
//! blocks added in order: its bits depend on its own operands alone.

use std::ops::Range;

use crate::{
    kernels::{self, Bf16Panels, Loop, PanelProduct, PanelWidths, vectorized},
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
/// Rows whose panels are in the second-level cache together: the right panels are then used often enough.
const ROWS: usize = 48;
/// Tasks a thread should have, for all to finish together.
const TASKS: usize = 4;

/// A factor of a product: its values by index (row of the left factor, column of the right one) and depth.
#[derive(Clone, Copy)]
pub struct Factor<'a, T, F> {
    /// Whether an index's values over the depth are neighbours, or a depth's values over the indices.
    order: Order,
    /// Elements between neighbours in the other direction.
    stride: usize,
    data: &'a [T],
    /// The value of an element at a depth.
    value: F,
}

#[derive(Clone, Copy)]
enum Order {
    DepthInner,
    IndexInner,
}

impl<'a, T: Copy, F: Fn(T, usize) -> f32> Factor<'a, T, F> {
    /// The value of index `i` at depth `d` is `value(data[i · stride + d], d)`.
    pub fn depth_inner(stride: usize, data: &'a [T], value: F) -> Self {
        Self { order: Order::DepthInner, stride, data, value }
    }

    /// The value of index `i` at depth `d` is `value(data[d · stride + i], d)`.
    pub fn index_inner(stride: usize, data: &'a [T], value: F) -> Self {
        Self { order: Order::IndexInner, stride, data, value }
    }

    /// The values at `out.len()` neighbouring places from `first` on, at the depths that `depth` says.
    #[inline(always)]
    fn fill(&self, first: usize, depth: impl Fn(usize) -> usize, out: &mut [f32]) {
        let data = &self.data[first..][..out.len()];
        for (i, (out, x)) in out.iter_mut().zip(data).enumerate() {
            *out = (self.value)(*x, depth(i));
        }
    }
}

/// An element that is a value as it is.
#[inline(always)]
pub fn plain(x: f32, _depth: usize) -> f32 {
    x
}

/// Brings a panel of `width` indices of a factor into its order; of those beyond `indices` it may be anything.
struct Pack<'a, T, F, P: Panels> {
    panels: &'a P,
    factor: &'a Factor<'a, T, F>,
    indices: Range<usize>,
    depth: Range<usize>,
    width: usize,
    out: &'a mut [P::Value],
}

impl<T: Copy, F: Fn(T, usize) -> f32, P: Panels> Loop for Pack<'_, T, F, P> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { panels, factor, indices, depth, width, out } = self;
        match factor.order {
            Order::DepthInner => {
                let mut line = [0f32; DEPTH];
                let line = &mut line[..depth.len().next_multiple_of(P::PAIR)];
                for (i, index) in indices.enumerate() {
                    let first = index * factor.stride + depth.start;
                    factor.fill(first, |d| depth.start + d, &mut line[..depth.len()]);
                    panels.scatter(line, &mut out[i..], width);
                }
            }
            // A constant width becomes vector moves; the last panel may have fewer indices than its width.
            Order::IndexInner => match (width, indices.len()) {
                (4, 4) => lines::<4, T, F, P>(panels, factor, indices.start, depth, out),
                (6, 6) => lines::<6, T, F, P>(panels, factor, indices.start, depth, out),
                (12, 12) => lines::<12, T, F, P>(panels, factor, indices.start, depth, out),
                (16, 16) => lines::<16, T, F, P>(panels, factor, indices.start, depth, out),
                (32, 32) => lines::<32, T, F, P>(panels, factor, indices.start, depth, out),
                _ => {
                    for (i, index) in indices.enumerate() {
                        let value = |d: usize| match d < depth.end {
                            true => (factor.value)(factor.data[d * factor.stride + index], d),
                            false => 0.,
                        };
                        let starts = depth.clone().step_by(P::PAIR);
                        for (d, out) in starts.zip(out[i..].iter_mut().step_by(width)) {
                            *out = panels.join(value(d), value(d + P::PAIR - 1));
                        }
                    }
                }
            },
        }
    }
}

/// Panels of exactly `N` indices from `first` on.
#[inline(always)]
fn lines<const N: usize, T: Copy, F: Fn(T, usize) -> f32, P: Panels>(
    panels: &P,
    factor: &Factor<'_, T, F>,
    first: usize,
    depth: Range<usize>,
    out: &mut [P::Value],
) {
    let line = |d: usize| -> &[T; N] {
        factor.data[d * factor.stride + first..].first_chunk().unwrap_or_else(|| outside())
    };
    let (outs, _) = out.as_chunks_mut::<N>();
    for (d, out) in depth.clone().step_by(P::PAIR).zip(outs) {
        let (low, last) = (line(d), d + P::PAIR - 1);
        match last < depth.end {
            true => {
                let high = line(last);
                for i in 0..N {
                    let (low, high) = ((factor.value)(low[i], d), (factor.value)(high[i], last));
                    out[i] = panels.join(low, high);
                }
            }
            false => {
                for i in 0..N {
                    out[i] = panels.join((factor.value)(low[i], d), 0.);
                }
            }
        }
    }
}

#[cold]
fn outside() -> ! {
    panic!("a factor outside its slice")
}

/// `out[i][j] = scale · Σ_d a[i][d] · b[d][j]` for `rows` × `cols` outputs.
///
/// # Panics
/// If `out` is of another size.
pub fn gemm<T, U, A, B>(
    (rows, cols, depth): (usize, usize, usize),
    a: Factor<'_, T, A>,
    b: Factor<'_, U, B>,
    scale: f32,
    precision: Precision,
    out: &mut [f32],
) where
    T: Copy + Sync,
    U: Copy + Sync,
    A: Fn(T, usize) -> f32 + Sync,
    B: Fn(U, usize) -> f32 + Sync,
{
    product(PanelProduct { rows, cols, depth, scale, add: false }, a, b, precision, out);
}

/// `out[i][j] += Σ_d a[i][d] · b[d][j]` for `rows` × `cols` outputs.
///
/// # Panics
/// If `out` is of another size.
pub fn gemm_add<T, U, A, B>(
    (rows, cols, depth): (usize, usize, usize),
    a: Factor<'_, T, A>,
    b: Factor<'_, U, B>,
    precision: Precision,
    out: &mut [f32],
) where
    T: Copy + Sync,
    U: Copy + Sync,
    A: Fn(T, usize) -> f32 + Sync,
    B: Fn(U, usize) -> f32 + Sync,
{
    product(PanelProduct { rows, cols, depth, scale: 1., add: true }, a, b, precision, out);
}

fn product<T, U, A, B>(
    shape: PanelProduct,
    a: Factor<'_, T, A>,
    b: Factor<'_, U, B>,
    precision: Precision,
    out: &mut [f32],
) where
    T: Copy + Sync,
    U: Copy + Sync,
    A: Fn(T, usize) -> f32 + Sync,
    B: Fn(U, usize) -> f32 + Sync,
{
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

/// How panels are stored and multiplied.
trait Panels: Sync {
    type Value: Copy + Default + Send + Sync;
    /// Depths in a value.
    const PAIR: usize;
    fn widths(&self) -> PanelWidths;
    /// The values of one index over the depth, to every `width`-th place.
    fn scatter(&self, line: &[f32], out: &mut [Self::Value], width: usize);
    /// The values of an index at [`PAIR`](Self::PAIR) depths, of which the first may be the last.
    fn join(&self, low: f32, high: f32) -> Self::Value;
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

    #[inline(always)]
    fn scatter(&self, line: &[f32], out: &mut [f32], width: usize) {
        for (value, out) in line.iter().zip(out.iter_mut().step_by(width)) {
            *out = self.join(*value, 0.);
        }
    }

    #[inline(always)]
    fn join(&self, value: f32, _: f32) -> f32 {
        if self.1 { to_bf16(value) } else { value }
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
    fn scatter(&self, line: &[f32], out: &mut [u32], width: usize) {
        let mut pairs = [0u32; DEPTH / 2];
        for (pair, values) in pairs.iter_mut().zip(line.as_chunks::<2>().0) {
            *pair = bf16_pair(values[0], values[1]);
        }
        for (pair, out) in pairs[..line.len() / 2].iter().zip(out.iter_mut().step_by(width)) {
            *out = *pair;
        }
    }

    #[inline(always)]
    fn join(&self, low: f32, high: f32) -> u32 {
        bf16_pair(low, high)
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

fn blocks<T, U, A, B, P: Panels>(
    shape: PanelProduct,
    a: Factor<'_, T, A>,
    b: Factor<'_, U, B>,
    panels: &P,
    out: &mut [f32],
) where
    T: Copy + Sync,
    U: Copy + Sync,
    A: Fn(T, usize) -> f32 + Sync,
    B: Fn(U, usize) -> f32 + Sync,
{
    let PanelProduct { cols, depth, .. } = shape;
    let widths = panels.widths();
    let panel_len = |depth: usize, width: usize| depth.div_ceil(P::PAIR) * width;
    let mut right = vec![
        P::Value::default();
        cols.div_ceil(widths.cols) * panel_len(DEPTH.min(depth), widths.cols)
    ];
    let group_rows = ROWS.next_multiple_of(widths.rows);
    let groups = shape.rows.div_ceil(group_rows);
    let task_rows = groups.div_ceil(threads::count() * TASKS).max(1) * group_rows;
    for start in (0..depth).step_by(DEPTH) {
        let block = start..depth.min(start + DEPTH);
        let len = panel_len(block.len(), widths.cols);
        let right = &mut right[..cols.div_ceil(widths.cols) * len];
        threads::for_each_chunk(right, len, |panel, out| {
            let first = panel * widths.cols;
            let columns = first..cols.min(first + widths.cols);
            let width = widths.cols;
            vectorized(Pack {
                panels,
                factor: &b,
                indices: columns,
                depth: block.clone(),
                width,
                out,
            });
        });
        let right = &*right;
        threads::for_each_chunk(out, task_rows * cols, |task, out| {
            let len = panel_len(block.len(), widths.rows);
            let mut left = vec![P::Value::default(); group_rows / widths.rows * len];
            for (group, out) in out.chunks_mut(group_rows * cols).enumerate() {
                let (first, rows) = (task * task_rows + group * group_rows, out.len() / cols);
                for (panel, out) in
                    left.chunks_exact_mut(len).take(rows.div_ceil(widths.rows)).enumerate()
                {
                    let from = first + panel * widths.rows;
                    let indices = from..(first + rows).min(from + widths.rows);
                    let width = widths.rows;
                    let depth = block.clone();
                    vectorized(Pack { panels, factor: &a, indices, depth, width, out });
                }
                let depth = block.len().div_ceil(P::PAIR);
                let product = PanelProduct { rows, depth, add: shape.add || start > 0, ..shape };
                panels.multiply(&left, right, product, out);
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
            [(1, 1, 1), (13, 37, 5), (12, 32, 512), (50, 33, 513), (97, 100, 1030)]
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

    #[test]
    fn rounding_to_bfloat16_is_halfs() {
        for bits in (0..=u32::MAX).step_by(65_521).chain([0x7f80_0000, 0x7f7f_ffff, 0xffc0_0001]) {
            let x = f32::from_bits(bits);
            let found = half::bf16::from_bits(bf16_bits(x) as u16);
            assert!(found == half::bf16::from_f32(x) || x.is_nan() && found.is_nan(), "{x:?}");
        }
    }
}
