//! The product of quantization-aware training: integers forward, straight through backward.

use std::sync::OnceLock;

#[cfg(feature = "cuda")]
use bitnet_model::cuda;
use bitnet_model::{
    activations::{QuantizedActivations, SharedActivations},
    kernels::TileFormat,
    ops::gemm::{Factor, Precision, gemm, plain},
    quant::{ActivationCodes, WeightCodes, WeightQuantizer},
    storage::{contiguous, with_slice, with_width},
    weights::TernaryWeight,
};
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};

/// How a [`qat_matmul`] quantizes, and multiplies backward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QatProduct {
    /// The weight's quantizer.
    pub weight: WeightQuantizer,
    /// The input's.
    pub input: ActivationCodes,
    /// Of the products of the backward pass: in bfloat16 the incoming gradients are rounded, the quantized operands are
    /// what they are.
    pub backward: Precision,
}

/// `y = q(x)·q(latent)ᵀ`, exactly as packed inference computes it: `x` (…, in_features) and `latent`
/// (out_features, in_features) f32 → (…, out_features) f32.
///
/// Both gradients use the quantized operands, `dx = dy·q(latent)` and `dlatent = dyᵀ·q(x)`; rounding and clamping pass
/// them unchanged. A latent that is not tracked gets none.
pub fn qat_matmul(
    x: &Tensor,
    latent: &Tensor,
    product: QatProduct,
    input: &SharedActivations,
) -> Result<Tensor> {
    let op = QatMatmul { product, input: input.clone(), codes: OnceLock::new() };
    x.apply_op2(latent, op)
}

struct QatMatmul {
    product: QatProduct,
    input: SharedActivations,
    /// Of the latent, left by the forward pass for the backward pass.
    codes: OnceLock<WeightCodes>,
}

impl QatMatmul {
    /// The shape of the result; refuses a latent that does not fit.
    fn shape(&self, x: &Layout, latent: &Layout) -> Result<Shape> {
        let shape @ (out_features, in_features) = latent.shape().dims2()?;
        match with_width(x, in_features, out_features) {
            Some(shape) => Ok(shape),
            None => bail!("qat-matmul: x {:?} does not fit {shape:?}", x.shape()),
        }
    }
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
        const FORMAT: TileFormat = TileFormat::TwoBit;
        let y_shape = self.shape(x_layout, latent_layout)?;
        let shape @ (_, in_features) = latent_layout.shape().dims2()?;
        let latent = contiguous::<f32>(latent, latent_layout)?;
        let codes = self.codes.get_or_init(|| self.product.weight.codes(&latent));
        let weight = TernaryWeight::from_codes(&latent, shape, *codes, FORMAT);
        let x = contiguous::<f32>(x, x_layout)?;
        let quantize = || QuantizedActivations::new(&x, in_features, self.product.input, FORMAT);
        let y = weight.product(self.input.get_or_quantize(quantize));
        Ok((CpuStorage::F32(y), y_shape))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_layout: &Layout,
        latent: &CudaStorage,
        latent_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let shape = self.shape(x_layout, latent_layout)?;
        let quantizers = (self.product.weight, self.product.input);
        cuda::ops::latent_product((x, x_layout), (latent, latent_layout), quantizers, shape)
    }

    bitnet_model::no_metal_fwd!(2);

    fn bwd(
        &self,
        x: &Tensor,
        latent: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        #[cfg(feature = "cuda")]
        if dy.device().is_cuda() {
            // Both operands are quantized again: that takes less than the memory to keep them.
            let QatProduct { weight, input, backward } = self.product;
            let bf16 = backward == Precision::Bf16;
            let dx = cuda::ops::latent_input_gradient(dy, latent, (weight, bf16), x.shape())?;
            let of_latent =
                || cuda::ops::latent_weight_gradient(dy, x, (input, bf16), latent.shape());
            return Ok((Some(dx), latent.track_op().then(of_latent).transpose()?));
        }
        let (Some(input), Some(codes)) = (self.input.get(), self.codes.get()) else {
            bail!("{} went backward before forward", self.name())
        };
        let ((n, k), tokens) = (latent.dims2()?, input.tokens());
        let precision = self.product.backward;
        let mut dx = vec![0f32; tokens * k];
        let mut dlatent = latent.track_op().then(|| vec![0f32; n * k]);
        with_slice::<f32, _>(dy, |dy| {
            with_slice::<f32, _>(latent, |latent| {
                let code = |weight: f32, _: usize| f32::from(codes.code(weight));
                let (a, b) =
                    (Factor::depth_inner(n, dy, plain), Factor::index_inner(k, latent, code));
                gemm((tokens, k, n), a, b, codes.scale, precision, &mut dx);
                Ok(())
            })?;
            if let Some(dlatent) = &mut dlatent {
                // x = code / a of its token: the token's factor goes to the gradient, so that the codes stay integers.
                let inverse: Vec<f32> = input.factors().iter().map(|factor| 1. / factor).collect();
                let scaled = |dy: f32, token: usize| dy * inverse[token];
                let code = |code: i8, _: usize| f32::from(code);
                let a = Factor::index_inner(n, dy, scaled);
                let b = Factor::index_inner(input.stride(), input.codes(), code);
                gemm((n, k, tokens), a, b, 1., precision, dlatent);
            }
            Ok(())
        })?;
        let dlatent = dlatent.map(|dlatent| Tensor::from_vec(dlatent, (n, k), x.device()));
        Ok((Some(Tensor::from_vec(dx, x.shape(), x.device())?), dlatent.transpose()?))
    }
}
