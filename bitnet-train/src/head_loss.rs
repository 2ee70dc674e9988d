//! Output head and cross-entropy in one operation, slice by slice: there is never a logit for every token at once.
//!
//! Of a slice of tokens whose labels count, the logits are computed, their loss and its gradient, `softmax − onehot`, and
//! from it the slice's share of the gradients of hidden states and head; then the slice is forgotten. Memory does not grow
//! with tokens × vocabulary, and nothing is computed for labels that do not count.

use std::sync::Mutex;

#[cfg(feature = "cuda")]
use bitnet_model::cuda;
use bitnet_model::{
    kernels::{self, Loop, vectorized},
    ops::gemm::{Bf16Factor, Factor, Operand, Precision, gemm, gemm_add, plain},
    storage::contiguous,
    threads,
};
use candle_core::{CpuStorage, CustomOp2, DType, Device, Layout, Shape, Tensor, bail};
#[cfg(feature = "cuda")]
use candle_core::{CudaStorage, backend::BackendStorage};

use crate::{
    Error, Result,
    loss::{log_sum_exp, targets},
};

/// Sum of the cross-entropies of `hidden` (…, hidden_size) f32 under the head `weight` (vocab, hidden_size), f32 or bf16,
/// in nats, divided by `items`: a scalar. `labels` has one token id a row, or [`IGNORED`](crate::loss::IGNORED).
///
/// Differentiable once; a weight that is not tracked gets no gradient. `precision` is that of the three products.
///
/// # Errors
/// Labels outside the vocabulary or not one a row, no items, a tracked weight that is not f32.
pub fn head_loss(
    hidden: &Tensor,
    weight: &Tensor,
    labels: &[i64],
    items: usize,
    precision: Precision,
) -> Result<Tensor> {
    let (vocab, hidden_size) = weight.dims2()?;
    if items == 0 {
        return Err(Error::Input("a loss over no label at all: every label is ignored".into()));
    }
    if weight.track_op() && weight.dtype() != DType::F32 {
        let dtype = weight.dtype();
        return Err(Error::Input(format!("only an f32 head can be trained, not {dtype:?}")));
    }
    let targets = targets((hidden.elem_count() / hidden_size.max(1), vocab), labels)?;
    let rows = targets.into_iter().enumerate().filter_map(|(row, target)| Some((row, target?)));
    let (rows, targets) = rows.unzip();
    let trains_weight = weight.track_op();
    let op =
        HeadLoss { rows, targets, items, precision, trains_weight, gradients: Mutex::default() };
    Ok(hidden.apply_op2(weight, op)?)
}

struct HeadLoss {
    /// The rows that count, and their labels.
    rows: Vec<usize>,
    targets: Vec<usize>,
    items: usize,
    precision: Precision,
    trains_weight: bool,
    /// Left by the forward pass for the backward pass.
    gradients: Mutex<Option<Gradients>>,
}

struct Gradients {
    hidden: Tensor,
    /// None if the weight is frozen.
    weight: Option<Tensor>,
}

/// [`Gradients`] on the CPU, of whatever shapes.
struct Values {
    hidden: Vec<f32>,
    /// Empty if the weight is frozen.
    weight: Vec<f32>,
}

/// Logits of a slice, about: 128 MiB. Of a large vocabulary these are 256 rows, and the head is read twice for as many.
const SLICE: usize = 32 << 20;
/// Rows of a slice, at least and about at most.
const ROWS: (usize, usize) = (64, 512);

/// Rows of each of the slices that `rows` are cut into: equal parts.
fn slice_rows(rows: usize, vocab: usize) -> usize {
    let most = (SLICE / vocab.max(1)).clamp(ROWS.0, ROWS.1);
    rows.div_ceil(rows.div_ceil(most).max(1)).max(1)
}

impl HeadLoss {
    /// The loss and its gradients for the `hidden` states (rows, k) and the head `weight` (vocab, k).
    ///
    /// The head comes twice: with the hidden dimension as depth, and with the vocabulary.
    fn run(
        &self,
        hidden: &[f32],
        (by_hidden, by_vocab): (impl Operand + Copy, impl Operand + Copy),
        (vocab, k): (usize, usize),
    ) -> (f32, Values) {
        let mut gradients = Values {
            hidden: vec![0.; hidden.len()],
            weight: vec![0.; if self.trains_weight { vocab * k } else { 0 }],
        };
        let size = slice_rows(self.rows.len(), vocab);
        let mut nats = 0f64;
        let mut logits = vec![0f32; size * vocab];
        for (rows, targets) in self.rows.chunks(size).zip(self.targets.chunks(size)) {
            let count = rows.len();
            let mut x = vec![0f32; count * k];
            for (x, row) in x.chunks_mut(k).zip(rows) {
                x.copy_from_slice(&hidden[row * k..][..k]);
            }
            let logits = &mut logits[..count * vocab];
            let a = Factor::depth_inner(k, &x, plain);
            gemm((count, vocab, k), a, by_hidden, 1., self.precision, logits);
            let mut losses = vec![0f64; count];
            let pair = ((&mut *logits, vocab), (&mut losses[..], 1));
            threads::for_each_chunk_pair(pair.0, pair.1, |i, row, loss| {
                loss[0] = self.row(row, targets[i]);
            });
            nats += losses.iter().sum::<f64>();
            let mut dx = vec![0f32; count * k];
            let a = Factor::depth_inner(vocab, &*logits, plain);
            gemm((count, k, vocab), a, by_vocab, 1., self.precision, &mut dx);
            for (dx, row) in dx.chunks(k).zip(rows) {
                gradients.hidden[row * k..][..k].copy_from_slice(dx);
            }
            if self.trains_weight {
                let (a, b) = (
                    Factor::index_inner(vocab, &*logits, plain),
                    Factor::index_inner(k, &x, plain),
                );
                gemm_add((vocab, k, count), a, b, 1., self.precision, &mut gradients.weight);
            }
        }
        ((nats / self.items as f64) as f32, gradients)
    }

    /// For the backward pass.
    fn keep(&self, gradients: Gradients) {
        *self.gradients.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(gradients);
    }

    /// The loss of a row of logits, which become its gradient.
    fn row(&self, row: &mut [f32], target: usize) -> f64 {
        let kernel = kernels::active();
        let log_sum = log_sum_exp(&mut Vec::new(), row);
        let nats = f64::from(log_sum - row[target]);
        vectorized(Shift { row, by: log_sum });
        kernel.exp(row);
        let scale = 1. / self.items as f32;
        vectorized(Scale { row, by: scale });
        row[target] -= scale;
        nats
    }
}

struct Shift<'a> {
    row: &'a mut [f32],
    by: f32,
}

impl Loop for Shift<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        self.row.iter_mut().for_each(|x| *x -= self.by);
    }
}

struct Scale<'a> {
    row: &'a mut [f32],
    by: f32,
}

impl Loop for Scale<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        self.row.iter_mut().for_each(|x| *x *= self.by);
    }
}

impl CustomOp2 for HeadLoss {
    fn name(&self) -> &'static str {
        "head-loss"
    }

    fn cpu_fwd(
        &self,
        hidden: &CpuStorage,
        hidden_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let shape @ (_, k) = weight_layout.shape().dims2()?;
        if hidden_layout.dims().last() != Some(&k) {
            bail!("{}: hidden states {:?} for a head of {k}", self.name(), hidden_layout.shape());
        }
        let hidden = contiguous::<f32>(hidden, hidden_layout)?;
        let (loss, values) = match weight {
            CpuStorage::BF16(_) => {
                let weight = contiguous::<half::bf16>(weight, weight_layout)?;
                let by_hidden = Bf16Factor::depth_inner(k, &weight);
                self.run(&hidden, (by_hidden, Bf16Factor::index_inner(k, &weight)), shape)
            }
            _ => {
                let weight = contiguous::<f32>(weight, weight_layout)?;
                let by_hidden = Factor::depth_inner(k, &weight, plain);
                self.run(&hidden, (by_hidden, Factor::index_inner(k, &weight, plain)), shape)
            }
        };
        let of_weight = || Tensor::from_vec(values.weight, shape, &Device::Cpu);
        let weight = self.trains_weight.then(of_weight).transpose()?;
        let hidden = Tensor::from_vec(values.hidden, hidden_layout.shape(), &Device::Cpu)?;
        self.keep(Gradients { hidden, weight });
        Ok((CpuStorage::F32(vec![loss]), Shape::from(())))
    }

    bitnet_model::no_metal_fwd!(2);

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        hidden: &CudaStorage,
        hidden_layout: &Layout,
        weight: &CudaStorage,
        weight_layout: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        let (vocab, k) = weight_layout.shape().dims2()?;
        if hidden_layout.dims().last() != Some(&k) {
            bail!("{}: hidden states {:?} for a head of {k}", self.name(), hidden_layout.shape());
        }
        let ids = |all: &[usize]| Vec::from_iter(all.iter().map(|id| *id as u32));
        let of = cuda::ops::HeadLossOf {
            rows: &ids(&self.rows),
            targets: &ids(&self.targets),
            items: self.items,
            slice: slice_rows(self.rows.len(), vocab),
            bf16: self.precision == Precision::Bf16,
            trains_weight: self.trains_weight,
        };
        let (hidden, weight) = ((hidden, hidden_layout), (weight, weight_layout));
        let (loss, hidden_gradient, weight) = cuda::ops::head_loss(hidden, weight, of)?;
        self.keep(Gradients { hidden: hidden_gradient, weight });
        let device = hidden.0.device();
        let loss = CudaStorage::wrap_cuda_slice(device.clone_htod(&[loss])?, device.clone());
        Ok((loss, Shape::from(())))
    }

    fn bwd(
        &self,
        _hidden: &Tensor,
        _weight: &Tensor,
        _loss: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let gradients =
            self.gradients.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take();
        let Some(Gradients { hidden: dhidden, weight: dweight }) = gradients else {
            bail!("{} goes backward once, after its forward pass", self.name())
        };
        let scale = f64::from(grad.to_scalar::<f32>()?);
        let scaled = |gradient: Tensor| if scale == 1. { Ok(gradient) } else { gradient * scale };
        Ok((Some(scaled(dhidden)?), dweight.map(scaled).transpose()?))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{D, Device, Var};

    use super::*;
    use crate::loss::{IGNORED, cross_entropy};

    fn values(tensor: &Tensor) -> Vec<f32> {
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    fn assert_close(found: &Tensor, expected: &Tensor, bound: f32) {
        let expected = values(expected);
        let largest = expected.iter().fold(0f32, |most, x| most.max(x.abs()));
        for (found, expected) in values(found).iter().zip(&expected) {
            assert!((found - expected).abs() <= bound * largest, "{found} {expected}");
        }
    }

    #[test]
    fn it_is_the_head_and_the_cross_entropy() {
        let device = Device::Cpu;
        // More rows than a slice has, and some that do not count.
        let (batch, seq, k, vocab) = (2, 400, 24, 40);
        let waves =
            |count: usize, step: f32| Vec::from_iter((0..count).map(|i| (i as f32 * step).sin()));
        let hidden = Var::from_vec(waves(batch * seq * k, 0.37), (batch, seq, k), &device).unwrap();
        let weight = Var::from_vec(waves(vocab * k, 0.71), (vocab, k), &device).unwrap();
        let label = |i: usize| if i.is_multiple_of(5) { IGNORED } else { (i * 7 % vocab) as i64 };
        let labels: Vec<i64> = (0..batch * seq).map(label).collect();
        let logits = hidden.reshape(((), k)).unwrap().matmul(&weight.t().unwrap()).unwrap();
        let expected =
            cross_entropy(&logits.flatten_to(D::Minus2).unwrap(), &labels, Some(500)).unwrap();
        let expected_grads = (&expected * 3.).unwrap().backward().unwrap();
        // A bfloat16 factor is off by 2⁻⁹ of itself at most: 24 products of values below 1 by less than 24 · 2⁻⁸ < 0.1 in all,
        // which changes a probability, and with it a gradient, by no more than that part of itself.
        for (precision, bound) in [(Precision::F32, 1e-5), (Precision::Bf16, 0.1)] {
            let loss = head_loss(&hidden, &weight, &labels, 500, precision).unwrap();
            assert_close(&loss, &expected, bound);
            let grads = (loss * 3.).unwrap().backward().unwrap();
            for var in [&hidden, &weight] {
                assert_close(grads.get(var).unwrap(), expected_grads.get(var).unwrap(), bound);
            }
        }
        // A frozen head, f32 or bf16.
        for dtype in [DType::F32, DType::BF16] {
            let frozen = weight.detach().to_dtype(dtype).unwrap();
            let loss = head_loss(&hidden, &frozen, &labels, 500, Precision::F32).unwrap();
            assert_close(&loss, &expected, 1e-2);
            let grads = (loss * 3.).unwrap().backward().unwrap();
            assert_close(grads.get(&hidden).unwrap(), expected_grads.get(&hidden).unwrap(), 1e-2);
        }
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let hidden = Tensor::zeros((3, 4), DType::F32, &Device::Cpu).unwrap();
        let weight = Tensor::zeros((5, 4), DType::F32, &Device::Cpu).unwrap();
        let loss =
            |labels: &[i64], items| head_loss(&hidden, &weight, labels, items, Precision::F32);
        assert!(loss(&[0, 1, 4], 3).is_ok());
        assert!(loss(&[0, 1, 5], 3).is_err());
        assert!(loss(&[0, 1], 2).is_err());
        assert!(loss(&[0, 1, 2], 0).is_err());
    }
}
