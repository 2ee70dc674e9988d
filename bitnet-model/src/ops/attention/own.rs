//! Attention of tokens to one another, without a cache: keys and values lie as the projections leave them.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};

use super::{
    Attention, Dims,
    backward::{Gradients, KvStrides},
    forward::Forward,
    key_values::KeyValues,
};
#[cfg(feature = "cuda")]
use crate::cuda;
use crate::{kernels, ops::gemm::Precision, storage::contiguous};

/// Attends `q` (batch, seq, heads, head_dim) over `k` (batch, seq, kv_heads, head_dim) and `v`
/// (batch, seq, kv_heads · head_dim), all f32: (batch, seq, heads · head_dim). What
/// [`attention`](super::attention()) computes when the context is the queries' own tokens, with the same bits, and without
/// bringing keys and values into the order of a cache. `backward` is the precision of the products of the gradients, on the
/// CPU: but for those that make the probabilities again, which stay what they were.
pub fn self_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    starts: &[usize],
    backward: Precision,
) -> Result<Tensor> {
    q.apply_op3(k, v, SelfAttention(Attention { starts: starts.to_vec(), backward }))
}

struct SelfAttention(Attention);

impl SelfAttention {
    fn dims(&self, q: &Shape, k: &Shape, v: &Shape) -> Result<Dims> {
        let (batch, seq, heads, head_dim) = q.dims4()?;
        let (_, _, kv_heads, _) = k.dims4()?;
        let fits = k.dims() == [batch, seq, kv_heads, head_dim]
            && v.dims() == [batch, seq, kv_heads * head_dim]
            && kv_heads > 0
            && heads.is_multiple_of(kv_heads);
        if !fits {
            bail!("self-attention: q {q:?}, k {k:?} and v {v:?} do not fit together");
        }
        let dims = Dims { batch, seq, heads, kv_heads, context: seq, head_dim };
        self.0.check(&dims)?;
        Ok(dims)
    }
}

impl Dims {
    fn token_major(&self) -> KvStrides {
        let position = self.kv_heads * self.head_dim;
        KvStrides { row: self.context * position, head: self.head_dim, position }
    }
}

impl CustomOp3 for SelfAttention {
    fn name(&self) -> &'static str {
        "self-attention"
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
        let dims = self.dims(q_layout.shape(), k_layout.shape(), v_layout.shape())?;
        let Dims { batch, seq, heads, head_dim, .. } = dims;
        let q = contiguous::<f32>(q, q_layout)?;
        let (k, v) = (contiguous::<f32>(k, k_layout)?, contiguous::<f32>(v, v_layout)?);
        let forward = Forward {
            dims,
            starts: &self.0.starts,
            q: &q,
            k: KeyValues::from_f32(&k, dims.token_major()),
            v: KeyValues::from_f32(&v, dims.token_major()),
            kernel: kernels::active(),
        };
        Ok((CpuStorage::F32(forward.run()), (batch, seq, heads * head_dim).into()))
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
        let dims = self.dims(q_layout.shape(), k_layout.shape(), v_layout.shape())?;
        let Dims { batch, seq, heads, kv_heads, head_dim, .. } = dims;
        let k_layout = k_layout.transpose(1, 2)?;
        let [row, position, 1] = *v_layout.stride() else {
            bail!("self-attention: values must be dense, not {:?}", v_layout.stride());
        };
        let v_shape = (batch, kv_heads, seq, head_dim).into();
        let v_stride = vec![row, head_dim, position, 1];
        let v_layout = Layout::new(v_shape, v_stride, v_layout.start_offset());
        let (q, k, v) = ((q, q_layout), (k, &k_layout), (v, &v_layout));
        let shape = (batch, seq, heads * head_dim).into();
        cuda::ops::attention(dims.on_device(), [q, k, v], &self.0.starts, shape)
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
        let dims = self.dims(q.shape(), k.shape(), v.shape())?;
        self.0.gradients(&dims, [q, k, v, dy], dims.token_major(), Gradients::token_major)
    }
}
