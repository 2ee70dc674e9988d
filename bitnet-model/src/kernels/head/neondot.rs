//! NEON with dot products: `sdot` multiplies signed bytes, so 8-bit codes are taken less 128.

use std::arch::aarch64::*;

use super::{HeadActivations, HeadFormat, HeadRoutines, Line, PlaneSums, ROWS, in_blocks};
use crate::kernels::neondot::{dot, load};

pub(in crate::kernels) const ROUTINES: HeadRoutines =
    HeadRoutines { q8: head_q8, q6: head_groups::<6>, q4: head_groups::<4> };

/// Rows of a register.
const QUARTER: usize = 4;

#[target_feature(enable = "dotprod")]
fn head_q8(lines: &[Line], x: &[[i8; 8]], sums: &mut [PlaneSums]) {
    let of = |first: usize, tokens: usize| &x[first * lines.len()..][..tokens * lines.len()];
    in_blocks::<2, _>(
        sums,
        |first, sums| head_q8_block(lines, of(first, 2), sums),
        |first, sums| head_q8_block(lines, of(first, 1), sums),
    );
}

/// `N` tokens: a line is read once for all of them.
///
/// `Σ code·x = Σ (code − 128)·x + 128·Σ x`, both terms at most 128 · 64 · cols ≤ 2³⁰.
#[target_feature(enable = "dotprod")]
fn head_q8_block<const N: usize>(lines: &[Line], x: &[[i8; 8]], out: &mut [PlaneSums; N]) {
    assert_eq!((x.len(), lines.len() % 2), (N * lines.len(), 0));
    let (sign, ones) = (vdupq_n_u8(0x80), vdupq_n_s8(1));
    let mut sums = [[[vdupq_n_s32(0); QUARTER]; 2]; N];
    let mut x_sums = [vdupq_n_s32(0); N]; // hi, lo, hi, lo
    for (i, [first, second]) in lines.as_chunks::<2>().0.iter().enumerate() {
        let mut planes = [vdupq_n_s8(0); N];
        for (token, planes) in planes.iter_mut().enumerate() {
            // SAFETY: token < N and 2·i + 1 < lines.len(): two of the N · lines.len() quads of x.
            *planes = unsafe { load_quads(x.as_ptr().add(token * lines.len() + 2 * i)) };
            x_sums[token] = dot::<0>(x_sums[token], *planes, ones);
        }
        for quarter in 0..QUARTER {
            let first = vreinterpretq_s8_u8(veorq_u8(load_quarter(first, quarter), sign));
            let second = vreinterpretq_s8_u8(veorq_u8(load_quarter(second, quarter), sign));
            for ([hi, lo], x) in sums.iter_mut().zip(planes) {
                hi[quarter] = dot::<2>(dot::<0>(hi[quarter], first, x), second, x);
                lo[quarter] = dot::<3>(dot::<1>(lo[quarter], first, x), second, x);
            }
        }
    }
    for ((out, sums), x_sums) in out.iter_mut().zip(sums).zip(x_sums) {
        let x_sums = vadd_s32(vget_low_s32(x_sums), vget_high_s32(x_sums));
        let offsets = vshl_n_s32::<7>(x_sums);
        let offsets = [vdupq_lane_s32::<0>(offsets), vdupq_lane_s32::<1>(offsets)];
        for ((out, sums), offset) in out.iter_mut().zip(sums).zip(offsets) {
            for (out, sum) in out.as_chunks_mut::<4>().0.iter_mut().zip(sums) {
                // SAFETY: four i32 are one register.
                unsafe { vst1q_s32(out.as_mut_ptr(), vaddq_s32(sum, offset)) };
            }
        }
    }
}

/// Two quads: `hi` of the first four columns, their `lo`, `hi` of the next four, their `lo`.
///
/// # Safety
/// The two quads can be read.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn load_quads(quads: *const [i8; 8]) -> int8x16_t {
    // SAFETY: the caller's; two quads are one register.
    unsafe { vld1q_s8(quads.cast()) }
}

#[target_feature(enable = "dotprod")]
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
#[target_feature(enable = "dotprod")]
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
    let mut totals = [[vdupq_n_f32(0.); QUARTER]; N];
    for (group, (lines, scales)) in
        lines.chunks_exact(format.lines_per_group()).zip(scales).enumerate()
    {
        for (quarter, scales) in scales.as_chunks::<4>().0.iter().enumerate() {
            let mut sums = [[vdupq_n_s32(0); 2]; N];
            for half in 0..2 {
                let codes = match BITS {
                    6 => decode_q6(&lines.as_chunks().0[half], quarter),
                    _ => decode_q4(&lines.as_chunks().0[half], quarter),
                };
                for (token, [hi, lo]) in sums.iter_mut().enumerate() {
                    let start = (token * groups + group) * QUADS + QUADS / 2 * half;
                    // SAFETY: token < N, group < groups and half < 2: four of the N · groups · QUADS quads of x.
                    let (x, next) = unsafe {
                        let quads = x.quads.as_ptr().add(start);
                        (load_quads(quads), load_quads(quads.add(2)))
                    };
                    *hi = dot::<2>(dot::<0>(*hi, codes[0], x), codes[1], x);
                    *lo = dot::<3>(dot::<1>(*lo, codes[0], x), codes[1], x);
                    *hi = dot::<2>(dot::<0>(*hi, codes[2], next), codes[3], next);
                    *lo = dot::<3>(dot::<1>(*lo, codes[2], next), codes[3], next);
                }
            }
            // SAFETY: four scales are half a register.
            let scales = unsafe { vld1_u16(scales.as_ptr()) };
            let scales = vreinterpretq_f32_u32(vshll_n_u16::<16>(scales)); // bfloat16
            for (token, (totals, [hi, lo])) in totals.iter_mut().zip(sums).enumerate() {
                let offset = vdupq_n_s32(offset * group_sums[token * groups + group]);
                let sum = vsubq_s32(vaddq_s32(vshlq_n_s32::<6>(hi), lo), offset);
                totals[quarter] = vfmaq_f32(totals[quarter], scales, vcvtq_f32_s32(sum));
            }
        }
    }
    for (out, totals) in out.iter_mut().zip(totals) {
        for (out, total) in out.as_chunks_mut::<4>().0.iter_mut().zip(totals) {
            // SAFETY: four f32 are one register.
            unsafe { vst1q_f32(out.as_mut_ptr(), total) };
        }
    }
}

/// Four rows of a line.
#[inline]
#[target_feature(enable = "neon")]
fn load_quarter(line: &Line, quarter: usize) -> uint8x16_t {
    load(&line.as_chunks().0[quarter])
}

/// The low and the high four bits of each byte.
#[inline]
#[target_feature(enable = "neon")]
fn nibbles(line: uint8x16_t) -> [uint8x16_t; 2] {
    [vandq_u8(line, vdupq_n_u8(15)), vshrq_n_u8::<4>(line)]
}

/// Four rows of two lines of nibbles to those of four lines of codes.
#[inline]
#[target_feature(enable = "neon")]
fn decode_q4([first, second]: &[Line; 2], quarter: usize) -> [int8x16_t; 4] {
    let [a, b] = nibbles(load_quarter(first, quarter));
    let [c, d] = nibbles(load_quarter(second, quarter));
    [a, b, c, d].map(|codes| vreinterpretq_s8_u8(codes))
}

/// Four rows of two lines of nibbles and of one of high bits to those of four lines of codes.
#[inline]
#[target_feature(enable = "neon")]
fn decode_q6([first, second, high]: &[Line; 3], quarter: usize) -> [int8x16_t; 4] {
    let high2 = vdupq_n_u8(3 << 4);
    let [a, b] = nibbles(load_quarter(first, quarter));
    let [c, d] = nibbles(load_quarter(second, quarter));
    let high = load_quarter(high, quarter);
    [
        vorrq_u8(a, vandq_u8(vshlq_n_u8::<4>(high), high2)),
        vorrq_u8(b, vandq_u8(vshlq_n_u8::<2>(high), high2)),
        vorrq_u8(c, vandq_u8(high, high2)),
        vorrq_u8(d, vandq_u8(vshrq_n_u8::<2>(high), high2)),
    ]
    .map(|codes| vreinterpretq_s8_u8(codes))
}
