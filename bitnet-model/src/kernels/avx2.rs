//! AVX2 with FMA and F16C: `vpmaddubsw` multiplies unsigned codes by signed activations and adds neighbours, in 16 bits.

use std::arch::x86_64::*;

use super::{
    COLS, Kernel, ROWS, Tile,
    simd::{LANES, Simd, routines},
};

pub(super) static KERNEL: Kernel = Kernel {
    name: "avx2",
    is_available: || {
        is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
    },
    accumulate,
    routines: routines!(Avx2(()), 2 x 3, #[target_feature(enable = "avx2,fma,f16c")]),
};

#[target_feature(enable = "avx2,fma")]
fn accumulate(tiles: &[Tile], x: &[i8], acc: &mut [[i32; ROWS]]) {
    let cols = tiles.len() * COLS;
    let (blocks, rest) = acc.as_chunks_mut::<4>();
    let (x, x_rest) = x.split_at(blocks.len() * 4 * cols);
    for (i, acc) in blocks.iter_mut().enumerate() {
        block(tiles, &x[i * 4 * cols..][..4 * cols], acc);
    }
    for (i, acc) in rest.iter_mut().enumerate() {
        block(tiles, &x_rest[i * cols..][..cols], std::array::from_mut(acc));
    }
}

/// `N` tokens: their sums stay in registers, and a tile is decoded once for all of them.
#[target_feature(enable = "avx2,fma")]
fn block<const N: usize>(tiles: &[Tile], x: &[i8], acc: &mut [[i32; ROWS]; N]) {
    let cols = tiles.len() * COLS;
    assert_eq!(x.len(), N * cols);
    let low2 = _mm256_set1_epi8(3);
    let ones = _mm256_set1_epi16(1);
    let mut sums = [[_mm256_setzero_si256(); 2]; N];
    for (i, tile) in tiles.iter().enumerate() {
        for half in 0..2 {
            // SAFETY: a `Tile` is 64 bytes: rows 0 to 7 in the first half, 8 to 15 in the second.
            let codes = unsafe { _mm256_loadu_si256(tile.as_ptr().add(32 * half).cast()) };
            let lanes = [
                _mm256_and_si256(codes, low2),
                _mm256_and_si256(_mm256_srli_epi16::<2>(codes), low2),
                _mm256_and_si256(_mm256_srli_epi16::<4>(codes), low2),
                _mm256_and_si256(_mm256_srli_epi16::<6>(codes), low2),
            ];
            for (token, sums) in sums.iter_mut().enumerate() {
                // SAFETY: token < N and i < tiles.len(), so these sixteen values end within the N · cols of x.
                let x = unsafe { _mm_loadu_si128(x.as_ptr().add(token * cols + i * COLS).cast()) };
                let x = _mm256_broadcastsi128_si256(x);
                // |2 · 128 + 2 · 128| = 512 in each product, 2048 in their sum: far from 2¹⁵.
                let products = [
                    _mm256_maddubs_epi16(lanes[0], _mm256_shuffle_epi32::<0x00>(x)),
                    _mm256_maddubs_epi16(lanes[1], _mm256_shuffle_epi32::<0x55>(x)),
                    _mm256_maddubs_epi16(lanes[2], _mm256_shuffle_epi32::<0xaa>(x)),
                    _mm256_maddubs_epi16(lanes[3], _mm256_shuffle_epi32::<0xff>(x)),
                ];
                let products = _mm256_add_epi16(
                    _mm256_add_epi16(products[0], products[1]),
                    _mm256_add_epi16(products[2], products[3]),
                );
                sums[half] = _mm256_add_epi32(sums[half], _mm256_madd_epi16(products, ones));
            }
        }
    }
    for (acc, sums) in acc.iter_mut().zip(sums) {
        for (acc, sum) in acc.as_chunks_mut::<8>().0.iter_mut().zip(sums) {
            let acc = acc.as_mut_ptr().cast();
            // SAFETY: eight i32 are one register.
            unsafe { _mm256_storeu_si256(acc, _mm256_add_epi32(_mm256_loadu_si256(acc), sum)) };
        }
    }
}

/// Proof of AVX2, FMA and F16C: made only in functions that have these features.
#[derive(Clone, Copy)]
struct Avx2(());

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
