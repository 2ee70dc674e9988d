//! `BitLinear`: a projection with ternary weights and int8 activations (arXiv:2402.17764).

use std::sync::Arc;

use candle_core::{DType, Module, Result, Tensor};
use candle_nn::VarBuilder;

use super::{LinearFactory, LinearSpec, Projection, RmsNorm};
use crate::{
    config::{Quantization, ScaleConvention, WeightForm},
    ops::ternary_matmul,
    quant::Rounding,
    storage::with_slice,
    weights::TernaryWeight,
};

/// `y = (int8(x)·codesᵀ) · scale`, after the projection's own norm if it has one.
#[derive(Clone, Debug)]
pub struct BitLinear {
    weight: Arc<TernaryWeight>,
    rounding: Rounding,
    input_norm: Option<RmsNorm>,
}

impl BitLinear {
    /// A projection that rounds activations by `rounding`.
    pub fn new(weight: TernaryWeight, rounding: Rounding, input_norm: Option<RmsNorm>) -> Self {
        Self { weight: Arc::new(weight), rounding, input_norm }
    }

    /// Loads packed codes `weight` (out_features / 4, in_features) u8 with `weight_scale`, or
    /// ternarizes a float `weight` (out_features, in_features); one matrix at a time.
    pub fn load(spec: LinearSpec, quantization: Quantization, vb: VarBuilder) -> Result<Self> {
        let Quantization { weights, rounding, input_norm_eps } = quantization;
        let (out_features, in_features) = (spec.out_features, spec.in_features);
        let refuse = |reason: String| {
            candle_core::Error::Msg(format!("tensor `{}.weight`: {reason}", vb.prefix()))
        };
        let weight = match weights {
            WeightForm::Latent => {
                let shape = (out_features, in_features);
                let latent =
                    vb.get_with_hints_dtype(shape, "weight", Default::default(), DType::F32)?;
                with_slice::<f32, _>(&latent, |latent| {
                    if let Some(at) = latent.iter().position(|w| !w.is_finite()) {
                        let (row, col) = (at / in_features, at % in_features);
                        return Err(refuse(format!("row {row}, column {col} is {}", latent[at])));
                    }
                    Ok(TernaryWeight::from_latent(latent, out_features, in_features, rounding))
                })?
            }
            WeightForm::Packed(convention) => {
                let shape = (out_features.div_ceil(4), in_features);
                let codes =
                    vb.get_with_hints_dtype(shape, "weight", Default::default(), DType::U8)?;
                let scale =
                    vb.get_with_hints_dtype(1, "weight_scale", Default::default(), DType::F32)?;
                let scale = scale.to_vec1::<f32>()?[0];
                if !(scale.is_finite() && scale > 0.) {
                    return Err(refuse(format!("weight_scale is {scale}, not a positive number")));
                }
                let scale = match convention {
                    ScaleConvention::Multiply => scale,
                    ScaleConvention::Divide => 1. / scale,
                };
                with_slice::<u8, _>(&codes, |codes| {
                    TernaryWeight::from_packed(codes, out_features, in_features, scale)
                        .map_err(|e| refuse(e.to_string()))
                })?
            }
        };
        let input_norm = match input_norm_eps {
            Some(eps) => Some(RmsNorm::load(in_features, eps, vb.pp("rms_norm"))?),
            None => None,
        };
        Ok(Self::new(weight, rounding, input_norm))
    }

    /// The packed weight.
    pub fn weight(&self) -> &TernaryWeight {
        &self.weight
    }
}

impl Module for BitLinear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match &self.input_norm {
            Some(norm) => ternary_matmul(&norm.forward(x)?, &self.weight, self.rounding),
            None => ternary_matmul(x, &self.weight, self.rounding),
        }
    }
}

/// The factory of packed inference: every projection is a [`BitLinear`].
#[derive(Clone, Copy, Debug)]
pub struct BitLinears(pub Quantization);

impl LinearFactory for BitLinears {
    fn linear(&self, spec: LinearSpec, vb: VarBuilder) -> Result<Projection> {
        Ok(Arc::new(BitLinear::load(spec, self.0, vb)?))
    }
}
