//! `TernaryMatmul`: int8 activations times packed ternary weights, one matrix or several with the same inputs.
//!
//! Candle has no i8 dtype, so quantized activations cannot travel between ops: one op quantizes,
//! multiplies in integers and rescales.

use std::{ops::Range, sync::Arc};

use candle_core::{CpuStorage, CustomOp1, CustomOp2, D, Layout, Result, Shape, Tensor, bail};

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;

use super::{
    gemm::{Factor, Precision, TernaryRows, gemm, gemm_add, plain},
    rms_norm::RmsNorm,
};
#[cfg(feature = "cuda")]
use crate::cuda;
use crate::{
    activations::{QuantizedActivations, SharedActivations},
    kernels::{self, tile::TileFormat},
    quant::{ActivationCodes, Rounding},
    storage::{Rows, contiguous},
    weights::{TernaryWeight, matmul},
};

/// How a [`ternary_matmul`] quantizes its input, and multiplies backward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TernaryProduct {
    /// The input's quantizer.
    pub input: ActivationCodes,
    /// Of the product of the backward pass: in bfloat16 the incoming gradients are rounded, ternary weights are what they
    /// are.
    pub backward: Precision,
}

impl From<ActivationCodes> for TernaryProduct {
    /// With gradients in single precision.
    fn from(input: ActivationCodes) -> Self {
        Self { input, backward: Precision::F32 }
    }
}

impl From<Rounding> for TernaryProduct {
    /// int8, with gradients in single precision.
    fn from(rounding: Rounding) -> Self {
        ActivationCodes::from(rounding).into()
    }
}

/// `x` (…, in_features) f32, quantized to integers per row, times the transposes of `weights`, matrices of the same inputs
/// stacked on one another: (…, Σ out_features) f32. The gradient passes straight through the quantization of `x`; the
/// weights are frozen.
pub fn ternary_matmul(
    x: &Tensor,
    weights: &Arc<[TernaryWeight]>,
    product: impl Into<TernaryProduct>,
) -> Result<Tensor> {
    product_of(x, weights, 0..weights.len(), product.into(), &SharedActivations::default())
}

/// As [`ternary_matmul`], by matrix `index` of `weights` alone: (…, out_features). Several products of one input share its
/// integers, and their gradients are whole tensors, where views into a stacked result would each have one of its size.
pub fn ternary_matmul_part(
    x: &Tensor,
    weights: &Arc<[TernaryWeight]>,
    index: usize,
    product: impl Into<TernaryProduct>,
    input: &SharedActivations,
) -> Result<Tensor> {
    product_of(x, weights, index..index + 1, product.into(), input)
}

/// [`ternary_matmul`] of what [`rms_norm`](super::rms_norm()) makes of `x` with a weight and ε; records no gradients. On CUDA norm
/// and quantization are one launch.
pub fn normed_ternary_matmul(
    x: &Tensor,
    (norm, eps): (&Tensor, f64),
    weights: &Arc<[TernaryWeight]>,
    product: impl Into<TernaryProduct>,
) -> Result<Tensor> {
    let (weights, part) = (fitting(x, weights)?.clone(), 0..weights.len());
    let (product, input) = (product.into(), SharedActivations::default());
    let product = TernaryMatmul { weights, part, product, input };
    x.apply_op2(norm, NormedProduct { norm: RmsNorm { eps: eps as f32 }, product })
}

fn product_of(
    x: &Tensor,
    weights: &Arc<[TernaryWeight]>,
    part: Range<usize>,
    product: TernaryProduct,
    input: &SharedActivations,
) -> Result<Tensor> {
    let (weights, input) = (fitting(x, weights)?.clone(), input.clone());
    x.apply_op1(TernaryMatmul { weights, part, product, input })
}

/// The weights, if all fit `x`.
fn fitting<'a>(x: &Tensor, weights: &'a Arc<[TernaryWeight]>) -> Result<&'a Arc<[TernaryWeight]>> {
    let in_features = x.dim(D::Minus1)?;
    match weights.iter().find(|weight| weight.in_features() != in_features) {
        None => Ok(weights),
        Some(weight) => {
            let (rows, cols) = (weight.out_features(), weight.in_features());
            bail!("ternary-matmul: x {:?} does not fit a weight of {rows} × {cols}", x.shape())
        }
    }
}

/// The op behind [`ternary_matmul`].
struct TernaryMatmul {
    weights: Arc<[TernaryWeight]>,
    /// Those that are multiplied.
    part: Range<usize>,
    product: TernaryProduct,
    input: SharedActivations,
}

impl TernaryMatmul {
    fn weights(&self) -> &[TernaryWeight] {
        &self.weights[self.part.clone()]
    }

    /// What activations are padded for.
    fn format(&self) -> TileFormat {
        self.weights().first().map_or_else(Default::default, TernaryWeight::format)
    }

    /// The shape of the result.
    fn shape(&self, x: &Layout) -> Shape {
        let mut shape = x.dims().to_vec();
        if let Some(last) = shape.last_mut() {
            *last = self.weights().iter().map(TernaryWeight::out_features).sum();
        }
        shape.into()
    }
}

impl CustomOp1 for TernaryMatmul {
    fn name(&self) -> &'static str {
        "ternary-matmul"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let in_features = layout.dims().last().copied().unwrap_or(0);
        let x = contiguous::<f32>(x, layout)?;
        let quantize =
            || QuantizedActivations::new(&x, in_features, self.product.input, self.format());
        let y = matmul(kernels::active(), self.input.get_or_quantize(quantize), self.weights());
        Ok((CpuStorage::F32(y), self.shape(layout)))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let weights = (&*self.weights, self.part.clone());
        cuda::ops::ternary_product(
            (x, layout),
            None,
            weights,
            self.product.input,
            self.shape(layout),
        )
    }

    crate::no_metal_fwd!(1);

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let (weights, part) = (self.weights.clone(), self.part.clone());
        let (precision, shape) = (self.product.backward, x.shape().clone());
        let dx = dy.detach().apply_op1(Gradient { weights, part, precision, shape })?;
        Ok(Some(dx))
    }
}

/// The op behind [`normed_ternary_matmul`].
struct NormedProduct {
    norm: RmsNorm,
    product: TernaryMatmul,
}

impl CustomOp2 for NormedProduct {
    fn name(&self) -> &'static str {
        "normed-ternary-matmul"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        norm: &CpuStorage,
        norm_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let hidden = self.norm.check(x_layout, norm_layout)?;
        let tokens = x_layout.shape().elem_count().checked_div(hidden).unwrap_or(0);
        let x = Rows::<f32>::new(x, x_layout)?;
        let weight = contiguous::<f32>(norm, norm_layout)?;
        let TernaryMatmul { product, .. } = &self.product;
        let rows = (tokens, hidden);
        let x = QuantizedActivations::of_rows(
            rows,
            product.input,
            self.product.format(),
            |rows, quantize| {
                let mut normed = vec![0.; hidden];
                for row in rows {
                    self.norm.normalize(x.row(row), &weight, &mut normed);
                    quantize(&normed);
                }
            },
        );
        let y = matmul(kernels::active(), &x, self.product.weights());
        Ok((CpuStorage::F32(y), self.product.shape(x_layout)))
    }

    crate::no_metal_fwd!(2);

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_layout: &Layout,
        norm: &CudaStorage,
        norm_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.norm.check(x_layout, norm_layout)?;
        let TernaryMatmul { weights, part, product, .. } = &self.product;
        cuda::ops::ternary_product(
            (x, x_layout),
            Some((norm, norm_layout, self.norm.eps)),
            (weights, part.clone()),
            product.input,
            self.product.shape(x_layout),
        )
    }
}

/// The gradient of the input of a [`TernaryMatmul`] from that of its result.
struct Gradient {
    weights: Arc<[TernaryWeight]>,
    part: Range<usize>,
    precision: Precision,
    shape: Shape,
}

impl CustomOp1 for Gradient {
    fn name(&self) -> &'static str {
        "ternary-gradient"
    }

    fn cpu_fwd(&self, dy: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let mut dx = vec![0f32; self.shape.elem_count()];
        let weights = &self.weights[self.part.clone()];
        backward_x(&contiguous::<f32>(dy, layout)?, weights, self.precision, &mut dx);
        Ok((CpuStorage::F32(dx), self.shape.clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, dy: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let weights = (&*self.weights, self.part.clone());
        let bf16 = self.precision == Precision::Bf16;
        cuda::ops::ternary_gradient(dy, layout, weights, bf16, self.shape.clone())
    }

    crate::no_metal_fwd!(1);
}

/// `dx = Σ scale · dy·codes` for `dy` (tokens, Σ out_features) of stacked matrices; `dx` (tokens, in_features) is
/// overwritten. A block of rows of a matrix is decoded at a time.
///
/// # Panics
/// If a slice has another size.
pub fn backward_x(dy: &[f32], weights: &[TernaryWeight], precision: Precision, dx: &mut [f32]) {
    let n: usize = weights.iter().map(TernaryWeight::out_features).sum();
    let tokens = dy.len().checked_div(n).unwrap_or(0);
    let mut first = 0;
    for weight in weights {
        let (rows, k) = (weight.out_features(), weight.in_features());
        let dy = Factor::depth_inner(n, &dy[first.min(dy.len())..], plain);
        let (shape, w, scale) = ((tokens, k, rows), TernaryRows(weight), weight.scale());
        match first {
            0 => gemm(shape, dy, w, scale, precision, dx),
            _ => gemm_add(shape, dy, w, scale, precision, dx),
        }
        first += rows;
    }
}
