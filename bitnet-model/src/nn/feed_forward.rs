//! The gated feed-forward layer.

use std::sync::Arc;

use candle_core::{Module, Result, Tensor};
use candle_nn::VarBuilder;

use super::{
    LinearFactory, LinearSpec, Projections, RmsNorm, linear::project, lora_linear::beside_all,
};
use crate::{
    adapter::{BlockAdaptation, RowAdapters},
    config::Activation,
    ops,
};

/// The projections of the input, in the order of their product.
const GATE_UP: [&str; 2] = ["gate_proj", "up_proj"];
/// The projection of what is between.
const DOWN: &str = "down_proj";

/// `down(norm(act(gate(x)) · up(x)))`; the sub-norm exists in BitNet models only.
#[derive(Clone)]
pub struct FeedForward {
    /// `gate_proj` and `up_proj`.
    gate_up_proj: Arc<dyn Projections>,
    down_proj: Arc<dyn Projections>,
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
        let gate_up = GATE_UP.map(|name| linear(name, hidden_size, intermediate_size));
        let down = linear(DOWN, intermediate_size, hidden_size);
        Ok(Self {
            gate_up_proj: linears.linears(&gate_up, &vb)?,
            down_proj: linears.linears(&[down], &vb)?,
            sub_norm,
            act,
        })
    }

    /// The same layer with adapters beside its projections, which are shared.
    pub(super) fn adapted(&self, adaptation: &BlockAdaptation) -> Self {
        let weight = adaptation.norm(&["mlp.ffn_sub_norm", "mlp.ffn_layernorm"]);
        Self {
            gate_up_proj: beside_all(&self.gate_up_proj, adaptation.pairs_of(GATE_UP)),
            down_proj: beside_all(&self.down_proj, adaptation.pairs_of([DOWN])),
            sub_norm: self.sub_norm.as_ref().map(|norm| norm.replaced(weight)),
            act: self.act,
        }
    }

    /// `norm(x)` (batch, seq, hidden_size) → (batch, seq, hidden_size), with the adapters of the batch's rows.
    pub fn forward_normed(
        &self,
        x: &Tensor,
        norm: &RmsNorm,
        adapters: RowAdapters<'_>,
    ) -> Result<Tensor> {
        self.project(x, Some(norm), adapters)
    }

    fn project(
        &self,
        x: &Tensor,
        norm: Option<&RmsNorm>,
        adapters: RowAdapters<'_>,
    ) -> Result<Tensor> {
        let [gate, up] = project((&*self.gate_up_proj, GATE_UP), x, norm, adapters)?;
        let hidden = ops::gated(&gate, &up, self.act)?; // (…, intermediate_size)
        let sub_norm = self.sub_norm.as_ref();
        let [y] = project((&*self.down_proj, [DOWN]), &hidden, sub_norm, adapters)?;
        Ok(y)
    }
}

impl Module for FeedForward {
    /// `x` (…, hidden_size) → (…, hidden_size).
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.project(x, None, RowAdapters::NONE)
    }
}
