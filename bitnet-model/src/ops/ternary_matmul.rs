//! `TernaryMatmul`: int8 activations times packed ternary weights, one matrix or several with the same inputs.
//!
//! Candle has no i8 dtype, so quantized activations cannot travel between ops: one op quantizes,
//! multiplies in integers and rescales.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use crate::{
    kernels::{self, tile::ROWS},
    quant::ActivationCodes,
    storage::{contiguous, with_slice},
    weights::{TernaryWeight, ternary_product},
};

/// `x` (…, in_features) f32, quantized to integers per row, times the transposes of `weights`, matrices of the same inputs
/// stacked on one another: (…, Σ out_features) f32. The gradient passes straight through the quantization of `x`; the
/// weights are frozen.
pub fn ternary_matmul(
    x: &Tensor,
    weights: &Arc<[TernaryWeight]>,
    quantizer: impl Into<ActivationCodes>,
) -> Result<Tensor> {
    let quantizer = quantizer.into();
    let mut shape = x.dims().to_vec();
    let in_features = shape.last().copied().unwrap_or(0);
    if let Some(weight) = weights.iter().find(|weight| weight.in_features() != in_features) {
        let (rows, cols) = (weight.out_features(), weight.in_features());
        bail!("ternary-matmul: x {:?} does not fit a weight of {rows} × {cols}", x.shape());
    }
    if let Some(last) = shape.last_mut() {
        *last = weights.iter().map(TernaryWeight::out_features).sum();
    }
    x.reshape(((), in_features))?
        .apply_op1(TernaryMatmul { weights: weights.clone(), quantizer })?
        .reshape(shape)
}

/// The op behind [`ternary_matmul`].
struct TernaryMatmul {
    weights: Arc<[TernaryWeight]>,
    quantizer: ActivationCodes,
}

impl TernaryMatmul {
    fn out_features(&self) -> usize {
        self.weights.iter().map(TernaryWeight::out_features).sum()
    }
}

impl CustomOp1 for TernaryMatmul {
    fn name(&self) -> &'static str {
        "ternary-matmul"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (tokens, _) = layout.shape().dims2()?;
        let x = contiguous::<f32>(x, layout)?;
        let y = ternary_product(&x, &self.weights, self.quantizer);
        Ok((CpuStorage::F32(y), (tokens, self.out_features()).into()))
    }

    /// `dx = Σ dy·W`: sixteen rows of W are decoded at a time, never a whole matrix.
    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        /// Tokens whose gradients share one decoded block.
        const TOKENS: usize = 64;
        let (n, (_, k)) = (self.out_features(), x.dims2()?);
        let kernel = kernels::active();
        let dx = with_slice::<f32, _>(dy, |dy| {
            let mut dx = vec![0f32; x.elem_count()];
            dx.par_chunks_mut(TOKENS * k).zip(dy.par_chunks(TOKENS * n)).for_each(|(dx, dy)| {
                let mut block = vec![0f32; ROWS * k];
                let mut first = 0;
                for weight in self.weights.iter() {
                    for band in 0..weight.out_features().div_ceil(ROWS) {
                        let rows = ROWS.min(weight.out_features() - band * ROWS);
                        weight.decode_band(band, &mut block[..rows * k]);
                        for (dx, dy) in dx.chunks_mut(k).zip(dy.chunks(n)) {
                            for (row, dy) in block[..rows * k].chunks(k).zip(&dy[first..]) {
                                kernel.axpy(*dy, row, dx);
                            }
                        }
                        first += rows;
                    }
                }
            });
            Ok(dx)
        })?;
        Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
    }
}
