//! Factors of a product as slices: rows or columns of values, each seen through a function.

use std::ops::Range;

use half::{bf16, slice::HalfFloatSliceExt};

use super::{DEPTH, Operand, Panel, panels::Panels};

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

impl<T: Copy + Sync, F: Fn(T, usize) -> f32 + Sync> Operand for Factor<'_, T, F> {
    #[inline(always)]
    fn pack<P: Panels>(&self, panels: &P, panel: Panel, out: &mut [P::Value]) {
        let Panel { indices, depth, width } = panel;
        match self.order {
            Order::DepthInner => {
                let mut line = [0f32; DEPTH];
                let line = &mut line[..depth.len().next_multiple_of(P::PAIR)];
                for (i, index) in indices.enumerate() {
                    let first = index * self.stride + depth.start;
                    self.fill(first, |d| depth.start + d, &mut line[..depth.len()]);
                    panels.scatter(line, &mut out[i..], width);
                }
            }
            // A constant width becomes vector moves; the last panel may have fewer indices than its width.
            Order::IndexInner => match (width, indices.len()) {
                (4, 4) => lines::<4, T, F, P>(panels, self, indices.start, depth, out),
                (6, 6) => lines::<6, T, F, P>(panels, self, indices.start, depth, out),
                (12, 12) => lines::<12, T, F, P>(panels, self, indices.start, depth, out),
                (16, 16) => lines::<16, T, F, P>(panels, self, indices.start, depth, out),
                (32, 32) => lines::<32, T, F, P>(panels, self, indices.start, depth, out),
                _ => {
                    for (i, index) in indices.enumerate() {
                        let value = |d: usize| match d < depth.end {
                            true => (self.value)(self.data[d * self.stride + index], d),
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
        Self { order: Order::DepthInner, stride, bits: data.reinterpret_cast() }
    }

    /// The value of index `i` at depth `d` is `data[d · stride + i]`.
    pub fn index_inner(stride: usize, data: &'a [bf16]) -> Self {
        Self { order: Order::IndexInner, stride, bits: data.reinterpret_cast() }
    }
}

impl Operand for Bf16Factor<'_> {
    #[inline(always)]
    fn pack<P: Panels>(&self, panels: &P, panel: Panel, out: &mut [P::Value]) {
        let Panel { indices, depth, width } = panel;
        let outs = out.chunks_mut(width).take(depth.len().div_ceil(P::PAIR));
        match self.order {
            Order::DepthInner => {
                for (i, index) in indices.enumerate() {
                    let line = &self.bits[index * self.stride..][depth.clone()];
                    for (pair, out) in line.chunks(P::PAIR).zip(out[i..].iter_mut().step_by(width))
                    {
                        let high = if pair.len() == P::PAIR { pair[P::PAIR - 1] } else { 0 };
                        *out = panels.join_bf16(pair[0], high);
                    }
                }
            }
            Order::IndexInner => {
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
