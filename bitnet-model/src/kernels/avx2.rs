//! AVX2 with FMA and F16C: `vpmaddubsw` multiplies unsigned codes by signed activations and adds neighbours, in 16 bits.

use std::arch::x86_64::*;

use super::{
    Kernel, ROWS, Tile, TileFormat, head,
    instructions::requirements,
    peak, prefetch,
    simd::{LANES, Simd, routines},
};

pub(super) static KERNEL: Kernel = Kernel {
    name: "avx2",
    requires: requirements!["avx2", "fma", "f16c"],
    accumulate,
    accumulate_trits,
    routines: routines!(Avx2(()), 2 x 3, 6 x 1, 4 x 1, #[target_feature(enable = "avx2,fma,f16c")]),
    head: head::avx2::ROUTINES,
    peak: peak::AVX2,
};

/// Inputs of a tile of 2-bit codes.
const COLS: usize = TileFormat::TwoBit.cols();

/// Tokens that share a decoded tile: their sums, two registers a token, leave room for codes and activations.
const BLOCK: usize = 4;

/// From more tokens than that on, codes are unpacked into memory for all of them.
const FEW: usize = 8;

/// Tiles whose products fit the 16-bit sums: a tile adds four of at most `2 · 2 · 128`, and `15 · 4 · 512 < 2¹⁵`.
const RUN: usize = 15;

/// As [`RUN`], where half of the products are taken four times: `7 · 2 · 4 · 512 < 2¹⁵`.
const SINGLE_RUN: usize = 7;

#[target_feature(enable = "avx2,fma")]
fn accumulate(tiles: &[Tile], x: &[i8], acc: &mut [[i32; ROWS]]) {
    if acc.len() > FEW {
        return in_runs::<4>(tiles, x, acc, |half| unpack_codes(half));
    }
    let cols = tiles.len() * COLS;
    let (blocks, rest) = acc.as_chunks_mut::<BLOCK>();
    let (x, x_rest) = x.split_at(blocks.len() * BLOCK * cols);
    for (i, acc) in blocks.iter_mut().enumerate() {
        block::<BLOCK>(tiles, &x[i * BLOCK * cols..][..BLOCK * cols], acc);
    }
    match rest {
        [] => {}
        [acc] => single(tiles, x_rest, acc),
        [_, _] => block::<2>(tiles, x_rest, rest),
        _ => block::<3>(tiles, x_rest, rest),
    }
}

/// `N` tokens: their sums stay in registers for a run of tiles, and a tile is decoded once for all of them.
#[target_feature(enable = "avx2,fma")]
fn block<const N: usize>(tiles: &[Tile], x: &[i8], acc: &mut [[i32; ROWS]]) {
    let cols = tiles.len() * COLS;
    assert_eq!((x.len(), acc.len()), (N * cols, N));
    let low2 = _mm256_set1_epi8(3);
    for (run, tiles) in tiles.chunks(RUN).enumerate() {
        let mut sums = [[_mm256_setzero_si256(); 2]; N];
        for (i, tile) in tiles.iter().enumerate() {
            fetch_ahead(tile);
            let [mut low, mut high] = halves(tile);
            for lane in 0..4 {
                let codes = [_mm256_and_si256(low, low2), _mm256_and_si256(high, low2)];
                (low, high) = (_mm256_srli_epi16::<2>(low), _mm256_srli_epi16::<2>(high));
                for (token, sums) in sums.iter_mut().enumerate() {
                    let start = token * cols + (run * RUN + i) * COLS + 4 * lane;
                    // SAFETY: token < N and the tile is one of `cols / COLS`, so these four values end within x.
                    let x = unsafe { broadcast(x.as_ptr().add(start)) };
                    for (sum, codes) in sums.iter_mut().zip(codes) {
                        *sum = _mm256_add_epi16(*sum, _mm256_maddubs_epi16(codes, x));
                    }
                }
            }
        }
        acc.iter_mut().zip(sums).for_each(|(acc, sums)| add_pairs(acc, sums));
    }
}

/// One token. Half of the codes are used where they stand, as four times their value, in sums of their own: a shift
/// for every two lanes.
#[target_feature(enable = "avx2,fma")]
fn single(tiles: &[Tile], x: &[i8], acc: &mut [i32; ROWS]) {
    let (once, four_times) = (_mm256_set1_epi8(3), _mm256_set1_epi8(3 << 2));
    let runs = tiles.chunks(SINGLE_RUN).zip(x.as_chunks::<COLS>().0.chunks(SINGLE_RUN));
    for (tiles, x) in runs {
        let mut sums = [[_mm256_setzero_si256(); 2]; 2]; // of each half: once, four times
        for (tile, x) in tiles.iter().zip(x) {
            fetch_ahead(tile);
            for (sums, codes) in sums.iter_mut().zip(halves(tile)) {
                for (lanes, codes) in [codes, _mm256_srli_epi16::<4>(codes)].into_iter().enumerate()
                {
                    // SAFETY: lanes < 2, so the eight values end within the sixteen of x.
                    let (x0, x1) = unsafe {
                        let x = x.as_ptr().add(8 * lanes);
                        (broadcast(x), broadcast(x.add(4)))
                    };
                    let products = _mm256_maddubs_epi16(_mm256_and_si256(codes, once), x0);
                    sums[0] = _mm256_add_epi16(sums[0], products);
                    let products = _mm256_maddubs_epi16(_mm256_and_si256(codes, four_times), x1);
                    sums[1] = _mm256_add_epi16(sums[1], products);
                }
            }
        }
        let [low, high] = sums;
        let total = [
            _mm256_add_epi16(low[0], _mm256_srai_epi16::<2>(low[1])),
            _mm256_add_epi16(high[0], _mm256_srai_epi16::<2>(high[1])),
        ];
        add_pairs(acc, total);
    }
}

/// As [`RUN`], for five codes a byte: `12 · 5 · 512 < 2¹⁵`.
const TRIT_RUN: usize = 12;

#[target_feature(enable = "avx2,fma")]
pub(super) fn accumulate_trits(tiles: &[Tile], x: &[i8], acc: &mut [[i32; ROWS]]) {
    if acc.len() > FEW {
        return in_runs::<5>(tiles, x, acc, |half| unpack_trits(half));
    }
    let cols = tiles.len() * TileFormat::Trits.cols();
    for (i, acc) in acc.chunks_mut(BLOCK).enumerate() {
        let x = &x[i * BLOCK * cols..][..acc.len() * cols];
        match acc.len() {
            1 => trit_block::<1>(tiles, x, acc),
            2 => trit_block::<2>(tiles, x, acc),
            3 => trit_block::<3>(tiles, x, acc),
            _ => trit_block::<BLOCK>(tiles, x, acc),
        }
    }
}

/// As [`block`], for five codes a byte. One loop for both formats made the 2-bit products a tenth slower.
#[target_feature(enable = "avx2,fma")]
fn trit_block<const N: usize>(tiles: &[Tile], x: &[i8], acc: &mut [[i32; ROWS]]) {
    const COLS: usize = TileFormat::Trits.cols();
    let cols = tiles.len() * COLS;
    assert_eq!((x.len(), acc.len()), (N * cols, N));
    for (run, tiles) in tiles.chunks(TRIT_RUN).enumerate() {
        let mut sums = [[_mm256_setzero_si256(); 2]; N];
        for (i, tile) in tiles.iter().enumerate() {
            fetch_ahead(tile);
            let [low, high] = halves(tile);
            let (low, high) = (unpack_trits(low), unpack_trits(high));
            for (lane, (low, high)) in low.into_iter().zip(high).enumerate() {
                for (token, sums) in sums.iter_mut().enumerate() {
                    let start = token * cols + (run * TRIT_RUN + i) * COLS + 4 * lane;
                    // SAFETY: token < N and the tile is one of `cols / COLS`, so these four values end within x.
                    let x = unsafe { broadcast(x.as_ptr().add(start)) };
                    for (sum, codes) in sums.iter_mut().zip([low, high]) {
                        *sum = _mm256_add_epi16(*sum, _mm256_maddubs_epi16(codes, x));
                    }
                }
            }
        }
        acc.iter_mut().zip(sums).for_each(|(acc, sums)| add_pairs(acc, sums));
    }
}

/// Four inputs each, whose products fit 16-bit sums: `60 · 512 < 2¹⁵`.
const QUADS: usize = RUN * 4;

/// Codes of a run of tiles, a byte each: of four inputs rows 0 to 7, then 8 to 15.
type Codes = [[__m256i; 2]; QUADS];

/// Many tokens: the codes of a run of tiles, of `LANES` times four inputs each, are unpacked once for all of them and stay
/// in the first-level cache. What remains for a block of tokens is to load and multiply.
#[target_feature(enable = "avx2,fma")]
fn in_runs<const LANES: usize>(
    tiles: &[Tile],
    x: &[i8],
    acc: &mut [[i32; ROWS]],
    unpack: impl Fn(__m256i) -> [__m256i; LANES],
) {
    /// Tokens of a block: their sums, two registers a token, leave room for the codes of four inputs.
    const MOST: usize = 6;
    let cols = tiles.len() * LANES * 4;
    assert_eq!(x.len(), acc.len() * cols);
    let block = acc.len().div_ceil(acc.len().div_ceil(MOST));
    let mut codes: Codes = [[_mm256_setzero_si256(); 2]; QUADS];
    for (run, tiles) in tiles.chunks(QUADS / LANES).enumerate() {
        for (tile, codes) in tiles.iter().zip(codes.as_chunks_mut::<LANES>().0) {
            fetch_ahead(tile);
            let [low, high] = halves(tile).map(&unpack);
            codes.iter_mut().zip(low.into_iter().zip(high)).for_each(|(codes, (low, high))| {
                *codes = [low, high];
            });
        }
        let codes = &codes[..tiles.len() * LANES];
        for (x, acc) in x.chunks(block * cols).zip(acc.chunks_mut(block)) {
            let x = &x[run * QUADS * 4..];
            match acc.len() {
                1 => run_block::<1>(codes, x, cols, acc),
                2 => run_block::<2>(codes, x, cols, acc),
                3 => run_block::<3>(codes, x, cols, acc),
                4 => run_block::<4>(codes, x, cols, acc),
                5 => run_block::<5>(codes, x, cols, acc),
                _ => run_block::<MOST>(codes, x, cols, acc),
            }
        }
    }
}

/// `N` tokens, `cols` values of `x` apart, and the unpacked codes of a run.
#[target_feature(enable = "avx2,fma")]
fn run_block<const N: usize>(
    codes: &[[__m256i; 2]],
    x: &[i8],
    cols: usize,
    acc: &mut [[i32; ROWS]],
) {
    assert!(acc.len() == N && (N - 1) * cols + 4 * codes.len() <= x.len());
    let mut sums = [[_mm256_setzero_si256(); 2]; N];
    for (quad, [low, high]) in codes.iter().enumerate() {
        for (token, [low_sum, high_sum]) in sums.iter_mut().enumerate() {
            // SAFETY: token < N and quad < codes.len(), so these four values end within x.
            let x = unsafe { broadcast(x.as_ptr().add(token * cols + 4 * quad)) };
            *low_sum = _mm256_add_epi16(*low_sum, _mm256_maddubs_epi16(*low, x));
            *high_sum = _mm256_add_epi16(*high_sum, _mm256_maddubs_epi16(*high, x));
        }
    }
    acc.iter_mut().zip(sums).for_each(|(acc, sums)| add_pairs(acc, sums));
}

/// The four codes of each byte of two bits each.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn unpack_codes(v: __m256i) -> [__m256i; 4] {
    let low2 = _mm256_set1_epi8(3);
    [
        _mm256_and_si256(v, low2),
        _mm256_and_si256(_mm256_srli_epi16::<2>(v), low2),
        _mm256_and_si256(_mm256_srli_epi16::<4>(v), low2),
        _mm256_and_si256(_mm256_srli_epi16::<6>(v), low2),
    ]
}

/// The five codes of each byte `v = d₀ + 3d₁ + 9d₂ + 27d₃ + 81d₄`.
///
/// `v mod 81` is the least of v, v − 81 and v − 162 as unsigned bytes, of which those below zero wrap around to more than v;
/// bits 6 and 7 of the rest, 0, 81 or 162, are d₄. Then `a = ⌊r / 9⌋ = ⌊57r / 512⌋`, exact for r ≤ 80, and `r − 9a` are each
/// below nine, and a shuffle looks up their two codes.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn unpack_trits(v: __m256i) -> [__m256i; 5] {
    let low2 = _mm256_set1_epi8(3);
    let once = _mm256_sub_epi8(v, _mm256_set1_epi8(81));
    let twice = _mm256_sub_epi8(v, _mm256_set1_epi8(162_u8 as i8));
    let r = _mm256_min_epu8(_mm256_min_epu8(v, once), twice);
    let d4 = _mm256_and_si256(_mm256_srli_epi16::<6>(_mm256_sub_epi8(v, r)), low2);
    let by57 = |x| _mm256_mullo_epi16(x, _mm256_set1_epi16(57));
    let even = _mm256_srli_epi16::<9>(by57(_mm256_and_si256(r, _mm256_set1_epi16(0xff))));
    let odd = _mm256_srli_epi16::<1>(by57(_mm256_srli_epi16::<8>(r)));
    let a = _mm256_or_si256(even, _mm256_and_si256(odd, _mm256_set1_epi16(0xff00_u16 as i16)));
    let nine_a = _mm256_add_epi8(a, _mm256_slli_epi16::<3>(a)); // 8a ≤ 64 stays within its byte
    let b = _mm256_sub_epi8(r, nine_a);
    // n mod 3 and ⌊n / 3⌋ in bits 0..2 and 2..4.
    let pairs = _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 0, 0, 0, 0, 0, 0, 0);
    let pairs = _mm256_broadcastsi128_si256(pairs);
    let (d01, d23) = (_mm256_shuffle_epi8(pairs, b), _mm256_shuffle_epi8(pairs, a));
    let second = |pairs| _mm256_and_si256(_mm256_srli_epi16::<2>(pairs), low2);
    [_mm256_and_si256(d01, low2), second(d01), _mm256_and_si256(d23, low2), second(d23), d4]
}

/// Asks for a later tile, to lie in the second-level cache by then: while products fill the queue of instructions, the
/// processor's own prefetching falls behind.
#[inline(always)]
pub(super) fn fetch_ahead(tile: &Tile) {
    /// Tiles: 12 KiB.
    const AHEAD: usize = 192;
    prefetch(std::ptr::from_ref(tile).wrapping_add(AHEAD));
}

/// Rows 0 to 7 and 8 to 15 of a tile.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn halves(tile: &Tile) -> [__m256i; 2] {
    let tile: *const __m256i = tile.as_ptr().cast();
    // SAFETY: a `Tile` is 64 bytes, two registers.
    unsafe { [_mm256_loadu_si256(tile), _mm256_loadu_si256(tile.add(1))] }
}

/// The four values at `x` in every 32-bit lane.
///
/// # Safety
/// `x` is valid for reads of four bytes.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) unsafe fn broadcast(x: *const i8) -> __m256i {
    // SAFETY: upheld by the caller.
    _mm256_set1_epi32(unsafe { x.cast::<i32>().read_unaligned() })
}

/// Adds to each row its two neighbouring 16-bit sums.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn add_pairs(acc: &mut [i32; ROWS], [low, high]: [__m256i; 2]) {
    let ones = _mm256_set1_epi16(1);
    add(acc, [_mm256_madd_epi16(low, ones), _mm256_madd_epi16(high, ones)]);
}

/// Adds to each row its sum.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn add(acc: &mut [i32; ROWS], sums: [__m256i; 2]) {
    for (acc, sum) in acc.as_chunks_mut::<8>().0.iter_mut().zip(sums) {
        let acc = acc.as_mut_ptr().cast();
        // SAFETY: eight i32 are one register.
        unsafe { _mm256_storeu_si256(acc, _mm256_add_epi32(_mm256_loadu_si256(acc), sum)) };
    }
}

/// Proof of AVX2, FMA and F16C: made only in functions that have these features.
#[derive(Clone, Copy)]
pub(super) struct Avx2(pub(super) ());

impl Simd for Avx2 {
    /// Lanes 0 to 7 and 8 to 15.
    type F32 = [__m256; 2];

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F32 {
        // SAFETY: `self` proves AVX2.
        unsafe { [_mm256_set1_ps(x); 2] }
    }

    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::F32 {
        // SAFETY: `self` proves AVX2; x is two registers long.
        unsafe { [_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(x.as_ptr().add(8))] }
    }

    #[inline(always)]
    fn load_bf16(self, x: &[u16; LANES]) -> Self::F32 {
        // SAFETY: `self` proves AVX2; x is twice 128 bits.
        unsafe {
            let x: *const __m128i = x.as_ptr().cast();
            [widen(_mm_loadu_si128(x)), widen(_mm_loadu_si128(x.add(1)))]
        }
    }

    #[inline(always)]
    fn load_f16(self, x: &[u16; LANES]) -> Self::F32 {
        // SAFETY: `self` proves F16C; x is twice 128 bits.
        unsafe {
            let x: *const __m128i = x.as_ptr().cast();
            [_mm256_cvtph_ps(_mm_loadu_si128(x)), _mm256_cvtph_ps(_mm_loadu_si128(x.add(1)))]
        }
    }

    #[inline(always)]
    fn load_i8(self, x: &[i8; LANES]) -> Self::F32 {
        // SAFETY: `self` proves AVX2; x is 128 bits.
        unsafe {
            let x = _mm_loadu_si128(x.as_ptr().cast());
            let high = _mm_unpackhi_epi64(x, x);
            [
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x)),
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(high)),
            ]
        }
    }

    #[inline(always)]
    fn store(self, x: Self::F32, out: &mut [f32; LANES]) {
        // SAFETY: `self` proves AVX2; out is two registers long.
        unsafe {
            _mm256_storeu_ps(out.as_mut_ptr(), x[0]);
            _mm256_storeu_ps(out.as_mut_ptr().add(8), x[1]);
        }
    }

    #[inline(always)]
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: `self` proves AVX2.
        unsafe { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: `self` proves AVX2.
        unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn mul_add(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        // SAFETY: `self` proves FMA.
        unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
    }

    #[inline(always)]
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: `self` proves AVX2.
        unsafe { [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn min(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: `self` proves AVX2.
        unsafe { [_mm256_min_ps(a[0], b[0]), _mm256_min_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn round(self, a: Self::F32) -> Self::F32 {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        // SAFETY: `self` proves AVX2.
        unsafe { [_mm256_round_ps::<NEAREST>(a[0]), _mm256_round_ps::<NEAREST>(a[1])] }
    }

    #[inline(always)]
    fn scale(self, a: Self::F32, n: Self::F32) -> Self::F32 {
        // SAFETY: `self` proves AVX2.
        unsafe { [scale8(a[0], n[0]), scale8(a[1], n[1])] }
    }

    #[inline(always)]
    fn sum4(self, [a, b, c, d]: [Self::F32; 4]) -> [f32; 4] {
        // SAFETY: `self` proves AVX2.
        unsafe {
            sum4([
                _mm256_add_ps(a[0], a[1]),
                _mm256_add_ps(b[0], b[1]),
                _mm256_add_ps(c[0], c[1]),
                _mm256_add_ps(d[0], d[1]),
            ])
        }
    }
}

/// Eight bfloat16 to f32.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn widen(x: __m128i) -> __m256 {
    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(x)))
}

/// [`Simd::scale`] of eight lanes by two factors, each a normal number; the first product is exact.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn scale8(a: __m256, n: __m256) -> __m256 {
    let n = _mm256_cvtps_epi32(n);
    let half = _mm256_srai_epi32::<1>(n);
    let a = _mm256_mul_ps(a, power_of_two(half));
    _mm256_mul_ps(a, power_of_two(_mm256_sub_epi32(n, half)))
}

/// 2ⁿ for −126 ≤ n ≤ 127: the exponent field alone.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn power_of_two(n: __m256i) -> __m256 {
    _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(n, _mm256_set1_epi32(127))))
}

/// The steps of [`Simd::sum4`] after `l + 8`, for four vectors at once.
#[inline]
#[target_feature(enable = "avx2,fma")]
pub(super) fn sum4([a, b, c, d]: [__m256; 4]) -> [f32; 4] {
    // l + 4: [a | b] and [c | d], four partial sums in each 128-bit half.
    let (ab, cd) = (add_halves(a, b), add_halves(c, d));
    // l + 2: [a a c c | b b d d]; l + 1: the even ones.
    let pairs = _mm256_add_ps(
        _mm256_shuffle_ps::<0b01_00_01_00>(ab, cd),
        _mm256_shuffle_ps::<0b11_10_11_10>(ab, cd),
    );
    let sums = _mm256_add_ps(pairs, _mm256_movehdup_ps(pairs));
    let (ac, bd) = (_mm256_castps256_ps128(sums), _mm256_extractf128_ps::<1>(sums));
    // [a c b d] to [a b c d].
    let sums = _mm_shuffle_ps::<0b10_00_10_00>(ac, bd);
    let sums = _mm_shuffle_ps::<0b11_01_10_00>(sums, sums);
    let mut out = [0.; 4];
    // SAFETY: four f32 are one register.
    unsafe { _mm_storeu_ps(out.as_mut_ptr(), sums) };
    out
}

/// The 128-bit halves of each vector added: `[a | b]`.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn add_halves(a: __m256, b: __m256) -> __m256 {
    _mm256_add_ps(_mm256_permute2f128_ps::<0x20>(a, b), _mm256_permute2f128_ps::<0x31>(a, b))
}
