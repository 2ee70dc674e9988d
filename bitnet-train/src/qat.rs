//! Quantization-aware training as a linear factory: latent f32 weights, quantized in every forward
//! pass by the very code that packs them for inference, trained straight through:
//! `dW = dyᵀ·x_q`, `dx = dy·W_q`.

use std::sync::Arc;

use bitnet_model::{
    kernels::TileFormat,
    nn::{LinearFactory, LinearSpec, Projection},
    ops::dense_matmul::{backward_weight, backward_x},
    quant::Rounding,
    storage::{contiguous, with_slice},
    weights::{TernaryWeight, quantized_activations, ternary_product},
};
use candle_core::{CpuStorage, CustomOp2, DType, Layout, Module, Result, Shape, Tensor, bail};
use candle_nn::{Init, VarBuilder};

/// A BitLinear whose weight is a trainable master.
#[derive(Clone, Debug)]
pub struct QatLinear {
    latent: Tensor,
    rounding: Rounding,
}

impl QatLinear {
    /// `latent` (out_features, in_features) f32.
    pub fn new(latent: Tensor, rounding: Rounding) -> Self {
        Self { latent, rounding }
    }
}

impl Module for QatLinear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (out_features, in_features) = self.latent.dims2()?;
        let mut shape = x.dims().to_vec();
        match shape.last_mut() {
            Some(last) if *last == in_features => *last = out_features,
            _ => bail!("qat-matmul: x {:?} does not fit {:?}", x.shape(), self.latent.shape()),
        }
        x.reshape(((), in_features))?
            .apply_op2(&self.latent, QatMatmul { rounding: self.rounding })?
            .reshape(shape)
    }
}

/// The factory of quantization-aware training.
#[derive(Clone, Copy, Debug)]
pub struct QatLinears {
    /// Of activations and weights.
    pub rounding: Rounding,
}

impl LinearFactory for QatLinears {
    fn linear(&self, spec: LinearSpec, vb: VarBuilder) -> Result<Projection> {
        if spec.bias {
            bail!("{}: quantized projections have no bias", vb.prefix())
        }
        let shape = (spec.out_features, spec.in_features);
        let init = Init::Randn { mean: 0., stdev: 0.02 };
        let latent = vb.get_with_hints_dtype(shape, "weight", init, DType::F32)?;
        Ok(Arc::new(QatLinear::new(latent, self.rounding)))
    }
}

/// `y = int8(x)·ternary(latent)ᵀ`, integers and one rescale, exactly as packed inference computes it.
struct QatMatmul {
    rounding: Rounding,
}

impl CustomOp2 for QatMatmul {
    fn name(&self) -> &'static str {
        "qat-matmul"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        latent: &CpuStorage,
        latent_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (tokens, _) = x_layout.shape().dims2()?;
        let (out_features, in_features) = latent_layout.shape().dims2()?;
        let x = contiguous::<f32>(x, x_layout)?;
        let latent = contiguous::<f32>(latent, latent_layout)?;
        let weight = TernaryWeight::from_latent(
            &latent,
            (out_features, in_features),
            self.rounding,
            TileFormat::TwoBit,
        );
        let y = ternary_product(&x, &[weight], self.rounding);
        Ok((CpuStorage::F32(y), (tokens, out_features).into()))
    }

    /// Both gradients use the quantized operands; rounding and clamping pass them unchanged.
    fn bwd(
        &self,
        x: &Tensor,
        latent: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (out_features, in_features) = latent.dims2()?;
        let weight = with_slice::<f32, _>(latent, |latent| {
            let weight = TernaryWeight::from_latent(
                latent,
                (out_features, in_features),
                self.rounding,
                TileFormat::TwoBit,
            );
            Tensor::from_vec(weight.dequantize(), (out_features, in_features), x.device())
        })?;
        let x = with_slice::<f32, _>(x, |values| {
            let quantized = quantized_activations(values, in_features, self.rounding);
            Tensor::from_vec(quantized, x.shape(), x.device())
        })?;
        Ok((Some(backward_x(dy, &weight)?), Some(backward_weight(dy, &x)?)))
    }
}
