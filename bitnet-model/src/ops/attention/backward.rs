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

/// The gradients of one key/value head.
#[derive(Clone, Default)]
struct Head {
    /// Of its group of query heads, (group, seq, head_dim).
    dq: Vec<f32>,
    /// (context, head_dim).
    dk: Vec<f32>,
    dv: Vec<f32>,
}

/// The gradients of all key/value heads, rows of the batch first.
pub(super) struct Gradients {
    heads: Vec<Head>,
    dims: Dims,
}

/// Queries of a block: what they need not see of the keys is small beside what they see.
pub(super) const QUERIES: usize = 128;

/// The inputs: `q` and `dy` (batch, seq, heads, head_dim), `k` and `v` as `strides` says.
#[derive(Clone, Copy)]
pub(super) struct Inputs<'a> {
    pub q: &'a [f32],
    pub k: &'a [f32],
    pub v: &'a [f32],
    pub dy: &'a [f32],
    pub strides: KvStrides,
}

/// Elements from one row of the batch, head and position to the next.
#[derive(Clone, Copy)]
pub(super) struct KvStrides {
    pub row: usize,
    pub head: usize,
    pub position: usize,
}

impl Attention {
    /// One task owns one key/value head and its group of query heads, so nothing is shared and every sum has one order.
    pub(super) fn backward(&self, dims: &Dims, inputs: Inputs<'_>) -> Gradients {
        let mut heads = vec![Head::default(); dims.batch * dims.kv_heads];
        threads::for_each_chunk(&mut heads, 1, |index, head| {
            head[0] = self.head(dims, inputs, (index / dims.kv_heads, index % dims.kv_heads));
        });
        Gradients { heads, dims: *dims }
    }

    fn head(&self, dims: &Dims, inputs: Inputs<'_>, (row, kv_head): (usize, usize)) -> Head {
        let Dims { seq, heads, kv_heads, context, head_dim, .. } = *dims;
        let (group, strides) = (heads / kv_heads, inputs.strides);
        let first = row * strides.row + kv_head * strides.head;
        let (k, v) = (&inputs.k[first..], &inputs.v[first..]);
        let mut out = Head {
            dq: vec![0f32; group * seq * head_dim],
            dk: vec![0f32; context * head_dim],
            dv: vec![0f32; context * head_dim],
        };
        for (j, dq) in out.dq.chunks_mut(seq * head_dim).enumerate() {
            let at = (row * seq * heads + kv_head * group + j) * head_dim;
            for (block, dq) in dq.chunks_mut(QUERIES * head_dim).enumerate() {
                let first = block * QUERIES;
                let visible: Vec<(usize, usize)> = (first..first + dq.len() / head_dim)
                    .map(|i| self.visible(dims, row, i))
                    .collect();
                let begin = visible.iter().map(|(start, _)| *start).min().unwrap_or(0);
                let end = visible.iter().map(|(start, count)| start + count).max().unwrap_or(0);
                if begin >= end {
                    continue; // only padding
                }
                let keys = begin * head_dim..end * head_dim;
                let at = at + first * heads * head_dim;
                let queries = Queries {
                    visible: &visible,
                    begin,
                    precision: self.backward,
                    stride: heads * head_dim,
                    kv_stride: strides.position,
                };
                let inputs = Inputs {
                    q: &inputs.q[at..],
                    k: &k[begin * strides.position..],
                    v: &v[begin * strides.position..],
                    dy: &inputs.dy[at..],
                    strides,
                };
                let gradients = (dq, &mut out.dk[keys.clone()], &mut out.dv[keys]);
                queries.backward(dims.scale(), inputs, gradients);
            }
        }
        out
    }
}

impl Gradients {
    /// Of `q`, (batch, seq, heads, head_dim).
    pub fn dq(&self) -> Vec<f32> {
        let Dims { seq, heads, kv_heads, .. } = self.dims;
        let group = heads / kv_heads;
        self.by_token(seq, heads, |head| (&self.heads[head / group].dq, head % group))
    }

    /// Of `k` and `v`, (batch, kv_heads, context, head_dim).
    pub fn head_major(&self) -> [Vec<f32>; 2] {
        let all =
            |part: fn(&Head) -> &Vec<f32>| self.heads.iter().flat_map(part).copied().collect();
        [all(|head| &head.dk), all(|head| &head.dv)]
    }

    /// Of `k` and `v`, (batch, context, kv_heads, head_dim).
    pub fn token_major(&self) -> [Vec<f32>; 2] {
        let Dims { kv_heads, context, .. } = self.dims;
        [
            self.by_token(context, kv_heads, |head| (&self.heads[head].dk, 0)),
            self.by_token(context, kv_heads, |head| (&self.heads[head].dv, 0)),
        ]
    }

    /// (batch, len, heads, head_dim) of parts (len, head_dim): which values hold those of a head, counted through all rows,
    /// and the number of its part in them.
    fn by_token<'a>(
        &'a self,
        len: usize,
        heads: usize,
        part: impl Fn(usize) -> (&'a Vec<f32>, usize) + Sync,
    ) -> Vec<f32> {
        let Dims { batch, head_dim, .. } = self.dims;
        let mut out = vec![0f32; batch * len * heads * head_dim];
        threads::for_each_chunk(&mut out, (heads * head_dim).max(1), |token, out| {
            let (row, i) = (token / len, token % len);
            for (head, out) in out.chunks_mut(head_dim).enumerate() {
                let (values, part) = part(row * heads + head);
                out.copy_from_slice(&values[(part * len + i) * head_dim..][..head_dim]);
            }
        });
        out
    }
}

/// A block of queries of one head.
struct Queries<'a> {
    /// First key and number of keys that each sees.
    visible: &'a [(usize, usize)],
    /// The first key that one of them sees.
    begin: usize,
    /// Of all products but `q·kᵀ`: the probabilities are those of the forward pass.
    precision: Precision,
    /// Elements from one query to the next, and from one key to the next.
    stride: usize,
    kv_stride: usize,
}

impl Queries<'_> {
    /// Fills `dq` and adds to `dk` and `dv`, of the keys from the first to the last that is seen.
    fn backward(
        &self,
        scale: f32,
        Inputs { q, k, v, dy, .. }: Inputs<'_>,
        (dq, dk, dv): (&mut [f32], &mut [f32], &mut [f32]),
    ) {
        let count = self.visible.len();
        let head_dim = dq.len() / count;
        let keys = dk.len() / head_dim;
        let precision = self.precision;
        let (mut p, mut ds) = (vec![0f32; count * keys], vec![0f32; count * keys]);
        let shape = (count, keys, head_dim);
        let (queries, upstream) = (
            Factor::depth_inner(self.stride, q, plain),
            Factor::depth_inner(self.stride, dy, plain),
        );
        let of = |x| Factor::depth_inner(self.kv_stride, x, plain);
        gemm(shape, queries, of(k), scale, Precision::F32, &mut p);
        gemm(shape, upstream, of(v), 1., precision, &mut ds); // dp
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
            Factor::index_inner(self.kv_stride, k, plain),
            1.,
            precision,
            dq,
        );
        let shape = (keys, head_dim, count);
        let (queries, upstream) = (
            Factor::index_inner(self.stride, q, plain),
            Factor::index_inner(self.stride, dy, plain),
        );
        gemm_add(shape, Factor::index_inner(keys, &ds, plain), queries, 1., precision, dk);
        gemm_add(shape, Factor::index_inner(keys, &p, plain), upstream, 1., precision, dv);
    }
}
