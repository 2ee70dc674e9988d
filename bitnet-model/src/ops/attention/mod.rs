//! Causal scaled-dot-product attention with grouped key/value heads, `softmax(q·kᵀ/√d)·v`, as one op
//! with a gradient.

mod backward;
mod forward;
mod key_values;
mod own;

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};
#[cfg(feature = "cuda")]
use candle_core::{CudaStorage, DType, backend::BackendStorage};

#[cfg(feature = "cuda")]
use self::key_values::SCALE_BYTES;
use self::{
    backward::{Gradients, Inputs, KvStrides},
    forward::Forward,
    key_values::KeyValues,
};
pub use self::{key_values::KvType, own::self_attention};
#[cfg(feature = "cuda")]
use crate::cuda;
use crate::{
    kernels,
    ops::gemm::Precision,
    storage::{contiguous, with_slice},
};

/// Attends `q` (batch, seq, heads, head_dim) f32 over `k` and `v` (batch, kv_heads, context, head_dim), f32 or as a
/// [`KvType`] stores them: (batch, seq, heads, head_dim) f32. Differentiable when all are f32.
///
/// The queries are the last `seq` positions of the context. Query head `h` uses key/value head
/// `h / (heads / kv_heads)`. Query `i` of `row` sees the positions from `starts[row · seq + i]` to its own: what is
/// before is padding, or another document; an empty `starts` means that all see from 0. A query that starts behind
/// itself is padding and gets zeros. The bits of a query depend on the positions that it sees alone.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, starts: &[usize]) -> Result<Tensor> {
    q.apply_op3(k, v, Attention { starts: starts.to_vec(), backward: Precision::F32 })
}

struct Attention {
    /// First visible position of every query, (batch, seq) row-major; empty: 0.
    starts: Vec<usize>,
    /// Of the products of the gradients.
    backward: Precision,
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
    /// `stored` tells the head's dimension from the width of a stored row.
    fn new(q: &Shape, k: &Shape, v: &Shape, stored: impl Fn(usize) -> usize) -> Result<Self> {
        let (batch, seq, heads, head_dim) = q.dims4()?;
        let (k_batch, kv_heads, context, k_dim) = k.dims4()?;
        let fits = k == v
            && k_batch == batch
            && stored(k_dim) == head_dim
            && seq <= context
            && kv_heads > 0
            && heads.is_multiple_of(kv_heads);
        if !fits {
            bail!("attention: q {q:?}, k {k:?} and v {v:?} do not fit together");
        }
        Ok(Self { batch, seq, heads, kv_heads, context, head_dim })
    }

    #[cfg(feature = "cuda")]
    fn on_device(&self) -> cuda::ops::AttentionSizes {
        let Self { batch, seq, heads, kv_heads, context, head_dim } = *self;
        cuda::ops::AttentionSizes { batch, seq, heads: (heads, kv_heads), context, head_dim }
    }

    fn scale(&self) -> f32 {
        1. / (self.head_dim as f32).sqrt()
    }
}

impl Attention {
    /// Refuses starts that are not one a query.
    fn check(&self, dims: &Dims) -> Result<()> {
        let (found, queries) = (self.starts.len(), dims.batch * dims.seq);
        if found != 0 && found != queries {
            bail!("attention: {found} starts for {queries} queries");
        }
        Ok(())
    }

    /// The gradients of `q`, `k` and `v`; those of keys and values lie as `strides` says, which is what `lies` makes of them.
    fn gradients(
        &self,
        dims: &Dims,
        [q, k, v, dy]: [&Tensor; 4],
        strides: KvStrides,
        lies: fn(&Gradients) -> [Vec<f32>; 2],
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        #[cfg(feature = "cuda")]
        if dy.device().is_cuda() {
            let queries = (0..dims.batch).flat_map(|row| (0..dims.seq).map(move |i| (row, i)));
            let visible = queries.map(|(row, i)| self.visible(dims, row, i));
            let visible = Vec::from_iter(visible.map(|(first, count)| (first, first + count)));
            let KvStrides { row, head, position } = strides;
            let strides = cuda::ops::KeyStrides { row, head, position };
            let inputs = [q, k, v, dy];
            let visible = (&visible[..], backward::QUERIES);
            let gradients =
                cuda::ops::attention_gradients(dims.on_device(), inputs, strides, visible)?;
            let [dq, dk, dv] = gradients.map(Some);
            return Ok((dq, dk, dv));
        }
        let gradients = self.host_gradients(dims, [q, k, v, dy], strides)?;
        let [dk, dv] = lies(&gradients);
        let device = q.device();
        Ok((
            Some(Tensor::from_vec(gradients.dq(), q.shape(), device)?),
            Some(Tensor::from_vec(dk, k.shape(), device)?),
            Some(Tensor::from_vec(dv, v.shape(), device)?),
        ))
    }

    fn host_gradients(
        &self,
        dims: &Dims,
        [q, k, v, dy]: [&Tensor; 4],
        strides: KvStrides,
    ) -> Result<Gradients> {
        with_slice::<f32, _>(q, |q| {
            with_slice::<f32, _>(k, |k| {
                with_slice::<f32, _>(v, |v| {
                    with_slice::<f32, _>(dy, |dy| {
                        Ok(self.backward(dims, Inputs { q, k, v, dy, strides }))
                    })
                })
            })
        })
    }

    /// First position and number of positions that query `i` of `row` sees.
    fn visible(&self, dims: &Dims, row: usize, i: usize) -> (usize, usize) {
        let start = self.starts.get(row * dims.seq + i).copied().unwrap_or(0);
        let end = dims.context - dims.seq + i + 1;
        (start.min(end), end.saturating_sub(start))
    }
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
        let (k, v) = (KeyValues::new(k, k_layout)?, KeyValues::new(v, v_layout)?);
        let (q_shape, k_shape, v_shape) = (q_layout.shape(), k_layout.shape(), v_layout.shape());
        let dims = Dims::new(q_shape, k_shape, v_shape, |width| k.head_dim(width))?;
        self.check(&dims)?;
        let q = contiguous::<f32>(q, q_layout)?;
        let out =
            Forward { dims, starts: &self.starts, q: &q, k, v, kernel: kernels::active() }.run();
        Ok((CpuStorage::F32(out), q_layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        q: &CudaStorage,
        q_layout: &Layout,
        k: &CudaStorage,
        k_layout: &Layout,
        v: &CudaStorage,
        v_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let head_dim = |width: usize| match k.dtype() {
            DType::U8 => width.saturating_sub(SCALE_BYTES),
            _ => width,
        };
        let (q_shape, k_shape, v_shape) = (q_layout.shape(), k_layout.shape(), v_layout.shape());
        let dims = Dims::new(q_shape, k_shape, v_shape, head_dim)?;
        self.check(&dims)?;
        let (q, k, v) = ((q, q_layout), (k, k_layout), (v, v_layout));
        cuda::ops::attention(dims.on_device(), [q, k, v], &self.starts, q_shape.clone())
    }

    crate::no_metal_fwd!(3);

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let dims = Dims::new(q.shape(), k.shape(), v.shape(), |width| width)?;
        self.check(&dims)?;
        let (context, d) = (dims.context, dims.head_dim);
        let strides =
            KvStrides { row: dims.kv_heads * context * d, head: context * d, position: d };
        self.gradients(&dims, [q, k, v, dy], strides, Gradients::head_major)
    }
}
