//! The product of a projection with its low-rank pair, as one operation: `y = base(x) + s·B(A(dropout(x)))`.
//!
//! ```text
//! h  = dropout(x)·Aᵀ          dh = s·dy·B        dB = s·dyᵀ·h
//! y  = base(x) + s·h·Bᵀ       dA = dhᵀ·dropout(x)
//!                             dx = dx_base + dropout(dh·A)
//! ```
//!
//! All of it goes through the blocked products of [`gemm`](bitnet_model::ops::gemm). Of a ternary base the gradient is
//! decoded from its tiles, and the base has no gradient of its own. What is kept from the forward pass is `h`.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use bitnet_model::{
    activations::{QuantizedActivations, SharedActivations},
    ops::{
        TernaryProduct,
        gemm::{Factor, Precision, gemm, gemm_add, plain},
        ternary_matmul::backward_x,
    },
    storage::{contiguous, with_slice},
    weights::TernaryWeight,
};
use candle_core::{CpuStorage, CustomOp3, D, Layout, Result, Shape, Tensor, bail};

use super::noise::Stream;

/// A trainable pair: `lora_a` (rank, in_features) and `lora_b` (out_features, rank), f32, and what multiplies them.
#[derive(Clone, Debug)]
pub struct TrainedPair {
    /// `A`.
    pub lora_a: Tensor,
    /// `B`.
    pub lora_b: Tensor,
    /// `s`.
    pub scale: f64,
}

/// How a [`low_rank`] is computed in this step.
#[derive(Clone, Copy, Debug)]
pub struct Pass {
    /// What of the input is left out: the rate, and where the randomness comes from.
    pub dropout: Option<(f64, Stream)>,
    /// Of the products of the backward pass.
    pub backward: Precision,
}

/// One matrix of a packed projection.
#[derive(Clone, Debug)]
pub struct TernaryBase {
    /// It and those that are stacked on it.
    pub weights: Arc<[TernaryWeight]>,
    /// Which it is.
    pub index: usize,
    /// How it multiplies.
    pub product: TernaryProduct,
    /// The integers of the input, shared with the others.
    pub input: SharedActivations,
}

/// What came of a [`low_rank`].
#[derive(Clone, Debug)]
pub struct Product {
    /// The result.
    pub y: Tensor,
    /// `h` (tokens, rank), left by the forward pass for the backward pass.
    inner: Arc<OnceLock<Vec<f32>>>,
}

impl Product {
    /// Bytes that it takes.
    pub fn bytes(&self) -> usize {
        let inner = self.inner.get().map_or(0, Vec::len);
        (self.y.elem_count() + inner) * size_of::<f32>()
    }
}

/// `s·B(A(dropout(x)))`, on top of the product of `base` if there is one: `x` (…, in_features) f32 →
/// (…, out_features) f32. Differentiable in `x`, `A` and `B`; matrices that are not tracked get no gradient.
///
/// # Errors
/// Shapes that do not fit.
pub fn low_rank(
    x: &Tensor,
    pair: &TrainedPair,
    base: Option<TernaryBase>,
    pass: Pass,
    known: Option<Product>,
) -> Result<Product> {
    let ((rank, k), (n, rank_b)) = (pair.lora_a.dims2()?, pair.lora_b.dims2()?);
    let base_shape = base.as_ref().map(|base| {
        let weight = &base.weights[base.index];
        (weight.out_features(), weight.in_features())
    });
    if rank != rank_b || x.dim(D::Minus1)? != k || base_shape.is_some_and(|shape| shape != (n, k)) {
        bail!(
            "low-rank: x {:?}, A {:?} and B {:?} do not fit one another and a base {base_shape:?}",
            x.shape(),
            pair.lora_a.shape(),
            pair.lora_b.shape()
        );
    }
    let (known, inner) = known.map(|known| (known.y, known.inner)).unzip();
    let inner = inner.unwrap_or_default();
    let scale = pair.scale as f32;
    let op = LowRankProduct { base, scale, pass, known: known.into(), inner: inner.clone() };
    Ok(Product { y: x.apply_op3(&pair.lora_a, &pair.lora_b, op)?, inner })
}

struct LowRankProduct {
    base: Option<TernaryBase>,
    scale: f32,
    pass: Pass,
    /// The result, if it is known; it is asked for once.
    known: Mutex<Option<Tensor>>,
    inner: Arc<OnceLock<Vec<f32>>>,
}

impl LowRankProduct {
    /// The product of the base, or zeros: (tokens, n).
    fn base(&self, x: &[f32], (tokens, n, k): (usize, usize, usize)) -> Vec<f32> {
        let Some(TernaryBase { weights, index, product, input }) = &self.base else {
            return vec![0.; tokens * n];
        };
        let weight = &weights[*index];
        let quantize = || QuantizedActivations::new(x, k, product.input, weight.format());
        weight.product(input.get_or_quantize(quantize))
    }

    /// The input with what is dropped, if anything is.
    fn dropped(&self, x: &[f32], k: usize) -> Option<Vec<f32>> {
        let (rate, stream) = self.pass.dropout?;
        let mut x = x.to_vec();
        stream.drop(rate, k, &mut x);
        Some(x)
    }
}

impl CustomOp3 for LowRankProduct {
    fn name(&self) -> &'static str {
        "low-rank"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        a: &CpuStorage,
        a_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let ((rank, k), (n, _)) = (a_layout.shape().dims2()?, b_layout.shape().dims2()?);
        let mut shape = x_layout.dims().to_vec();
        if let Some(last) = shape.last_mut() {
            *last = n;
        }
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(y) = known {
            return Ok((CpuStorage::F32(with_slice(&y, |y| Ok(y.to_vec()))?), shape.into()));
        }
        let x = contiguous::<f32>(x, x_layout)?;
        let (a, b) = (contiguous::<f32>(a, a_layout)?, contiguous::<f32>(b, b_layout)?);
        let tokens = x.len() / k.max(1);
        let mut y = self.base(&x, (tokens, n, k));
        let dropped = self.dropped(&x, k);
        let mut inner = vec![0f32; tokens * rank];
        let x = Factor::depth_inner(k, dropped.as_deref().unwrap_or(&x), plain);
        let a = Factor::depth_inner(k, &a, plain);
        gemm((tokens, rank, k), x, a, 1., Precision::F32, &mut inner);
        let (h, b) =
            (Factor::depth_inner(rank, &inner, plain), Factor::depth_inner(rank, &b, plain));
        gemm_add((tokens, n, rank), h, b, self.scale, Precision::F32, &mut y);
        let _ = self.inner.set(inner);
        Ok((CpuStorage::F32(y), shape.into()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        a: &Tensor,
        b: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let Some(inner) = self.inner.get() else {
            bail!("{} went backward before forward", self.name())
        };
        let ((rank, k), (n, _)) = (a.dims2()?, b.dims2()?);
        let (tokens, precision) = (inner.len() / rank.max(1), self.pass.backward);
        let mut dinner = vec![0f32; tokens * rank];
        let mut db = b.track_op().then(|| vec![0f32; n * rank]);
        let mut da = a.track_op().then(|| vec![0f32; rank * k]);
        let mut dx = x.track_op().then(|| vec![0f32; tokens * k]);
        with_slice::<f32, _>(dy, |dy| {
            with_slice::<f32, _>(b, |b| {
                let (dy, b) =
                    (Factor::depth_inner(n, dy, plain), Factor::index_inner(rank, b, plain));
                gemm((tokens, rank, n), dy, b, self.scale, precision, &mut dinner);
                Ok(())
            })?;
            if let Some(db) = &mut db {
                let h = Factor::index_inner(rank, inner, plain);
                let dy = Factor::index_inner(n, dy, plain);
                gemm((n, rank, tokens), dy, h, self.scale, precision, db);
            }
            if let (Some(dx), Some(base)) = (&mut dx, &self.base) {
                let weight = std::slice::from_ref(&base.weights[base.index]);
                backward_x(dy, weight, base.product.backward, dx);
            }
            Ok(())
        })?;
        if let Some(da) = &mut da {
            with_slice::<f32, _>(x, |x| {
                let dropped = self.dropped(x, k);
                let x = Factor::index_inner(k, dropped.as_deref().unwrap_or(x), plain);
                let dinner = Factor::index_inner(rank, &dinner, plain);
                gemm((rank, k, tokens), dinner, x, 1., precision, da);
                Ok(())
            })?;
        }
        if let Some(dx) = &mut dx {
            with_slice::<f32, _>(a, |a| {
                let shape = (tokens, k, rank);
                let dinner = Factor::depth_inner(rank, &dinner, plain);
                let a = Factor::index_inner(k, a, plain);
                match self.pass.dropout {
                    None => gemm_add(shape, dinner, a, 1., precision, dx),
                    Some((rate, stream)) => {
                        let mut through = vec![0f32; tokens * k];
                        gemm(shape, dinner, a, 1., precision, &mut through);
                        stream.drop(rate, k, &mut through);
                        add(&through, dx);
                    }
                }
                Ok(())
            })?;
        }
        let tensor = |values: Option<Vec<f32>>, like: &Tensor| {
            values.map(|values| Tensor::from_vec(values, like.shape(), like.device())).transpose()
        };
        Ok((tensor(dx, x)?, tensor(da, a)?, tensor(db, b)?))
    }
}

/// `y += x`.
fn add(x: &[f32], y: &mut [f32]) {
    const CHUNK: usize = 1 << 14;
    bitnet_model::threads::for_each_chunk(y, CHUNK, |index, y| {
        let x = &x[index * CHUNK..];
        y.iter_mut().zip(x).for_each(|(y, x)| *y += x);
    });
}
