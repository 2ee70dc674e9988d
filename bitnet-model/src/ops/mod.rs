//! Candle custom ops: layouts, dtypes, threads and gradients around the [`kernels`](crate::kernels).
//!
//! Every op has a `bwd` or fails loudly; none loses a gradient in silence. Every row of a result
//! is computed in an order that depends on that row alone, so it has the same bits whatever its
//! neighbours in the batch are and however a prompt is cut.

use crate::{
    kernels::{DenseWeights, Kernel, Matrix},
    threads,
};

mod attention;
pub mod dense_matmul;
mod gated;
pub mod gemm;
mod rms_norm;
mod rope;
pub mod ternary_matmul;
#[cfg(test)]
mod tests;
mod vocabulary;

pub use attention::{KvType, attention, self_attention};
pub use dense_matmul::dense_matmul;
pub use gated::gated;
pub use rms_norm::rms_norm;
pub use rope::rope;
pub use ternary_matmul::{
    TernaryProduct, normed_ternary_matmul, ternary_matmul, ternary_matmul_part,
};
pub(crate) use vocabulary::quantized_head_product;
pub use vocabulary::{embed, head_product, table_product};

/// Elements below which another thread is not worth calling (a region of [`threads`] is about a microsecond).
pub(crate) const PARALLEL_ELEMENTS: usize = 1 << 14;

/// Runs `task` on each `size`-element chunk of `out`, in parallel when `work` elements are worth it.
pub(crate) fn for_each_chunk(
    out: &mut [f32],
    size: usize,
    work: usize,
    task: impl Fn(usize, &mut [f32]) + Sync,
) {
    if out.is_empty() || size == 0 {
        return;
    }
    if work < PARALLEL_ELEMENTS {
        out.chunks_mut(size).enumerate().for_each(|(i, chunk)| task(i, chunk));
    } else {
        threads::for_each_chunk(out, size, task);
    }
}

/// `Σ x·y`, in the kernels' fixed order.
pub(crate) fn dot(kernel: &Kernel, x: &[f32], y: &[f32]) -> f32 {
    let mut out = [0f32];
    let y = DenseWeights::F32(Matrix::new(y, 1, y.len()));
    kernel.matmul_nt(Matrix::new(x, 1, x.len()), y, &mut out, 1);
    out[0]
}
