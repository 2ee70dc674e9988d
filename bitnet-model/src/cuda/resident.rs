//! Ternary weights on a device: packed once, when a product first needs them there.

use std::sync::{Arc, OnceLock};

use candle_core::{
    CudaDevice, Result, bail,
    cuda_backend::{DeviceId, cudarc::driver::CudaSlice},
};

use super::layout::Stack;
use crate::weights::TernaryWeight;

/// A [`Stack`] in a device's memory.
#[derive(Debug)]
pub struct OnDevice {
    device: DeviceId,
    /// [`Stack::words`].
    pub words: CudaSlice<u32>,
    /// [`Stack::bands`], three words each.
    pub bands: CudaSlice<u32>,
    /// [`Stack::chunks`].
    pub chunks: usize,
}

/// Room for the copy that a device has of a stack of matrices, which its first matrix keeps.
#[derive(Clone, Debug, Default)]
pub struct Resident(Arc<OnceLock<OnDevice>>);

impl Resident {
    /// The copy, made now if there is none yet.
    ///
    /// # Errors
    /// No memory, or the weights are on another device.
    pub fn get_or_copy(&self, weights: &[TernaryWeight], device: &CudaDevice) -> Result<&OnDevice> {
        if self.0.get().is_none() {
            let stack = Stack::new(weights);
            let bands = stack.bands.iter();
            let bands = Vec::from_iter(
                bands.flat_map(|band| [band.scale.to_bits(), band.first, band.rows]),
            );
            let copy = OnDevice {
                device: device.id(),
                words: device.clone_htod(&stack.words)?,
                bands: device.clone_htod(&bands)?,
                chunks: stack.chunks,
            };
            // Another thread may have been first: both copies are the same.
            let _ = self.0.set(copy);
        }
        match self.0.get() {
            Some(copy) if copy.device == device.id() => Ok(copy),
            _ => {
                bail!("ternary weights are on another device already: load the model once a device")
            }
        }
    }
}
