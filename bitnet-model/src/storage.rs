//! The elements behind a Candle tensor on the CPU.

use std::borrow::Cow;

use candle_core::{CpuStorage, Layout, Result, Storage, Tensor, WithDType};

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
