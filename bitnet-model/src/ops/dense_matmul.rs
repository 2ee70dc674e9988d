//! `y = x·Wᵀ` with dense weights, in an order of summation that is fixed per output element.
//!
//! Candle's own matmul picks its blocking by shape, so a row's last bits change with the number of
//! rows beside it. Here they do not: see [`Kernel::matmul_nt`](crate::kernels::Kernel::matmul_nt).

use std::ops::Range;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp2, D, DType, Layout, Result, Shape, Tensor, bail};
use half::slice::HalfFloatSliceExt;

use super::{
    PARALLEL_ELEMENTS,
    gemm::{Factor, Precision, gemm, plain},
};
#[cfg(feature = "cuda")]
use crate::cuda;
use crate::{
    kernels::{self, DenseWeights, Matrix},
    storage::{contiguous, with_slice, with_width},
    threads,
};

/// `x` (…, in_features) f32 times the transpose of `weight` (out_features, in_features) f32 or
/// bf16: (…, out_features) f32. Differentiable in both when `weight` is f32.
pub fn dense_matmul(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    x.apply_op2(weight, DenseMatmul)
}

struct DenseMatmul;

impl DenseMatmul {
    /// The shape of the result; refuses a weight that does not fit.
    fn shape(&self, x: &Layout, weight: &Layout) -> Result<Shape> {
        let (out_features, in_features) = weight.shape().dims2()?;
        match with_width(x, in_features, out_features) {
            Some(shape) => Ok(shape),
            None => {
                bail!("dense-matmul: x {:?} does not fit weight {:?}", x.shape(), weight.shape())
            }
        }
    }
}

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
        let shape = self.shape(x_layout, weight_layout)?;
        let (out_features, k) = weight_layout.shape().dims2()?;
        let x = contiguous::<f32>(x, x_layout)?;
        let tokens = shape.elem_count() / out_features.max(1);
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
        Ok((CpuStorage::F32(y), shape))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_layout: &Layout,
        weight: &CudaStorage,
        weight_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let shape = self.shape(x_layout, weight_layout)?;
        cuda::ops::dense_product((x, x_layout), (weight, weight_layout), shape)
    }

    crate::no_metal_fwd!(2);

    /// `dx = dy·W`, and `dW = dyᵀ·x` unless the weight is frozen.
    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let f32_weight = weight.detach().to_dtype(DType::F32)?;
        let dx = backward_x(dy, &f32_weight)?.reshape(x.shape())?;
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

/// `dx = dy·W` for `dy` (…, out_features) and `weight` (out_features, in_features), both f32: (tokens, in_features).
fn backward_x(dy: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (n, k) = weight.dims2()?;
    let tokens = dy.elem_count() / n.max(1);
    #[cfg(feature = "cuda")]
    if dy.device().is_cuda() {
        return cuda::ops::dense_input_gradient(dy, weight, &(tokens, k).into());
    }
    let mut dx = vec![0f32; tokens * k];
    with_slice::<f32, _>(dy, |dy| {
        with_slice::<f32, _>(weight, |weight| {
            let (a, b) = (Factor::depth_inner(n, dy, plain), Factor::index_inner(k, weight, plain));
            gemm((tokens, k, n), a, b, 1., Precision::F32, &mut dx);
            Ok(())
        })
    })?;
    Tensor::from_vec(dx, (tokens, k), dy.device())
}

/// `dW = dyᵀ·x` for `dy` (…, out_features) and `x` (…, in_features), both f32.
fn backward_weight(dy: &Tensor, x: &Tensor) -> Result<Tensor> {
    let (n, k) = (dy.dim(D::Minus1)?, x.dim(D::Minus1)?);
    let tokens = dy.elem_count() / n.max(1);
    #[cfg(feature = "cuda")]
    if dy.device().is_cuda() {
        return cuda::ops::dense_weight_gradient(dy, x, (n, k));
    }
    let mut dweight = vec![0f32; n * k];
    with_slice::<f32, _>(dy, |dy| {
        with_slice::<f32, _>(x, |x| {
            let (a, b) = (Factor::index_inner(n, dy, plain), Factor::index_inner(k, x, plain));
            gemm((n, k, tokens), a, b, 1., Precision::F32, &mut dweight);
            Ok(())
        })
    })?;
    Tensor::from_vec(dweight, (n, k), dy.device())
}

/// Hands out rows of `k` values.
fn f32_rows<'a>(weight: &'a [f32], k: usize) -> impl Fn(Range<usize>) -> DenseWeights<'a> + Sync {
    move |r| DenseWeights::F32(Matrix::new(&weight[r.start * k..r.end * k], r.len(), k))
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
    if tokens >= 2 * TOKEN_BLOCK {
        // Many tokens: a task owns whole rows of `y`.
        return threads::new_chunks(tokens * n, (TOKEN_BLOCK * n).max(1), |block, y| {
            let rows = y.len() / n;
            let x = Matrix::new(&x[block * TOKEN_BLOCK * k..], rows, k);
            for first in (0..n).step_by(OUT_BLOCK) {
                let last = n.min(first + OUT_BLOCK);
                kernel.matmul_nt(x, weight(first..last), &mut y[first..], n);
            }
        });
    }
    // Few tokens: a task owns a block of output features.
    let x = Matrix::new(x, tokens, k);
    let width = if tokens * n * k < PARALLEL_ELEMENTS { n } else { OUT_BLOCK };
    let cuts: Vec<usize> = (0..n).step_by(width.max(1)).chain([n]).collect();
    threads::written_blocks(tokens, tokens.max(1), &cuts, |(_, j), block| {
        let width = cuts[j + 1] - cuts[j];
        let mut out = vec![0f32; tokens * width];
        kernel.matmul_nt(x, weight(cuts[j]..cuts[j + 1]), &mut out, width);
        out.chunks(width).enumerate().for_each(|(i, out)| block.extend(i, out, |x| *x));
    })
}
