//! `TernaryMatmul`: int8 activations times packed ternary weights.
//!
//! Candle has no i8 dtype, so quantized activations cannot travel between ops: one op quantizes,
//! multiplies in integers and rescales.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use crate::{
    kernels::{self, tile::ROWS},
    quant::Rounding,
    storage::{contiguous, with_slice},
    weights::{TernaryWeight, ternary_product},
};

/// `x` (…, in_features) f32, quantized to int8 per row, times the transpose of `weight`:
/// (…, out_features) f32. The gradient passes straight through the quantization of `x`; the weight
/// is frozen.
pub fn ternary_matmul(
    x: &Tensor,
    weight: &Arc<TernaryWeight>,
    rounding: Rounding,
) -> Result<Tensor> {
    let mut shape = x.dims().to_vec();
    match shape.last_mut() {
        Some(last) if *last == weight.in_features() => *last = weight.out_features(),
        _ => bail!(
            "ternary-matmul: x {:?} does not fit a weight of {} × {}",
            x.shape(),
            weight.out_features(),
            weight.in_features()
        ),
    }
    x.reshape(((), weight.in_features()))?
        .apply_op1(TernaryMatmul { weight: weight.clone(), rounding })?
        .reshape(shape)
}

/// The op behind [`ternary_matmul`].
struct TernaryMatmul {
    weight: Arc<TernaryWeight>,
    rounding: Rounding,
}

impl CustomOp1 for TernaryMatmul {
    fn name(&self) -> &'static str {
        "ternary-matmul"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (tokens, _) = layout.shape().dims2()?;
        let x = contiguous::<f32>(x, layout)?;
        let y = ternary_product(&x, &self.weight, self.rounding);
        Ok((CpuStorage::F32(y), (tokens, self.weight.out_features()).into()))
    }

    /// `dx = dy·W`: sixteen rows of W are decoded at a time, never the whole matrix.
    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        /// Tokens whose gradients share one decoded block.
        const TOKENS: usize = 64;
        let (n, k) = (self.weight.out_features(), self.weight.in_features());
        let kernel = kernels::active();
        let dx = with_slice::<f32, _>(dy, |dy| {
            let mut dx = vec![0f32; dy.len() / n * k];
            dx.par_chunks_mut(TOKENS * k).zip(dy.par_chunks(TOKENS * n)).for_each(|(dx, dy)| {
                let mut block = vec![0f32; ROWS * k];
                for band in 0..n.div_ceil(ROWS) {
                    let rows = ROWS.min(n - band * ROWS);
                    self.weight.decode_band(band, &mut block[..rows * k]);
                    for (dx, dy) in dx.chunks_mut(k).zip(dy.chunks(n)) {
                        for (row, dy) in block[..rows * k].chunks(k).zip(&dy[band * ROWS..]) {
                            kernel.axpy(*dy, row, dx);
                        }
                    }
                }
            });
            Ok(dx)
        })?;
        Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
    }
}
