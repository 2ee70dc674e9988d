//! Sixteen f32 lanes in an instruction set's own registers, and the shared routines compiled for each set.
//!
//! The routines of [`dense`](super::dense), [`exp`](super::exp) and [`quantize`](super::quantize) are written once,
//! over [`Simd`]. Every method is one correctly rounded operation on each lane, so a routine gives the same bits
//! on every instruction set. Code over [`Simd`] is `#[inline(always)]` and keeps vectors out of closures: a function
//! that is not inlined is compiled without the target features, and calls every intrinsic in it.

use super::{
    dense::{DenseWeights, Matrix},
    gemm::{PanelProduct, PanelWidths},
    head::{FinishQ8, QuantizedRow},
};

/// Lanes of a vector; partial sums of a reduction.
pub(super) const LANES: usize = 16;

/// An instruction set. A value of the implementing type proves that the processor has it.
pub(super) trait Simd: Copy {
    /// Sixteen lanes.
    type F32: Copy;

    /// `x` in every lane.
    fn splat(self, x: f32) -> Self::F32;
    /// Lane `l` is `x[l]`.
    fn load(self, x: &[f32; LANES]) -> Self::F32;
    /// Lane `l` is the bfloat16 with the bits `x[l]`.
    fn load_bf16(self, x: &[u16; LANES]) -> Self::F32;
    /// Lane `l` is the half-precision float with the bits `x[l]`.
    fn load_f16(self, x: &[u16; LANES]) -> Self::F32;
    /// Lane `l` is `x[l]`.
    fn load_i8(self, x: &[i8; LANES]) -> Self::F32;
    /// The inverse of `load`.
    fn store(self, x: Self::F32, out: &mut [f32; LANES]);
    /// `a + b`.
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a · b`.
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a · b + c`, rounded once.
    fn mul_add(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32;
    /// `if a > b { a } else { b }`: `b` where either is NaN.
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `if a < b { a } else { b }`: `b` where either is NaN.
    fn min(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// The nearest integer, half to even.
    fn round(self, a: Self::F32) -> Self::F32;
    /// `a · 2ⁿ`, rounded once, for integers `n` from −200 to 200 and `a` from ½ to 2. NaN if `a` is.
    fn scale(self, a: Self::F32, n: Self::F32) -> Self::F32;
    /// The sum of the lanes of each vector: lane `l` takes `l + 8`, then `l + 4`, `l + 2`, `l + 1`.
    fn sum4(self, a: [Self::F32; 4]) -> [f32; 4];
}

type QuantizeRow = unsafe fn(x: &[f32], half_up: bool, codes: &mut [i8]) -> (f32, i32);

/// The routines written over [`Simd`], compiled for one instruction set, which the caller must know to be present.
#[derive(Clone, Copy)]
pub(super) struct Routines {
    pub quantize_row: QuantizeRow,
    pub quantize_head_row: unsafe fn(&[f32], &mut [u8]) -> QuantizedRow,
    pub finish_q8: FinishQ8,
    pub matmul_nt: unsafe fn(Matrix<'_, f32>, DenseWeights<'_>, &mut [f32], usize),
    pub sum: unsafe fn(&[f32]) -> f32,
    pub sum_squares: unsafe fn(&[f32]) -> f32,
    pub max: unsafe fn(&[f32]) -> f32,
    pub panel_widths: PanelWidths,
    pub multiply_panels: unsafe fn(&[f32], &[f32], PanelProduct, &mut [f32]),
    pub weighted_sums: unsafe fn(Matrix<'_, f32>, DenseWeights<'_>, &mut [f32]),
    pub axpy: unsafe fn(f32, &[f32], &mut [f32]),
    pub exp: unsafe fn(&mut [f32]),
    pub softmax: unsafe fn(&mut [f32]),
}

/// [`Routines`] whose functions carry the given `#[target_feature]`. The instruction set's registers hold `$rows` ×
/// `$cols` accumulators of a matrix product, as many of a product of panels, and of weighted sums.
macro_rules! routines {
    ($simd:expr, $rows:literal x $cols:literal, $panel_rows:literal x $panel_cols:literal,
     $sum_rows:literal x $sum_cols:literal $(, #[$feature:meta])?) => {{
        use crate::kernels::{dense, exp, gemm, head, quantize};
        $(#[$feature])?
        fn quantize_row(x: &[f32], half_up: bool, codes: &mut [i8]) -> (f32, i32) {
            quantize::quantize_row(x, half_up, codes)
        }
        $(#[$feature])?
        fn quantize_head_row(w: &[f32], codes: &mut [u8]) -> head::QuantizedRow {
            head::quantize_head_row(w, codes)
        }
        $(#[$feature])?
        fn finish_q8(
            sums: &[head::PlaneSums],
            scales: &[f32; crate::kernels::ROWS],
            x: head::HeadActivations<'_>,
            out: &mut [[f32; crate::kernels::ROWS]],
        ) {
            head::finish_q8(sums, scales, x, out)
        }
        $(#[$feature])?
        fn matmul_nt(x: dense::Matrix<'_, f32>, w: dense::DenseWeights<'_>, y: &mut [f32], y_stride: usize) {
            dense::matmul_nt::<_, $rows, $cols>($simd, x, w, y, y_stride)
        }
        $(#[$feature])?
        fn sum(x: &[f32]) -> f32 {
            dense::sum($simd, x)
        }
        $(#[$feature])?
        fn sum_squares(x: &[f32]) -> f32 {
            dense::sum_squares($simd, x)
        }
        $(#[$feature])?
        fn max(x: &[f32]) -> f32 {
            dense::max($simd, x)
        }
        $(#[$feature])?
        fn multiply_panels(a: &[f32], b: &[f32], product: gemm::PanelProduct, out: &mut [f32]) {
            gemm::multiply::<_, $panel_rows, $panel_cols>($simd, a, b, product, out)
        }
        $(#[$feature])?
        fn weighted_sums(p: dense::Matrix<'_, f32>, v: dense::DenseWeights<'_>, out: &mut [f32]) {
            dense::weighted_sums::<_, $sum_rows, $sum_cols>($simd, p, v, out)
        }
        $(#[$feature])?
        fn axpy(a: f32, x: &[f32], y: &mut [f32]) {
            dense::axpy(a, x, y)
        }
        $(#[$feature])?
        fn exp(x: &mut [f32]) {
            exp::exp($simd, x)
        }
        $(#[$feature])?
        fn softmax(scores: &mut [f32]) {
            exp::softmax($simd, scores)
        }
        $crate::kernels::simd::Routines {
            quantize_row, quantize_head_row, finish_q8, matmul_nt, sum, sum_squares, max, multiply_panels, weighted_sums,
            axpy, exp, softmax, panel_widths: gemm::PanelWidths::new($panel_rows, $panel_cols, 1),
        }
    }};
}
pub(super) use routines;
