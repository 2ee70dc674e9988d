//! The Hadamard transform that BitNet v2 puts before `o_proj` and `down_proj` (arXiv:2504.18415).

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

#[cfg(feature = "cuda")]
use crate::cuda;
use crate::storage::contiguous;

/// The transform's size for rows of `width` values: the largest power of two that divides it.
pub fn hadamard_block(width: usize) -> usize {
    match width {
        0 => 1,
        _ => 1 << width.trailing_zeros(),
    }
}

/// Each row `x` (…, width) f32 times the orthonormal Hadamard matrix `H / √n`, `H₁ = 1`, `H₂ₙ = [[Hₙ, Hₙ], [Hₙ, −Hₙ]]`.
///
/// A width that is no power of two is cut into blocks of the largest power of two that divides it, each transformed by
/// itself: the matrix is block-diagonal. It is symmetric and its own inverse, so applied twice it gives `x` again and
/// its gradient is the transform of the gradient.
pub fn hadamard(x: &Tensor) -> Result<Tensor> {
    if x.dtype() != DType::F32 {
        bail!("hadamard: takes f32, not {:?}", x.dtype())
    }
    x.apply_op1(Hadamard)
}

struct Hadamard;

impl CustomOp1 for Hadamard {
    fn name(&self) -> &'static str {
        "hadamard"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let mut y = contiguous::<f32>(x, layout)?.into_owned();
        let width = layout.dims().last().copied().unwrap_or(1);
        let block = hadamard_block(width);
        // A few thousand values a task.
        y.par_chunks_mut(block.max(1 << 12)).for_each(|blocks| {
            blocks.chunks_exact_mut(block).for_each(transform);
        });
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        cuda::ops::hadamard(x, layout)
    }

    crate::no_metal_fwd!(1);

    fn bwd(&self, _x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        hadamard(dy).map(Some)
    }
}

/// The fast transform of one block, in place: `log₂ n` rounds of sums and differences.
fn transform(x: &mut [f32]) {
    let mut half = 1;
    while half < x.len() {
        for pair in x.chunks_exact_mut(2 * half) {
            let (left, right) = pair.split_at_mut(half);
            for (l, r) in left.iter_mut().zip(right) {
                (*l, *r) = (*l + *r, *l - *r);
            }
        }
        half *= 2;
    }
    let norm = 1. / (x.len() as f32).sqrt();
    x.iter_mut().for_each(|x| *x *= norm);
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;

    fn values(count: usize) -> Vec<f32> {
        (0..count).map(|i| (i as f32 * 12.9898).sin()).collect()
    }

    /// `H[i][j] = (−1)^popcount(i & j)` within a block.
    fn naive(x: &[f32], width: usize) -> Vec<f32> {
        let block = hadamard_block(width);
        let norm = 1. / (block as f32).sqrt();
        let entry =
            |i: usize, j: usize| if (i & j).count_ones().is_multiple_of(2) { norm } else { -norm };
        let row = |block_of: &[f32], i| (0..block).map(|j| entry(i, j) * block_of[j]).sum::<f32>();
        x.chunks(block)
            .flat_map(|x| (0..block).map(move |i| row(x, i)).collect::<Vec<_>>())
            .collect()
    }

    #[test]
    fn it_is_the_matrix_and_its_own_inverse() {
        for (width, block) in [(1, 1), (2, 2), (8, 8), (24, 8), (37, 1), (344, 8), (8192, 8192)] {
            assert_eq!(hadamard_block(width), block);
            let x = Tensor::from_vec(values(3 * width), (3, width), &Device::Cpu).unwrap();
            let y = hadamard(&x).unwrap();
            if width < 1000 {
                let want = naive(&values(3 * width), width);
                let got: Vec<f32> = y.flatten_all().unwrap().to_vec1().unwrap();
                assert!(got.iter().zip(&want).all(|(a, b)| (a - b).abs() < 1e-5), "{width}");
            }
            let off = (hadamard(&y).unwrap() - &x).unwrap().abs().unwrap().max_all().unwrap();
            assert!(off.to_scalar::<f32>().unwrap() < 1e-5, "{width}");
        }
    }

    #[test]
    fn its_gradient_is_the_transform() {
        let x = Var::from_vec(values(24), (2, 12), &Device::Cpu).unwrap();
        let seed = Tensor::from_vec(values(24), (2, 12), &Device::Cpu).unwrap();
        let loss = (hadamard(&x).unwrap() * &seed).unwrap().sum_all().unwrap();
        let grad = loss.backward().unwrap().get(&x).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(grad, hadamard(&seed).unwrap().to_vec2::<f32>().unwrap());
    }

    #[test]
    fn other_types_are_refused() {
        let x = Tensor::zeros((1, 4), DType::U32, &Device::Cpu).unwrap();
        assert!(hadamard(&x).unwrap_err().to_string().contains("f32"));
    }
}
