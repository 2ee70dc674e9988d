//! Multi-head attention with grouped key/value heads and rotary positions.

use std::sync::Arc;

use candle_core::{Module, Result, Tensor, bail};
use candle_nn::VarBuilder;

use super::{Angles, LinearFactory, LinearSpec, Projection, Projections, RmsNorm};
use crate::{kv_cache::LayerCache, ops};

/// `o_proj(norm(softmax(q·kᵀ/√d)·v))`; the sub-norm exists in BitNet models only.
#[derive(Clone)]
pub struct Attention {
    /// `q_proj`, `k_proj` and `v_proj`.
    qkv_proj: Arc<dyn Projections>,
    o_proj: Projection,
    sub_norm: Option<RmsNorm>,
    spec: AttentionSpec,
}

/// What the tokens of one forward pass attend to.
#[derive(Debug)]
pub enum Context<'a> {
    /// What the cache holds and themselves: their keys and values go through it.
    Cache(LayerCache<'a>),
    /// One another: token `i` of the flattened (batch, seq) sees the positions of its row from `starts[i]` to its own,
    /// all of them from 0 if there are no starts.
    Own(&'a [usize]),
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
        let qkv = [
            linear("q_proj", hidden_size, heads * head_dim),
            linear("k_proj", hidden_size, kv_heads * head_dim),
            linear("v_proj", hidden_size, kv_heads * head_dim),
        ];
        Ok(Self {
            qkv_proj: linears.linears(&qkv, &vb)?,
            o_proj: linears
                .linear(linear("o_proj", heads * head_dim, hidden_size), vb.pp("o_proj"))?,
            sub_norm,
            spec,
        })
    }

    /// `x` (batch, seq, hidden_size) → (batch, seq, hidden_size).
    pub fn forward(&self, x: &Tensor, angles: &Angles, context: Context<'_>) -> Result<Tensor> {
        let AttentionSpec { heads, kv_heads, head_dim, .. } = self.spec;
        let (batch, seq, _) = x.dims3()?;
        let [q, k, v] = &self.qkv_proj.forward(x)?[..] else {
            bail!("qkv_proj: there are three projections")
        };
        let q = angles.rotate(q, heads)?; // (batch, seq, heads, head_dim)
        let k = angles.rotate(k, kv_heads)?.transpose(1, 2)?; // (batch, kv_heads, seq, head_dim)
        let v = v.reshape((batch, seq, kv_heads, head_dim))?.transpose(1, 2)?;
        let y = match context {
            Context::Cache(cache) => {
                let starts = cache.query_starts(seq);
                let (k, v) = cache.append(&k, &v)?; // (batch, kv_heads, context, head_dim)
                ops::attention(&q, &k, &v, &starts)?
            }
            Context::Own(starts) => ops::attention(&q, &k, &v, starts)?,
        };
        let mut y = y.reshape((batch, seq, heads * head_dim))?;
        if let Some(norm) = &self.sub_norm {
            y = norm.forward(&y)?;
        }
        self.o_proj.forward(&y)
    }
}
