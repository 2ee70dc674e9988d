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

/// A vector of `len` elements whose `size`-element chunks `task` fills: in parallel when that is worth it.
pub(crate) fn new_chunks(
    len: usize,
    size: usize,
    task: impl Fn(usize, &mut [f32]) + Sync,
) -> Vec<f32> {
    let size = size.max(1);
    if len >= PARALLEL_ELEMENTS {
        return threads::new_chunks(len, size, task);
    }
    let mut out = vec![0.; len];
    out.chunks_mut(size).enumerate().for_each(|(i, chunk)| task(i, chunk));
    out
}

/// `Σ x·y`, in the kernels' fixed order.
pub(crate) fn dot(kernel: &Kernel, x: &[f32], y: &[f32]) -> f32 {
    let mut out = [0f32];
    let y = DenseWeights::F32(Matrix::new(y, 1, y.len()));
    kernel.matmul_nt(Matrix::new(x, 1, x.len()), y, &mut out, 1);
    out[0]
}
