//! The gradients of attention: `dv = pᵀ·dy`, `dp = dy·vᵀ`, `ds = p·(dp − Σ p·dp)`, `dq = ds·k/√d`, `dk = dsᵀ·q/√d` for
//! `p = softmax(s)`, `s = q·kᵀ/√d`. The probabilities are computed again.

use rayon::prelude::*;

use super::{Attention, Dims};
use crate::{
    kernels::{self, DenseWeights, Kernel, Matrix},
    ops::dot,
};

pub(super) struct Gradients {
    pub dq: Vec<f32>,
    pub dk: Vec<f32>,
    pub dv: Vec<f32>,
}

impl Attention {
    /// All inputs row-major. One task owns one key/value head and its group of query heads, so
    /// nothing is shared and every sum has one order.
    pub(super) fn backward(
        &self,
        dims: &Dims,
        q: &[f32],
        k: &[f32],
        v: &[f32],
        dy: &[f32],
    ) -> Gradients {
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
    probabilities(kernel, q, k, p);
    dots(kernel, dy, v, ds); // dp
    let mean = dot(kernel, p, ds);
    for (ds, p) in ds.iter_mut().zip(p.iter()) {
        *ds = p * (*ds - mean) * scale;
    }
    let keys = DenseWeights::F32(Matrix::new(k, ds.len(), head_dim));
    kernel.weighted_sums(Matrix::new(ds, 1, ds.len()), keys, dq);
    for (j, (dk, dv)) in dk.chunks_mut(head_dim).zip(dv.chunks_mut(head_dim)).enumerate() {
        kernel.axpy(ds[j], q, dk);
        kernel.axpy(p[j], dy, dv);
    }
}

/// `out[j] = x · rows[j]`.
fn dots(kernel: &Kernel, x: &[f32], rows: &[f32], out: &mut [f32]) {
    let rows = Matrix::new(rows, out.len(), x.len());
    let count = out.len();
    kernel.matmul_nt(Matrix::new(x, 1, x.len()), DenseWeights::F32(rows), out, count);
}

/// `p = softmax(q·kᵀ/√d)` of one query over the `p.len()` first rows of `keys`.
fn probabilities(kernel: &Kernel, q: &[f32], keys: &[f32], p: &mut [f32]) {
    dots(kernel, q, keys, p);
    let scale = 1. / (q.len() as f32).sqrt();
    p.iter_mut().for_each(|score| *score *= scale);
    kernel.softmax(p);
}
