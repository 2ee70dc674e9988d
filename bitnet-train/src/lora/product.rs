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

#[cfg(feature = "cuda")]
use bitnet_model::cuda;
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
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp3, D, Device, Layout, Result, Shape, Tensor, bail};

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
    inner: Arc<OnceLock<Tensor>>,
}

impl Product {
    /// Bytes that it takes.
    pub fn bytes(&self) -> usize {
        let inner = self.inner.get().map_or(0, Tensor::elem_count);
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
    inner: Arc<OnceLock<Tensor>>,
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

    /// The result that is known, once.
    fn take_known(&self) -> Option<Tensor> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// The shape of the result.
    fn shape(&self, x: &Layout, b: &Layout) -> Result<Shape> {
        let (n, _) = b.shape().dims2()?;
        let outer = x.dims().split_last().map_or(&[][..], |(_, outer)| outer);
        Ok([outer, &[n]].concat().into())
    }

    /// What a device is told of it, for `rows` rows.
    #[cfg(feature = "cuda")]
    fn on_cuda(&self, rows: usize) -> cuda::ops::LowRankOf<'_> {
        let base = self.base.as_ref().map(|base| cuda::ops::BaseOf {
            weights: &base.weights,
            index: base.index,
            input: base.product.input,
            bf16: base.product.backward == Precision::Bf16,
        });
        let Pass { dropout, backward } = self.pass;
        cuda::ops::LowRankOf {
            base,
            scale: self.scale,
            dropout: dropout.map(|(rate, stream)| stream.dropout(rate, rows)),
            bf16: backward == Precision::Bf16,
        }
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
        let shape = self.shape(x_layout, b_layout)?;
        if let Some(y) = self.take_known() {
            return Ok((CpuStorage::F32(with_slice(&y, |y| Ok(y.to_vec()))?), shape));
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
        let _ = self.inner.set(Tensor::from_vec(inner, (tokens, rank), &Device::Cpu)?);
        Ok((CpuStorage::F32(y), shape))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_layout: &Layout,
        a: &CudaStorage,
        a_layout: &Layout,
        b: &CudaStorage,
        b_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let shape = self.shape(x_layout, b_layout)?;
        if let Some(y) = self.take_known() {
            return Ok((cuda::ops::copy(&y)?, shape));
        }
        let (_, k) = a_layout.shape().dims2()?;
        let of = self.on_cuda(x_layout.shape().elem_count() / k.max(1));
        let inputs = [(x, x_layout), (a, a_layout), (b, b_layout)];
        let (y, inner) = cuda::ops::low_rank(inputs, &of, shape.clone())?;
        let _ = self.inner.set(inner);
        Ok((y, shape))
    }

    bitnet_model::no_metal_fwd!(3);

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
        let (tokens, precision) = (inner.dim(0)?, self.pass.backward);
        #[cfg(feature = "cuda")]
        if dy.device().is_cuda() {
            let (of, wanted) = (self.on_cuda(tokens), [x, a, b].map(Tensor::track_op));
            let gradients = cuda::ops::low_rank_gradients([x, a, b], (inner, dy), &of, wanted)?;
            return Ok(gradients.into());
        }
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
                with_slice::<f32, _>(inner, |h| {
                    let h = Factor::index_inner(rank, h, plain);
                    let dy = Factor::index_inner(n, dy, plain);
                    gemm((n, rank, tokens), dy, h, self.scale, precision, db);
                    Ok(())
                })?;
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

#[cfg(test)]
mod tests {
    use bitnet_model::{kernels::TileFormat, quant::Rounding};
    use candle_core::{Device, Var};

    use super::{super::noise::Step, *};
    use crate::lora::Kept;

    const TOKENS: usize = 9;
    const IN: usize = 40;
    const OUT: usize = 24;
    const RANK: usize = 3;

    fn wave(shape: (usize, usize), step: f32) -> Var {
        let values = (0..shape.0 * shape.1).map(|i| (i as f32 * step).sin());
        Var::from_tensor(&Tensor::from_iter(values, &Device::Cpu).unwrap().reshape(shape).unwrap())
            .unwrap()
    }

    fn values(tensor: &Tensor) -> Vec<f32> {
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    fn assert_close(what: &str, found: &Tensor, expected: &Tensor) {
        let scale = values(expected).iter().fold(0f32, |most, x| most.max(x.abs()));
        assert!(scale > 0., "{what} is zero");
        for (found, expected) in values(found).iter().zip(values(expected)) {
            // Sums of at most 40 products of order 1, in another order.
            assert!((found - expected).abs() <= 1e-5 * scale, "{what}: {found} is not {expected}");
        }
    }

    /// Values and gradients of the formula, composed of Candle's operations.
    #[test]
    fn it_is_the_formula_with_and_without_a_base_and_dropout() {
        let (x, a, b) = (wave((TOKENS, IN), 0.37), wave((RANK, IN), 0.71), wave((OUT, RANK), 0.53));
        let pair = TrainedPair {
            lora_a: a.as_tensor().clone(),
            lora_b: b.as_tensor().clone(),
            scale: 1.5,
        };
        let latent = values(&wave((OUT, IN), 0.91));
        let weight =
            TernaryWeight::from_latent(&latent, (OUT, IN), Rounding::HalfEven, TileFormat::TwoBit);
        let dense = Tensor::from_vec(weight.dequantize(), (OUT, IN), &Device::Cpu).unwrap();
        let weights: Arc<[TernaryWeight]> = Arc::new([weight]);
        let step = Step::new(1, Kept::new(0));
        step.begin(0, 0, 0);
        let stream = step.stream("here").unwrap();
        let mut mask = vec![1f32; TOKENS * IN];
        stream.drop(0.4, IN, &mut mask);
        let mask = Tensor::from_vec(mask, (TOKENS, IN), &Device::Cpu).unwrap();
        for (has_base, has_dropout) in [(true, true), (true, false), (false, true), (false, false)]
        {
            let product = TernaryProduct::from(Rounding::HalfEven);
            let base = has_base.then(|| TernaryBase {
                weights: weights.clone(),
                index: 0,
                product,
                input: SharedActivations::default(),
            });
            let dropout = has_dropout.then_some((0.4, stream));
            let pass = Pass { dropout, backward: Precision::F32 };
            let found = low_rank(&x, &pair, base.clone(), pass, None).unwrap();

            let dropped =
                if has_dropout { (x.as_tensor() * &mask).unwrap() } else { x.as_tensor().clone() };
            let inner = dropped.matmul(&a.t().unwrap()).unwrap();
            let mut expected = (inner.matmul(&b.t().unwrap()).unwrap() * 1.5).unwrap();
            if has_base {
                // The gradient passes the quantization of the input unchanged.
                let straight = x.matmul(&dense.t().unwrap()).unwrap();
                let exact =
                    bitnet_model::ops::ternary_matmul(&x.detach(), &weights, product).unwrap();
                let quantized = ((exact - &straight).unwrap().detach() + straight).unwrap();
                expected = (expected + quantized).unwrap();
            }
            let what = format!("base {has_base}, dropout {has_dropout}");
            assert_close(&what, &found.y, &expected);
            let upstream = wave((TOKENS, OUT), 0.13).detach();
            let backward =
                |y: &Tensor| (y * &upstream).unwrap().sum_all().unwrap().backward().unwrap();
            let (grads, expected) = (backward(&found.y), backward(&expected));
            for (name, var) in [("x", &x), ("A", &a), ("B", &b)] {
                let gradient =
                    |grads: &candle_core::backprop::GradStore| grads.get(var).unwrap().clone();
                assert_close(&format!("{what}: {name}"), &gradient(&grads), &gradient(&expected));
            }
            // What is known is taken as it is.
            let known = Product { y: found.y.detach(), inner: found.inner.clone() };
            let again = low_rank(&x, &pair, base, pass, Some(known)).unwrap();
            assert_eq!(values(&again.y), values(&found.y));
            let again = backward(&again.y);
            for var in [&x, &a, &b] {
                assert_eq!(values(again.get(var).unwrap()), values(grads.get(var).unwrap()));
            }
        }
    }

    #[test]
    fn shapes_that_do_not_fit_are_errors() {
        let pair = |a: (usize, usize), b: (usize, usize)| TrainedPair {
            lora_a: wave(a, 0.1).detach(),
            lora_b: wave(b, 0.1).detach(),
            scale: 1.,
        };
        let x = wave((TOKENS, IN), 0.3);
        let pass = Pass { dropout: None, backward: Precision::F32 };
        for (a, b) in [((RANK, IN + 1), (OUT, RANK)), ((RANK, IN), (OUT, RANK + 1))] {
            let message = low_rank(&x, &pair(a, b), None, pass, None).unwrap_err().to_string();
            assert!(message.contains("do not fit"), "{message}");
        }
    }
}
