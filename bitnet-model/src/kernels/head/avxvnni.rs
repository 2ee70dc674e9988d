//! AVX-VNNI: `vpdpbusd` on 256-bit registers. Lines are decoded as in AVX2.

use std::arch::x86_64::*;

#[cfg(test)]
use super::super::avxvnni::Evex;
use super::{
    super::avxvnni::{Dpbusd, Vex},
    HeadActivations, HeadFormat, HeadRoutines, Line, PlaneSums, ROWS,
    avx2::{decode_q4, decode_q6, load_half, planes, widen},
    in_blocks,
};

/// [`HeadRoutines`] with an encoding of the instruction and the features it needs.
macro_rules! head_routines {
    ($dot:expr, #[$feature:meta]) => {{
        #[$feature]
        fn q8(lines: &[Line], x: &[[i8; 8]], sums: &mut [PlaneSums]) {
            head_q8($dot, lines, x, sums)
        }
        #[$feature]
        fn q6(l: &[Line], s: &[[u16; ROWS]], x: HeadActivations<'_>, out: &mut [[f32; ROWS]]) {
            head_groups::<_, 6>($dot, l, s, x, out)
        }
        #[$feature]
        fn q4(l: &[Line], s: &[[u16; ROWS]], x: HeadActivations<'_>, out: &mut [[f32; ROWS]]) {
            head_groups::<_, 4>($dot, l, s, x, out)
        }
        HeadRoutines { q8, q6, q4 }
    }};
}

pub(in crate::kernels) const VEX: HeadRoutines =
    head_routines!(Vex(()), #[target_feature(enable = "avx2,fma,avxvnni")]);

#[cfg(test)]
pub(in crate::kernels) const EVEX: HeadRoutines =
    head_routines!(Evex(()), #[target_feature(enable = "avx2,fma,avx512vnni,avx512vl")]);

#[inline(always)]
fn head_q8<D: Dpbusd>(dot: D, lines: &[Line], x: &[[i8; 8]], sums: &mut [PlaneSums]) {
    let of = |first: usize, tokens: usize| &x[first * lines.len()..][..tokens * lines.len()];
    in_blocks::<2, _>(
        sums,
        |first, sums| head_q8_block::<D, 2, 1>(dot, lines, of(first, 2), sums),
        |first, sums| head_q8_block::<D, 1, 2>(dot, lines, of(first, 1), sums),
    );
}

/// `N` tokens with `CHAINS` sums for each plane and half of the rows: a line is read once for all tokens.
#[inline(always)]
fn head_q8_block<D: Dpbusd, const N: usize, const CHAINS: usize>(
    dot: D,
    lines: &[Line],
    x: &[[i8; 8]],
    out: &mut [PlaneSums; N],
) {
    assert_eq!(x.len(), N * lines.len());
    // SAFETY: `dot` proves AVX2; the reads of x are argued below, and eight i32 are one register.
    unsafe {
        let mut sums = [[[[_mm256_setzero_si256(); 2]; 2]; CHAINS]; N];
        for (i, line) in lines.iter().enumerate() {
            let codes = [load_half(line, 0), load_half(line, 1)];
            for (token, sums) in sums.iter_mut().enumerate() {
                // token < N and i < lines.len(): one of the N · lines.len() quads of x.
                let planes = planes(x.as_ptr().add(token * lines.len() + i));
                for (sums, x) in sums[i % CHAINS].iter_mut().zip(planes) {
                    for (sum, codes) in sums.iter_mut().zip(codes) {
                        *sum = dot.dpbusd(*sum, codes, x);
                    }
                }
            }
        }
        for (out, chains) in out.iter_mut().zip(sums) {
            for (plane, out) in out.iter_mut().enumerate() {
                for (half, out) in out.as_chunks_mut::<8>().0.iter_mut().enumerate() {
                    let mut total = chains[0][plane][half];
                    for sums in &chains[1..] {
                        total = _mm256_add_epi32(total, sums[plane][half]);
                    }
                    _mm256_storeu_si256(out.as_mut_ptr().cast(), total);
                }
            }
        }
    }
}

#[inline(always)]
fn head_groups<D: Dpbusd, const BITS: u32>(
    dot: D,
    lines: &[Line],
    scales: &[[u16; ROWS]],
    x: HeadActivations<'_>,
    out: &mut [[f32; ROWS]],
) {
    in_blocks::<4, _>(
        out,
        |first, out| head_groups_block::<D, BITS, 4>(dot, lines, scales, x.tokens(first, 4), out),
        |first, out| head_groups_block::<D, BITS, 1>(dot, lines, scales, x.tokens(first, 1), out),
    );
}

/// `N` tokens: a group is decoded once for all of them.
#[inline(always)]
fn head_groups_block<D: Dpbusd, const BITS: u32, const N: usize>(
    dot: D,
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
    // SAFETY: `dot` proves AVX2 and FMA; the reads of x and scales are argued below, and eight f32
    // are one register.
    unsafe {
        let mut totals = [[_mm256_setzero_ps(); 2]; N];
        for (group, (lines, scales)) in
            lines.chunks_exact(format.lines_per_group()).zip(scales).enumerate()
        {
            // (group + 1) · QUADS ≤ groups · QUADS quads in each of the N rows of x.
            let x = x.quads.as_ptr().add(group * QUADS);
            for half in 0..2 {
                let mut sums = [[_mm256_setzero_si256(); 2]; N];
                for i in 0..2 {
                    let codes = match BITS {
                        6 => decode_q6(&lines.as_chunks().0[i], half),
                        _ => decode_q4(&lines.as_chunks().0[i], half),
                    };
                    for (j, codes) in codes.into_iter().enumerate() {
                        for (token, sums) in sums.iter_mut().enumerate() {
                            let planes = planes(x.add(token * groups * QUADS + 4 * i + j));
                            for (sum, x) in sums.iter_mut().zip(planes) {
                                *sum = dot.dpbusd(*sum, codes, x);
                            }
                        }
                    }
                }
                // Eight of the sixteen scales, 128 bits each half.
                let scales = widen(_mm_loadu_si128(scales.as_ptr().cast::<__m128i>().add(half)));
                for (token, (totals, [hi, lo])) in totals.iter_mut().zip(sums).enumerate() {
                    let offset = _mm256_set1_epi32(offset * group_sums[token * groups + group]);
                    let sum =
                        _mm256_add_epi32(_mm256_slli_epi32::<6>(hi), _mm256_sub_epi32(lo, offset));
                    totals[half] = _mm256_fmadd_ps(scales, _mm256_cvtepi32_ps(sum), totals[half]);
                }
            }
        }
        for (out, totals) in out.iter_mut().zip(totals) {
            for (out, total) in out.as_chunks_mut::<8>().0.iter_mut().zip(totals) {
                _mm256_storeu_ps(out.as_mut_ptr(), total);
            }
        }
    }
}
