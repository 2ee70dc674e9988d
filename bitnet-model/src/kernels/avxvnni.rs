//! AVX-VNNI: `vpdpbusd` on 256-bit registers, for processors with it and without AVX-512. All else is as in AVX2.

use std::arch::x86_64::*;

use super::{
    Kernel, ROWS, Tile, TileFormat,
    avx2::{self, Avx2, add, broadcast, halves},
    head,
    instructions::requirements,
    peak,
    simd::routines,
};

/// Inputs of a tile of 2-bit codes.
const COLS: usize = TileFormat::TwoBit.cols();

pub(super) static KERNEL: Kernel = Kernel {
    name: "avxvnni",
    requires: requirements!["avxvnni", "avx2", "fma", "f16c"],
    accumulate: {
        #[target_feature(enable = "avx2,fma,avxvnni")]
        fn vex(tiles: &[Tile], x: &[i8], acc: &mut [[i32; ROWS]]) {
            accumulate(Vex(()), tiles, x, acc);
        }
        vex
    },
    accumulate_trits: avx2::accumulate_trits,
    routines: routines!(Avx2(()), 2 x 3, 6 x 1, 4 x 1, #[target_feature(enable = "avx2,fma,f16c")]),
    head: head::avxvnni::VEX,
    peak: peak::AVXVNNI,
};

/// The same loops with the other encoding of the instruction, so that a processor with AVX-512 proves them.
#[cfg(test)]
pub(super) static EVEX: Kernel = Kernel {
    name: "avx512vnni, 256 bits",
    requires: requirements!["avx512vnni", "avx512vl", "avx2", "fma", "f16c"],
    accumulate: {
        #[target_feature(enable = "avx2,fma,avx512vnni,avx512vl")]
        fn evex(tiles: &[Tile], x: &[i8], acc: &mut [[i32; ROWS]]) {
            accumulate(Evex(()), tiles, x, acc);
        }
        evex
    },
    accumulate_trits: avx2::accumulate_trits,
    routines: routines!(Avx2(()), 2 x 3, 6 x 1, 4 x 1, #[target_feature(enable = "avx2,fma,f16c")]),
    head: head::avxvnni::EVEX,
    peak: peak::AVX2,
};

/// An encoding of `vpdpbusd`. A value of the implementing type proves that the processor has it, AVX2 and FMA.
pub(super) trait Dpbusd: Copy {
    /// Each 32-bit lane of `sum` plus the products of its four unsigned `codes` and signed `x`.
    fn dpbusd(self, sum: __m256i, codes: __m256i, x: __m256i) -> __m256i;
}

/// Proof of AVX-VNNI, AVX2 and FMA: made only in functions that have these features.
#[derive(Clone, Copy)]
pub(super) struct Vex(pub(super) ());

impl Dpbusd for Vex {
    #[inline(always)]
    fn dpbusd(self, sum: __m256i, codes: __m256i, x: __m256i) -> __m256i {
        // SAFETY: `self` proves AVX-VNNI.
        unsafe { _mm256_dpbusd_avx_epi32(sum, codes, x) }
    }
}

/// Proof of AVX-512 VNNI and VL, AVX2 and FMA: made only in functions that have these features.
#[cfg(test)]
#[derive(Clone, Copy)]
pub(super) struct Evex(pub(super) ());

#[cfg(test)]
impl Dpbusd for Evex {
    #[inline(always)]
    fn dpbusd(self, sum: __m256i, codes: __m256i, x: __m256i) -> __m256i {
        // SAFETY: `self` proves AVX-512 VNNI and VL.
        unsafe { _mm256_dpbusd_epi32(sum, codes, x) }
    }
}

/// Tokens that share a decoded tile: their sums, two registers a token, leave room for codes and activations.
const BLOCK: usize = 4;

#[inline(always)]
fn accumulate<D: Dpbusd>(dot: D, tiles: &[Tile], x: &[i8], acc: &mut [[i32; ROWS]]) {
    let cols = tiles.len() * COLS;
    let (blocks, rest) = acc.as_chunks_mut::<BLOCK>();
    let (x, x_rest) = x.split_at(blocks.len() * BLOCK * cols);
    for (i, acc) in blocks.iter_mut().enumerate() {
        block::<D, BLOCK, 1>(dot, tiles, &x[i * BLOCK * cols..][..BLOCK * cols], acc);
    }
    // With few tokens, several sums for each of them hide the latency of the products.
    match rest {
        [] => {}
        [acc] => single(dot, tiles, x_rest, acc),
        [_, _] => block::<D, 2, 2>(dot, tiles, x_rest, rest),
        _ => block::<D, 3, 1>(dot, tiles, x_rest, rest),
    }
}

/// `N` tokens with `CHAINS` sums for each half of the rows: the sums stay in registers, and a tile is decoded once for all
/// tokens.
#[inline(always)]
fn block<D: Dpbusd, const N: usize, const CHAINS: usize>(
    dot: D,
    tiles: &[Tile],
    x: &[i8],
    acc: &mut [[i32; ROWS]],
) {
    let cols = tiles.len() * COLS;
    assert_eq!((x.len(), acc.len()), (N * cols, N));
    // SAFETY: `dot` proves AVX2; the reads of x are argued below.
    unsafe {
        let low2 = _mm256_set1_epi8(3);
        let mut sums = [[[_mm256_setzero_si256(); 2]; CHAINS]; N];
        for (i, tile) in tiles.iter().enumerate() {
            avx2::fetch_ahead(tile);
            let [mut low, mut high] = halves(tile);
            for lane in 0..4 {
                let codes = [_mm256_and_si256(low, low2), _mm256_and_si256(high, low2)];
                (low, high) = (_mm256_srli_epi16::<2>(low), _mm256_srli_epi16::<2>(high));
                for (token, sums) in sums.iter_mut().enumerate() {
                    // token < N, i < tiles.len() and lane < 4: these four values end within the N · cols of x.
                    let x = broadcast(x.as_ptr().add(token * cols + i * COLS + 4 * lane));
                    for (sum, codes) in sums[lane % CHAINS].iter_mut().zip(codes) {
                        *sum = dot.dpbusd(*sum, codes, x);
                    }
                }
            }
        }
        for (acc, sums) in acc.iter_mut().zip(sums) {
            for sums in sums {
                add(acc, sums);
            }
        }
    }
}

/// One token, a sum for each lane of codes and half of the rows. Half of the codes are used where they stand, as four
/// times their value: one shift for half a tile instead of three. `4 · 2 · 128 · cols / 4 < 2³¹`.
#[inline(always)]
fn single<D: Dpbusd>(dot: D, tiles: &[Tile], x: &[i8], acc: &mut [i32; ROWS]) {
    // SAFETY: `dot` proves AVX2; the reads of x are argued below.
    unsafe {
        let (once, four_times) = (_mm256_set1_epi8(3), _mm256_set1_epi8(3 << 2));
        let mut sums = [[_mm256_setzero_si256(); 2]; 4];
        for (tile, x) in tiles.iter().zip(x.as_chunks::<COLS>().0) {
            let low = halves(tile);
            let high = [_mm256_srli_epi16::<4>(low[0]), _mm256_srli_epi16::<4>(low[1])];
            let lanes = [(low, once), (low, four_times), (high, once), (high, four_times)];
            for (lane, (codes, mask)) in lanes.into_iter().enumerate() {
                // lane < 4: these four values end within the sixteen of x.
                let x = broadcast(x.as_ptr().add(4 * lane));
                for (sum, codes) in sums[lane].iter_mut().zip(codes) {
                    *sum = dot.dpbusd(*sum, _mm256_and_si256(codes, mask), x);
                }
            }
        }
        for [once, four_times] in sums.as_chunks().0 {
            add(acc, *once);
            let [low, high] = *four_times;
            add(acc, [_mm256_srai_epi32::<2>(low), _mm256_srai_epi32::<2>(high)]);
        }
    }
}
