//! AVX-512 with VNNI: `vpdpbusd` adds four products of unsigned codes and signed activations to 32-bit sums.

use std::arch::x86_64::*;

use super::{HeadActivations, HeadFormat, HeadRoutines, Line, PlaneSums, ROWS};

pub(in crate::kernels) const ROUTINES: HeadRoutines =
    HeadRoutines { q8: head_q8, q6: head_groups::<6>, q4: head_groups::<4> };

/// Lines that [`head_q8`] asks for ahead: the system's own prefetching stops at the end of a page.
const AHEAD: usize = 128;

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
        for i in 0..2 {
            let codes = match BITS {
                6 => decode_q6(&lines.as_chunks().0[i]),
                _ => decode_q4(&lines.as_chunks().0[i]),
            };
            for (j, codes) in codes.iter().enumerate() {
                // SAFETY: two halves of four quads each.
                unsafe { add_quad(&mut sums, *codes, x.add(4 * i + j), groups * QUADS) };
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

/// Two lines of nibbles to four lines of codes.
#[inline]
#[target_feature(enable = "avx512f")]
fn decode_q4([first, second]: &[Line; 2]) -> [__m512i; 4] {
    let ([a, b], [c, d]) = (nibbles(load(first)), nibbles(load(second)));
    [a, b, c, d]
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
