//! Root-mean-square norm with a gradient: `y = weight · x · rsqrt(mean(x²) + ε)`.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};

use super::{dot, new_chunks};
#[cfg(feature = "cuda")]
use crate::cuda;
use crate::{
    kernels::{self, Loop, vectorized},
    storage::{Rows, contiguous, with_slice},
    threads,
};

/// Normalizes the last dimension of `x` (…, hidden) and multiplies it by `weight` (hidden); f32.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    x.apply_op2(weight, RmsNorm { eps: eps as f32 })
}

pub(super) struct RmsNorm {
    pub eps: f32,
}

impl RmsNorm {
    /// Elements of a row, which are as many as those of the weight.
    pub fn check(&self, x: &Layout, weight: &Layout) -> Result<usize> {
        let hidden = weight.shape().dims1()?;
        if x.dims().last() != Some(&hidden) {
            bail!("rms-norm: x is {:?}, the weight has {hidden} elements", x.shape());
        }
        Ok(hidden)
    }

    /// `rsqrt(mean(x²) + ε)` of one row.
    fn inverse_rms(&self, row: &[f32]) -> f32 {
        let mean = kernels::active().sum_squares(row) / row.len() as f32;
        1. / (mean + self.eps).sqrt()
    }

    /// One row.
    pub fn normalize(&self, x: &[f32], weight: &[f32], y: &mut [f32]) {
        vectorized(Normalized { inverse_rms: self.inverse_rms(x), weight, x, y });
    }
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let hidden = self.check(x_layout, weight_layout)?;
        let x = Rows::<f32>::new(x, x_layout)?;
        let weight = contiguous::<f32>(weight, weight_layout)?;
        let y = new_chunks(x_layout.shape().elem_count(), hidden, |row, y| {
            self.normalize(x.row(row), &weight, y);
        });
        Ok((CpuStorage::F32(y), x_layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_layout: &Layout,
        weight: &CudaStorage,
        weight_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.check(x_layout, weight_layout)?;
        cuda::ops::rms_norm((x, x_layout), (weight, weight_layout), self.eps)
    }

    crate::no_metal_fwd!(2);

    /// With `r = rsqrt(mean(x²) + ε)` and `u = dy·weight`:
    /// `dx = r·u − x·r³·mean(u·x)`, `dweight = Σ_rows dy·x·r`.
    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        #[cfg(feature = "cuda")]
        if dy.device().is_cuda() {
            let [dx, dweight] = cuda::ops::rms_norm_gradients(x, weight, dy, self.eps)?;
            return Ok((Some(dx), Some(dweight)));
        }
        /// Rows added up by one task; fixed, so that the sum has one order on any machine.
        const ROWS: usize = 64;
        let hidden = weight.dims1()?;
        let (dx, dweight) = with_slice::<f32, _>(x, |x| {
            with_slice::<f32, _>(weight, |weight| {
                with_slice::<f32, _>(dy, |dy| {
                    let mut dx = vec![0f32; x.len()];
                    let mut sums = vec![Vec::new(); x.len().div_ceil(ROWS * hidden)];
                    let pair = ((&mut dx[..], ROWS * hidden), (&mut sums[..], 1));
                    threads::for_each_chunk_pair(pair.0, pair.1, |chunk, dx, sum| {
                        let at = chunk * ROWS * hidden..chunk * ROWS * hidden + dx.len();
                        sum[0] = self.backward_rows(&x[at.clone()], weight, &dy[at], dx);
                    });
                    let mut dweight = vec![0f32; hidden];
                    for sum in &sums {
                        dweight.iter_mut().zip(sum).for_each(|(total, s)| *total += s);
                    }
                    Ok((dx, dweight))
                })
            })
        })?;
        let dx = Tensor::from_vec(dx, x.shape(), x.device())?;
        Ok((Some(dx), Some(Tensor::from_vec(dweight, hidden, x.device())?)))
    }
}

impl RmsNorm {
    /// Fills `dx` and returns these rows' share of `dweight`.
    fn backward_rows(&self, x: &[f32], weight: &[f32], dy: &[f32], dx: &mut [f32]) -> Vec<f32> {
        let hidden = weight.len();
        let mut dweight = vec![0f32; hidden];
        for ((x, dy), dx) in x.chunks(hidden).zip(dy.chunks(hidden)).zip(dx.chunks_mut(hidden)) {
            let r = self.inverse_rms(x);
            vectorized(Scaled { weight, dy, dx });
            let mean = dot(kernels::active(), dx, x) / hidden as f32;
            vectorized(BackwardRow {
                r,
                shrink: mean * r * r * r,
                x,
                dy,
                dx,
                dweight: &mut dweight,
            });
        }
        dweight
    }
}

/// `y = weight · (x · inverse_rms)` of one row.
struct Normalized<'a> {
    inverse_rms: f32,
    weight: &'a [f32],
    x: &'a [f32],
    y: &'a mut [f32],
}

impl Loop for Normalized<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for ((y, x), weight) in self.y.iter_mut().zip(self.x).zip(self.weight) {
            *y = weight * (x * self.inverse_rms);
        }
    }
}

/// `u = dy·weight`, to `dx`.
struct Scaled<'a> {
    weight: &'a [f32],
    dy: &'a [f32],
    dx: &'a mut [f32],
}

impl Loop for Scaled<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for (dx, (dy, weight)) in self.dx.iter_mut().zip(self.dy.iter().zip(self.weight)) {
            *dx = dy * weight;
        }
    }
}

/// `dx = r·u − x·shrink` and `dweight += dy·x·r` of one row, where `dx` holds `u`.
struct BackwardRow<'a> {
    r: f32,
    shrink: f32,
    x: &'a [f32],
    dy: &'a [f32],
    dx: &'a mut [f32],
    dweight: &'a mut [f32],
}

impl Loop for BackwardRow<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let inputs = self.x.iter().zip(self.dy);
        for ((x, dy), (dx, dweight)) in inputs.zip(self.dx.iter_mut().zip(self.dweight)) {
            *dx = self.r * *dx - x * self.shrink;
            *dweight += dy * x * self.r;
        }
    }
}
