//! The product of quantization-aware training: integers forward, straight through backward.

use bitnet_model::{
    kernels::TileFormat,
    ops::dense_matmul::{backward_weight, backward_x},
    quant::{ActivationCodes, WeightQuantizer},
    storage::{contiguous, with_slice},
    weights::{TernaryWeight, quantized_activations, ternary_product},
};
use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};

/// `y = q(x)·q(latent)ᵀ`, exactly as packed inference computes it: `x` (tokens, in_features) and `latent`
/// (out_features, in_features) f32 → (tokens, out_features) f32.
///
/// Both gradients use the quantized operands, `dx = dy·q(latent)` and `dlatent = dyᵀ·q(x)`; rounding and clamping pass
/// them unchanged. A latent that is not tracked gets none.
pub fn qat_matmul(
    x: &Tensor,
    latent: &Tensor,
    weight: WeightQuantizer,
    input: ActivationCodes,
) -> Result<Tensor> {
    x.apply_op2(latent, QatMatmul { weight, input })
}

struct QatMatmul {
    weight: WeightQuantizer,
    input: ActivationCodes,
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
        let shape @ (out_features, _) = latent_layout.shape().dims2()?;
        let x = contiguous::<f32>(x, x_layout)?;
        let latent = contiguous::<f32>(latent, latent_layout)?;
        let weight = TernaryWeight::from_latent(&latent, shape, self.weight, TileFormat::TwoBit);
        let y = ternary_product(&x, &[weight], self.input);
        Ok((CpuStorage::F32(y), (tokens, out_features).into()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        latent: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let shape @ (_, in_features) = latent.dims2()?;
        let weight = with_slice::<f32, _>(latent, |latent| {
            let weight = TernaryWeight::from_latent(latent, shape, self.weight, TileFormat::TwoBit);
            Tensor::from_vec(weight.dequantize(), shape, x.device())
        })?;
        let dx = backward_x(dy, &weight)?;
        if !latent.track_op() {
            return Ok((Some(dx), None));
        }
        let x = with_slice::<f32, _>(x, |values| {
            let quantized = quantized_activations(values, in_features, self.input);
            Tensor::from_vec(quantized, x.shape(), x.device())
        })?;
        Ok((Some(dx), Some(backward_weight(dy, &x)?)))
    }
}
