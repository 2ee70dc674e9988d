//! NEON with dot products: `sdot` adds four products of signed bytes, codes as they are and activations of one lane of a
//! register, to 32-bit sums.

use std::arch::{aarch64::*, asm};

use super::{
    Kernel, ROWS, Tile, TileFormat, head,
    instructions::requirements,
    peak,
    simd::{LANES, Simd, routines},
    tile::TRIT_CODES,
};

pub(super) static KERNEL: Kernel = Kernel {
    name: "neondot",
    requires: requirements!["dotprod"],
    accumulate: accumulate::<{ TileFormat::TwoBit.lanes() }>,
    accumulate_trits: accumulate::<{ TileFormat::Trits.lanes() }>,
    routines: routines!(Neon, 2 x 2, 6 x 1, 4 x 1),
    head: head::neondot::ROUTINES,
    peak: peak::NEONDOT,
};

/// Tokens that share a decoded tile: their sums take half of the 32 registers.
const BLOCK: usize = 4;

/// `sum[row] + Σⱼ codes[4·row + j] · x[4·LANE + j]` for four rows. Written as an instruction because the intrinsic
/// `vdotq_laneq_s32` is not stable.
#[inline]
#[target_feature(enable = "dotprod")]
pub(in crate::kernels) fn dot<const LANE: u8>(
    sum: int32x4_t,
    codes: int8x16_t,
    x: int8x16_t,
) -> int32x4_t {
    const { assert!(LANE < 4) }
    let mut sum = sum;
    // SAFETY: the instruction is in this function's features, and touches nothing but these registers.
    unsafe {
        asm!(
            "sdot {sum:v}.4s, {codes:v}.16b, {x:v}.4b[{lane}]",
            sum = inout(vreg) sum,
            codes = in(vreg) codes,
            x = in(vreg) x,
            lane = const LANE,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}

/// `CODES` a byte: four of 2 bits or five of base 3.
#[target_feature(enable = "dotprod")]
fn accumulate<const CODES: usize>(tiles: &[Tile], x: &[i8], acc: &mut [[i32; ROWS]]) {
    let cols = tiles.len() * 4 * CODES;
    for (i, acc) in acc.chunks_mut(BLOCK).enumerate() {
        let x = &x[i * BLOCK * cols..][..acc.len() * cols];
        // With few tokens, several sums a row hide the latency of the products.
        match acc.len() {
            1 => block::<CODES, 1, 4>(tiles, x, acc),
            2 => block::<CODES, 2, 2>(tiles, x, acc),
            3 => block::<CODES, 3, 1>(tiles, x, acc),
            _ => block::<CODES, BLOCK, 1>(tiles, x, acc),
        }
    }
}

/// `N` tokens with `CHAINS` sums a row: the sums stay in registers, and a tile is decoded once for all tokens.
#[target_feature(enable = "dotprod")]
fn block<const CODES: usize, const N: usize, const CHAINS: usize>(
    tiles: &[Tile],
    x: &[i8],
    acc: &mut [[i32; ROWS]],
) {
    let width = 4 * CODES;
    let cols = tiles.len() * width;
    assert_eq!((x.len(), acc.len()), (N * cols, N));
    let mut sums = [[[vdupq_n_s32(0); CHAINS]; N]; 4];
    for (i, tile) in tiles.iter().enumerate() {
        let mut x_lanes = [[vdupq_n_s8(0); 2]; N];
        for (token, lanes) in x_lanes.iter_mut().enumerate() {
            // SAFETY: token < N and i < tiles.len(), so the tile's 16 or 20 values lie within the N · cols of x.
            unsafe {
                let x = x.as_ptr().add(token * cols + i * width);
                lanes[0] = vld1q_s8(x);
                if CODES == 5 {
                    let fifth = x.add(16).cast::<i32>().read_unaligned();
                    lanes[1] = vreinterpretq_s8_s32(vdupq_n_s32(fifth));
                }
            }
        }
        // Not a loop: sums that an index picks would live in memory.
        let (rows, _) = tile.as_chunks::<16>();
        add_rows::<CODES, N, CHAINS>(&mut sums[0], &rows[0], &x_lanes);
        add_rows::<CODES, N, CHAINS>(&mut sums[1], &rows[1], &x_lanes);
        add_rows::<CODES, N, CHAINS>(&mut sums[2], &rows[2], &x_lanes);
        add_rows::<CODES, N, CHAINS>(&mut sums[3], &rows[3], &x_lanes);
    }
    for (quarter, sums) in sums.into_iter().enumerate() {
        for (acc, sums) in acc.iter_mut().zip(sums) {
            let acc = acc.as_chunks_mut::<4>().0[quarter].as_mut_ptr();
            // SAFETY: four i32 are one register.
            let mut total = unsafe { vld1q_s32(acc) };
            for sum in sums {
                total = vaddq_s32(total, sum);
            }
            // SAFETY: as above.
            unsafe { vst1q_s32(acc, total) };
        }
    }
}

/// Four rows of a tile with the tile's activations of `N` tokens.
#[inline]
#[target_feature(enable = "dotprod")]
fn add_rows<const CODES: usize, const N: usize, const CHAINS: usize>(
    sums: &mut [[int32x4_t; CHAINS]; N],
    rows: &[u8; 16],
    x: &[[int8x16_t; 2]; N],
) {
    let codes = if CODES == 5 { unpack_trits(load(rows)) } else { unpack(load(rows)) };
    for (sums, x) in sums.iter_mut().zip(x) {
        sums[0] = dot::<0>(sums[0], codes[0], x[0]);
        sums[1 % CHAINS] = dot::<1>(sums[1 % CHAINS], codes[1], x[0]);
        sums[2 % CHAINS] = dot::<2>(sums[2 % CHAINS], codes[2], x[0]);
        sums[3 % CHAINS] = dot::<3>(sums[3 % CHAINS], codes[3], x[0]);
        if CODES == 5 {
            sums[0] = dot::<0>(sums[0], codes[4], x[1]);
        }
    }
}

#[inline]
#[target_feature(enable = "neon")]
pub(in crate::kernels) fn load(bytes: &[u8; 16]) -> uint8x16_t {
    // SAFETY: one register.
    unsafe { vld1q_u8(bytes.as_ptr()) }
}

/// The four codes of 2 bits of each byte, and no fifth.
#[inline]
#[target_feature(enable = "neon")]
fn unpack(v: uint8x16_t) -> [int8x16_t; 5] {
    let low2 = vdupq_n_u8(3);
    [
        vandq_u8(v, low2),
        vandq_u8(vshrq_n_u8::<2>(v), low2),
        vandq_u8(vshrq_n_u8::<4>(v), low2),
        vshrq_n_u8::<6>(v),
        vdupq_n_u8(0),
    ]
    .map(|codes| vreinterpretq_s8_u8(codes))
}

/// The five codes of each byte `v = r + 81·d₄`.
///
/// The remainder r is the least of v, v − 81 and v − 162 as unsigned bytes, of which those below zero wrap around to more
/// than v. A table turns it into four codes of two bits, its first 64 bytes and the others looked up apart: an index
/// outside of the second table leaves what was there. Bits 6 and 7 of v − r, 0, 81 or 162, are d₄.
#[inline]
#[target_feature(enable = "neon")]
fn unpack_trits(v: uint8x16_t) -> [int8x16_t; 5] {
    let (tables, _) = TRIT_CODES.as_chunks::<16>();
    let low = uint8x16x4_t(load(&tables[0]), load(&tables[1]), load(&tables[2]), load(&tables[3]));
    let high = uint8x16x2_t(load(&tables[4]), load(&tables[5]));
    let once = vsubq_u8(v, vdupq_n_u8(81));
    let twice = vsubq_u8(v, vdupq_n_u8(162));
    let r = vminq_u8(vminq_u8(v, once), twice);
    let codes = vqtbx2q_u8(vqtbl4q_u8(low, r), high, vsubq_u8(r, vdupq_n_u8(64)));
    let mut codes = unpack(codes);
    codes[4] = vreinterpretq_s8_u8(vshrq_n_u8::<6>(vsubq_u8(v, r)));
    codes
}

/// NEON, which every processor of the architecture has.
#[derive(Clone, Copy)]
struct Neon;

/// `f` of each register.
macro_rules! each {
    ($f:ident($($x:ident),+)) => {
        // SAFETY: every processor of the architecture has NEON.
        unsafe { [$f($($x[0]),+), $f($($x[1]),+), $f($($x[2]),+), $f($($x[3]),+)] }
    };
}

impl Simd for Neon {
    /// Lanes 0 to 3, 4 to 7, 8 to 11 and 12 to 15.
    type F32 = [float32x4_t; 4];

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F32 {
        // SAFETY: every processor of the architecture has NEON.
        unsafe { [vdupq_n_f32(x); 4] }
    }

    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::F32 {
        // SAFETY: every processor of the architecture has NEON; x is four registers long.
        unsafe {
            let x = x.as_ptr();
            [vld1q_f32(x), vld1q_f32(x.add(4)), vld1q_f32(x.add(8)), vld1q_f32(x.add(12))]
        }
    }

    #[inline(always)]
    fn load_bf16(self, x: &[u16; LANES]) -> Self::F32 {
        // SAFETY: every processor of the architecture has NEON.
        unsafe { widen_bf16(halves(x)) }
    }

    #[inline(always)]
    fn load_f16(self, x: &[u16; LANES]) -> Self::F32 {
        // SAFETY: every processor of the architecture has NEON.
        unsafe { widen_f16(halves(x)) }
    }

    #[inline(always)]
    fn load_i8(self, x: &[i8; LANES]) -> Self::F32 {
        // SAFETY: every processor of the architecture has NEON; x is one register long.
        unsafe { widen_i8(vld1q_s8(x.as_ptr())) }
    }

    #[inline(always)]
    fn store(self, x: Self::F32, out: &mut [f32; LANES]) {
        for (out, x) in out.as_chunks_mut::<4>().0.iter_mut().zip(x) {
            // SAFETY: every processor of the architecture has NEON; four values are one register.
            unsafe { vst1q_f32(out.as_mut_ptr(), x) };
        }
    }

    #[inline(always)]
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        each!(vaddq_f32(a, b))
    }

    #[inline(always)]
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        each!(vmulq_f32(a, b))
    }

    #[inline(always)]
    fn mul_add(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        each!(vfmaq_f32(c, a, b))
    }

    #[inline(always)]
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // Not `fmax`, which is NaN where either is.
        let greater = each!(vcgtq_f32(a, b));
        each!(vbslq_f32(greater, a, b))
    }

    #[inline(always)]
    fn min(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        let less = each!(vcltq_f32(a, b));
        each!(vbslq_f32(less, a, b))
    }

    #[inline(always)]
    fn round(self, a: Self::F32) -> Self::F32 {
        each!(vrndnq_f32(a))
    }

    #[inline(always)]
    fn scale(self, a: Self::F32, n: Self::F32) -> Self::F32 {
        each!(scale4(a, n))
    }

    #[inline(always)]
    fn sum4(self, x: [Self::F32; 4]) -> [f32; 4] {
        // SAFETY: every processor of the architecture has NEON.
        unsafe { sum4(x) }
    }
}

/// Values 0 to 7 and 8 to 15.
#[inline]
#[target_feature(enable = "neon")]
fn halves(x: &[u16; LANES]) -> [uint16x8_t; 2] {
    // SAFETY: two registers of eight values are sixteen.
    unsafe { [vld1q_u16(x.as_ptr()), vld1q_u16(x.as_ptr().add(8))] }
}

/// Sixteen bfloat16 to f32.
#[inline]
#[target_feature(enable = "neon")]
fn widen_bf16([low, high]: [uint16x8_t; 2]) -> [float32x4_t; 4] {
    [
        vreinterpretq_f32_u32(vshll_n_u16::<16>(vget_low_u16(low))),
        vreinterpretq_f32_u32(vshll_high_n_u16::<16>(low)),
        vreinterpretq_f32_u32(vshll_n_u16::<16>(vget_low_u16(high))),
        vreinterpretq_f32_u32(vshll_high_n_u16::<16>(high)),
    ]
}

/// Sixteen half-precision floats to f32.
#[inline]
#[target_feature(enable = "neon")]
fn widen_f16([low, high]: [uint16x8_t; 2]) -> [float32x4_t; 4] {
    [
        widen_4_f16(vget_low_u16(low)),
        widen_4_f16(vget_high_u16(low)),
        widen_4_f16(vget_low_u16(high)),
        widen_4_f16(vget_high_u16(high)),
    ]
}

/// Written as an instruction because its intrinsic is younger than the oldest compiler this crate supports.
#[inline]
#[target_feature(enable = "neon")]
fn widen_4_f16(x: uint16x4_t) -> float32x4_t {
    let wide: float32x4_t;
    // SAFETY: the instruction is in this function's features, and touches nothing but these registers.
    unsafe {
        asm!(
            "fcvtl {wide:v}.4s, {x:v}.4h",
            wide = lateout(vreg) wide,
            x = in(vreg) x,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    wide
}

/// Sixteen integers to f32.
#[inline]
#[target_feature(enable = "neon")]
fn widen_i8(x: int8x16_t) -> [float32x4_t; 4] {
    let (low, high) = (vmovl_s8(vget_low_s8(x)), vmovl_high_s8(x));
    [
        vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))),
        vcvtq_f32_s32(vmovl_high_s16(low)),
        vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))),
        vcvtq_f32_s32(vmovl_high_s16(high)),
    ]
}

/// [`Simd::scale`] of four lanes by two factors, each a normal number; the first product is exact.
#[inline]
#[target_feature(enable = "neon")]
fn scale4(a: float32x4_t, n: float32x4_t) -> float32x4_t {
    let n = vcvtq_s32_f32(n);
    let half = vshrq_n_s32::<1>(n);
    let a = vmulq_f32(a, power_of_two(half));
    vmulq_f32(a, power_of_two(vsubq_s32(n, half)))
}

/// 2ⁿ for −126 ≤ n ≤ 127: the exponent field alone.
#[inline]
#[target_feature(enable = "neon")]
fn power_of_two(n: int32x4_t) -> float32x4_t {
    vreinterpretq_f32_s32(vshlq_n_s32::<23>(vaddq_s32(n, vdupq_n_s32(127))))
}

/// [`Simd::sum4`].
#[inline]
#[target_feature(enable = "neon")]
fn sum4([a, b, c, d]: [[float32x4_t; 4]; 4]) -> [f32; 4] {
    let ab = add_halves(add_quarters(a), add_quarters(b));
    let cd = add_halves(add_quarters(c), add_quarters(d));
    let mut out = [0.; 4];
    // SAFETY: four values are one register.
    unsafe { vst1q_f32(out.as_mut_ptr(), vpaddq_f32(ab, cd)) }; // l + 1
    out
}

/// Lane `l` plus `l + 8`, then plus `l + 4`.
#[inline]
#[target_feature(enable = "neon")]
fn add_quarters(x: [float32x4_t; 4]) -> float32x4_t {
    vaddq_f32(vaddq_f32(x[0], x[2]), vaddq_f32(x[1], x[3]))
}

/// Lane `l` plus `l + 2` of both: `[a a b b]`.
#[inline]
#[target_feature(enable = "neon")]
fn add_halves(a: float32x4_t, b: float32x4_t) -> float32x4_t {
    vaddq_f32(
        vcombine_f32(vget_low_f32(a), vget_low_f32(b)),
        vcombine_f32(vget_high_f32(a), vget_high_f32(b)),
    )
}
