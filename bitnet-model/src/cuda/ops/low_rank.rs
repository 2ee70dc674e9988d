//! A ternary product with its low-rank pair, forward and backward: adapters that are trained.

use candle_core::{
    CudaDevice, CudaStorage, Layout, Result, Shape, Tensor, backend::BackendStorage,
    cuda_backend::cudarc::driver::CudaSlice,
};

use super::{
    gradients::{of_storage, read, tensor},
    ternary_gradient, ternary_product,
};
use crate::{
    cuda::{
        device::{Gathered, Memory, launch, result, uninitialized},
        launch::{Dropout, Factor, GemmShape, Launch, Right},
    },
    quant::ActivationCodes,
    weights::TernaryWeight,
};

/// What is computed beside the pair, and how.
#[derive(Clone, Debug)]
pub struct LowRankOf<'a> {
    /// The ternary product.
    pub base: Option<BaseOf<'a>>,
    /// Multiplies the product of the pair.
    pub scale: f32,
    /// What of the input the pair does not see.
    pub dropout: Option<Dropout>,
    /// Whether the pair's products of the backward pass round their factors to bfloat16.
    pub bf16: bool,
}

/// A ternary product with one of several matrices.
#[derive(Clone, Copy, Debug)]
pub struct BaseOf<'a> {
    /// The matrices.
    pub weights: &'a [TernaryWeight],
    /// Which of them.
    pub index: usize,
    /// How the input becomes integers.
    pub input: ActivationCodes,
    /// Whether the product of the backward pass rounds its factors to bfloat16.
    pub bf16: bool,
}

/// What is left of dense rows `x`.
fn drop_some(
    dropout: &Dropout,
    x: &Memory<'_>,
    width: usize,
    device: &CudaDevice,
) -> Result<CudaSlice<f32>> {
    let stream = device.cuda_stream();
    let keys = device.clone_htod(&dropout.keys)?;
    let mut y = uninitialized::<f32>(device, dropout.keys.len() * width)?;
    {
        let (keys, y) = (Memory::read(&keys, 0, &stream), Memory::written(&mut y, &stream));
        let how = (dropout, keys.address);
        // SAFETY: there is a key for each row, and all buffers are held.
        unsafe { launch(device, &Launch::dropout(x.address, width, how, y.address)) }?;
    }
    Ok(y)
}

fn by_rows(width: usize, values: &Memory<'_>) -> Factor {
    Factor::depth_inner(width, values.address)
}

fn by_columns(width: usize, values: &Memory<'_>) -> Factor {
    Factor::index_inner(width, values.address)
}

/// `out` = scale · a·b, or that added to what is there, as `shape` says.
fn multiply(
    device: &CudaDevice,
    (a, b): (Factor, Factor),
    shape: GemmShape,
    out: &mut CudaSlice<f32>,
) -> Result<()> {
    let stream = device.cuda_stream();
    let out = Memory::written(out, &stream);
    // SAFETY: the caller's strides stay within the factors, which it holds, and `out` is (rows, cols).
    unsafe { launch(device, &Launch::gemm((a, 0), (Right::F32, b), shape, 1, out.address)) }
}

impl LowRankOf<'_> {
    /// What the pair sees of `x`, if it is not all.
    fn dropped(
        &self,
        x: &Memory<'_>,
        width: usize,
        device: &CudaDevice,
    ) -> Result<Option<CudaSlice<f32>>> {
        let drop_some = |dropout| drop_some(dropout, x, width, device);
        self.dropout.as_ref().map(drop_some).transpose()
    }

    /// A product of the backward pass.
    fn backward(&self, shape: (usize, usize, usize), scale: f32) -> GemmShape {
        GemmShape { scale, ..GemmShape::new(shape, false, self.bf16) }
    }
}

/// `base(x) + scale · B(A(dropout(x)))`, of `shape`, and A(dropout(x)) (tokens, rank).
pub fn low_rank(
    [x, a, b]: [(&CudaStorage, &Layout); 3],
    of: &LowRankOf<'_>,
    shape: Shape,
) -> Result<(CudaStorage, Tensor)> {
    let ((rank, k), (n, _)) = (a.1.shape().dims2()?, b.1.shape().dims2()?);
    let device = x.0.device();
    let stream = device.cuda_stream();
    let tokens = x.1.shape().elem_count() / k.max(1);
    let (x_dense, a_dense, b_dense) = (
        Gathered::<f32>::contiguous(x.0, x.1)?,
        Gathered::<f32>::contiguous(a.0, a.1)?,
        Gathered::<f32>::contiguous(b.0, b.1)?,
    );
    let (x_memory, a, b) =
        (x_dense.memory(&stream)?, a_dense.memory(&stream)?, b_dense.memory(&stream)?);
    let dropped = of.dropped(&x_memory, k, device)?;
    let dropped = dropped.as_ref().map(|dropped| Memory::read(dropped, 0, &stream));
    let seen = dropped.as_ref().unwrap_or(&x_memory);
    let mut inner = uninitialized::<f32>(device, tokens * rank)?;
    let factors = (by_rows(k, seen), by_rows(k, &a));
    multiply(device, factors, GemmShape::new((tokens, rank, k), false, false), &mut inner)?;
    let (mut y, _) = match of.base {
        Some(BaseOf { weights, index, input, .. }) => {
            ternary_product(x, None, (weights, index..index + 1), input, shape)?
        }
        None => result(uninitialized(device, tokens * n)?, device, shape),
    };
    let product = GemmShape::new((tokens, n, rank), of.base.is_some(), false);
    let product = GemmShape { scale: of.scale, ..product };
    {
        let inner = Memory::read(&inner, 0, &stream);
        let factors = (by_rows(rank, &inner), by_rows(rank, &b));
        multiply(device, factors, product, y.as_cuda_slice_mut()?)?;
    }
    Ok((y, tensor(inner, device, &(tokens, rank).into())))
}

/// The gradients of input, A and B of a [`low_rank`] whose second result is `inner`; `None` of those that are not wanted.
pub fn low_rank_gradients(
    [x, a, b]: [&Tensor; 3],
    (inner, dy): (&Tensor, &Tensor),
    of: &LowRankOf<'_>,
    [wants_x, wants_a, wants_b]: [bool; 3],
) -> Result<[Option<Tensor>; 3]> {
    let ((rank, k), (n, _), (tokens, _)) = (a.dims2()?, b.dims2()?, inner.dims2()?);
    let [x_read, a_read, b_read, inner_read, dy_read] = [x, a, b, inner, dy].map(read);
    let storage = dy_read.storage()?;
    let device = storage.device();
    let stream = device.cuda_stream();
    let [a_dense, b_dense, dy_dense] = [a_read.dense()?, b_read.dense()?, dy_read.dense()?];
    let [a_memory, b_memory, dy_memory] =
        [a_dense.memory(&stream)?, b_dense.memory(&stream)?, dy_dense.memory(&stream)?];
    let mut dinner = uninitialized::<f32>(device, tokens * rank)?;
    let factors = (by_rows(n, &dy_memory), by_columns(rank, &b_memory));
    multiply(device, factors, of.backward((tokens, rank, n), of.scale), &mut dinner)?;
    let dinner_memory = Memory::read(&dinner, 0, &stream);
    let mut gradients = [const { None }; 3];
    if wants_b {
        let inner = inner_read.dense()?;
        let inner = inner.memory(&stream)?;
        let mut db = uninitialized::<f32>(device, n * rank)?;
        let factors = (by_columns(n, &dy_memory), by_columns(rank, &inner));
        multiply(device, factors, of.backward((n, rank, tokens), of.scale), &mut db)?;
        gradients[2] = Some(tensor(db, device, b.shape()));
    }
    if wants_a {
        let x = x_read.dense()?;
        let x = x.memory(&stream)?;
        let dropped = of.dropped(&x, k, device)?;
        let dropped = dropped.as_ref().map(|dropped| Memory::read(dropped, 0, &stream));
        let mut da = uninitialized::<f32>(device, rank * k)?;
        let seen = dropped.as_ref().unwrap_or(&x);
        let factors = (by_columns(rank, &dinner_memory), by_columns(k, seen));
        multiply(device, factors, of.backward((rank, k, tokens), 1.), &mut da)?;
        gradients[1] = Some(tensor(da, device, a.shape()));
    }
    if wants_x {
        let factors = (by_rows(rank, &dinner_memory), by_columns(k, &a_memory));
        let through = of.backward((tokens, k, rank), 1.);
        let base = match of.base {
            Some(BaseOf { weights, index, bf16, .. }) => {
                let part = (weights, index..index + 1);
                Some(ternary_gradient(storage, dy_read.layout, part, bf16, x.shape().clone())?.0)
            }
            None => None,
        };
        gradients[0] = Some(input_gradient(base, (factors, through), of, (device, x.shape()))?);
    }
    Ok(gradients)
}

/// The gradient that the base has, and what comes through the pair.
fn input_gradient(
    base: Option<CudaStorage>,
    (factors, through): ((Factor, Factor), GemmShape),
    of: &LowRankOf<'_>,
    (device, shape): (&CudaDevice, &Shape),
) -> Result<Tensor> {
    let count = shape.elem_count();
    match (base, &of.dropout) {
        (Some(mut dx), None) => {
            let added = GemmShape { add: 1, ..through };
            multiply(device, factors, added, dx.as_cuda_slice_mut()?)?;
            Ok(of_storage(dx, shape))
        }
        (base, dropout) => {
            let mut all = uninitialized::<f32>(device, count)?;
            multiply(device, factors, through, &mut all)?;
            let dx = match dropout {
                Some(dropout) => {
                    let stream = device.cuda_stream();
                    let memory = Memory::read(&all, 0, &stream);
                    drop_some(dropout, &memory, through.cols as usize, device)?
                }
                None => all,
            };
            let dx = tensor(dx, device, shape);
            base.map_or(Ok(dx.clone()), |base| &dx + of_storage(base, shape))
        }
    }
}
