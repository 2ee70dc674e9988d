//! Kullback–Leibler divergence of two softmaxes, fused: one pass over both rows forward and one backward.
//!
//! `loss = τ² · Σ_rows Σ_j p_j · (log p_j − log q_j) / divisor` over the rows that count, with `p = softmax(teacher / τ)` and
//! `q = softmax(student / τ)`; `τ²` keeps the gradient's size independent of the temperature (arXiv:1503.02531). Backward:
//! `dstudent = τ · (q − p) · g / divisor`, and nothing for the teacher. No softmax is ever stored: a row of each is made
//! where it is needed, in f32.
//!
//! A row's sums have one fixed order, whatever the number of threads.

use std::sync::Arc;

use bitnet_model::{
    kernels::{self, Kernel},
    storage::{contiguous, with_slice},
};
use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Shape, Tensor};
use rayon::prelude::*;

use crate::{Error, Result};

/// What is summed and how.
#[derive(Clone, Debug)]
pub struct Divergence {
    /// τ, by which both sides are divided.
    pub temperature: f32,
    /// Which rows count.
    pub rows: Arc<[bool]>,
    /// Divides the sum over rows.
    pub divisor: f64,
}

impl Divergence {
    /// The divergence of `student` from `teacher`, both (rows, columns) f32: a scalar that can be differentiated with
    /// respect to `student`. The processor computes it, of copies if they are on a device.
    ///
    /// # Errors
    /// Shapes that differ, or another number of rows than there are marks.
    pub fn of(&self, student: &Tensor, teacher: &Tensor) -> Result<Tensor> {
        let (rows, columns) = student.dims2()?;
        if teacher.dims2()? != (rows, columns) || columns == 0 {
            let (student, teacher) = (student.shape(), teacher.shape());
            return Err(Error::Input(format!(
                "divergence: student {student:?} and teacher {teacher:?} have no common shape"
            )));
        }
        if rows != self.rows.len() {
            let marks = self.rows.len();
            return Err(Error::Input(format!("divergence: {rows} rows, {marks} marks")));
        }
        let op = Op { divergence: self.clone(), teacher: teacher.detach().to_dtype(DType::F32)? };
        let copy = student.contiguous()?.to_device(&Device::Cpu)?;
        Ok(copy.apply_op1(op)?.to_device(student.device())?)
    }
}

struct Op {
    divergence: Divergence,
    teacher: Tensor,
}

impl CustomOp1 for Op {
    fn name(&self) -> &'static str {
        "divergence"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let (_, columns) = layout.shape().dims2()?;
        let Divergence { temperature, rows, divisor } = &self.divergence;
        let (x, kernel) = (contiguous::<f32>(x, layout)?, kernels::active());
        let sums: Vec<f64> = with_slice::<f32, _>(&self.teacher, |teacher| {
            let pairs = x.par_chunks(columns).zip(teacher.par_chunks(columns));
            let row = |(p, q): &mut (Vec<f32>, Vec<f32>),
                       ((x, teacher), counts): ((&[f32], &[f32]), &bool)| {
                if !counts {
                    return 0.;
                }
                let p_shift = log_softmax(kernel, teacher, *temperature, p);
                let q_shift = log_softmax(kernel, x, *temperature, q);
                // Σ p·(log p − log q), with log p = t/τ − its log-sum.
                let terms = p.iter().zip(teacher.iter().zip(x));
                let inverse = 1. / temperature;
                terms
                    .map(|(p, (t, s))| {
                        f64::from(p * ((t * inverse - p_shift) - (s * inverse - q_shift)))
                    })
                    .sum::<f64>()
            };
            Ok(pairs.zip(rows.par_iter()).map_init(Default::default, row).collect())
        })?;
        let tau = f64::from(*temperature);
        let loss = tau * tau * sums.iter().sum::<f64>() / divisor;
        Ok((CpuStorage::F32(vec![loss as f32]), Shape::from(())))
    }

    bitnet_model::no_metal_fwd!(1);

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let (_, columns) = x.dims2()?;
        let Divergence { temperature, rows, divisor } = &self.divergence;
        let factor = f64::from(grad.to_scalar::<f32>()?) * f64::from(*temperature) / divisor;
        let (factor, kernel) = (factor as f32, kernels::active());
        let mut dx = vec![0f32; x.elem_count()];
        with_slice::<f32, _>(x, |x| {
            with_slice::<f32, _>(&self.teacher, |teacher| {
                let pairs = x.par_chunks(columns).zip(teacher.par_chunks(columns));
                let outs = dx.par_chunks_mut(columns).zip(rows.par_iter());
                outs.zip(pairs).for_each_init(Vec::new, |p, ((dx, counts), (x, teacher))| {
                    if !counts {
                        return;
                    }
                    let mut q = Vec::new();
                    log_softmax(kernel, teacher, *temperature, p);
                    log_softmax(kernel, x, *temperature, &mut q);
                    for ((dx, q), p) in dx.iter_mut().zip(&q).zip(p.iter()) {
                        *dx = (q - p) * factor;
                    }
                });
                Ok(())
            })
        })?;
        Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
    }
}

/// Fills `softmax` with `softmax(row / τ)` and returns the number that makes `row / τ` its logarithm when taken away.
fn log_softmax(kernel: &Kernel, row: &[f32], temperature: f32, softmax: &mut Vec<f32>) -> f32 {
    let inverse = 1. / temperature;
    let shift = kernel.max(row) * inverse;
    softmax.clear();
    softmax.extend(row.iter().map(|x| x * inverse - shift));
    kernel.exp(softmax);
    let sum = kernel.sum(softmax);
    softmax.iter_mut().for_each(|x| *x /= sum);
    shift + sum.ln()
}

#[cfg(test)]
mod tests {
    use candle_core::{D, Var};
    use proptest::prelude::*;

    use super::*;

    fn values(count: usize) -> impl Strategy<Value = Vec<f32>> {
        prop::collection::vec(-20f32..20., count)
    }

    fn flat(x: &Tensor) -> Vec<f32> {
        x.flatten_all().unwrap().to_vec1().unwrap()
    }

    /// The definition, in Candle's own operations.
    fn oracle(student: &Tensor, teacher: &Tensor, of: &Divergence) -> candle_core::Result<Tensor> {
        let log_softmax =
            |x: &Tensor| candle_nn::ops::log_softmax(&(x / f64::from(of.temperature))?, D::Minus1);
        let (log_p, log_q) = (log_softmax(teacher)?, log_softmax(student)?);
        let marks: Vec<f32> = of.rows.iter().map(|&counts| f32::from(u8::from(counts))).collect();
        let marks = Tensor::new(marks.as_slice(), student.device())?;
        let rows = (log_p.exp()? * (log_p - log_q)?)?.sum(D::Minus1)?;
        (rows * marks)?.sum_all()? * (f64::from(of.temperature).powi(2) / of.divisor)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn equals_candle_forward_and_backward(
            (rows, columns, student, teacher) in (1..6usize, 1..60usize).prop_flat_map(|(rows, columns)| {
                (Just(rows), Just(columns), values(rows * columns), values(rows * columns))
            }),
            temperature in 0.5f32..5.,
        ) {
            let device = Device::Cpu;
            let student = Var::from_vec(student, (rows, columns), &device).unwrap();
            let teacher = Tensor::from_vec(teacher, (rows, columns), &device).unwrap();
            let marks: Vec<bool> = (0..rows).map(|row| row % 3 != 1).collect();
            let of = Divergence { temperature, rows: marks.into(), divisor: 7. };
            let loss = of.of(&student, &teacher).unwrap();
            let expected = oracle(&student, &teacher, &of).unwrap();
            let (value, wanted) = (loss.to_scalar::<f32>().unwrap(), expected.to_scalar::<f32>().unwrap());
            // Logits of 40 have an ulp of 4e-6, and there are up to 25 · 6 / 7 of them.
            prop_assert!((value - wanted).abs() < 1e-4 * wanted.abs().max(1.), "{value} {wanted}");
            let grad = |loss: &Tensor| {
                let grads = (loss * 3.).unwrap().backward().unwrap();
                flat(grads.get(&student).unwrap())
            };
            for (grad, expected) in grad(&loss).iter().zip(grad(&expected)) {
                prop_assert!((grad - expected).abs() < 2e-5, "{grad} {expected}");
            }
        }
    }

    #[test]
    fn equal_sides_diverge_by_nothing() {
        let x = Var::randn(0f32, 1., (4, 30), &Device::Cpu).unwrap();
        let of = Divergence { temperature: 2., rows: vec![true; 4].into(), divisor: 4. };
        let loss = of.of(&x, &x.detach()).unwrap();
        assert_eq!(loss.to_scalar::<f32>().unwrap(), 0.);
        assert!(flat(loss.backward().unwrap().get(&x).unwrap()).iter().all(|&g| g == 0.));
    }

    #[test]
    fn shapes_that_differ_are_refused() {
        let zeros = |shape| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
        let of = Divergence { temperature: 1., rows: vec![true; 2].into(), divisor: 1. };
        assert!(of.of(&zeros((2, 3)), &zeros((2, 4))).is_err());
        assert!(of.of(&zeros((3, 3)), &zeros((3, 3))).is_err());
    }
}
