//! Portable code: for processors, and instruction sets, that have nothing better.

use std::array;

use super::{GROUP, HeadActivations, HeadFormat, HeadRoutines, Line, PlaneSums, ROWS, group};

pub(in crate::kernels) const ROUTINES: HeadRoutines = HeadRoutines {
    q8: head_q8,
    q6: head_groups::<{ HeadFormat::Q6 as u8 }>,
    q4: head_groups::<{ HeadFormat::Q4 as u8 }>,
};

fn head_q8(lines: &[Line], x: &[[i8; 8]], sums: &mut [PlaneSums]) {
    for (token, sums) in sums.iter_mut().enumerate() {
        *sums = [[0; ROWS]; 2];
        for (line, x) in lines.iter().zip(&x[token * lines.len()..]) {
            let (hi, lo) = x.split_at(4);
            add_products(line, hi, &mut sums[0]);
            add_products(line, lo, &mut sums[1]);
        }
    }
}

fn head_groups<const FORMAT: u8>(
    lines: &[Line],
    scales: &[[u16; ROWS]],
    x: HeadActivations<'_>,
    out: &mut [[f32; ROWS]],
) {
    let format = if FORMAT == HeadFormat::Q6 as u8 { HeadFormat::Q6 } else { HeadFormat::Q4 };
    let groups = scales.len();
    for out in out.iter_mut() {
        *out = [0.; ROWS];
    }
    for (index, (lines, scales)) in
        lines.chunks_exact(format.lines_per_group()).zip(scales).enumerate()
    {
        // The group as lines of 8-bit codes.
        let mut codes = [[0; 64]; GROUP / 4];
        for row in 0..ROWS {
            let quads = group(format, lines, row);
            for (line, quad) in codes.iter_mut().zip(quads.as_chunks::<4>().0) {
                line[4 * row..4 * row + 4].copy_from_slice(quad);
            }
        }
        for (token, out) in out.iter_mut().enumerate() {
            let mut sums = [[0; ROWS]; 2];
            let quads = &x.quads[(token * groups + index) * GROUP / 4..];
            for (line, x) in codes.iter().zip(quads) {
                let (hi, lo) = x.split_at(4);
                add_products(line, hi, &mut sums[0]);
                add_products(line, lo, &mut sums[1]);
            }
            let offset = i32::from(format.offset()) * x.sums[token * groups + index];
            for row in 0..ROWS {
                let sum = 64 * sums[0][row] + sums[1][row] - offset;
                let scale = f32::from_bits(u32::from(scales[row]) << 16);
                out[row] = scale.mul_add(sum as f32, out[row]);
            }
        }
    }
}

/// `sums[row] += Σ line[4·row + j] · x[j]`.
#[inline(always)]
fn add_products(line: &Line, x: &[i8], sums: &mut [i32; ROWS]) {
    let x: [i16; 4] = array::from_fn(|j| i16::from(x[j]));
    for (sum, codes) in sums.iter_mut().zip(line.as_chunks::<4>().0) {
        for (code, x) in codes.iter().zip(x) {
            *sum += i32::from(i16::from(*code) * x); // at most 255 · 64
        }
    }
}
