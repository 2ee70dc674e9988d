//! AVX-512 with VNNI: `vpdpbusd` adds four products of unsigned codes and signed activations to 32-bit sums.

use std::arch::x86_64::*;

use super::{
    Kernel, ROWS, Tile, TileFormat, avx2, head,
    instructions::requirements,
    peak,
    simd::{LANES, Simd, routines},
};

pub(super) static KERNEL: Kernel = Kernel {
    name: "avx512vnni",
    requires: requirements!["avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni", "fma"],
    accumulate,
    accumulate_trits: avx2::accumulate_trits, // what AVX-512 would gain needs VBMI
    routines: routines!(
        Avx512(()), 4 x 4, 12 x 2, 4 x 4,
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")]
    ),
    head: head::avx512vnni::ROUTINES,
    peak: peak::AVX512VNNI,
};

/// Inputs of a tile of 2-bit codes.
const COLS: usize = TileFormat::TwoBit.cols();

/// Tokens that share a decoded tile.
const BLOCK: usize = 8;

#[target_feature(enable = "avx512f,avx512vnni")]
fn accumulate(tiles: &[Tile], x: &[i8], acc: &mut [[i32; ROWS]]) {
    let cols = tiles.len() * COLS;
    let (blocks, rest) = acc.as_chunks_mut::<BLOCK>();
    let (x, x_rest) = x.split_at(blocks.len() * BLOCK * cols);
    for (i, acc) in blocks.iter_mut().enumerate() {
        block::<BLOCK, 1>(tiles, &x[i * BLOCK * cols..][..BLOCK * cols], acc);
    }
    // With few tokens, one sum for each lane of codes hides the latency of the products.
    match rest.len() {
        0 => {}
        1 => single(tiles, x_rest, &mut rest[0]),
        2 => block::<2, 4>(tiles, x_rest, rest),
        3 => block::<3, 4>(tiles, x_rest, rest),
        4 => block::<4, 4>(tiles, x_rest, rest),
        5 => block::<5, 2>(tiles, x_rest, rest),
        6 => block::<6, 2>(tiles, x_rest, rest),
        _ => block::<7, 2>(tiles, x_rest, rest),
    }
}

#[target_feature(enable = "avx512f,avx512vnni")]
fn block<const N: usize, const CHAINS: usize>(tiles: &[Tile], x: &[i8], acc: &mut [[i32; ROWS]]) {
    // SAFETY: this function has the features.
    unsafe { multiply::<N, CHAINS, 4>(tiles, x, acc, |tile| lanes(load(tile))) }
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn load(tile: &Tile) -> __m512i {
    // SAFETY: a `Tile` is 64 bytes.
    unsafe { _mm512_loadu_si512(tile.as_ptr().cast()) }
}

/// The four codes of 2 bits of each byte, a register for each lane.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn lanes(codes: __m512i) -> [__m512i; 4] {
    let low2 = _mm512_set1_epi8(3);
    [
        _mm512_and_si512(codes, low2),
        _mm512_and_si512(_mm512_srli_epi32::<2>(codes), low2),
        _mm512_and_si512(_mm512_srli_epi32::<4>(codes), low2),
        _mm512_and_si512(_mm512_srli_epi32::<6>(codes), low2),
    ]
}

/// `N` tokens with `CHAINS` sums each: the sums stay in registers, and a tile, whose codes `unpack` gives in a register for
/// each lane, is unpacked once for all tokens.
///
/// # Safety
/// The caller has AVX-512 F and VNNI as target features.
#[inline(always)]
pub(super) unsafe fn multiply<const N: usize, const CHAINS: usize, const LANES: usize>(
    tiles: &[Tile],
    x: &[i8],
    acc: &mut [[i32; ROWS]],
    unpack: impl Fn(&Tile) -> [__m512i; LANES],
) {
    let cols = tiles.len() * 4 * LANES;
    assert_eq!((x.len(), acc.len()), (N * cols, N));
    // SAFETY: the caller's features; the reads of x are argued below.
    unsafe {
        let mut sums = [[_mm512_setzero_si512(); CHAINS]; N];
        for (i, tile) in tiles.iter().enumerate() {
            avx2::fetch_ahead(tile);
            for (lane, codes) in unpack(tile).into_iter().enumerate() {
                for (token, sums) in sums.iter_mut().enumerate() {
                    // token < N, i < tiles.len() and lane < LANES: these four values end within the N · cols of x.
                    let x = broadcast(x.as_ptr().add(token * cols + 4 * (i * LANES + lane)));
                    let sum = &mut sums[lane % CHAINS];
                    *sum = _mm512_dpbusd_epi32(*sum, codes, x);
                }
            }
        }
        for (acc, sums) in acc.iter_mut().zip(sums) {
            add(acc, sums);
        }
    }
}

/// One token, a sum for each lane of codes. Half of them are used where they stand, as four times their value: one shift
/// for a tile instead of three. `4 · 2 · 128 · cols / 4 < 2³¹`.
#[target_feature(enable = "avx512f,avx512vnni")]
fn single(tiles: &[Tile], x: &[i8], acc: &mut [i32; ROWS]) {
    let (once, four_times) = (_mm512_set1_epi8(3), _mm512_set1_epi8(3 << 2));
    let mut sums = [_mm512_setzero_si512(); 4];
    for (tile, x) in tiles.iter().zip(x.as_chunks::<COLS>().0) {
        fetch_next(tile);
        let low = load(tile);
        let high = _mm512_srli_epi32::<4>(low);
        let lanes = [(low, once), (low, four_times), (high, once), (high, four_times)];
        for (lane, (codes, mask)) in lanes.into_iter().enumerate() {
            // SAFETY: lane < 4, so these four values end within the sixteen of x.
            let x = unsafe { broadcast(x.as_ptr().add(4 * lane)) };
            sums[lane] = _mm512_dpbusd_epi32(sums[lane], _mm512_and_si512(codes, mask), x);
        }
    }
    let [a, b, c, d] = sums;
    add(acc, [a, _mm512_srai_epi32::<2>(b), c, _mm512_srai_epi32::<2>(d)]);
}

/// Asks for the tile 4 KiB behind this one, for a single token: its loop is as fast as the memory, which is asked in time then
/// also where the processor's own prefetching stops, at the end of a page.
#[inline(always)]
pub(super) fn fetch_next(tile: &Tile) {
    let at = std::ptr::from_ref(tile).wrapping_add(64);
    // SAFETY: every x86-64 processor has the instruction, and it reads nothing that the program sees.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) };
}

/// The four values at `x` in every 32-bit lane.
///
/// # Safety
/// `x` is valid for reads of four bytes.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn broadcast(x: *const i8) -> __m512i {
    // SAFETY: upheld by the caller.
    _mm512_set1_epi32(unsafe { x.cast::<i32>().read_unaligned() })
}

/// Adds the sums of each row to it.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn add<const CHAINS: usize>(acc: &mut [i32; ROWS], sums: [__m512i; CHAINS]) {
    for sum in sums {
        let acc = acc.as_mut_ptr().cast();
        // SAFETY: sixteen i32 are one register.
        unsafe { _mm512_storeu_si512(acc, _mm512_add_epi32(_mm512_loadu_si512(acc), sum)) };
    }
}

/// Proof of AVX-512 F, BW, DQ and VL: made only in functions that have these features.
#[derive(Clone, Copy)]
pub(super) struct Avx512(pub(super) ());

impl Simd for Avx512 {
    type F32 = __m512;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F32 {
        // SAFETY: `self` proves AVX-512.
        unsafe { _mm512_set1_ps(x) }
    }

    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::F32 {
        // SAFETY: `self` proves AVX-512; x is one register long.
        unsafe { _mm512_loadu_ps(x.as_ptr()) }
    }

    #[inline(always)]
    fn load_bf16(self, x: &[u16; LANES]) -> Self::F32 {
        // SAFETY: `self` proves AVX-512; x is 256 bits.
        unsafe {
            let x = _mm512_cvtepu16_epi32(_mm256_loadu_si256(x.as_ptr().cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(x))
        }
    }

    #[inline(always)]
    fn load_f16(self, x: &[u16; LANES]) -> Self::F32 {
        // SAFETY: `self` proves AVX-512; x is 256 bits.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(x.as_ptr().cast())) }
    }

    #[inline(always)]
    fn load_i8(self, x: &[i8; LANES]) -> Self::F32 {
        // SAFETY: `self` proves AVX-512; x is 128 bits.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(x.as_ptr().cast()))) }
    }

    #[inline(always)]
    fn store(self, x: Self::F32, out: &mut [f32; LANES]) {
        // SAFETY: `self` proves AVX-512; out is one register long.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), x) }
    }

    #[inline(always)]
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: `self` proves AVX-512.
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: `self` proves AVX-512.
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    fn mul_add(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        // SAFETY: `self` proves AVX-512.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: `self` proves AVX-512.
        unsafe { _mm512_max_ps(a, b) }
    }

    #[inline(always)]
    fn min(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: `self` proves AVX-512.
        unsafe { _mm512_min_ps(a, b) }
    }

    #[inline(always)]
    fn round(self, a: Self::F32) -> Self::F32 {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        // SAFETY: `self` proves AVX-512.
        unsafe { _mm512_roundscale_ps::<NEAREST>(a) }
    }

    #[inline(always)]
    fn scale(self, a: Self::F32, n: Self::F32) -> Self::F32 {
        // SAFETY: `self` proves AVX-512.
        unsafe { _mm512_scalef_ps(a, n) }
    }

    #[inline(always)]
    fn sum4(self, [a, b, c, d]: [Self::F32; 4]) -> [f32; 4] {
        // SAFETY: `self` proves AVX-512, and with it AVX2 and FMA.
        unsafe { avx2::sum4([add_halves(a), add_halves(b), add_halves(c), add_halves(d)]) }
    }
}

/// Lane `l` plus lane `l + 8`.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn add_halves(a: __m512) -> __m256 {
    _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a))
}
