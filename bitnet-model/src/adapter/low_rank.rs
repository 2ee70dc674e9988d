//! One low-rank pair: `scale · B(A x)` (LoRA, arXiv:2106.09685).

use candle_core::{Device, Module, Result, Tensor, bail};

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

    /// The same pair on `device`.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        let (lora_a, lora_b) = (self.lora_a.to_device(device)?, self.lora_b.to_device(device)?);
        Ok(Self { lora_a, lora_b, scale: self.scale })
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

/// What each pair makes of `x`.
pub(super) fn products(x: &Tensor, pairs: &[LowRank]) -> impl Iterator<Item = Result<Tensor>> {
    pairs.iter().map(move |pair| pair.forward(x))
}

/// `y` and what the pairs make of `x`, summed in their order.
pub(crate) fn add_pairs(y: Tensor, x: &Tensor, pairs: &[LowRank]) -> Result<Tensor> {
    products(x, pairs).try_fold(y, |y, product| y + product?)
}
