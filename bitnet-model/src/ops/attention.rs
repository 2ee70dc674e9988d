//! Causal scaled-dot-product attention with grouped key/value heads, `softmax(q·kᵀ/√d)·v`, as one op
//! with a gradient. Scores of one query at a time: memory is linear in the context.

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::{dot, for_each_chunk};
use crate::{
    kernels::{self, DenseWeights, Kernel, Matrix},
    storage::{contiguous, with_slice},
};

/// Attends `q` (batch, seq, heads, head_dim) over `k` and `v` (batch, kv_heads, context, head_dim):
/// (batch, seq, heads, head_dim); f32.
///
/// The queries are the last `seq` positions of the context. Query head `h` uses key/value head
/// `h / (heads / kv_heads)`. Positions before `starts[row]` are padding and not seen; an empty
/// `starts` means none. A query that is itself padding gets zeros.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, starts: &[usize]) -> Result<Tensor> {
    q.apply_op3(k, v, Attention { starts: starts.to_vec() })
}

struct Attention {
    starts: Vec<usize>,
}

/// The sizes all parts of the op share, checked once.
#[derive(Clone, Copy)]
struct Dims {
    batch: usize,
    seq: usize,
    heads: usize,
    kv_heads: usize,
    context: usize,
    head_dim: usize,
}

impl Dims {
    fn new(q: &Shape, k: &Shape, v: &Shape) -> Result<Self> {
        let (batch, seq, heads, head_dim) = q.dims4()?;
        let (k_batch, kv_heads, context, k_dim) = k.dims4()?;
        let fits = k == v
            && k_batch == batch
            && k_dim == head_dim
            && seq <= context
            && kv_heads > 0
            && heads.is_multiple_of(kv_heads);
        if !fits {
            bail!("attention: q {q:?}, k {k:?} and v {v:?} do not fit together");
        }
        Ok(Self { batch, seq, heads, kv_heads, context, head_dim })
    }

    fn kv_head(&self, head: usize) -> usize {
        head / (self.heads / self.kv_heads)
    }

    fn scale(&self) -> f32 {
        1. / (self.head_dim as f32).sqrt()
    }
}

/// Keys or values of all rows: a strided view whose innermost dimension is dense.
#[derive(Clone, Copy)]
struct Rows<'a> {
    data: &'a [f32],
    batch_stride: usize,
    head_stride: usize,
    stride: usize,
}

impl<'a> Rows<'a> {
    fn new(storage: &'a CpuStorage, layout: &Layout) -> Result<Self> {
        let data = &storage.as_slice::<f32>()?[layout.start_offset()..];
        match *layout.stride() {
            [batch_stride, head_stride, stride, 1] => {
                Ok(Self { data, batch_stride, head_stride, stride })
            }
            _ => {
                bail!("attention: the innermost dimension must be dense, not {:?}", layout.stride())
            }
        }
    }

    /// Positions `first ..` of one head.
    fn head(&self, row: usize, head: usize, first: usize) -> &'a [f32] {
        &self.data[row * self.batch_stride + head * self.head_stride + first * self.stride..]
    }
}

impl Attention {
    fn start(&self, row: usize) -> usize {
        self.starts.get(row).copied().unwrap_or(0)
    }

    /// First position and number of positions that query `i` of `row` sees.
    fn visible(&self, dims: &Dims, row: usize, i: usize) -> (usize, usize) {
        let start = self.start(row);
        let end = dims.context - dims.seq + i + 1;
        (start.min(end), end.saturating_sub(start))
    }
}

/// `out[j] = x · rows[j]`.
fn dots(kernel: &Kernel, x: &[f32], rows: &[f32], stride: usize, out: &mut [f32]) {
    let rows = Matrix::strided(rows, out.len(), x.len(), stride);
    let count = out.len();
    kernel.matmul_nt(Matrix::new(x, 1, x.len()), DenseWeights::F32(rows), out, count);
}

/// `p = softmax(q·kᵀ/√d)` of one query over the `p.len()` first rows of `keys`.
fn probabilities(kernel: &Kernel, q: &[f32], keys: &[f32], stride: usize, p: &mut [f32]) {
    dots(kernel, q, keys, stride, p);
    let scale = 1. / (q.len() as f32).sqrt();
    p.iter_mut().for_each(|score| *score *= scale);
    kernel.softmax(p);
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let dims = Dims::new(q_layout.shape(), k_layout.shape(), v_layout.shape())?;
        let q = contiguous::<f32>(q, q_layout)?;
        let (k, v) = (Rows::new(k, k_layout)?, Rows::new(v, v_layout)?);
        let kernel = kernels::active();
        let Dims { seq, heads, head_dim, context, .. } = dims;
        let mut out = vec![0f32; q.len()];
        for_each_chunk(&mut out, head_dim, q.len() * context, |index, out| {
            let (head, i, row) = (index % heads, index / heads % seq, index / heads / seq);
            let (first, count) = self.visible(&dims, row, i);
            let kv_head = dims.kv_head(head);
            let mut p = vec![0f32; count];
            let q = &q[index * head_dim..][..head_dim];
            probabilities(kernel, q, k.head(row, kv_head, first), k.stride, &mut p);
            kernel.weighted_sum(&p, v.head(row, kv_head, first), v.stride, out);
        });
        Ok((CpuStorage::F32(out), q_layout.shape().clone()))
    }

    /// With `p = softmax(s)`, `s = q·kᵀ/√d`: `dv = pᵀ·dy`, `dp = dy·vᵀ`,
    /// `ds = p·(dp − Σ p·dp)`, `dq = ds·k/√d`, `dk = dsᵀ·q/√d`. The probabilities are recomputed.
    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let dims = Dims::new(q.shape(), k.shape(), v.shape())?;
        let gradients = with_slice::<f32, _>(q, |q| {
            with_slice::<f32, _>(k, |k| {
                with_slice::<f32, _>(v, |v| {
                    with_slice::<f32, _>(dy, |dy| Ok(self.backward(&dims, q, k, v, dy)))
                })
            })
        })?;
        let Gradients { dq, dk, dv } = gradients;
        let device = q.device();
        Ok((
            Some(Tensor::from_vec(dq, q.shape(), device)?),
            Some(Tensor::from_vec(dk, k.shape(), device)?),
            Some(Tensor::from_vec(dv, v.shape(), device)?),
        ))
    }
}

struct Gradients {
    dq: Vec<f32>,
    dk: Vec<f32>,
    dv: Vec<f32>,
}

impl Attention {
    /// All inputs row-major. One task owns one key/value head and its group of query heads, so
    /// nothing is shared and every sum has one order.
    fn backward(&self, dims: &Dims, q: &[f32], k: &[f32], v: &[f32], dy: &[f32]) -> Gradients {
        let Dims { batch, seq, heads, kv_heads, context, head_dim } = *dims;
        let group = heads / kv_heads;
        let head_len = context * head_dim;
        let (mut dk, mut dv) = (vec![0f32; k.len()], vec![0f32; v.len()]);
        // dq of one key/value head: (group, seq, head_dim)
        let parts: Vec<Vec<f32>> = dk
            .par_chunks_mut(head_len)
            .zip(dv.par_chunks_mut(head_len))
            .enumerate()
            .map(|(index, (dk, dv))| {
                let (row, kv_head) = (index / kv_heads, index % kv_heads);
                let (k, v) =
                    (&k[index * head_len..][..head_len], &v[index * head_len..][..head_len]);
                let mut dq = vec![0f32; group * seq * head_dim];
                let (mut p, mut ds) = (vec![0f32; context], vec![0f32; context]);
                for (j, dq) in dq.chunks_mut(head_dim).enumerate() {
                    let (head, i) = (kv_head * group + j / seq, j % seq);
                    let at = ((row * seq + i) * heads + head) * head_dim;
                    let (q, dy) = (&q[at..][..head_dim], &dy[at..][..head_dim]);
                    let (first, count) = self.visible(dims, row, i);
                    let seen = first * head_dim..(first + count) * head_dim;
                    let (p, ds) = (&mut p[..count], &mut ds[..count]);
                    let (k, v) = (&k[seen.clone()], &v[seen.clone()]);
                    backward_query(
                        dims.scale(),
                        (q, k, v, dy),
                        (p, ds),
                        (dq, &mut dk[seen.clone()], &mut dv[seen]),
                    );
                }
                dq
            })
            .collect();
        let mut dq = vec![0f32; q.len()];
        dq.par_chunks_mut(heads * head_dim).enumerate().for_each(|(token, dq)| {
            let (row, i) = (token / seq, token % seq);
            for (head, dq) in dq.chunks_mut(head_dim).enumerate() {
                let part = &parts[row * kv_heads + head / group];
                dq.copy_from_slice(&part[((head % group) * seq + i) * head_dim..][..head_dim]);
            }
        });
        debug_assert_eq!(parts.len(), batch * kv_heads);
        Gradients { dq, dk, dv }
    }
}

/// One query's share: fills `dq`, adds to `dk` and `dv`; `p` and `ds` are scratch.
fn backward_query(
    scale: f32,
    (q, k, v, dy): (&[f32], &[f32], &[f32], &[f32]),
    (p, ds): (&mut [f32], &mut [f32]),
    (dq, dk, dv): (&mut [f32], &mut [f32], &mut [f32]),
) {
    let kernel = kernels::active();
    let head_dim = q.len();
    probabilities(kernel, q, k, head_dim, p);
    dots(kernel, dy, v, head_dim, ds); // dp
    let mean = dot(kernel, p, ds);
    for (ds, p) in ds.iter_mut().zip(p.iter()) {
        *ds = p * (*ds - mean) * scale;
    }
    kernel.weighted_sum(ds, k, head_dim, dq);
    for (j, (dk, dv)) in dk.chunks_mut(head_dim).zip(dv.chunks_mut(head_dim)).enumerate() {
        kernel.axpy(ds[j], q, dk);
        kernel.axpy(p[j], dy, dv);
    }
}
