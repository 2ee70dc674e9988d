//! The elements behind a Candle tensor on the CPU.

use std::borrow::Cow;

use candle_core::{CpuStorage, Layout, Result, Shape, Storage, Tensor, WithDType};

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

/// Rows of the last dimension, all other dimensions taken together: the result of a fused projection is a view whose rows
/// begin further apart than they are long.
pub struct Rows<'a, T: Clone> {
    data: Cow<'a, [T]>,
    width: usize,
    stride: usize,
}

impl<'a, T: WithDType> Rows<'a, T> {
    /// Borrows the rows when they are dense and evenly spaced, gathers them otherwise.
    pub fn new(storage: &'a CpuStorage, layout: &Layout) -> Result<Self> {
        let width = layout.dims().last().copied().unwrap_or(1);
        let Some(stride) = row_stride(layout) else {
            return Ok(Self { data: contiguous(storage, layout)?, width, stride: width });
        };
        let data = Cow::Borrowed(&storage.as_slice::<T>()?[layout.start_offset()..]);
        Ok(Self { data, width, stride })
    }

    /// Elements of a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Row `index`.
    pub fn row(&self, index: usize) -> &[T] {
        &self.data[index * self.stride..][..self.width]
    }
}

/// The shape of what rows of `from` values become if each is turned into one of `to`; `None` if rows have another length.
pub fn with_width(layout: &Layout, from: usize, to: usize) -> Option<Shape> {
    let (&width, outer) = layout.dims().split_last()?;
    (width == from).then(|| Shape::from([outer, &[to]].concat()))
}

/// Elements between the beginnings of rows, if rows are dense and evenly spaced and do not overlap.
pub fn row_stride(layout: &Layout) -> Option<usize> {
    let (&width, outer) = layout.dims().split_last()?;
    let (&1, strides) = layout.stride().split_last()? else { return None };
    // Dimensions of size 1 have no say; of the others, each must step over all of the next.
    let mut steps = outer.iter().zip(strides).rev().filter(|(dim, _)| **dim != 1);
    let stride = steps.clone().next().map_or(width, |(_, stride)| *stride);
    let mut next = stride;
    let even = steps.all(|(dim, stride)| std::mem::replace(&mut next, stride * dim) == *stride);
    (even && stride >= width).then_some(stride)
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

/// Calls `f` on a tensor's elements in row-major order; of a tensor on another device, on a copy of them.
pub fn with_slice<T: WithDType, R>(
    tensor: &Tensor,
    f: impl FnOnce(&[T]) -> Result<R>,
) -> Result<R> {
    if !tensor.device().is_cpu() {
        return f(&tensor.flatten_all()?.to_vec1::<T>()?);
    }
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => f(&contiguous(storage, layout)?),
        _ => candle_core::bail!("a tensor of the CPU is stored elsewhere"),
    }
}
