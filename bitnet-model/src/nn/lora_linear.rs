//! Low-rank adapters beside a projection (LoRA, arXiv:2106.09685): `y = base(x) + scale · B(A x)`.
//!
//! The base is whatever a [`LinearFactory`](super::LinearFactory) made, shared and never changed: its product is the one it
//! has without an adapter, bit for bit, and the sum is f32. `x` is what goes into the projection, before it is quantized.

use std::sync::Arc;

use candle_core::{Module, Result, Tensor, bail};

use super::{Projection, Projections};
use crate::adapter::{LowRank, add_pairs};

/// A projection with low-rank pairs beside it.
#[derive(Clone)]
pub struct LoraLinear {
    base: Projection,
    pairs: Vec<LowRank>,
}

impl LoraLinear {
    /// `base` and what is added to it, in this order.
    pub fn new(base: Projection, pairs: Vec<LowRank>) -> Self {
        Self { base, pairs }
    }
}

impl Module for LoraLinear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        add_pairs(self.base.forward(x)?, x, &self.pairs)
    }
}

/// Projections of one input, each with its low-rank pairs beside it.
#[derive(Clone)]
pub struct LoraProjections {
    base: Arc<dyn Projections>,
    pairs: Vec<Vec<LowRank>>,
}

impl LoraProjections {
    /// `pairs`, one list for each projection of `base`, in its order; an empty one adds nothing.
    pub fn new(base: Arc<dyn Projections>, pairs: Vec<Vec<LowRank>>) -> Self {
        Self { base, pairs }
    }
}

impl Projections for LoraProjections {
    fn forward(&self, x: &Tensor) -> Result<Vec<Tensor>> {
        let products = self.base.forward(x)?;
        if products.len() != self.pairs.len() {
            bail!("{} projections, but adapters for {}", products.len(), self.pairs.len());
        }
        let pairs = products.into_iter().zip(&self.pairs);
        pairs.map(|(y, pairs)| add_pairs(y, x, pairs)).collect()
    }
}

/// `base`, with pairs beside it if there are any.
pub(super) fn beside_one(base: &Projection, pairs: &[LowRank]) -> Projection {
    match pairs {
        [] => base.clone(),
        pairs => Arc::new(LoraLinear::new(base.clone(), pairs.to_vec())),
    }
}

/// `base`, with pairs beside its projections if there are any.
pub(super) fn beside_all<const N: usize>(
    base: &Arc<dyn Projections>,
    pairs: [&[LowRank]; N],
) -> Arc<dyn Projections> {
    match pairs.iter().all(|pairs| pairs.is_empty()) {
        true => base.clone(),
        false => {
            Arc::new(LoraProjections::new(base.clone(), pairs.map(<[LowRank]>::to_vec).into()))
        }
    }
}
