//! The most products a kernel's multiply instruction can make, with all operands in registers: the bound of everything
//! that is limited by arithmetic.

#[cfg(target_arch = "aarch64")]
use std::arch::aarch64::*;
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;
use std::hint::black_box;

use super::Kernel;
#[cfg(target_arch = "aarch64")]
use super::neondot::dot;

/// A loop of nothing but multiply instructions.
#[derive(Clone, Copy)]
pub(super) struct Peak {
    /// Runs that many rounds.
    pub run: unsafe fn(rounds: usize),
    /// Products of int8 activations and codes in a round.
    pub products: usize,
}

/// Instructions under way at once: two units of a latency of up to six cycles.
const CHAINS: usize = 12;

impl Kernel {
    /// Runs `rounds` rounds of the multiply instruction on registers and returns how many products of an activation and
    /// a code these were. Timing it gives the kernel's peak rate on one thread.
    pub fn multiply_in_registers(&self, rounds: usize) -> usize {
        // SAFETY: `self` came from `available`, which checked the processor.
        unsafe { (self.peak.run)(rounds) };
        rounds * self.peak.products
    }
}

/// `multiply` again and again, on as many sums as are under way at once.
#[inline(always)]
fn repeat<T: Copy>(rounds: usize, start: T, multiply: impl Fn(T) -> T) {
    let mut sums = [start; CHAINS];
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = multiply(*sum);
        }
    }
    black_box(sums);
}

/// `vpdpbusd` on 512 bits.
#[cfg(target_arch = "x86_64")]
pub(super) const AVX512VNNI: Peak = Peak { run: avx512vnni, products: CHAINS * 64 };

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vnni")]
fn avx512vnni(rounds: usize) {
    let (codes, x) = (_mm512_set1_epi8(black_box(2)), _mm512_set1_epi8(black_box(-3)));
    repeat(rounds, _mm512_setzero_si512(), |sum| _mm512_dpbusd_epi32(sum, codes, x));
}

/// `vpdpbusd` on 256 bits.
#[cfg(target_arch = "x86_64")]
pub(super) const AVXVNNI: Peak = Peak { run: avxvnni, products: CHAINS * 32 };

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,avxvnni")]
fn avxvnni(rounds: usize) {
    let (codes, x) = (_mm256_set1_epi8(black_box(2)), _mm256_set1_epi8(black_box(-3)));
    repeat(rounds, _mm256_setzero_si256(), |sum| _mm256_dpbusd_avx_epi32(sum, codes, x));
}

/// `vpmaddubsw` on 256 bits. Its products are the codes of the next one, as it has no sum to add to.
#[cfg(target_arch = "x86_64")]
pub(super) const AVX2: Peak = Peak { run: avx2, products: CHAINS * 32 };

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn avx2(rounds: usize) {
    let x = _mm256_set1_epi8(black_box(-3));
    repeat(rounds, _mm256_set1_epi8(black_box(2)), |codes| _mm256_maddubs_epi16(codes, x));
}

/// `sdot` on 128 bits.
#[cfg(target_arch = "aarch64")]
pub(super) const NEONDOT: Peak = Peak { run: neondot, products: CHAINS * 16 };

#[cfg(target_arch = "aarch64")]
#[target_feature(enable = "dotprod")]
fn neondot(rounds: usize) {
    let (codes, x) = (vdupq_n_s8(black_box(2)), vdupq_n_s8(black_box(-3)));
    repeat(rounds, vdupq_n_s32(0), |sum| dot::<0>(sum, codes, x));
}

/// 16-bit products and sums, vectorized for what every processor of the architecture has.
pub(super) const SCALAR: Peak = Peak { run: scalar, products: CHAINS * 8 };

fn scalar(rounds: usize) {
    let x = black_box([-3i16; 8]);
    repeat(rounds, black_box([1i16; 8]), |sum| {
        std::array::from_fn(|i| sum[i].wrapping_mul(x[i]).wrapping_add(x[i]))
    });
}
