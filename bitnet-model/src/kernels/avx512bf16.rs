//! AVX-512 BF16: `vdpbf16ps` adds two products of bfloat16 to a single-precision sum, twice the products of an ordinary
//! instruction. Denormals count as zero, and the rounding is the instruction's own: results are the same on every processor
//! that has it, and within a few roundings of the exact sum.

use std::{arch::x86_64::*, mem::transmute};

use super::{
    avx512vnni::Avx512,
    gemm::{self, LeftPanel, Order, PanelProduct, PanelWidths},
    simd::LANES,
};

/// Rows of a left panel, and vectors of columns of a right one: 24 sums.
const R: usize = 12;
const C: usize = 2;

pub(super) const WIDTHS: PanelWidths = PanelWidths::new(R, C, 2);

pub(super) fn is_available() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512bf16")
        && is_x86_feature_detected!("fma")
}

/// As [`gemm::multiply`], for pairs of bfloat16 of neighbouring depths, the lower depth in the lower half; `product.depth`
/// counts pairs.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")]
pub(super) fn multiply(a: &[u32], b: &[u32], product: PanelProduct, out: &mut [f32]) {
    const FULL: usize = WIDTHS.full;
    let PanelProduct { rows, cols, depth, .. } = product;
    let b = b.as_chunks::<LANES>().0.as_chunks::<C>().0;
    for (j, b) in b.chunks_exact(depth).take(cols.div_ceil(C * LANES)).enumerate() {
        for i in 0..rows.div_ceil(R) {
            let acc = match product.order {
                Order::Depths => sums(&a.as_chunks::<R>().0[i * depth..][..depth], b),
                Order::Rows => {
                    sums(&a.as_chunks::<FULL>().0.as_chunks::<R>().0[i], &b[..depth.min(FULL)])
                }
            };
            gemm::store(Avx512(()), &acc, product, (i * R, j * C * LANES), out);
        }
    }
}

/// The sums of a panel's rows and a panel's columns.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")]
fn sums<A: LeftPanel<u32> + ?Sized>(a: &A, b: &[[[u32; LANES]; C]]) -> [[__m512; C]; R] {
    let mut acc = [[_mm512_setzero_ps(); C]; R];
    for (depth, b) in b.iter().enumerate() {
        let mut lanes = [_mm512_setzero_si512(); C];
        for c in 0..C {
            // SAFETY: sixteen pairs are 64 bytes.
            lanes[c] = unsafe { _mm512_loadu_si512(b[c].as_ptr().cast()) };
        }
        for (r, acc) in acc.iter_mut().enumerate() {
            let x = _mm512_set1_epi32(a.value(depth, r).cast_signed());
            for c in 0..C {
                acc[c] = _mm512_dpbf16_ps(acc[c], pairs(x), pairs(lanes[c]));
            }
        }
    }
    acc
}

#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn pairs(x: __m512i) -> __m512bh {
    // SAFETY: both are 512 bits without an invalid value.
    unsafe { transmute::<__m512i, __m512bh>(x) }
}
