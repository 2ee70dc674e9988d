//! The gated feed-forward layer.

use std::sync::Arc;

use candle_core::{Module, Result, Tensor, bail};
use candle_nn::VarBuilder;

use super::{LinearFactory, LinearSpec, Projection, Projections, RmsNorm};
use crate::{config::Activation, ops};

/// `down(norm(act(gate(x)) · up(x)))`; the sub-norm exists in BitNet models only.
#[derive(Clone)]
pub struct FeedForward {
    /// `gate_proj` and `up_proj`.
    gate_up_proj: Arc<dyn Projections>,
    down_proj: Projection,
    sub_norm: Option<RmsNorm>,
    act: Activation,
}

/// The sizes and kinds of a [`FeedForward`].
#[derive(Clone, Copy, Debug)]
pub struct FeedForwardSpec {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width between the projections.
    pub intermediate_size: usize,
    /// The gate's activation.
    pub act: Activation,
    /// Whether the projections have biases.
    pub bias: bool,
}

impl FeedForward {
    /// Loads the three projections; `sub_norm` is loaded by the caller, who knows its name.
    pub fn load(
        spec: FeedForwardSpec,
        sub_norm: Option<RmsNorm>,
        linears: &dyn LinearFactory,
        vb: VarBuilder,
    ) -> Result<Self> {
        let FeedForwardSpec { hidden_size, intermediate_size, act, bias } = spec;
        let linear =
            |name, in_features, out_features| LinearSpec { name, in_features, out_features, bias };
        let gate_up = [
            linear("gate_proj", hidden_size, intermediate_size),
            linear("up_proj", hidden_size, intermediate_size),
        ];
        let down = linear("down_proj", intermediate_size, hidden_size);
        Ok(Self {
            gate_up_proj: linears.linears(&gate_up, &vb)?,
            down_proj: linears.linear(down, vb.pp("down_proj"))?,
            sub_norm,
            act,
        })
    }
}

impl Module for FeedForward {
    /// `x` (…, hidden_size) → (…, hidden_size).
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let [gate, up] = &self.gate_up_proj.forward(x)?[..] else {
            bail!("gate_up_proj: there are two projections")
        };
        let mut hidden = ops::gated(gate, up, self.act)?; // (…, intermediate_size)
        if let Some(norm) = &self.sub_norm {
            hidden = norm.forward(&hidden)?;
        }
        self.down_proj.forward(&hidden)
    }
}
