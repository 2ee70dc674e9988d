//! AVX2: `vpmaddubsw` multiplies unsigned codes by signed activations and adds neighbours, in 16 bits.

use std::arch::x86_64::*;

use super::{
    super::avx2::fetch_ahead, HeadActivations, HeadFormat, HeadRoutines, Line, PlaneSums, ROWS,
    in_blocks,
};

pub(in crate::kernels) const ROUTINES: HeadRoutines =
    HeadRoutines { q8: head_q8, q6: head_groups::<6>, q4: head_groups::<4> };

#[target_feature(enable = "avx2,fma")]
fn head_q8(lines: &[Line], x: &[[i8; 8]], sums: &mut [PlaneSums]) {
    let of = |first: usize, tokens: usize| &x[first * lines.len()..][..tokens * lines.len()];
    in_blocks::<2, _>(
        sums,
        |first, sums| head_q8_block(lines, of(first, 2), sums),
        |first, sums| head_q8_block(lines, of(first, 1), sums),
    );
}

/// `N` tokens: a line is read once for all of them.
#[target_feature(enable = "avx2,fma")]
fn head_q8_block<const N: usize>(lines: &[Line], x: &[[i8; 8]], out: &mut [PlaneSums; N]) {
    assert_eq!(x.len(), N * lines.len());
    let ones = _mm256_set1_epi16(1);
    let mut sums = [[[_mm256_setzero_si256(); 2]; 2]; N];
    for (i, line) in lines.iter().enumerate() {
        fetch_ahead(line);
        for half in 0..2 {
            // SAFETY: a `Line` is 64 bytes: rows 0 to 7 in the first half, 8 to 15 in the second.
            let codes = unsafe { _mm256_loadu_si256(line.as_ptr().add(32 * half).cast()) };
            for (token, sums) in sums.iter_mut().enumerate() {
                // SAFETY: token < N and i < lines.len(): one of the N · lines.len() quads of x.
                let planes = unsafe { planes(x.as_ptr().add(token * lines.len() + i)) };
                for (sum, x) in sums.iter_mut().zip(planes) {
                    // |255 · 64 + 255 · 64| = 32640 < 2¹⁵.
                    let products = _mm256_maddubs_epi16(codes, x);
                    sum[half] = _mm256_add_epi32(sum[half], _mm256_madd_epi16(products, ones));
                }
            }
        }
    }
    for (out, sums) in out.as_flattened_mut().iter_mut().zip(sums.as_flattened()) {
        for (out, sum) in out.as_chunks_mut::<8>().0.iter_mut().zip(sums) {
            // SAFETY: eight i32 are one register.
            unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), *sum) };
        }
    }
}

/// The four `hi` and the four `lo` of a quad, each in every lane.
///
/// # Safety
/// `quad` can be read.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) unsafe fn planes(quad: *const [i8; 8]) -> [__m256i; 2] {
    let quad: *const i32 = quad.cast();
    // SAFETY: the caller's.
    unsafe {
        [_mm256_set1_epi32(quad.read_unaligned()), _mm256_set1_epi32(quad.add(1).read_unaligned())]
    }
}

#[target_feature(enable = "avx2,fma")]
fn head_groups<const BITS: u32>(
    lines: &[Line],
    scales: &[[u16; ROWS]],
    x: HeadActivations<'_>,
    out: &mut [[f32; ROWS]],
) {
    in_blocks::<4, _>(
        out,
        |first, out| head_groups_block::<BITS, 4>(lines, scales, x.tokens(first, 4), out),
        |first, out| head_groups_block::<BITS, 1>(lines, scales, x.tokens(first, 1), out),
    );
}

/// `N` tokens: a group is decoded once for all of them.
#[target_feature(enable = "avx2,fma")]
fn head_groups_block<const BITS: u32, const N: usize>(
    lines: &[Line],
    scales: &[[u16; ROWS]],
    x: HeadActivations<'_>,
    out: &mut [[f32; ROWS]; N],
) {
    const QUADS: usize = 8;
    let groups = scales.len();
    let format = if BITS == 6 { HeadFormat::Q6 } else { HeadFormat::Q4 };
    assert_eq!(lines.len(), groups * format.lines_per_group());
    assert_eq!((x.quads.len(), x.sums.len()), (N * groups * QUADS, N * groups));
    let (offset, group_sums) = (i32::from(format.offset()), x.sums);
    let mut totals = [[_mm256_setzero_ps(); 2]; N];
    for (group, (lines, scales)) in
        lines.chunks_exact(format.lines_per_group()).zip(scales).enumerate()
    {
        lines.iter().for_each(fetch_ahead);
        // SAFETY: (group + 1) · QUADS ≤ groups · QUADS quads in each of the N rows of x.
        let x = unsafe { x.quads.as_ptr().add(group * QUADS) };
        let stride = groups * QUADS;
        for half in 0..2 {
            let mut sums = [_mm256_setzero_si256(); N];
            for i in 0..2 {
                let codes = match BITS {
                    6 => decode_q6(&lines.as_chunks().0[i], half),
                    _ => decode_q4(&lines.as_chunks().0[i], half),
                };
                // |4 · 2 · 63 · 64| = 32256 < 2¹⁵: four quads fit 16 bits.
                let mut products = [[_mm256_setzero_si256(); 2]; N];
                for (j, codes) in codes.iter().enumerate() {
                    // SAFETY: two halves of four quads each.
                    unsafe { add_quad(&mut products, *codes, x.add(4 * i + j), stride) };
                }
                add_planes(&mut sums, products);
            }
            // SAFETY: eight of the sixteen scales, 128 bits each half.
            let scales =
                widen(unsafe { _mm_loadu_si128(scales.as_ptr().cast::<__m128i>().add(half)) });
            for (token, (totals, sum)) in totals.iter_mut().zip(sums).enumerate() {
                let offset = _mm256_set1_epi32(offset * group_sums[token * groups + group]);
                let sum = _mm256_cvtepi32_ps(_mm256_sub_epi32(sum, offset));
                totals[half] = _mm256_fmadd_ps(scales, sum, totals[half]);
            }
        }
    }
    for (out, totals) in out.iter_mut().zip(totals) {
        for (out, total) in out.as_chunks_mut::<8>().0.iter_mut().zip(totals) {
            // SAFETY: eight f32 are one register.
            unsafe { _mm256_storeu_ps(out.as_mut_ptr(), total) };
        }
    }
}

/// `products[token] += [codes·hi, codes·lo]`, neighbours added, of a quad of each of `N` tokens, which are `stride`
/// quads apart.
///
/// # Safety
/// These quads can be read.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn add_quad<const N: usize>(
    products: &mut [[__m256i; 2]; N],
    codes: __m256i,
    x: *const [i8; 8],
    stride: usize,
) {
    for (token, products) in products.iter_mut().enumerate() {
        // SAFETY: the caller's.
        let planes = unsafe { planes(x.add(token * stride)) };
        for (products, x) in products.iter_mut().zip(planes) {
            *products = _mm256_add_epi16(*products, _mm256_maddubs_epi16(codes, x));
        }
    }
}

/// `sums[token] += Σ 64·hi + lo` of the 16-bit products.
#[inline]
#[target_feature(enable = "avx2")]
fn add_planes<const N: usize>(sums: &mut [__m256i; N], products: [[__m256i; 2]; N]) {
    for (sum, [hi, lo]) in sums.iter_mut().zip(products) {
        let hi = _mm256_madd_epi16(hi, _mm256_set1_epi16(64));
        let lo = _mm256_madd_epi16(lo, _mm256_set1_epi16(1));
        *sum = _mm256_add_epi32(*sum, _mm256_add_epi32(hi, lo));
    }
}

/// Half of a line: rows 0 to 7 or 8 to 15.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn load_half(line: &Line, half: usize) -> __m256i {
    let half: &[u8; 32] = &line.as_chunks().0[half];
    // SAFETY: one register.
    unsafe { _mm256_loadu_si256(half.as_ptr().cast()) }
}

/// The low and the high four bits of each byte.
#[inline]
#[target_feature(enable = "avx2")]
fn nibbles(line: __m256i) -> [__m256i; 2] {
    let low4 = _mm256_set1_epi8(15);
    [_mm256_and_si256(line, low4), _mm256_and_si256(_mm256_srli_epi16::<4>(line), low4)]
}

/// Half of two lines of nibbles to four halves of codes.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn decode_q4([first, second]: &[Line; 2], half: usize) -> [__m256i; 4] {
    let [a, b] = nibbles(load_half(first, half));
    let [c, d] = nibbles(load_half(second, half));
    [a, b, c, d]
}

/// Half of two lines of nibbles and of one of high bits to four halves of codes.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn decode_q6([first, second, high]: &[Line; 3], half: usize) -> [__m256i; 4] {
    let high2 = _mm256_set1_epi8(3 << 4);
    let [a, b] = nibbles(load_half(first, half));
    let [c, d] = nibbles(load_half(second, half));
    let high = load_half(high, half);
    [
        _mm256_or_si256(a, _mm256_and_si256(_mm256_slli_epi32::<4>(high), high2)),
        _mm256_or_si256(b, _mm256_and_si256(_mm256_slli_epi32::<2>(high), high2)),
        _mm256_or_si256(c, _mm256_and_si256(high, high2)),
        _mm256_or_si256(d, _mm256_and_si256(_mm256_srli_epi32::<2>(high), high2)),
    ]
}

/// Eight bfloat16 to f32.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn widen(x: __m128i) -> __m256 {
    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(x)))
}
