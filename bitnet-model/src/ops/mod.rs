//! Candle custom ops: layouts, dtypes, threads and gradients around the [`kernels`](crate::kernels).
//!
//! Every op has a `bwd` or fails loudly; none loses a gradient in silence. Every row of a result
//! is computed in an order that depends on that row alone, so it has the same bits whatever its
//! neighbours in the batch are and however a prompt is cut.

use std::borrow::Cow;

use candle_core::{CpuStorage, Layout, Result, Storage, Tensor, WithDType};

use crate::kernels::{DenseWeights, Kernel, Matrix};

mod attention;
pub mod dense_matmul;
mod gated;
mod rms_norm;
mod rope;
pub mod ternary_matmul;

pub use attention::attention;
pub use dense_matmul::dense_matmul;
pub use gated::gated;
pub use rms_norm::rms_norm;
pub use rope::rope;
pub use ternary_matmul::ternary_matmul;

/// Elements below which starting threads costs more than it saves (a rayon task is some 5 µs).
pub(crate) const PARALLEL_ELEMENTS: usize = 1 << 14;

/// The elements in row-major order: borrowed when the layout allows it, gathered otherwise.
pub fn contiguous<'a, T: WithDType>(
    storage: &'a CpuStorage,
    layout: &Layout,
) -> Result<Cow<'a, [T]>> {
    let all = storage.as_slice::<T>()?;
    Ok(match layout.contiguous_offsets() {
        Some((start, end)) => Cow::Borrowed(&all[start..end]),
        None => Cow::Owned(gather(all, layout)),
    })
}

/// The elements of a strided layout in row-major order.
fn gather<T: Copy>(all: &[T], layout: &Layout) -> Vec<T> {
    let Some((&width, outer)) = layout.dims().split_last() else {
        return vec![all[layout.start_offset()]];
    };
    let mut rows = vec![layout.start_offset()];
    for (&dim, &stride) in outer.iter().zip(layout.stride()) {
        rows = rows.iter().flat_map(|row| (0..dim).map(move |i| row + i * stride)).collect();
    }
    let stride = layout.stride()[outer.len()];
    let mut elements = Vec::with_capacity(rows.len() * width);
    for row in rows {
        match stride {
            1 => elements.extend_from_slice(&all[row..row + width]),
            _ => elements.extend((0..width).map(|i| all[row + i * stride])),
        }
    }
    elements
}

/// Calls `f` on a CPU tensor's elements in row-major order.
pub fn with_slice<T: WithDType, R>(
    tensor: &Tensor,
    f: impl FnOnce(&[T]) -> Result<R>,
) -> Result<R> {
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => f(&contiguous(storage, layout)?),
        _ => candle_core::bail!("this operation runs on the CPU only"),
    }
}

/// Runs `task` on each `size`-element chunk of `out`, in parallel when `work` elements are worth it.
pub(crate) fn for_each_chunk(
    out: &mut [f32],
    size: usize,
    work: usize,
    task: impl Fn(usize, &mut [f32]) + Send + Sync,
) {
    use rayon::prelude::*;
    if out.is_empty() || size == 0 {
        return;
    }
    if work < PARALLEL_ELEMENTS {
        out.chunks_mut(size).enumerate().for_each(|(i, chunk)| task(i, chunk));
    } else {
        out.par_chunks_mut(size).enumerate().for_each(|(i, chunk)| task(i, chunk));
    }
}

/// `Σ x·y`, in the kernels' fixed order.
pub(crate) fn dot(kernel: &Kernel, x: &[f32], y: &[f32]) -> f32 {
    let mut out = [0f32];
    let y = DenseWeights::F32(Matrix::new(y, 1, y.len()));
    kernel.matmul_nt(Matrix::new(x, 1, x.len()), y, &mut out, 1);
    out[0]
}
