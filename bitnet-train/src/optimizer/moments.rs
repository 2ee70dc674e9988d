//! The two moments of a parameter, f32, where the parameter is.

use std::borrow::Cow;

#[cfg(feature = "cuda")]
use bitnet_model::cuda;
#[cfg(feature = "cuda")]
use candle_core::Device;
use candle_core::{Result, Tensor};

/// Means of gradients and of their squares.
#[derive(Debug)]
pub enum Moments {
    /// On the processor.
    Cpu([Vec<f32>; 2]),
    /// On a device.
    #[cfg(feature = "cuda")]
    Cuda(cuda::ops::Moments),
}

impl Moments {
    /// Those of `parameter` before the first update: zeros.
    pub fn new(parameter: &Tensor) -> Result<Self> {
        let count = parameter.elem_count();
        #[cfg(feature = "cuda")]
        if let Device::Cuda(device) = parameter.device() {
            return Ok(Self::Cuda(cuda::ops::Moments::new(device, count)?));
        }
        Ok(Self::Cpu([vec![0.; count], vec![0.; count]]))
    }

    /// Both, if they are on the processor.
    pub fn on_cpu(&mut self) -> Option<&mut [Vec<f32>; 2]> {
        match self {
            Self::Cpu(both) => Some(both),
            #[cfg(feature = "cuda")]
            Self::Cuda(_) => None,
        }
    }

    /// Copies of both on the processor, if they are elsewhere.
    pub fn values(&self) -> Result<[Cow<'_, [f32]>; 2]> {
        match self {
            Self::Cpu(both) => Ok([Cow::from(&both[0]), Cow::from(&both[1])]),
            #[cfg(feature = "cuda")]
            Self::Cuda(both) => Ok(both.values()?.map(Cow::from)),
        }
    }

    /// Sets both to as many values.
    pub fn set(&mut self, values: [Vec<f32>; 2]) -> Result<()> {
        match self {
            Self::Cpu(both) => *both = values,
            #[cfg(feature = "cuda")]
            Self::Cuda(both) => both.set(values)?,
        }
        Ok(())
    }
}
