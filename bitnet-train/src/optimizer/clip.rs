//! Clipping by the norm of all gradients together, as `torch.nn.utils.clip_grad_norm_` does.

#[cfg(feature = "cuda")]
use bitnet_model::cuda;
use candle_core::{Storage, Tensor, bail};
use rayon::prelude::*;

use crate::Result;

/// Elements summed as one task.
const CHUNK: usize = 1 << 16;
/// Independent partial sums of a task.
const LANES: usize = 8;

/// The Euclidean norm of all `gradients` as one vector. Sums are f64 in a fixed order, whatever the number of threads.
pub fn global_norm<'a>(gradients: impl IntoIterator<Item = &'a Tensor>) -> Result<f64> {
    let sums = sums_of_squares(&Vec::from_iter(gradients))?;
    Ok(sums.iter().fold(0., |all, sum| all + sum).sqrt())
}

/// Of each of `gradients`.
fn sums_of_squares(gradients: &[&Tensor]) -> candle_core::Result<Vec<f64>> {
    #[cfg(feature = "cuda")]
    if gradients.first().is_some_and(|gradient| gradient.device().is_cuda()) {
        return cuda::ops::sums_of_squares(gradients);
    }
    gradients.iter().map(|gradient| sum_of_squares(&gradient.contiguous()?)).collect()
}

/// What gradients of norm `norm` are multiplied by so that their norm is at most `max_norm`: torch's
/// `min(1, max_norm / (norm + 1e-6))`.
pub fn clip_factor(norm: f64, max_norm: f64) -> f64 {
    (max_norm / (norm + 1e-6)).min(1.)
}

fn sum_of_squares(gradient: &Tensor) -> candle_core::Result<f64> {
    let (storage, layout) = gradient.storage_and_layout();
    let (Storage::Cpu(storage), Some((start, end))) = (&*storage, layout.contiguous_offsets())
    else {
        bail!("the norm of a gradient needs contiguous values in main memory")
    };
    let sums: Vec<f64> = storage.as_slice::<f32>()?[start..end]
        .par_chunks(CHUNK)
        .map(sum_of_squares_slice)
        .collect();
    Ok(sums.iter().sum())
}

fn sum_of_squares_slice(values: &[f32]) -> f64 {
    let (chunks, rest) = values.as_chunks::<LANES>();
    let mut sums = [0f64; LANES];
    for chunk in chunks {
        for (sum, &value) in sums.iter_mut().zip(chunk) {
            *sum += f64::from(value) * f64::from(value);
        }
    }
    sums.iter().sum::<f64>()
        + rest.iter().map(|&value| f64::from(value) * f64::from(value)).sum::<f64>()
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    #[test]
    fn the_norm_is_over_all_gradients() {
        let device = Device::Cpu;
        let a = Tensor::full(3f32, (300, 500), &device).unwrap(); // three tasks
        let b = Tensor::new(&[[4f32, 0.], [0., 4.]], &device).unwrap().t().unwrap();
        let expected = (9. * 150_000. + 32f64).sqrt();
        assert_eq!(global_norm([&a, &b]).unwrap(), expected);
        assert_eq!(global_norm([]).unwrap(), 0.);
        let nan = Tensor::new(&[f32::NAN], &device).unwrap();
        assert!(global_norm([&a, &nan]).unwrap().is_nan());
        assert!(global_norm([&a.to_dtype(DType::F64).unwrap()]).is_err());
    }

    #[test]
    fn only_long_gradients_are_shortened() {
        assert_eq!(clip_factor(0.5, 1.), 1.);
        assert_eq!(clip_factor(0., 1.), 1.);
        assert_eq!(clip_factor(4., 1.), 1. / 4.000001);
    }
}
