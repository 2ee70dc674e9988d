//! Multi-head attention with grouped key/value heads and rotary positions.

use std::sync::Arc;

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;

use super::{
    Angles, LinearFactory, LinearSpec, Projections, RmsNorm, linear::project,
    lora_linear::beside_all, map_on,
};
use crate::{
    adapter::{BlockAdaptation, RowAdapters},
    kv_cache::LayerCache,
    ops::{self, gemm::Precision},
};

/// The projections of the input, in the order of their product.
const QKV: [&str; 3] = ["q_proj", "k_proj", "v_proj"];
/// The projection of the result.
const O: &str = "o_proj";

/// `o_proj(norm(softmax(q·kᵀ/√d)·v))`; the sub-norm exists in BitNet models only.
#[derive(Clone)]
pub struct Attention {
    /// `q_proj`, `k_proj` and `v_proj`.
    qkv_proj: Arc<dyn Projections>,
    o_proj: Arc<dyn Projections>,
    sub_norm: Option<RmsNorm>,
    spec: AttentionSpec,
}

/// What the tokens of one forward pass attend to.
#[derive(Debug)]
pub enum Context<'a> {
    /// What the cache holds and themselves: their keys and values go through it.
    Cache(LayerCache<'a>),
    /// Each to those of its own sequence: the rows of the batch, of one token each, are so many tokens of each sequence, one
    /// sequence after the other, and their keys and values go through the cache of that.
    Sequences {
        /// The caches, each of one sequence, and the numbers of tokens.
        sequences: Vec<(LayerCache<'a>, usize)>,
        /// Of the tokens.
        adapters: RowAdapters<'a>,
    },
    /// One another.
    Own {
        /// Token `i` of the flattened (batch, seq) sees the positions of its row from `starts[i]` to its own, all of them from
        /// 0 if there are no starts.
        starts: &'a [usize],
        /// Of the gradients' products.
        backward: Precision,
    },
}

impl<'a> Context<'a> {
    /// The adapters of the rows of the batch.
    pub(super) fn adapters(&self) -> RowAdapters<'a> {
        match self {
            Self::Cache(cache) => cache.adapters(),
            Self::Sequences { adapters, .. } => *adapters,
            Self::Own { .. } => RowAdapters::NONE,
        }
    }
}

/// The sizes of an [`Attention`].
#[derive(Clone, Copy, Debug)]
pub struct AttentionSpec {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Whether the projections have biases.
    pub bias: bool,
}

impl Attention {
    /// Loads the four projections; `sub_norm` is loaded by the caller, who knows its name.
    pub fn load(
        spec: AttentionSpec,
        sub_norm: Option<RmsNorm>,
        linears: &dyn LinearFactory,
        vb: VarBuilder,
    ) -> Result<Self> {
        let AttentionSpec { hidden_size, heads, kv_heads, head_dim, bias } = spec;
        let linear =
            |name, in_features, out_features| LinearSpec { name, in_features, out_features, bias };
        let [q, k, v] = QKV;
        let qkv = [
            linear(q, hidden_size, heads * head_dim),
            linear(k, hidden_size, kv_heads * head_dim),
            linear(v, hidden_size, kv_heads * head_dim),
        ];
        Ok(Self {
            qkv_proj: linears.linears(&qkv, &vb)?,
            o_proj: linears.linears(&[linear(O, heads * head_dim, hidden_size)], &vb)?,
            sub_norm,
            spec,
        })
    }

    /// The same layer with adapters beside its projections, which are shared.
    pub(super) fn adapted(&self, adaptation: &BlockAdaptation) -> Self {
        let weight = adaptation.norm(&["self_attn.attn_sub_norm", "self_attn.inner_attn_ln"]);
        Self {
            qkv_proj: beside_all(&self.qkv_proj, adaptation.pairs_of(QKV)),
            o_proj: beside_all(&self.o_proj, adaptation.pairs_of([O])),
            sub_norm: self.sub_norm.as_ref().map(|norm| norm.replaced(weight)),
            spec: self.spec,
        }
    }

    /// `norm(x)` (batch, seq, hidden_size) → (batch, seq, hidden_size).
    pub fn forward(
        &self,
        x: &Tensor,
        norm: &RmsNorm,
        angles: &Angles,
        context: Context<'_>,
    ) -> Result<Tensor> {
        let AttentionSpec { heads, kv_heads, head_dim, .. } = self.spec;
        let (batch, seq, _) = x.dims3()?;
        let adapters = context.adapters();
        let [q, k, v] = project((&*self.qkv_proj, QKV), x, Some(norm), adapters)?;
        let q = angles.rotate(&q, heads)?; // (batch, seq, heads, head_dim)
        let k = angles.rotate(&k, kv_heads)?; // (batch, seq, kv_heads, head_dim)
        let y = match context {
            Context::Cache(cache) => {
                let v = v.reshape((batch, seq, kv_heads, head_dim))?;
                attend(&q, &k, &v, cache)?.reshape((batch, seq, heads * head_dim))?
            }
            Context::Sequences { sequences, .. } => {
                let mut first = 0;
                let parts = sequences.into_iter().map(|(cache, len)| {
                    first += len;
                    (cache, first - len, len)
                });
                let part = |x: &Tensor, first, len, heads| {
                    x.narrow(0, first, len)?.reshape((1, len, heads, head_dim))
                };
                let attend_part = |(cache, first, len)| {
                    let (q, k) = (part(&q, first, len, heads)?, part(&k, first, len, kv_heads)?);
                    attend(&q, &k, &part(&v, first, len, kv_heads)?, cache)
                };
                let parts = map_on(x.device(), parts, attend_part)?;
                Tensor::cat(&parts, 1)?.reshape((batch, seq, heads * head_dim))?
            }
            Context::Own { starts, backward } => ops::self_attention(&q, &k, &v, starts, backward)?,
        };
        let [y] = project((&*self.o_proj, [O]), &y, self.sub_norm.as_ref(), adapters)?;
        Ok(y)
    }
}

/// `q` (batch, seq, heads, head_dim) over what `cache` holds, with `k` and `v` (batch, seq, kv_heads, head_dim) appended:
/// (batch, seq, heads, head_dim).
fn attend(q: &Tensor, k: &Tensor, v: &Tensor, cache: LayerCache<'_>) -> Result<Tensor> {
    let starts = cache.query_starts(q.dim(1)?);
    let (k, v) = cache.append(&k.transpose(1, 2)?, &v.transpose(1, 2)?)?; // (batch, kv_heads, context, head_dim)
    ops::attention(q, &k, &v, &starts)
}
