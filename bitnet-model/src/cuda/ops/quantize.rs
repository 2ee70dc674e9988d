//! Values on their way to those they are quantized to, and rotations before that.

use candle_core::{CudaStorage, Layout, Result, Shape, backend::BackendStorage, bail};

use super::{Tensor, latent::mean_scale};
use crate::{
    cuda::{
        device::{Gathered, Memory, RowsOf, launch, result, uninitialized},
        launch::Launch,
    },
    quant::{ActivationCodes, Rounding, WeightQuantizer, hadamard_block},
};

/// `x + λ·(q(x) − x)` of a weight.
pub fn blend_weights(
    (latent, layout): (&CudaStorage, &Layout),
    quantizer: WeightQuantizer,
    lambda: f32,
) -> Result<Tensor> {
    let rounding = absmean_rounding("quantize", quantizer)?;
    let device = latent.device();
    let stream = device.cuda_stream();
    let count = layout.shape().elem_count();
    let latent = Gathered::<f32>::contiguous(latent, layout)?;
    let latent = latent.memory(&stream)?;
    let scale = mean_scale(device, &latent, count)?;
    let mut y = uninitialized::<f32>(device, count)?;
    {
        let (scale, y) = (Memory::read(&scale, 0, &stream), Memory::written(&mut y, &stream));
        let from = (latent.address, scale.address);
        let half_up = rounding == Rounding::HalfUp;
        let blend = Launch::blend_weights(from, count, half_up, lambda, y.address);
        // SAFETY: all buffers have the sizes that `Launch` documents, and are held.
        unsafe { launch(device, &blend) }?;
    }
    Ok(result(y, device, layout.shape().clone()))
}

/// The rounding of ternary weights by absolute mean, which alone are there.
pub(super) fn absmean_rounding(op: &str, quantizer: WeightQuantizer) -> Result<Rounding> {
    match quantizer {
        WeightQuantizer::Absmean(rounding) => Ok(rounding),
        WeightQuantizer::Sign => {
            bail!("{op}: binary weights are quantized on `cpu` only so far: leave out --device")
        }
    }
}

/// `x + λ·(q(x) − x)` of activations, row by row.
pub fn blend_rows(
    (x, layout): (&CudaStorage, &Layout),
    quantizer: ActivationCodes,
    lambda: f32,
) -> Result<Tensor> {
    let device = x.device();
    let stream = device.cuda_stream();
    let x = RowsOf::new("quantize", x, layout)?;
    let (rows, _x) = x.memory(&stream)?;
    let mut y = uninitialized::<f32>(device, layout.shape().elem_count())?;
    {
        let y = Memory::written(&mut y, &stream);
        // SAFETY: as above.
        unsafe { launch(device, &Launch::blend_rows(rows, quantizer, lambda, y.address)) }?;
    }
    Ok(result(y, device, layout.shape().clone()))
}

/// Rows times the orthonormal Hadamard matrix of their width.
pub fn hadamard(x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
    let size = hadamard_block(layout.dims().last().copied().unwrap_or(1));
    if size > Launch::HADAMARD_MOST {
        bail!(
            "hadamard: rotations of {size} values are computed on `cpu` only so far, {} at most on CUDA: leave out --device",
            Launch::HADAMARD_MOST
        );
    }
    let device = x.device();
    let stream = device.cuda_stream();
    let count = layout.shape().elem_count();
    let x = Gathered::<f32>::contiguous(x, layout)?;
    let x = x.memory(&stream)?;
    let mut y = uninitialized::<f32>(device, count)?;
    {
        let y = Memory::written(&mut y, &stream);
        // SAFETY: as above; `size` divides the row.
        unsafe { launch(device, &Launch::hadamard(x.address, (count / size, size), y.address)) }?;
    }
    Ok(result(y, device, layout.shape().clone()))
}
