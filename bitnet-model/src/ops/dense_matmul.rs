//! `y = x·Wᵀ` with dense weights, in an order of summation that is fixed per output element.
//!
//! Candle's own matmul picks its blocking by shape, so a row's last bits change with the number of
//! rows beside it. Here they do not: see [`Kernel::matmul_nt`](crate::kernels::Kernel::matmul_nt).

use std::ops::Range;

use candle_core::{CpuStorage, CustomOp2, DType, Layout, Result, Shape, Tensor, bail};
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

use super::{PARALLEL_ELEMENTS, for_each_chunk};
use crate::{
    kernels::{self, DenseWeights, Matrix},
    storage::{contiguous, with_slice},
    threads,
};

/// `x` (…, in_features) f32 times the transpose of `weight` (out_features, in_features) f32 or
/// bf16: (…, out_features) f32. Differentiable in both when `weight` is f32.
pub fn dense_matmul(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (out_features, in_features) = weight.dims2()?;
    let mut shape = x.dims().to_vec();
    match shape.last_mut() {
        Some(last) if *last == in_features => *last = out_features,
        _ => bail!("dense-matmul: x {:?} does not fit weight {:?}", x.shape(), weight.shape()),
    }
    x.reshape(((), in_features))?.apply_op2(weight, DenseMatmul)?.reshape(shape)
}

struct DenseMatmul;

impl CustomOp2 for DenseMatmul {
    fn name(&self) -> &'static str {
        "dense-matmul"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (tokens, k) = x_layout.shape().dims2()?;
        let (out_features, _) = weight_layout.shape().dims2()?;
        let x = contiguous::<f32>(x, x_layout)?;
        let y = match weight {
            CpuStorage::BF16(_) => {
                let weight = contiguous::<half::bf16>(weight, weight_layout)?;
                let bits: &[u16] = weight.reinterpret_cast();
                let rows = |r: Range<usize>| {
                    DenseWeights::Bf16(Matrix::new(&bits[r.start * k..r.end * k], r.len(), k))
                };
                matmul(&x, rows, tokens, out_features, k)
            }
            _ => {
                let weight = contiguous::<f32>(weight, weight_layout)?;
                matmul(&x, f32_rows(&weight, k), tokens, out_features, k)
            }
        };
        Ok((CpuStorage::F32(y), (tokens, out_features).into()))
    }

    /// `dx = dy·W`, and `dW = dyᵀ·x` unless the weight is frozen.
    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let dx = backward_x(dy, &weight.detach().to_dtype(DType::F32)?)?;
        let dweight = match weight.track_op() {
            true if weight.dtype() != DType::F32 => {
                bail!("dense-matmul: only an f32 weight can be trained, not {:?}", weight.dtype())
            }
            true => Some(backward_weight(dy, x)?),
            false => None,
        };
        Ok((Some(dx), dweight))
    }
}

/// `dx = dy·W` for `dy` (tokens, out_features) and `weight` (out_features, in_features), both f32.
pub fn backward_x(dy: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let ((tokens, n), (_, k)) = (dy.dims2()?, weight.dims2()?);
    let dx = with_slice::<f32, _>(dy, |dy| {
        with_slice::<f32, _>(weight, |weight| {
            let columns = transpose(weight, k);
            Ok(matmul(dy, f32_rows(&columns, n), tokens, k, n))
        })
    })?;
    Tensor::from_vec(dx, (tokens, k), dy.device())
}

/// `dW = dyᵀ·x` for `dy` (tokens, out_features) and `x` (tokens, in_features), both f32.
pub fn backward_weight(dy: &Tensor, x: &Tensor) -> Result<Tensor> {
    /// Tokens of one partial product: sixty-four columns of them fit the second-level cache.
    const TOKENS: usize = 512;
    let (n, k) = (dy.dim(1)?, x.dim(1)?);
    let mut total = vec![0f32; n * k];
    with_slice::<f32, _>(dy, |dy| {
        with_slice::<f32, _>(x, |x| {
            for (dy, x) in dy.chunks(TOKENS * n).zip(x.chunks(TOKENS * k)) {
                let (dy, x) = (transpose(dy, n), transpose(x, k));
                let tokens = dy.len() / n;
                let part = matmul(&dy, f32_rows(&x, tokens), n, k, tokens);
                total.par_iter_mut().zip(part).for_each(|(total, part)| *total += part);
            }
            Ok(())
        })
    })?;
    Tensor::from_vec(total, (n, k), dy.device())
}

/// Hands out rows of `k` values.
fn f32_rows<'a>(weight: &'a [f32], k: usize) -> impl Fn(Range<usize>) -> DenseWeights<'a> + Sync {
    move |r| DenseWeights::F32(Matrix::new(&weight[r.start * k..r.end * k], r.len(), k))
}

/// (rows, cols) → (cols, rows).
fn transpose(x: &[f32], cols: usize) -> Vec<f32> {
    /// Columns of one task; a cache line of each row.
    const BLOCK: usize = 16;
    let rows = x.len() / cols;
    let mut out = vec![0f32; x.len()];
    out.par_chunks_mut(BLOCK * rows).enumerate().for_each(|(block, out)| {
        for (row, x) in x.chunks(cols).enumerate() {
            let x = &x[block * BLOCK..][..out.len() / rows];
            for (col, x) in x.iter().enumerate() {
                out[col * rows + row] = *x;
            }
        }
    });
    out
}

/// Output features of one block: these rows of the weight stay in cache while tokens pass.
const OUT_BLOCK: usize = 64;
/// Tokens of one task.
const TOKEN_BLOCK: usize = 32;

/// `x` (tokens, k) times the transpose of the n rows that `weight` hands out: (tokens, n).
fn matmul<'a>(
    x: &[f32],
    weight: impl Fn(Range<usize>) -> DenseWeights<'a> + Sync,
    tokens: usize,
    n: usize,
    k: usize,
) -> Vec<f32> {
    let kernel = kernels::active();
    let mut y = vec![0f32; tokens * n];
    if tokens >= 2 * TOKEN_BLOCK {
        // Many tokens: a task owns whole rows of `y`.
        for_each_chunk(&mut y, TOKEN_BLOCK * n, x.len(), |block, y| {
            let rows = y.len() / n;
            let x = Matrix::new(&x[block * TOKEN_BLOCK * k..], rows, k);
            for first in (0..n).step_by(OUT_BLOCK) {
                let last = n.min(first + OUT_BLOCK);
                kernel.matmul_nt(x, weight(first..last), &mut y[first..], n);
            }
        });
    } else {
        // Few tokens: a task owns a block of output features.
        let x = Matrix::new(x, tokens, k);
        let width = if tokens * n * k < PARALLEL_ELEMENTS { n } else { OUT_BLOCK };
        let cuts: Vec<usize> = (0..n).step_by(width.max(1)).chain([n]).collect();
        threads::for_each_block(&mut y, tokens.max(1), &cuts, |(_, j), mut block| {
            let width = cuts[j + 1] - cuts[j];
            let mut out = vec![0f32; tokens * width];
            kernel.matmul_nt(x, weight(cuts[j]..cuts[j + 1]), &mut out, width);
            out.chunks(width).enumerate().for_each(|(i, out)| block.row(i).copy_from_slice(out));
        });
    }
    y
}
