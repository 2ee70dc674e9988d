//! Rotary position embedding, rotate-half form: the pair `(x[i], x[i + d/2])` turns by
//! `position · theta^(-2i/d)` (arXiv:2104.09864, in the element order of Llama checkpoints).

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};

use super::new_chunks;
#[cfg(feature = "cuda")]
use crate::cuda;
use crate::{
    kernels::{Loop, vectorized},
    storage::{Rows, contiguous},
};

/// Rotates `x` (batch, seq, heads · head_dim) by `cos` and `sin` (batch or 1, seq, head_dim / 2):
/// (batch, seq, heads, head_dim); all f32. The angles are constants: no gradient flows into them.
pub fn rope(x: &Tensor, heads: usize, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    x.apply_op3(cos, sin, Rope { heads })
}

struct Rope {
    heads: usize,
}

impl Rope {
    /// The shape of the result; refuses angles that do not fit.
    fn shape(&self, x: &Layout, cos: &Layout, sin: &Layout) -> Result<Shape> {
        let ((batch, seq, width), heads) = (x.shape().dims3()?, self.heads);
        let (angle_rows, angle_seq, half) = cos.shape().dims3()?;
        let angles_fit = cos.shape() == sin.shape()
            && (angle_rows == batch || angle_rows == 1)
            && angle_seq == seq
            && 2 * half * heads == width;
        if !angles_fit {
            let (angles, x) = (cos.shape(), x.shape());
            bail!("rope: angles {angles:?} do not fit {heads} heads of x {x:?}");
        }
        Ok((batch, seq, heads, 2 * half).into())
    }
}

/// One head: both halves are turned.
struct Turn<'a> {
    cos: &'a [f32],
    sin: &'a [f32],
    x: &'a [f32],
    y: &'a mut [f32],
}

impl Loop for Turn<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { cos, sin, x, y } = self;
        let half = cos.len();
        let ((x1, x2), (y1, y2)) = (x.split_at(half), y.split_at_mut(half));
        let pairs = x1.iter().zip(x2).zip(cos.iter().zip(sin));
        for (((x1, x2), (cos, sin)), (y1, y2)) in pairs.zip(y1.iter_mut().zip(y2)) {
            *y1 = x1 * cos - x2 * sin;
            *y2 = x2 * cos + x1 * sin;
        }
    }
}

impl CustomOp3 for Rope {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        cos: &CpuStorage,
        cos_layout: &Layout,
        sin: &CpuStorage,
        sin_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let shape = self.shape(x_layout, cos_layout, sin_layout)?;
        let (batch, seq, width) = x_layout.shape().dims3()?;
        let (angle_rows, _, half) = cos_layout.shape().dims3()?;
        let x = Rows::<f32>::new(x, x_layout)?;
        let cos = contiguous::<f32>(cos, cos_layout)?;
        let sin = contiguous::<f32>(sin, sin_layout)?;
        let head_dim = 2 * half;
        let y = new_chunks(batch * seq * width, width, |token, y| {
            let at = (token % (angle_rows * seq)) * half;
            let (cos, sin) = (&cos[at..][..half], &sin[at..][..half]);
            for (x, y) in x.row(token).chunks(head_dim).zip(y.chunks_mut(head_dim)) {
                vectorized(Turn { cos, sin, x, y });
            }
        });
        Ok((CpuStorage::F32(y), shape))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_layout: &Layout,
        cos: &CudaStorage,
        cos_layout: &Layout,
        sin: &CudaStorage,
        sin_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let shape = self.shape(x_layout, cos_layout, sin_layout)?;
        cuda::ops::rope((x, x_layout), (cos, cos_layout), (sin, sin_layout), shape)
    }

    crate::no_metal_fwd!(3);

    /// The gradient turns back by the same angle.
    fn bwd(
        &self,
        x: &Tensor,
        cos: &Tensor,
        sin: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let dy = dy.flatten_from(2)?;
        Ok((Some(rope(&dy, self.heads, cos, &sin.neg()?)?.reshape(x.shape())?), None, None))
    }
}
