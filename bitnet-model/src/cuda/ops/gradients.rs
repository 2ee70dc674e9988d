//! The gradients of norm, gate, dense products and attention.

use std::ops::Deref;

use candle_core::{
    CudaDevice, CudaStorage, Layout, Result, Shape, Storage, Tensor, backend::BackendStorage, bail,
    cuda_backend::cudarc::driver::CudaSlice, op::BackpropOp,
};

use super::AttentionSizes;
use crate::{
    config::Activation,
    cuda::{
        device::{Gathered, Memory, launch, uninitialized},
        launch::{Address, Factor, GemmShape, Launch, Right, Rows},
    },
};

/// A tensor's elements on a device, for as long as they are read.
pub(super) struct Read<'a, S> {
    storage: S,
    pub layout: &'a Layout,
}

/// The elements of `tensor`.
pub(super) fn read(tensor: &Tensor) -> Read<'_, impl Deref<Target = Storage>> {
    let (storage, layout) = tensor.storage_and_layout();
    Read { storage, layout }
}

impl<S: Deref<Target = Storage>> Read<'_, S> {
    pub fn storage(&self) -> Result<&CudaStorage> {
        match &*self.storage {
            Storage::Cuda(storage) => Ok(storage),
            _ => bail!("a gradient on CUDA of a tensor that is elsewhere"),
        }
    }

    /// f32, dense.
    pub fn dense(&self) -> Result<Gathered<'_, f32>> {
        Gathered::contiguous(self.storage()?, self.layout)
    }
}

/// A gradient.
pub(super) fn tensor(y: CudaSlice<f32>, device: &CudaDevice, shape: &Shape) -> Tensor {
    of_storage(CudaStorage::wrap_cuda_slice(y, device.clone()), shape)
}

/// A tensor that records nothing.
pub(super) fn of_storage(storage: CudaStorage, shape: &Shape) -> Tensor {
    Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false)
}

/// Rows that lie one behind another.
pub(super) fn dense_rows(address: Address, rows: usize, width: usize) -> Rows {
    Rows { address, stride: width, rows, width }
}

/// Of a norm's input and of its weight, which is as long as a row.
pub fn rms_norm_gradients(
    x: &Tensor,
    weight: &Tensor,
    dy: &Tensor,
    eps: f32,
) -> Result<[Tensor; 2]> {
    let (width, count) = (weight.dims1()?, x.elem_count());
    let rows = count / width.max(1);
    let [x_read, w_read, dy_read] = [x, weight, dy].map(read);
    let device = x_read.storage()?.device();
    let stream = device.cuda_stream();
    let [x_dense, w_dense, dy_dense] = [x_read.dense()?, w_read.dense()?, dy_read.dense()?];
    let mut dx = uninitialized::<f32>(device, count)?;
    let mut inverses = uninitialized::<f32>(device, rows)?;
    let mut shares = uninitialized::<f32>(device, Launch::norm_shares(rows) * width)?;
    let mut dweight = uninitialized::<f32>(device, width)?;
    {
        let (x, w, dy) =
            (x_dense.memory(&stream)?, w_dense.memory(&stream)?, dy_dense.memory(&stream)?);
        let (dx, inverses) =
            (Memory::written(&mut dx, &stream), Memory::written(&mut inverses, &stream));
        let (shares, dweight) =
            (Memory::written(&mut shares, &stream), Memory::written(&mut dweight, &stream));
        let x = dense_rows(x.address, rows, width);
        let to = (dx.address, inverses.address);
        let all_shares = dense_rows(shares.address, Launch::norm_shares(rows), width);
        // SAFETY: all buffers have the sizes that `Launch` documents, and are held.
        unsafe {
            launch(device, &Launch::rms_norm_backward(x, (w.address, eps), dy.address, to))?;
            launch(
                device,
                &Launch::rms_norm_shares(x, dy.address, inverses.address, shares.address),
            )?;
            launch(device, &Launch::sum_rows(all_shares, dweight.address))?;
        }
    }
    Ok([tensor(dx, device, x.shape()), tensor(dweight, device, weight.shape())])
}

/// Of gate and up, of equal shapes.
pub fn gated_gradients(
    act: Activation,
    gate: &Tensor,
    up: &Tensor,
    dy: &Tensor,
) -> Result<[Tensor; 2]> {
    let count = gate.elem_count();
    let reads = [gate, up, dy].map(read);
    let device = reads[0].storage()?.device();
    let stream = device.cuda_stream();
    let dense = [reads[0].dense()?, reads[1].dense()?, reads[2].dense()?];
    let mut dgate = uninitialized::<f32>(device, count)?;
    let mut dup = uninitialized::<f32>(device, count)?;
    {
        let [gate, up, dy] =
            [dense[0].memory(&stream)?, dense[1].memory(&stream)?, dense[2].memory(&stream)?];
        let (dgate, dup) =
            (Memory::written(&mut dgate, &stream), Memory::written(&mut dup, &stream));
        let inputs = [gate.address, up.address, dy.address];
        let backward = Launch::gated_backward(act, inputs, count, [dgate.address, dup.address]);
        // SAFETY: the shapes are equal, and all buffers are held.
        unsafe { launch(device, &backward) }?;
    }
    Ok([tensor(dgate, device, gate.shape()), tensor(dup, device, up.shape())])
}

/// Of the input of a dense product: `dy` (tokens, n) times `weight` (n, k), both f32.
pub fn dense_input_gradient(dy: &Tensor, weight: &Tensor, shape: &Shape) -> Result<Tensor> {
    let (n, k) = weight.dims2()?;
    let tokens = dy.elem_count() / n.max(1);
    product((dy, weight), (tokens, k, n), |dy, weight| {
        (Factor::depth_inner(n, dy), Factor::index_inner(k, weight))
    })?
    .reshape(shape)
}

/// Of the weight of a dense product: the transpose of `dy` (tokens, n) times `x` (tokens, k), both f32.
pub fn dense_weight_gradient(dy: &Tensor, x: &Tensor, (n, k): (usize, usize)) -> Result<Tensor> {
    let tokens = dy.elem_count() / n.max(1);
    product((dy, x), (n, k, tokens), |dy, x| {
        (Factor::index_inner(n, dy), Factor::index_inner(k, x))
    })
}

fn product(
    (a, b): (&Tensor, &Tensor),
    shape: (usize, usize, usize),
    factors: impl Fn(Address, Address) -> (Factor, Factor),
) -> Result<Tensor> {
    let [a_read, b_read] = [a, b].map(read);
    let device = a_read.storage()?.device();
    let stream = device.cuda_stream();
    let [a_dense, b_dense] = [a_read.dense()?, b_read.dense()?];
    let (rows, cols, _) = shape;
    let mut out = uninitialized::<f32>(device, rows * cols)?;
    {
        let (a, b) = (a_dense.memory(&stream)?, b_dense.memory(&stream)?);
        let out = Memory::written(&mut out, &stream);
        let (a, b) = factors(a.address, b.address);
        let shape = GemmShape::new(shape, false, false);
        // SAFETY: the caller's strides stay within the factors; all buffers are held.
        unsafe { launch(device, &Launch::gemm((a, 0), (Right::F32, b), shape, 1, out.address)) }?;
    }
    Ok(tensor(out, device, &(rows, cols).into()))
}

/// Elements from one row of the batch, key/value head and position to the next, of keys and values.
#[derive(Clone, Copy)]
pub struct KeyStrides {
    /// Rows of the batch.
    pub row: usize,
    /// Heads.
    pub head: usize,
    /// Positions.
    pub position: usize,
}

/// Of queries (batch, seq, heads, head_dim), and of keys and values, which lie as `strides` say. `visible`: of each query, the
/// first position that it sees and the one behind its last; `block` queries are taken at a time, and added up for each key.
pub fn attention_gradients(
    sizes: AttentionSizes,
    [q, k, v, dy]: [&Tensor; 4],
    strides: KeyStrides,
    (visible, block): (&[(usize, usize)], usize),
) -> Result<[Tensor; 3]> {
    let AttentionSizes { batch, seq, heads: (heads, kv_heads), context, head_dim } = sizes;
    if visible.is_empty() {
        return Ok([q.zeros_like()?, k.zeros_like()?, v.zeros_like()?]);
    }
    let reads = [q, k, v, dy].map(read);
    let device = reads[0].storage()?.device();
    let stream = device.cuda_stream();
    let dense = [reads[0].dense()?, reads[1].dense()?, reads[2].dense()?, reads[3].dense()?];
    let bounds =
        Vec::from_iter(visible.iter().flat_map(|(first, end)| [*first as u32, *end as u32]));
    let bounds = device.clone_htod(&bounds)?;
    let scores = kv_heads * block.min(seq) * context;
    let mut p = uninitialized::<f32>(device, scores)?;
    let mut ds = uninitialized::<f32>(device, scores)?;
    let mut dq = device.alloc_zeros::<f32>(q.elem_count().max(1))?;
    let mut dk = device.alloc_zeros::<f32>(k.elem_count().max(1))?;
    let mut dv = device.alloc_zeros::<f32>(v.elem_count().max(1))?;
    {
        let [q, k, v, dy] = [
            dense[0].memory(&stream)?,
            dense[1].memory(&stream)?,
            dense[2].memory(&stream)?,
            dense[3].memory(&stream)?,
        ];
        let (p, ds) = (Memory::written(&mut p, &stream), Memory::written(&mut ds, &stream));
        let (dq, dk) = (Memory::written(&mut dq, &stream), Memory::written(&mut dk, &stream));
        let (dv, bounds) = (Memory::written(&mut dv, &stream), Memory::read(&bounds, 0, &stream));
        let at = |memory: &Memory<'_>, elements: usize| {
            memory.address + (size_of::<f32>() * elements) as u64
        };
        let (group, stride, scale) =
            (heads / kv_heads, heads * head_dim, 1. / (head_dim as f32).sqrt());
        for (row, head) in (0..batch).flat_map(|row| (0..group).map(move |head| (row, head))) {
            for first in (0..seq).step_by(block) {
                let count = block.min(seq - first);
                let query = row * seq + first;
                let seen = &visible[query..query + count];
                let begin = seen.iter().map(|(first, _)| *first).min().unwrap_or(0);
                let end = seen.iter().map(|(_, end)| *end).max().unwrap_or(0);
                if begin >= end {
                    continue; // only padding
                }
                let keys = end - begin;
                let q_block = query * stride + head * head_dim;
                let kv_block = row * strides.row + begin * strides.position;
                let batched = |mut shape: GemmShape, a: usize, b: usize, out: usize| {
                    [shape.a_batch, shape.b_batch, shape.out_batch] =
                        [a, b, out].map(|elements| elements as u64);
                    shape
                };
                let (per_group, per_scores) = (group * head_dim, count * keys);
                let by_keys = |values: &Memory<'_>| {
                    Factor::depth_inner(strides.position, at(values, kv_block))
                };
                let rows = |values: &Memory<'_>| Factor::depth_inner(stride, at(values, q_block));
                let cols = |values: &Memory<'_>| Factor::index_inner(stride, at(values, q_block));
                let all = GemmShape::new((count, keys, head_dim), false, false);
                let all = batched(all, per_group, strides.head, per_scores);
                let to_dq = GemmShape::new((count, head_dim, keys), false, false);
                let to_dq = GemmShape { stride: stride as u64, ..to_dq };
                let to_dq = batched(to_dq, per_scores, strides.head, per_group);
                let to_kv = GemmShape::new((keys, head_dim, count), true, false);
                let to_kv = GemmShape { stride: strides.position as u64, ..to_kv };
                let to_kv = batched(to_kv, per_scores, per_group, strides.head);
                let product = |a: Factor, b: Factor, shape: GemmShape, out: u64| {
                    Launch::gemm((a, 0), (Right::F32, b), shape, kv_heads, out)
                };
                let k_values = Factor::index_inner(strides.position, at(&k, kv_block));
                let launches = [
                    product(rows(&q), by_keys(&k), GemmShape { scale, ..all }, p.address),
                    product(rows(&dy), by_keys(&v), all, ds.address),
                    Launch::softmax_backward(
                        (p.address, ds.address),
                        (bounds.address + (size_of::<[u32; 2]>() * query) as u64, begin),
                        (kv_heads, count, keys),
                        scale,
                    ),
                    product(
                        Factor::depth_inner(keys, ds.address),
                        k_values,
                        to_dq,
                        at(&dq, q_block),
                    ),
                    product(
                        Factor::index_inner(keys, ds.address),
                        cols(&q),
                        to_kv,
                        at(&dk, kv_block),
                    ),
                    product(
                        Factor::index_inner(keys, p.address),
                        cols(&dy),
                        to_kv,
                        at(&dv, kv_block),
                    ),
                ];
                for step in &launches {
                    // SAFETY: the caller checked that the shapes fit together; all buffers are held.
                    unsafe { launch(device, step) }?;
                }
            }
        }
    }
    Ok([
        tensor(dq, device, q.shape()),
        tensor(dk, device, k.shape()),
        tensor(dv, device, v.shape()),
    ])
}
