//! A transformer block, and the last place that reads the model's configuration.

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;

use super::{
    Angles, Attention, Context, FeedForward, LinearFactory, RmsNorm, attention::AttentionSpec,
    feed_forward::FeedForwardSpec,
};
use crate::{adapter::BlockAdaptation, config::Config};

/// `x + attention(norm(x))`, then `x + feed_forward(norm(x))`.
#[derive(Clone)]
pub struct Block {
    input_layernorm: RmsNorm,
    self_attn: Attention,
    post_attention_layernorm: RmsNorm,
    mlp: FeedForward,
}

impl Block {
    /// Loads one block; `vb` stands at `model.layers.N`.
    pub fn load(config: &Config, linears: &dyn LinearFactory, vb: VarBuilder) -> Result<Self> {
        let eps = config.rms_norm_eps;
        let norm = |size, vb| RmsNorm::load(size, eps, vb);
        let (attn_vb, mlp_vb) = (vb.pp("self_attn"), vb.pp("mlp"));
        let (attn_sub_norm, ffn_sub_norm) = match config.sub_norm_names() {
            Some((attn, ffn)) => (
                Some(norm(config.num_attention_heads * config.head_dim, attn_vb.pp(attn))?),
                Some(norm(config.intermediate_size, mlp_vb.pp(ffn))?),
            ),
            None => (None, None),
        };
        let attention = AttentionSpec {
            hidden_size: config.hidden_size,
            heads: config.num_attention_heads,
            kv_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
            bias: config.attention_bias,
        };
        let feed_forward = FeedForwardSpec {
            hidden_size: config.hidden_size,
            intermediate_size: config.intermediate_size,
            act: config.hidden_act,
            bias: false,
        };
        Ok(Self {
            input_layernorm: norm(config.hidden_size, vb.pp("input_layernorm"))?,
            self_attn: Attention::load(attention, attn_sub_norm, linears, attn_vb)?,
            post_attention_layernorm: norm(config.hidden_size, vb.pp("post_attention_layernorm"))?,
            mlp: FeedForward::load(feed_forward, ffn_sub_norm, linears, mlp_vb)?,
        })
    }

    /// This block with adapters beside it; the weights are shared.
    pub(crate) fn adapted(&self, adaptation: &BlockAdaptation) -> Self {
        let norm = |norm: &RmsNorm, name| norm.replaced(adaptation.norm(&[name]));
        Self {
            input_layernorm: norm(&self.input_layernorm, "input_layernorm"),
            self_attn: self.self_attn.adapted(adaptation),
            post_attention_layernorm: norm(
                &self.post_attention_layernorm,
                "post_attention_layernorm",
            ),
            mlp: self.mlp.adapted(adaptation),
        }
    }

    /// `x` (batch, seq, hidden_size) → (batch, seq, hidden_size).
    pub fn forward(&self, x: &Tensor, angles: &Angles, context: Context<'_>) -> Result<Tensor> {
        let adapters = context.adapters();
        let x = (x + self.self_attn.forward(x, &self.input_layernorm, angles, context)?)?;
        &x + self.mlp.forward_normed(&x, &self.post_attention_layernorm, adapters)?
    }

    /// The feed-forward layer by itself, for parity checks.
    pub fn feed_forward(&self) -> &FeedForward {
        &self.mlp
    }
}
