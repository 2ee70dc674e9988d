//! AVX-512 with VNNI: `vpdpbusd` adds four products of unsigned codes and signed activations to 32-bit sums.

use std::arch::x86_64::*;

use super::{
    COLS, Kernel, ROWS, Tile, avx2,
    head::{HeadActivations, HeadFormat, HeadRoutines, Line, PlaneSums},
    simd::{LANES, Simd, routines},
};

pub(super) static KERNEL: Kernel = Kernel {
    name: "avx512vnni",
    is_available: || {
        is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vnni")
            && is_x86_feature_detected!("fma")
    },
    accumulate,
    routines: routines!(
        Avx512(()), 4 x 4,
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")]
    ),
    head: HeadRoutines { q8: head_q8, q6: head_groups::<6>, q4: head_groups::<4> },
};

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
        1 => block::<1, 4>(tiles, x_rest, rest),
        2 => block::<2, 4>(tiles, x_rest, rest),
        3 => block::<3, 4>(tiles, x_rest, rest),
        4 => block::<4, 2>(tiles, x_rest, rest),
        5 => block::<5, 2>(tiles, x_rest, rest),
        6 => block::<6, 2>(tiles, x_rest, rest),
        _ => block::<7, 2>(tiles, x_rest, rest),
    }
}

/// `N` tokens with `CHAINS` sums each: the sums stay in registers, and a tile is decoded once for all tokens.
#[target_feature(enable = "avx512f,avx512vnni")]
fn block<const N: usize, const CHAINS: usize>(tiles: &[Tile], x: &[i8], acc: &mut [[i32; ROWS]]) {
    let cols = tiles.len() * COLS;
    assert_eq!((x.len(), acc.len()), (N * cols, N));
    let low2 = _mm512_set1_epi8(3);
    let mut sums = [[_mm512_setzero_si512(); CHAINS]; N];
    for (i, tile) in tiles.iter().enumerate() {
        // SAFETY: a `Tile` is 64 bytes.
        let codes = unsafe { _mm512_loadu_si512(tile.as_ptr().cast()) };
        let lanes = [
            _mm512_and_si512(codes, low2),
            _mm512_and_si512(_mm512_srli_epi32::<2>(codes), low2),
            _mm512_and_si512(_mm512_srli_epi32::<4>(codes), low2),
            _mm512_and_si512(_mm512_srli_epi32::<6>(codes), low2),
        ];
        for (lane, codes) in lanes.into_iter().enumerate() {
            for (token, sums) in sums.iter_mut().enumerate() {
                let start = token * cols + i * COLS + 4 * lane;
                // SAFETY: token < N, i < tiles.len() and lane < 4, so these four values end within the N · cols of x.
                let x = unsafe { x.as_ptr().add(start).cast::<i32>().read_unaligned() };
                let sum = &mut sums[lane % CHAINS];
                *sum = _mm512_dpbusd_epi32(*sum, codes, _mm512_set1_epi32(x));
            }
        }
    }
    for (acc, sums) in acc.iter_mut().zip(sums) {
        for sum in sums {
            let acc = acc.as_mut_ptr().cast();
            // SAFETY: sixteen i32 are one register.
            unsafe { _mm512_storeu_si512(acc, _mm512_add_epi32(_mm512_loadu_si512(acc), sum)) };
        }
    }
}

/// Lines that [`head_q8`] asks for ahead: the system's own prefetching stops at the end of a page.
const AHEAD: usize = 64;

#[target_feature(enable = "avx512f,avx512vnni")]
fn head_q8(lines: &[Line], x: &[[i8; 8]], sums: &mut [PlaneSums]) {
    match sums.len() {
        0 => {}
        // With few tokens, several sums for each of them hide the latency of the products.
        1 => head_q8_block::<1, 4>(lines, x, sums),
        2 => head_q8_block::<2, 4>(lines, x, sums),
        3 => head_q8_block::<3, 2>(lines, x, sums),
        4 => head_q8_block::<4, 2>(lines, x, sums),
        5 => head_q8_block::<5, 1>(lines, x, sums),
        6 => head_q8_block::<6, 1>(lines, x, sums),
        7 => head_q8_block::<7, 1>(lines, x, sums),
        _ => head_q8_block::<8, 1>(lines, x, sums),
    }
}

/// `N` tokens with `CHAINS` sums a plane each.
#[target_feature(enable = "avx512f,avx512vnni")]
fn head_q8_block<const N: usize, const CHAINS: usize>(
    lines: &[Line],
    x: &[[i8; 8]],
    out: &mut [PlaneSums],
) {
    assert_eq!((x.len(), out.len()), (N * lines.len(), N));
    let (runs, rest) = lines.as_chunks::<CHAINS>();
    assert!(rest.is_empty(), "whole groups of lines");
    let mut sums = [[[_mm512_setzero_si512(); 2]; CHAINS]; N];
    for (i, run) in runs.iter().enumerate() {
        for (chain, line) in run.iter().enumerate() {
            let codes = load(line);
            for (token, sums) in sums.iter_mut().enumerate() {
                // SAFETY: token < N and i · CHAINS + chain < lines.len(): one of the N · lines.len() quads of x.
                let (hi, lo) =
                    unsafe { planes(x.as_ptr().add(token * lines.len() + i * CHAINS + chain)) };
                let sums = &mut sums[chain];
                sums[0] = _mm512_dpbusd_epi32(sums[0], codes, hi);
                sums[1] = _mm512_dpbusd_epi32(sums[1], codes, lo);
            }
        }
    }
    for (out, sums) in out.iter_mut().zip(sums) {
        for (plane, out) in out.iter_mut().enumerate() {
            let mut total = sums[0][plane];
            for sums in &sums[1..] {
                total = _mm512_add_epi32(total, sums[plane]);
            }
            // SAFETY: sixteen i32 are one register.
            unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), total) };
        }
    }
}

/// The four `hi` and the four `lo` of a quad, each in every lane.
///
/// # Safety
/// `quad` can be read.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn planes(quad: *const [i8; 8]) -> (__m512i, __m512i) {
    let quad: *const i32 = quad.cast();
    // SAFETY: the caller's.
    unsafe {
        (_mm512_set1_epi32(quad.read_unaligned()), _mm512_set1_epi32(quad.add(1).read_unaligned()))
    }
}

#[target_feature(enable = "avx512f,avx512vnni")]
fn head_groups<const BITS: u32>(
    lines: &[Line],
    scales: &[[u16; ROWS]],
    x: HeadActivations<'_>,
    out: &mut [[f32; ROWS]],
) {
    match out.len() {
        0 => {}
        1 => head_groups_block::<BITS, 1>(lines, scales, x, out),
        2 => head_groups_block::<BITS, 2>(lines, scales, x, out),
        3 => head_groups_block::<BITS, 3>(lines, scales, x, out),
        4 => head_groups_block::<BITS, 4>(lines, scales, x, out),
        5 => head_groups_block::<BITS, 5>(lines, scales, x, out),
        6 => head_groups_block::<BITS, 6>(lines, scales, x, out),
        7 => head_groups_block::<BITS, 7>(lines, scales, x, out),
        _ => head_groups_block::<BITS, 8>(lines, scales, x, out),
    }
}

/// `N` tokens: a group is decoded once for all of them.
#[target_feature(enable = "avx512f,avx512vnni")]
fn head_groups_block<const BITS: u32, const N: usize>(
    lines: &[Line],
    scales: &[[u16; ROWS]],
    x: HeadActivations<'_>,
    out: &mut [[f32; ROWS]],
) {
    const QUADS: usize = 8;
    let groups = scales.len();
    let format = if BITS == 6 { HeadFormat::Q6 } else { HeadFormat::Q4 };
    let offset = i32::from(format.offset());
    assert_eq!(lines.len(), groups * format.lines_per_group());
    assert_eq!((x.quads.len(), x.sums.len()), (N * groups * QUADS, N * groups));
    let group_sums = x.sums;
    let mut totals = [_mm512_setzero_ps(); N];
    for (group, (lines, scales)) in
        lines.chunks_exact(format.lines_per_group()).zip(scales).enumerate()
    {
        let mut sums = [[_mm512_setzero_si512(); 2]; N];
        // SAFETY: (group + 1) · QUADS ≤ groups · QUADS quads in each of the N rows of x.
        let x = unsafe { x.quads.as_ptr().add(group * QUADS) };
        if BITS == 6 {
            let halves = lines.as_chunks::<3>().0;
            for (i, lines) in halves.iter().enumerate() {
                for (j, codes) in decode_q6(lines).iter().enumerate() {
                    // SAFETY: two halves of four quads each.
                    unsafe { add_quad(&mut sums, *codes, x.add(4 * i + j), groups * QUADS) };
                }
            }
        } else {
            for (i, line) in lines.iter().enumerate() {
                let [low, high] = nibbles(load(line));
                // SAFETY: four lines of two quads each.
                unsafe {
                    add_quad(&mut sums, low, x.add(2 * i), groups * QUADS);
                    add_quad(&mut sums, high, x.add(2 * i + 1), groups * QUADS);
                }
            }
        }
        // SAFETY: sixteen bfloat16 are 256 bits.
        let scales = unsafe { _mm256_loadu_si256(scales.as_ptr().cast()) };
        let scales = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(scales)));
        for (token, (total, [hi, lo])) in totals.iter_mut().zip(sums).enumerate() {
            let offset = _mm512_set1_epi32(offset * group_sums[token * groups + group]);
            let sum = _mm512_add_epi32(_mm512_slli_epi32::<6>(hi), _mm512_sub_epi32(lo, offset));
            *total = _mm512_fmadd_ps(scales, _mm512_cvtepi32_ps(sum), *total);
        }
    }
    for (out, total) in out.iter_mut().zip(totals) {
        // SAFETY: sixteen f32 are one register.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), total) };
    }
}

/// `sums[token] += [Σ codes·hi, Σ codes·lo]` of a quad of each of `N` tokens, which are `stride` quads apart.
///
/// # Safety
/// These quads can be read.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn add_quad<const N: usize>(
    sums: &mut [[__m512i; 2]; N],
    codes: __m512i,
    x: *const [i8; 8],
    stride: usize,
) {
    for (token, sums) in sums.iter_mut().enumerate() {
        // SAFETY: the caller's.
        let (hi, lo) = unsafe { planes(x.add(token * stride)) };
        sums[0] = _mm512_dpbusd_epi32(sums[0], codes, hi);
        sums[1] = _mm512_dpbusd_epi32(sums[1], codes, lo);
    }
}

/// A line, with a request for a later one.
#[inline]
#[target_feature(enable = "avx512f")]
fn load(line: &Line) -> __m512i {
    _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().wrapping_add(64 * AHEAD).cast());
    // SAFETY: a `Line` is 64 bytes.
    unsafe { _mm512_loadu_si512(line.as_ptr().cast()) }
}

/// The low and the high four bits of each byte.
#[inline]
#[target_feature(enable = "avx512f")]
fn nibbles(line: __m512i) -> [__m512i; 2] {
    let low4 = _mm512_set1_epi8(15);
    [_mm512_and_si512(line, low4), _mm512_and_si512(_mm512_srli_epi32::<4>(line), low4)]
}

/// Two lines of nibbles and one of high bits to four lines of codes.
#[inline]
#[target_feature(enable = "avx512f")]
fn decode_q6([first, second, high]: &[Line; 3]) -> [__m512i; 4] {
    /// `a | b & c`, bit by bit.
    const OR_AND: i32 = 0b1111_1000;
    let high2 = _mm512_set1_epi8(3 << 4);
    let ([a, b], [c, d], high) = (nibbles(load(first)), nibbles(load(second)), load(high));
    [
        _mm512_ternarylogic_epi32::<OR_AND>(a, _mm512_slli_epi32::<4>(high), high2),
        _mm512_ternarylogic_epi32::<OR_AND>(b, _mm512_slli_epi32::<2>(high), high2),
        _mm512_ternarylogic_epi32::<OR_AND>(c, high, high2),
        _mm512_ternarylogic_epi32::<OR_AND>(d, _mm512_srli_epi32::<2>(high), high2),
    ]
}

/// Proof of AVX-512 F, BW, DQ and VL: made only in functions that have these features.
#[derive(Clone, Copy)]
struct Avx512(());

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
