//! Portable code, left to the compiler's vectorizer: the baseline of every processor.

use std::array;

use super::{
    Kernel, ROWS, Tile, head, peak,
    simd::{LANES, Simd, routines},
};

pub(super) static KERNEL: Kernel = Kernel {
    name: "scalar",
    requires: &[],
    accumulate: accumulate::<4, 4>,
    accumulate_trits: accumulate::<3, 5>,
    routines: routines!(Scalar, 2 x 2, 4 x 1, 4 x 1),
    head: head::portable::ROUTINES,
    peak: peak::SCALAR,
};

/// Sums of 16 bits are widened after as many tiles as keep them exact: each of the 64 takes `lanes` products of a tile, and
/// `120 · 2 · 128 = 30720 < 2¹⁵`.
const PRODUCTS: usize = 120;

fn accumulate<const BASE: u8, const LANES: usize>(
    tiles: &[Tile],
    x: &[i8],
    acc: &mut [[i32; ROWS]],
) {
    let width = 4 * LANES;
    let (cols, run) = (tiles.len() * width, PRODUCTS / LANES);
    for (token, acc) in acc.iter_mut().enumerate() {
        let x = &x[token * cols..][..cols];
        for (tiles, x) in tiles.chunks(run).zip(x.chunks(run * width)) {
            let mut sums = [0i16; 64];
            for (tile, x) in tiles.iter().zip(x.chunks_exact(width)) {
                let mut rest = *tile;
                for x in x.as_chunks::<4>().0 {
                    let x: [i16; 8] = array::from_fn(|i| i16::from(x[i % 4]));
                    let codes = rest.map(|byte| byte % BASE);
                    rest = rest.map(|byte| byte / BASE);
                    let codes = codes.as_chunks::<8>().0;
                    for (sums, codes) in sums.as_chunks_mut::<8>().0.iter_mut().zip(codes) {
                        for i in 0..8 {
                            sums[i] += i16::from(codes[i]) * x[i];
                        }
                    }
                }
            }
            for (acc, sums) in acc.iter_mut().zip(sums.as_chunks::<4>().0) {
                *acc += sums.iter().map(|sum| i32::from(*sum)).sum::<i32>();
            }
        }
    }
}

/// No instruction set in particular.
#[derive(Clone, Copy)]
struct Scalar;

/// The half-precision float with these bits. Shifted into place its exponent is 112 too small, which a product mends,
/// for subnormals as well; infinity and NaN keep all exponent bits.
#[inline(always)]
pub(super) fn widen_f16(bits: u16) -> f32 {
    let magnitude = u32::from(bits & 0x7fff) << 13;
    let sign = u32::from(bits & 0x8000) << 16;
    let finite = f32::from_bits(magnitude) * f32::from_bits((127 + 112) << 23);
    let value = if bits & 0x7c00 == 0x7c00 { magnitude | 0x7f80_0000 } else { finite.to_bits() };
    f32::from_bits(value | sign)
}

#[inline(always)]
fn map2(a: [f32; LANES], b: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> [f32; LANES] {
    array::from_fn(|l| f(a[l], b[l]))
}

impl Simd for Scalar {
    type F32 = [f32; LANES];

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F32 {
        [x; LANES]
    }

    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::F32 {
        *x
    }

    #[inline(always)]
    fn load_bf16(self, x: &[u16; LANES]) -> Self::F32 {
        x.map(|bits| f32::from_bits(u32::from(bits) << 16))
    }

    #[inline(always)]
    fn load_f16(self, x: &[u16; LANES]) -> Self::F32 {
        x.map(widen_f16)
    }

    #[inline(always)]
    fn load_i8(self, x: &[i8; LANES]) -> Self::F32 {
        x.map(f32::from)
    }

    #[inline(always)]
    fn store(self, x: Self::F32, out: &mut [f32; LANES]) {
        *out = x;
    }

    #[inline(always)]
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        map2(a, b, |a, b| a + b)
    }

    #[inline(always)]
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        map2(a, b, |a, b| a * b)
    }

    #[inline(always)]
    fn mul_add(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        array::from_fn(|l| a[l].mul_add(b[l], c[l]))
    }

    #[inline(always)]
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        map2(a, b, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn min(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        map2(a, b, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    fn round(self, a: Self::F32) -> Self::F32 {
        a.map(f32::round_ties_even)
    }

    #[inline(always)]
    fn scale(self, a: Self::F32, n: Self::F32) -> Self::F32 {
        map2(a, n, |a, n| {
            // Two factors, each a normal number; the first product is exact.
            let n = n as i32;
            let half = n >> 1;
            let power = |n: i32| f32::from_bits(((n + 127) << 23) as u32);
            a * power(half) * power(n - half)
        })
    }

    #[inline(always)]
    fn sum4(self, a: [Self::F32; 4]) -> [f32; 4] {
        a.map(|mut a| {
            for half in [8, 4, 2, 1] {
                for l in 0..half {
                    a[l] += a[l + half];
                }
            }
            a[0]
        })
    }
}
