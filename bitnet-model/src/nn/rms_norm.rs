//! Root-mean-square norm (arXiv:1910.07467).

use candle_core::{DType, Module, Result, Tensor};
use candle_nn::{Init, VarBuilder};

use crate::ops;

/// `y = x / rms(x) · weight` over the last dimension; f32.
#[derive(Clone, Debug)]
pub struct RmsNorm {
    weight: Tensor,
    eps: f64,
}

impl RmsNorm {
    /// `weight` (size) f32.
    pub fn new(weight: Tensor, eps: f64) -> Self {
        Self { weight, eps }
    }

    /// Loads `weight` (size) as f32.
    pub fn load(size: usize, eps: f64, vb: VarBuilder) -> Result<Self> {
        let weight = vb.get_with_hints_dtype(size, "weight", Init::Const(1.), DType::F32)?;
        Ok(Self::new(weight, eps))
    }

    /// The weight (size), and what is added to the mean square.
    pub(super) fn parameters(&self) -> (&Tensor, f64) {
        (&self.weight, self.eps)
    }

    /// The same norm with another weight, if there is one.
    pub(crate) fn replaced(&self, weight: Option<&Tensor>) -> Self {
        Self { weight: weight.unwrap_or(&self.weight).clone(), eps: self.eps }
    }
}

impl Module for RmsNorm {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::rms_norm(x, &self.weight, self.eps)
    }
}
