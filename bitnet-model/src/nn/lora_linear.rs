//! Low-rank adapters beside a projection (LoRA, arXiv:2106.09685): `y = base(x) + scale · B(A x)`.
//!
//! The base is whatever a [`LinearFactory`](super::LinearFactory) made, shared and never changed: its product is the one it
//! has without an adapter, bit for bit, and the sum is f32. `x` is what goes into the projection, before it is quantized.

use std::sync::Arc;

use candle_core::{Module, Result, Tensor, bail};

use super::{Projection, Projections};
use crate::ops::dense_matmul;

/// The pair of matrices that an adapter adds to one projection.
#[derive(Clone, Debug)]
pub struct LowRank {
    lora_a: Tensor,
    lora_b: Tensor,
    scale: f64,
}

impl LowRank {
    /// `lora_a` (rank, in_features) and `lora_b` (out_features, rank), both f32; they train if they are variables. `scale`
    /// multiplies their product: `alpha / rank`, or `alpha / √rank` for rsLoRA.
    ///
    /// # Errors
    /// Matrices of different ranks.
    pub fn new(lora_a: Tensor, lora_b: Tensor, scale: f64) -> Result<Self> {
        let ((rank, _), (_, rank_b)) = (lora_a.dims2()?, lora_b.dims2()?);
        if rank != rank_b {
            bail!("lora_A {:?} and lora_B {:?} differ in rank", lora_a.shape(), lora_b.shape());
        }
        Ok(Self { lora_a, lora_b, scale })
    }

    /// `A` (rank, in_features).
    pub fn lora_a(&self) -> &Tensor {
        &self.lora_a
    }

    /// `B` (out_features, rank).
    pub fn lora_b(&self) -> &Tensor {
        &self.lora_b
    }

    /// What multiplies the product of the two.
    pub fn scale(&self) -> f64 {
        self.scale
    }

    /// Bytes of the two matrices.
    pub fn bytes(&self) -> usize {
        (self.lora_a.elem_count() + self.lora_b.elem_count()) * size_of::<f32>()
    }

    /// The change of the projection's weight, `scale · B·A`: (out_features, in_features) f32.
    pub fn weight_delta(&self) -> Result<Tensor> {
        dense_matmul(&self.lora_b, &self.lora_a.t()?.contiguous()?)? * self.scale
    }
}

impl Module for LowRank {
    /// `x` (…, in_features) f32 → `scale · B(A x)` (…, out_features) f32. Every row's bits are its own.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        // The scale goes to the narrow side.
        let inner = (dense_matmul(x, &self.lora_a)? * self.scale)?; // (…, rank)
        dense_matmul(&inner, &self.lora_b)
    }
}

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

/// `y + Σ pair(x)`.
pub(super) fn add_pairs(y: Tensor, x: &Tensor, pairs: &[LowRank]) -> Result<Tensor> {
    pairs.iter().try_fold(y, |y, pair| y + pair.forward(x)?)
}
