//! The gradients of attention: `dv = pᵀ·dy`, `dp = dy·vᵀ`, `ds = p·(dp − Σ p·dp)/√d`, `dq = ds·k`, `dk = dsᵀ·q` for
//! `p = softmax(s)`, `s = q·kᵀ/√d`. The probabilities are computed again, for a block of queries at a time.

use super::{Attention, Dims};
use crate::{
    kernels,
    ops::{
        dot,
        gemm::{Factor, Precision, gemm, gemm_add, plain},
    },
    threads,
};

pub(super) struct Gradients {
    pub dq: Vec<f32>,
    pub dk: Vec<f32>,
    pub dv: Vec<f32>,
}

/// Queries of a block: what they need not see of the keys is small beside what they see.
const QUERIES: usize = 64;

/// One key/value head and the gradients that are its own.
struct Head<'a> {
    dk: &'a mut [f32],
    dv: &'a mut [f32],
    /// Of its group of query heads, (group, seq, head_dim).
    dq: Vec<f32>,
}

/// The inputs, row-major.
#[derive(Clone, Copy)]
pub(super) struct Inputs<'a> {
    pub q: &'a [f32],
    pub k: &'a [f32],
    pub v: &'a [f32],
    pub dy: &'a [f32],
}

impl Attention {
    /// One task owns one key/value head and its group of query heads, so nothing is shared and every sum has one order.
    pub(super) fn backward(&self, dims: &Dims, inputs: Inputs<'_>) -> Gradients {
        let Dims { seq, heads, kv_heads, context, head_dim, .. } = *dims;
        let (group, head_len) = (heads / kv_heads, context * head_dim);
        let (mut dk, mut dv) = (vec![0f32; inputs.k.len()], vec![0f32; inputs.v.len()]);
        let mut all: Vec<Head> = (dk.chunks_mut(head_len).zip(dv.chunks_mut(head_len)))
            .map(|(dk, dv)| Head { dk, dv, dq: Vec::new() })
            .collect();
        threads::for_each_chunk(&mut all, 1, |index, head| {
            self.head(dims, inputs, index, &mut head[0])
        });
        let parts: Vec<Vec<f32>> = all.into_iter().map(|head| head.dq).collect();
        let mut dq = vec![0f32; inputs.q.len()];
        threads::for_each_chunk(&mut dq, (heads * head_dim).max(1), |token, dq| {
            let (row, i) = (token / seq, token % seq);
            for (head, dq) in dq.chunks_mut(head_dim).enumerate() {
                let part = &parts[row * kv_heads + head / group];
                dq.copy_from_slice(&part[((head % group) * seq + i) * head_dim..][..head_dim]);
            }
        });
        Gradients { dq, dk, dv }
    }

    /// The gradients of key/value head `index`, rows of the batch first.
    fn head(&self, dims: &Dims, inputs: Inputs<'_>, index: usize, out: &mut Head<'_>) {
        let Dims { seq, heads, kv_heads, context, head_dim, .. } = *dims;
        let (group, head_len) = (heads / kv_heads, context * head_dim);
        let (row, kv_head) = (index / kv_heads, index % kv_heads);
        let (k, v) = (&inputs.k[index * head_len..], &inputs.v[index * head_len..]);
        out.dq = vec![0f32; group * seq * head_dim];
        for (j, dq) in out.dq.chunks_mut(seq * head_dim).enumerate() {
            let at = (row * seq * heads + kv_head * group + j) * head_dim;
            for (block, dq) in dq.chunks_mut(QUERIES * head_dim).enumerate() {
                let first = block * QUERIES;
                let visible: Vec<(usize, usize)> = (first..first + dq.len() / head_dim)
                    .map(|i| self.visible(dims, row, i))
                    .collect();
                let begin = visible.iter().map(|(start, _)| *start).min().unwrap_or(0);
                let end = visible.iter().map(|(start, count)| start + count).max().unwrap_or(0);
                let keys = begin * head_dim..end * head_dim;
                let at = at + first * heads * head_dim;
                let queries = Queries { visible: &visible, begin, stride: heads * head_dim };
                queries.backward(
                    dims.scale(),
                    Inputs {
                        q: &inputs.q[at..],
                        k: &k[keys.clone()],
                        v: &v[keys.clone()],
                        dy: &inputs.dy[at..],
                    },
                    (dq, &mut out.dk[keys.clone()], &mut out.dv[keys]),
                );
            }
        }
    }
}

/// A block of queries of one head.
struct Queries<'a> {
    /// First key and number of keys that each sees.
    visible: &'a [(usize, usize)],
    /// The first key that one of them sees.
    begin: usize,
    /// Values from one query to the next.
    stride: usize,
}

impl Queries<'_> {
    /// Fills `dq` and adds to `dk` and `dv`, of the keys from the first to the last that is seen.
    fn backward(
        &self,
        scale: f32,
        Inputs { q, k, v, dy }: Inputs<'_>,
        (dq, dk, dv): (&mut [f32], &mut [f32], &mut [f32]),
    ) {
        let count = self.visible.len();
        let head_dim = dq.len() / count;
        let keys = dk.len() / head_dim;
        if keys == 0 {
            return;
        }
        const F32: Precision = Precision::F32;
        let (mut p, mut ds) = (vec![0f32; count * keys], vec![0f32; count * keys]);
        let shape = (count, keys, head_dim);
        let (queries, upstream) = (
            Factor::depth_inner(self.stride, q, plain),
            Factor::depth_inner(self.stride, dy, plain),
        );
        gemm(shape, queries, Factor::depth_inner(head_dim, k, plain), scale, F32, &mut p);
        gemm(shape, upstream, Factor::depth_inner(head_dim, v, plain), 1., F32, &mut ds); // dp
        let kernel = kernels::active();
        for ((p, ds), (start, seen)) in
            p.chunks_mut(keys).zip(ds.chunks_mut(keys)).zip(self.visible)
        {
            let seen = start - self.begin..start - self.begin + seen;
            for hidden in [0..seen.start, seen.end..keys] {
                p[hidden.clone()].fill(0.);
                ds[hidden].fill(0.);
            }
            let (p, ds) = (&mut p[seen.clone()], &mut ds[seen]);
            kernel.softmax(p);
            let mean = dot(kernel, p, ds);
            for (ds, p) in ds.iter_mut().zip(p.iter()) {
                *ds = p * (*ds - mean) * scale;
            }
        }
        let shape = (count, head_dim, keys);
        gemm(
            shape,
            Factor::depth_inner(keys, &ds, plain),
            Factor::index_inner(head_dim, k, plain),
            1.,
            F32,
            dq,
        );
        let shape = (keys, head_dim, count);
        let (queries, upstream) = (
            Factor::index_inner(self.stride, q, plain),
            Factor::index_inner(self.stride, dy, plain),
        );
        gemm_add(shape, Factor::index_inner(keys, &ds, plain), queries, F32, dk);
        gemm_add(shape, Factor::index_inner(keys, &p, plain), upstream, F32, dv);
    }
}
