//! The optimizer's moments, its updates in place, and the norm of gradients.

use candle_core::{
    CudaDevice, CudaStorage, Layout, Result, Tensor, backend::BackendStorage, bail,
    cuda_backend::cudarc::driver::CudaSlice,
};

use super::gradients::read;
use crate::cuda::{
    device::{Gathered, Memory, launch, uninitialized},
    launch::Launch,
};

/// The two moments of a parameter.
#[derive(Debug)]
pub struct Moments {
    device: CudaDevice,
    count: usize,
    both: [CudaSlice<f32>; 2],
}

impl Moments {
    /// Of `count` values, all 0.
    pub fn new(device: &CudaDevice, count: usize) -> Result<Self> {
        let zeros = || device.alloc_zeros::<f32>(count.max(1));
        Ok(Self { device: device.clone(), count, both: [zeros()?, zeros()?] })
    }

    /// Their values.
    pub fn values(&self) -> Result<[Vec<f32>; 2]> {
        let [first, second] = &self.both;
        let copy = |moment: &CudaSlice<f32>| self.device.clone_dtoh(&moment.slice(..self.count));
        Ok([copy(first)?, copy(second)?])
    }

    /// Sets both.
    pub fn set(&mut self, values: [Vec<f32>; 2]) -> Result<()> {
        for (moment, values) in self.both.iter_mut().zip(values) {
            self.device.memcpy_htod(&values, &mut moment.slice_mut(..self.count))?;
        }
        Ok(())
    }
}

/// Updates a dense `parameter` with a `gradient` of its shape; `coefficients` as [`Launch::adamw`] has them.
pub fn adamw(
    (parameter, layout): (&mut CudaStorage, &Layout),
    (gradient, gradient_layout): (&CudaStorage, &Layout),
    Moments { both: [first, second], .. }: &mut Moments,
    coefficients: [f32; 8],
) -> Result<()> {
    let Some((0, count)) = layout.contiguous_offsets() else {
        bail!("adamw: a parameter is a view of another tensor")
    };
    let device = parameter.device().clone();
    let stream = device.cuda_stream();
    let gradient = Gathered::<f32>::contiguous(gradient, gradient_layout)?;
    let gradient = gradient.memory(&stream)?;
    let (first, second) = (Memory::written(first, &stream), Memory::written(second, &stream));
    let parameter = Memory::written(parameter.as_cuda_slice_mut::<f32>()?, &stream);
    let moments = [first.address, second.address];
    let update = Launch::adamw(parameter.address, gradient.address, moments, count, coefficients);
    // SAFETY: the caller checked that the shapes are equal, the moments are as long, and all buffers are held.
    unsafe { launch(&device, &update) }
}

/// The sum of squares of each of `tensors`, f32 on one device. They come to the processor together.
pub fn sums_of_squares(tensors: &[&Tensor]) -> Result<Vec<f64>> {
    let Some(first) = tensors.first() else { return Ok(Vec::new()) };
    let device = first.device().as_cuda_device()?;
    let stream = device.cuda_stream();
    let counts =
        Vec::from_iter(tensors.iter().map(|tensor| Launch::square_sums(tensor.elem_count())));
    let mut sums = uninitialized::<f64>(device, counts.iter().sum())?;
    {
        let sums = Memory::written(&mut sums, &stream);
        let mut place = sums.address;
        for (tensor, count) in tensors.iter().zip(&counts) {
            let values = read(tensor);
            let values = values.dense()?;
            let values = values.memory(&stream)?;
            let squares = Launch::squares(values.address, tensor.elem_count(), place);
            // SAFETY: each has its part of the sums, and all buffers are held.
            unsafe { launch(device, &squares) }?;
            place += (size_of::<f64>() * count) as u64;
        }
    }
    let sums = device.clone_dtoh(&sums)?;
    let mut rest = &sums[..];
    let each = counts.iter().map(|count| {
        let (chunks, more) = rest.split_at(*count);
        rest = more;
        chunks.iter().sum()
    });
    Ok(each.collect())
}
