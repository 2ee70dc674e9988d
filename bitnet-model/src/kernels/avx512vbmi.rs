//! AVX-512 with VNNI and VBMI, whose permutation of bytes unpacks five ternary digits at once; else as `avx512vnni`.
//!
//! A byte of base 3 is `v = r + 81·d₄`, r = d₀ + 3d₁ + 9d₂ + 27d₃. The remainder r is the least of v, v − 81 and v − 162 as
//! unsigned bytes, of which those below zero wrap around to more than v. A table of 81 bytes turns r into the four codes
//! of two bits; v − r is 81·d₄.

use std::arch::x86_64::*;

use super::{
    Kernel, ROWS, Tile, TileFormat,
    avx512vnni::{self, add, broadcast, fetch_next, lanes, load, multiply},
    instructions::requirements,
    tile::TRIT_CODES,
};

pub(super) static KERNEL: Kernel = Kernel {
    name: "avx512vbmi",
    requires: requirements![
        "avx512f",
        "avx512bw",
        "avx512dq",
        "avx512vl",
        "avx512vnni",
        "avx512vbmi",
        "fma"
    ],
    accumulate_trits,
    ..avx512vnni::KERNEL
};

const COLS: usize = TileFormat::Trits.cols();

/// Multiplying by it, modulo 2³², divides a multiple of 81.
const INVERSE_81: i32 = inverse(81) as i32;

/// Newton's iteration for `1 / x` modulo 2³², x odd: each step doubles the number of right bits, of which x·x = 1 mod 8 gives
/// three.
const fn inverse(x: u32) -> u32 {
    let mut y = x;
    let mut right = 3;
    while right < 32 {
        y = y.wrapping_mul(2u32.wrapping_sub(x.wrapping_mul(y)));
        right *= 2;
    }
    y
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx512vbmi")]
fn accumulate_trits(tiles: &[Tile], x: &[i8], acc: &mut [[i32; ROWS]]) {
    let cols = tiles.len() * COLS;
    let mut first = 0;
    while first < acc.len() {
        // As many tokens as there are registers for their sums share a decoded tile.
        let tokens = match acc.len() - first {
            rest @ 0..8 => rest,
            8..16 => 8,
            _ => 16,
        };
        let x = &x[first * cols..][..tokens * cols];
        let acc = &mut acc[first..][..tokens];
        match tokens {
            1 => single(tiles, x, &mut acc[0]),
            2 => block::<2, 2>(tiles, x, acc),
            3 => block::<3, 2>(tiles, x, acc),
            4 => block::<4, 2>(tiles, x, acc),
            5 => block::<5, 1>(tiles, x, acc),
            6 => block::<6, 1>(tiles, x, acc),
            7 => block::<7, 1>(tiles, x, acc),
            8 => block::<8, 1>(tiles, x, acc),
            _ => block::<16, 1>(tiles, x, acc),
        }
        first += tokens;
    }
}

/// The codes of two bits and 81·d₄ of each byte.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx512vbmi")]
fn unpack(tile: &Tile) -> [__m512i; 2] {
    let v = load(tile);
    let [low, high] = [0, 1].map(|half| load(&TRIT_CODES.as_chunks().0[half]));
    let once = _mm512_sub_epi8(v, _mm512_set1_epi8(81));
    let twice = _mm512_sub_epi8(v, _mm512_set1_epi8(162_u8 as i8));
    let r = _mm512_min_epu8(_mm512_min_epu8(v, once), twice);
    [_mm512_permutex2var_epi8(low, r, high), _mm512_sub_epi8(v, r)]
}

/// One token: the codes are used where they stand, as 1, 4, 16, 64 and 81 times their value, each in sums of its own,
/// which saves the shifts. The largest, of lane 3, stays below 2³¹ ([`TileFormat::max_cols`]); that of lane 4 may wrap
/// around, as its 81st part is taken modulo 2³².
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx512vbmi")]
fn single(tiles: &[Tile], x: &[i8], acc: &mut [i32; ROWS]) {
    let masks = [3, 3 << 2, 3 << 4, 3 << 6].map(|mask: u8| _mm512_set1_epi8(mask as i8));
    let mut sums = [_mm512_setzero_si512(); 5];
    for (tile, x) in tiles.iter().zip(x.as_chunks::<COLS>().0) {
        fetch_next(tile);
        let [codes, fifth] = unpack(tile);
        let lanes = [
            _mm512_and_si512(codes, masks[0]),
            _mm512_and_si512(codes, masks[1]),
            _mm512_and_si512(codes, masks[2]),
            _mm512_and_si512(codes, masks[3]),
            fifth,
        ];
        for (lane, (sum, codes)) in sums.iter_mut().zip(lanes).enumerate() {
            // SAFETY: lane < 5, so these four values end within the twenty of x.
            let x = unsafe { broadcast(x.as_ptr().add(4 * lane)) };
            *sum = _mm512_dpbusd_epi32(*sum, codes, x);
        }
    }
    let lanes = [
        sums[0],
        _mm512_srai_epi32::<2>(sums[1]),
        _mm512_srai_epi32::<4>(sums[2]),
        _mm512_srai_epi32::<6>(sums[3]),
        _mm512_mullo_epi32(sums[4], _mm512_set1_epi32(INVERSE_81)),
    ];
    add(acc, lanes);
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx512vbmi")]
fn block<const N: usize, const CHAINS: usize>(tiles: &[Tile], x: &[i8], acc: &mut [[i32; ROWS]]) {
    // SAFETY: this function has the features.
    unsafe { multiply::<N, CHAINS, 5>(tiles, x, acc, |tile| unpack_lanes(tile)) }
}

/// The codes of a tile, a register for each lane.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx512vbmi")]
fn unpack_lanes(tile: &Tile) -> [__m512i; 5] {
    let [codes, fifth] = unpack(tile);
    let [a, b, c, d] = lanes(codes);
    let fifth = _mm512_srli_epi32::<6>(fifth); // 81 = 0b01…, 162 = 0b10…
    [a, b, c, d, _mm512_and_si512(fifth, _mm512_set1_epi8(3))]
}
