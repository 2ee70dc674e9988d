//! Factors of a product as slices: rows or columns of values, each seen through a function.

use std::ops::Range;

use half::{bf16, slice::HalfFloatSliceExt};

use super::{Operand, Part, panels::Panels};
use crate::kernels::{Order, PANEL_DEPTH, prefetch};

/// Depths by which [`lines`] asks for values in advance.
const AHEAD: usize = 16;
/// Bytes from one depth to the next from which on that pays: the processor's own prefetching stops at the end of a page.
const FAR: usize = 1024;

/// A factor of a product: its values by index (row of the left factor, column of the right one) and depth.
#[derive(Clone, Copy)]
pub struct Factor<'a, T, F> {
    /// Whose values are neighbours: of an index over the depth (`Rows`), or of a depth over the indices.
    order: Order,
    /// Elements between neighbours in the other direction.
    stride: usize,
    data: &'a [T],
    /// The value of an element at a depth.
    value: F,
}

impl<'a, T: Copy, F: Fn(T, usize) -> f32> Factor<'a, T, F> {
    /// The value of index `i` at depth `d` is `value(data[i · stride + d], d)`.
    pub fn depth_inner(stride: usize, data: &'a [T], value: F) -> Self {
        Self { order: Order::Rows, stride, data, value }
    }

    /// The value of index `i` at depth `d` is `value(data[d · stride + i], d)`.
    pub fn index_inner(stride: usize, data: &'a [T], value: F) -> Self {
        Self { order: Order::Depths, stride, data, value }
    }

    /// The values at `out.len()` neighbouring places from `first` on, at the depths that `depth` says.
    #[inline(always)]
    fn fill(&self, first: usize, depth: impl Fn(usize) -> usize, out: &mut [f32]) {
        let data = &self.data[first..][..out.len()];
        for (i, (out, x)) in out.iter_mut().zip(data).enumerate() {
            *out = (self.value)(*x, depth(i));
        }
    }

    /// Asks for the values of some neighbouring indices at a depth, if depths are far from each other.
    #[inline(always)]
    fn fetch(&self, indices: &Range<usize>, depth: usize) {
        const LINE: usize = 64;
        if self.stride * size_of::<T>() < FAR {
            return;
        }
        let first = self.data.as_ptr().wrapping_add(depth * self.stride + indices.start);
        for line in (0..indices.len() * size_of::<T>()).step_by(LINE) {
            prefetch(first.cast::<u8>().wrapping_add(line));
        }
    }

    /// The values of `out.len()` neighbouring indices at a depth, or of those of `indices` where the data ends before.
    #[inline(always)]
    fn line<const M: usize>(&self, indices: &Range<usize>, depth: usize, out: &mut [f32; M]) {
        let data = &self.data[depth * self.stride + indices.start..];
        match data.first_chunk::<M>() {
            Some(data) => {
                for (out, x) in out.iter_mut().zip(data) {
                    *out = (self.value)(*x, depth);
                }
            }
            None => {
                for (out, x) in out.iter_mut().zip(&data[..indices.len()]) {
                    *out = (self.value)(*x, depth);
                }
            }
        }
    }
}

/// An element that is a value as it is.
#[inline(always)]
pub fn plain(x: f32, _depth: usize) -> f32 {
    x
}

impl<T: Copy + Sync, F: Fn(T, usize) -> f32 + Sync> Operand for Factor<'_, T, F> {
    fn order(&self) -> Order {
        self.order
    }

    /// Constant widths become vector moves.
    #[inline(always)]
    fn pack<P: Panels>(&self, panels: &P, part: &Part, out: &mut [P::Value]) {
        match (self.order, part.width) {
            _ if part.order == Order::Rows => rows(panels, self, part, out),
            (Order::Rows, 32) => transposed::<32, T, F, P>(panels, self, part, out),
            (Order::Rows, _) => transposed::<16, T, F, P>(panels, self, part, out),
            (Order::Depths, 4) => lines::<4, 4, T, F, P>(panels, self, part, out),
            (Order::Depths, 6) => lines::<6, 8, T, F, P>(panels, self, part, out),
            (Order::Depths, 12) => lines::<12, 16, T, F, P>(panels, self, part, out),
            (Order::Depths, 32) => lines::<32, 32, T, F, P>(panels, self, part, out),
            (Order::Depths, _) => lines::<16, 16, T, F, P>(panels, self, part, out),
        }
    }
}

/// Panels of [`Order::Rows`] of a factor whose values over the depth are neighbours.
#[inline(always)]
fn rows<T: Copy, F: Fn(T, usize) -> f32, P: Panels>(
    panels: &P,
    factor: &Factor<'_, T, F>,
    Part { indices, depth, .. }: &Part,
    out: &mut [P::Value],
) {
    const PIECE: usize = 64;
    for (row, index) in out.chunks_exact_mut(PANEL_DEPTH / P::PAIR).zip(indices.clone()) {
        let starts = depth.clone().step_by(PIECE);
        for (start, out) in starts.zip(row.chunks_exact_mut(PIECE / P::PAIR)) {
            let len = PIECE.min(depth.end - start);
            let mut values = [0f32; PIECE];
            factor.fill(index * factor.stride + start, |d| start + d, &mut values[..len]);
            panels.convert(&values, out);
        }
    }
}

/// Panels of `N` indices of a factor whose values over the depth are neighbours: pieces of its lines are converted and then
/// transposed, in the first-level cache.
#[inline(always)]
fn transposed<const N: usize, T: Copy, F: Fn(T, usize) -> f32, P: Panels>(
    panels: &P,
    factor: &Factor<'_, T, F>,
    part: &Part,
    out: &mut [P::Value],
) {
    const PIECE: usize = 32;
    let depth = &part.depth;
    for (indices, out) in part.panels(out) {
        let (outs, _) = out.as_chunks_mut::<N>();
        let starts = depth.clone().step_by(PIECE * P::PAIR);
        for (start, outs) in starts.zip(outs.chunks_mut(PIECE)) {
            let len = (depth.end - start).min(PIECE * P::PAIR);
            let mut lines = [[P::Value::default(); PIECE]; N];
            for (line, index) in lines.iter_mut().zip(indices.clone()) {
                let mut values = [[0f32; PIECE]; 2];
                let values = &mut values.as_flattened_mut()[..PIECE * P::PAIR];
                factor.fill(index * factor.stride + start, |d| start + d, &mut values[..len]);
                panels.convert(values, line);
            }
            for (d, out) in outs.iter_mut().enumerate() {
                *out = std::array::from_fn(|i| lines[i][d]);
            }
        }
    }
}

/// Panels of `N` indices of a factor whose values over the indices are neighbours, which are read once, a depth (or pair)
/// after the other. `M` are converted at a time, as many as fill a vector.
#[inline(always)]
fn lines<const N: usize, const M: usize, T: Copy, F: Fn(T, usize) -> f32, P: Panels>(
    panels: &P,
    factor: &Factor<'_, T, F>,
    part: &Part,
    out: &mut [P::Value],
) {
    let depth = &part.depth;
    for (i, d) in depth.clone().step_by(P::PAIR).enumerate() {
        (d..d + P::PAIR).for_each(|d| factor.fetch(&part.indices, d + AHEAD));
        for (indices, out) in part.panels(out) {
            let [mut low, mut high] = [[0f32; M]; 2];
            factor.line(&indices, d, &mut low);
            let last = d + P::PAIR - 1;
            if P::PAIR > 1 && last < depth.end {
                factor.line(&indices, last, &mut high);
            }
            let mut joined = [P::Value::default(); M];
            for ((joined, low), high) in joined.iter_mut().zip(low).zip(high) {
                *joined = panels.join(low, high);
            }
            out[i * N..][..N].copy_from_slice(&joined[..N]);
        }
    }
}

/// A factor of bfloat16, which needs no rounding on its way into panels of these.
#[derive(Clone, Copy)]
pub struct Bf16Factor<'a> {
    order: Order,
    stride: usize,
    bits: &'a [u16],
}

impl<'a> Bf16Factor<'a> {
    /// The value of index `i` at depth `d` is `data[i · stride + d]`.
    pub fn depth_inner(stride: usize, data: &'a [bf16]) -> Self {
        Self { order: Order::Rows, stride, bits: data.reinterpret_cast() }
    }

    /// The value of index `i` at depth `d` is `data[d · stride + i]`.
    pub fn index_inner(stride: usize, data: &'a [bf16]) -> Self {
        Self { order: Order::Depths, stride, bits: data.reinterpret_cast() }
    }
}

impl Operand for Bf16Factor<'_> {
    #[inline(always)]
    fn pack<P: Panels>(&self, panels: &P, part: &Part, out: &mut [P::Value]) {
        for (indices, out) in part.panels(out) {
            self.panel(panels, (indices, &part.depth, part.width), out);
        }
    }
}

impl Bf16Factor<'_> {
    #[inline(always)]
    fn panel<P: Panels>(
        &self,
        panels: &P,
        (indices, depth, width): (Range<usize>, &Range<usize>, usize),
        out: &mut [P::Value],
    ) {
        let outs = out.chunks_mut(width).take(depth.len().div_ceil(P::PAIR));
        match self.order {
            Order::Rows => {
                for (i, index) in indices.enumerate() {
                    let line = &self.bits[index * self.stride..][depth.clone()];
                    for (pair, out) in line.chunks(P::PAIR).zip(out[i..].iter_mut().step_by(width))
                    {
                        let high = if pair.len() == P::PAIR { pair[P::PAIR - 1] } else { 0 };
                        *out = panels.join_bf16(pair[0], high);
                    }
                }
            }
            Order::Depths => {
                let line = |d: usize| &self.bits[d * self.stride..][indices.clone()];
                for (d, out) in depth.clone().step_by(P::PAIR).zip(outs) {
                    let (low, last) = (line(d), d + P::PAIR - 1);
                    match last < depth.end {
                        true => {
                            for ((out, low), high) in out.iter_mut().zip(low).zip(line(last)) {
                                *out = panels.join_bf16(*low, *high);
                            }
                        }
                        false => {
                            for (out, low) in out.iter_mut().zip(low) {
                                *out = panels.join_bf16(*low, 0);
                            }
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::gemm::{Precision, gemm};

    #[test]
    fn factors_of_bfloat16_are_their_values() {
        let (rows, cols, depth) = (13, 37, 515);
        let wave = |len: usize, step: f32| {
            Vec::from_iter((0..len).map(|i| bf16::from_f32((i as f32 * step).sin())))
        };
        let (a, b) = (wave(rows * depth, 0.37), wave(depth * cols, 0.71));
        let [wide_a, wide_b] = [&a, &b].map(|x| Vec::from_iter(x.iter().map(|x| x.to_f32())));
        for precision in [Precision::F32, Precision::Bf16] {
            let [mut found, mut expected] = [(); 2].map(|()| vec![0f32; rows * cols]);
            let shape = (rows, cols, depth);
            let factors = (Bf16Factor::depth_inner(depth, &a), Bf16Factor::index_inner(cols, &b));
            gemm(shape, factors.0, factors.1, 1., precision, &mut found);
            let wide_a = Factor::depth_inner(depth, &wide_a, plain);
            let wide_b = Factor::index_inner(cols, &wide_b, plain);
            gemm(shape, wide_a, wide_b, 1., precision, &mut expected);
            assert!(found == expected, "{precision:?}");
        }
    }
}
