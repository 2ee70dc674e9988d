//! Cross-entropy of next-token logits, fused: softmax, logarithm, gather and mean in one pass over the logits forward
//! and one backward.
//!
//! `loss = Σ_rows (log Σ_j exp(x_j) − x_label) / n` over the rows whose label is not [`IGNORED`], where `n` is their
//! number, or `num_items` when one update is accumulated from several batches (`transformers`' `ForCausalLMLoss`).
//! Backward: `dx = (softmax(x) − onehot(label)) · g / n`, and zero for ignored rows. Beside the gradient, which is as
//! large as the logits, only one number a row is kept.
//!
//! A row's sums have one fixed order, whatever the number of threads.

use std::sync::{Arc, OnceLock};

use bitnet_model::{kernels, sampler::argmax, storage::with_slice};
use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Shape, Tensor, bail};
use rayon::prelude::*;

use crate::{Error, Result, task::Prediction};

/// The label of a position that does not count.
pub const IGNORED: i64 = -100;

/// Mean cross-entropy of `logits` `(rows, vocab)` in nats: a scalar that can be differentiated. The processor computes it, of a
/// copy if they are on a device.
///
/// `labels` holds one token id a row, or [`IGNORED`]; it is already shifted, as [`Batch::labels`](crate::batch::Batch)
/// and [`shift_labels`] are. The sum over rows is divided by `num_items`, by default the number of labels that count.
pub fn cross_entropy(logits: &Tensor, labels: &[i64], num_items: Option<usize>) -> Result<Tensor> {
    let targets = targets(logits.dims2()?, labels)?;
    let items = num_items.unwrap_or_else(|| targets.iter().flatten().count());
    if items == 0 {
        return Err(Error::Input(
            "cross-entropy over no label at all: every label is ignored".into(),
        ));
    }
    let op =
        CrossEntropy { targets: targets.into(), items: items as f64, log_sums: OnceLock::new() };
    let copy = logits.to_dtype(DType::F32)?.contiguous()?.to_device(&Device::Cpu)?;
    Ok(copy.apply_op1(op)?.to_device(logits.device())?)
}

/// What `logits` (rows, vocab) make of each label that is not [`IGNORED`], in order; for evaluation.
pub fn predictions(logits: &Tensor, labels: &[i64]) -> Result<Vec<Prediction>> {
    let targets = targets(logits.dims2()?, labels)?;
    let vocab = logits.dim(1)?;
    Ok(with_slice::<f32, _>(&logits.to_dtype(DType::F32)?, |logits| {
        let rows = logits.par_chunks(vocab).zip(&targets);
        let predict = |scratch: &mut Vec<f32>, (row, target): (&[f32], &Option<usize>)| {
            let target = (*target)?;
            let nats = log_sum_exp(scratch, row) - row[target];
            Some(Prediction { nats, token: argmax(row) as u32 })
        };
        let predictions: Vec<Option<Prediction>> = rows.map_init(Vec::new, predict).collect();
        Ok(predictions.into_iter().flatten().collect())
    })?)
}

/// The labels of `(batch, seq)` token ids under a causal model: each row moved left by one, [`IGNORED`] at its end.
pub fn shift_labels(tokens: &[u32], sequence_length: usize) -> Vec<i64> {
    tokens
        .chunks(sequence_length)
        .flat_map(|row| row[1..].iter().map(|&token| i64::from(token)).chain([IGNORED]))
        .collect()
}

/// Labels as indices into a row, checked against the shape of the logits.
pub(crate) fn targets((rows, vocab): (usize, usize), labels: &[i64]) -> Result<Vec<Option<usize>>> {
    if vocab == 0 {
        return Err(Error::Input("logits over an empty vocabulary".into()));
    }
    if rows != labels.len() {
        return Err(Error::Input(format!("{rows} rows of logits for {} labels", labels.len())));
    }
    let target = |(row, &label): (usize, &i64)| match usize::try_from(label) {
        Ok(target) if target < vocab => Ok(Some(target)),
        _ if label == IGNORED => Ok(None),
        _ => Err(Error::Input(format!(
            "label {label} of row {row} is not in a vocabulary of {vocab}"
        ))),
    };
    labels.iter().enumerate().map(target).collect()
}

type Targets = Arc<[Option<usize>]>;

struct CrossEntropy {
    targets: Targets,
    items: f64,
    /// `log Σ_j exp(x_j)` of every row that counts, left by the forward pass for the backward pass.
    log_sums: OnceLock<Vec<f32>>,
}

impl CustomOp1 for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross-entropy"
    }

    fn cpu_fwd(
        &self,
        logits: &CpuStorage,
        layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (logits, vocab) = rows(self.name(), logits, layout)?;
        let log_sums: Vec<f32> = (logits.par_chunks(vocab).zip(self.targets.par_iter()))
            .map_init(Vec::new, |scratch, (row, target)| {
                target.map_or(0., |_| log_sum_exp(scratch, row))
            })
            .collect();
        let nats: f64 = (logits.chunks(vocab).zip(&log_sums).zip(self.targets.iter()))
            .filter_map(|((row, &log_sum), &target)| Some(f64::from(log_sum - row[target?])))
            .sum();
        // A second forward pass of the same op cannot happen: `cross_entropy` makes one op a call.
        self.log_sums.get_or_init(|| log_sums);
        Ok((CpuStorage::F32(vec![(nats / self.items) as f32]), Shape::from(())))
    }

    bitnet_model::no_metal_fwd!(1);

    fn bwd(
        &self,
        logits: &Tensor,
        _loss: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<Option<Tensor>> {
        let Some(log_sums) = self.log_sums.get() else {
            bail!("{} went backward before forward", self.name())
        };
        let scale = (f64::from(grad.to_scalar::<f32>()?) / self.items) as f32;
        let op =
            SoftmaxMinusOnehot { targets: self.targets.clone(), log_sums: log_sums.clone(), scale };
        Ok(Some(logits.detach().apply_op1(op)?))
    }
}

/// `(softmax(x) − onehot) · scale`, the gradient of [`CrossEntropy`].
struct SoftmaxMinusOnehot {
    targets: Targets,
    log_sums: Vec<f32>,
    scale: f32,
}

impl CustomOp1 for SoftmaxMinusOnehot {
    fn name(&self) -> &'static str {
        "cross-entropy-backward"
    }

    fn cpu_fwd(
        &self,
        logits: &CpuStorage,
        layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (logits, vocab) = rows(self.name(), logits, layout)?;
        let kernel = kernels::active();
        let mut grad = vec![0f32; logits.len()];
        let rows = grad.par_chunks_mut(vocab).zip(logits.par_chunks(vocab));
        rows.zip(self.targets.par_iter().zip(&self.log_sums)).for_each(
            |((grad, row), (&target, &log_sum))| {
                let Some(target) = target else { return };
                for (grad, &x) in grad.iter_mut().zip(row) {
                    *grad = x - log_sum;
                }
                kernel.exp(grad);
                for grad in grad.iter_mut() {
                    *grad *= self.scale;
                }
                grad[target] -= self.scale;
            },
        );
        Ok((CpuStorage::F32(grad), layout.shape().clone()))
    }

    bitnet_model::no_metal_fwd!(1);
}

/// The contiguous f32 values of a matrix and the length of its rows.
fn rows<'a>(
    op: &str,
    storage: &'a CpuStorage,
    layout: &Layout,
) -> candle_core::Result<(&'a [f32], usize)> {
    let (_, columns) = layout.shape().dims2()?;
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok((&storage.as_slice::<f32>()?[start..end], columns)),
        None => bail!("{op} needs contiguous logits"),
    }
}

/// `log Σ_j exp(x_j)`, shifted by the largest value so that nothing overflows. NaN if a value is NaN.
pub(crate) fn log_sum_exp(scratch: &mut Vec<f32>, row: &[f32]) -> f32 {
    let kernel = kernels::active();
    let shift = kernel.max(row);
    scratch.clear();
    scratch.extend(row.iter().map(|&x| x - shift));
    kernel.exp(scratch);
    (f64::from(shift) + f64::from(kernel.sum(scratch)).ln()) as f32
}

#[cfg(test)]
mod tests {
    use candle_core::Var;
    use proptest::prelude::*;

    use super::*;

    fn nats(logits: &Tensor, labels: &[i64]) -> Vec<f32> {
        predictions(logits, labels).unwrap().into_iter().map(|prediction| prediction.nats).collect()
    }

    fn values(rows: usize, vocab: usize) -> impl Strategy<Value = Vec<f32>> {
        prop::collection::vec(-30f32..30., rows * vocab)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn equals_candle_forward_and_backward(
            (rows, vocab, values, labels) in (1..7usize, 2..70usize).prop_flat_map(|(rows, vocab)| {
                (Just(rows), Just(vocab), values(rows, vocab), prop::collection::vec(0..vocab as i64, rows))
            })
        ) {
            let device = Device::Cpu;
            let logits = Var::from_vec(values, (rows, vocab), &device).unwrap();
            let loss = cross_entropy(&logits, &labels, None).unwrap();
            let candle_labels = Tensor::new(labels.as_slice(), &device).unwrap();
            let expected = candle_nn::loss::cross_entropy(&logits, &candle_labels).unwrap();
            let difference = (&loss - &expected).unwrap().to_scalar::<f32>().unwrap();
            prop_assert!(difference.abs() < 2e-5, "{difference}"); // 1 ulp at 30 is 2e-6

            // A factor on the way back tells a wrong use of the incoming gradient.
            let grad = |loss: &Tensor| {
                let grads = (loss * 3.).unwrap().backward().unwrap();
                grads.get(&logits).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
            };
            for (grad, expected) in grad(&loss).iter().zip(grad(&expected)) {
                prop_assert!((grad - expected).abs() < 1e-5, "{grad} {expected}");
            }
            let nats = nats(&logits, &labels);
            let mean = nats.iter().sum::<f32>() / rows as f32;
            prop_assert!((mean - loss.to_scalar::<f32>().unwrap()).abs() < 2e-5);
        }
    }

    #[test]
    fn ignored_rows_have_no_part_and_items_divide() {
        let device = Device::Cpu;
        let logits = Var::randn(0f32, 1., (3, 40), &device).unwrap();
        let labels = [5, IGNORED, 7];
        let nats = nats(&logits, &labels);
        assert_eq!(nats.len(), 2);
        for (num_items, divisor) in [(None, 2.), (Some(8), 8.)] {
            let loss = cross_entropy(&logits, &labels, num_items).unwrap();
            let expected = (nats[0] + nats[1]) / divisor;
            assert!((loss.to_scalar::<f32>().unwrap() - expected).abs() < 1e-6);
            let grads = loss.backward().unwrap();
            let grad = grads.get(&logits).unwrap().to_vec2::<f32>().unwrap();
            assert!(grad[1].iter().all(|&g| g == 0.));
            // Each row's gradient sums to zero: softmax sums to one, as does the one-hot row.
            assert!(grad.iter().all(|row| row.iter().sum::<f32>().abs() < 1e-6));
        }
    }

    #[test]
    fn extreme_logits_stay_finite_and_nan_shows() {
        let logits =
            Tensor::new(&[[1e30f32, -1e30, 0.], [-1e30, -1e30, -1e30]], &Device::Cpu).unwrap();
        let found = predictions(&logits, &[0, 2]).unwrap();
        assert_eq!(found[0], Prediction { nats: 0., token: 0 });
        let shifted = nats(&logits, &[0, 1]);
        assert!(shifted[1].is_finite());
        for width in [3, 40] {
            let mut row = vec![0f32; width];
            row[1] = f32::NAN;
            let logits = Tensor::from_vec(row, (1, width), &Device::Cpu).unwrap();
            assert!(nats(&logits, &[0])[0].is_nan());
        }
    }

    #[test]
    fn wrong_labels_are_refused() {
        let logits = Tensor::zeros((2, 4), DType::F32, &Device::Cpu).unwrap();
        for labels in [&[0][..], &[0, 4], &[0, -1], &[IGNORED, IGNORED]] {
            assert!(cross_entropy(&logits, labels, None).is_err(), "{labels:?}");
        }
        let empty = Tensor::zeros((1, 0), DType::F32, &Device::Cpu).unwrap();
        assert!(predictions(&empty, &[IGNORED]).is_err());
    }

    #[test]
    fn shifted_labels_end_ignored() {
        assert_eq!(shift_labels(&[1, 2, 3, 4, 5, 6], 3), [2, 3, IGNORED, 5, 6, IGNORED]);
    }
}
