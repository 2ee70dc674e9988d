//! Low-rank adapters beside projections (LoRA, arXiv:2106.09685): `y = base(x) + scale · B(A x)`.
//!
//! The base is whatever a [`LinearFactory`](super::LinearFactory) made, shared and never changed: its product is the one it
//! has without an adapter, bit for bit, and the sum is f32. `x` is what goes into the projection, before it is quantized.

use std::sync::Arc;

use candle_core::{Result, Tensor, bail};

use super::Projections;
use crate::adapter::{LowRank, add_pairs};

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
