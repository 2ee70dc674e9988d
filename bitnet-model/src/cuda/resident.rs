//! Weights on a device: copied once, when an op first needs them there.

use std::sync::{Arc, OnceLock};

use candle_core::{
    CudaDevice, Result, bail,
    cuda_backend::{
        DeviceId,
        cudarc::driver::{CudaSlice, DeviceRepr},
    },
};

use super::{
    device::uninitialized,
    head_layout::HeadBands,
    launch::{Element, head_groups},
    layout::Stack,
};
use crate::{
    head_weights::HeadWeights, kernels::DenseWeights, rows::RowSource, weights::TernaryWeight,
};

/// Room for the copy that a device has of something. Clones share it.
#[derive(Debug)]
pub struct Resident<T>(Arc<OnceLock<(DeviceId, T)>>);

impl<T> Clone for Resident<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T> Default for Resident<T> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<T> Resident<T> {
    /// The copy, made now if there is none yet.
    ///
    /// # Errors
    /// As `copy`, or there is one on another device.
    pub fn get_or_copy(&self, device: &CudaDevice, copy: impl FnOnce() -> Result<T>) -> Result<&T> {
        if self.0.get().is_none() {
            // Another thread may be first: both copies are the same.
            let _ = self.0.set((device.id(), copy()?));
        }
        match self.0.get() {
            Some((owner, copy)) if *owner == device.id() => Ok(copy),
            _ => bail!("weights are on another device already: load the model once a device"),
        }
    }
}

/// A [`Stack`] of ternary matrices, which its first matrix keeps.
#[derive(Debug)]
pub struct StackCopy {
    /// [`Stack::words`].
    pub words: CudaSlice<u32>,
    /// [`Stack::bands`], three words each.
    pub bands: CudaSlice<u32>,
    /// [`Stack::chunks`].
    pub chunks: usize,
}

impl StackCopy {
    pub fn new(weights: &[TernaryWeight], device: &CudaDevice) -> Result<Self> {
        let stack = Stack::new(weights);
        let bands = stack.bands.iter();
        let bands =
            Vec::from_iter(bands.flat_map(|band| [band.scale.to_bits(), band.first, band.rows]));
        Ok(Self {
            words: device.clone_htod(&stack.words)?,
            bands: device.clone_htod(&bands)?,
            chunks: stack.chunks,
        })
    }
}

/// A head in few bits.
#[derive(Debug)]
pub struct HeadCopy {
    /// [`HeadBands::words`].
    pub words: CudaSlice<u32>,
    /// [`HeadBands::scales`].
    pub scales: CudaSlice<u8>,
    /// Of a row.
    pub groups: usize,
}

impl HeadCopy {
    pub fn new(head: &HeadWeights, device: &CudaDevice) -> Result<Self> {
        let bands = HeadBands::new(head);
        Ok(Self {
            words: device.clone_htod(&bands.words)?,
            scales: device.clone_htod(&bands.scales)?,
            groups: head_groups(head.shape().1),
        })
    }
}

/// The rows of a table, one behind another, as they are stored.
#[derive(Debug)]
pub enum RowsCopy {
    F32(CudaSlice<f32>),
    /// The bits.
    F16(CudaSlice<u16>),
    /// The bits.
    Bf16(CudaSlice<u16>),
}

impl RowsCopy {
    pub fn new(source: &dyn RowSource, device: &CudaDevice) -> Result<Self> {
        let mut element = Ok(Element::F32);
        source.with_rows(0..source.shape().0.min(1), &mut |rows| {
            element = match rows {
                DenseWeights::F32(_) => Ok(Element::F32),
                DenseWeights::F16(_) => Ok(Element::F16),
                DenseWeights::Bf16(_) => Ok(Element::Bf16),
                DenseWeights::I8(_) => Err("rows of int8 are not multiplied on CUDA"),
            };
        })?;
        Ok(match element.map_err(candle_core::Error::msg)? {
            Element::F32 => Self::F32(copy_rows(source, device, |rows| match rows {
                DenseWeights::F32(rows) => rows.dense(),
                _ => None,
            })?),
            Element::F16 => Self::F16(copy_rows(source, device, |rows| match rows {
                DenseWeights::F16(rows) => rows.dense(),
                _ => None,
            })?),
            Element::Bf16 => Self::Bf16(copy_rows(source, device, |rows| match rows {
                DenseWeights::Bf16(rows) => rows.dense(),
                _ => None,
            })?),
        })
    }

    /// How they are stored.
    pub fn element(&self) -> Element {
        match self {
            Self::F32(_) => Element::F32,
            Self::F16(_) => Element::F16,
            Self::Bf16(_) => Element::Bf16,
        }
    }
}

/// All rows, some at a time.
fn copy_rows<T: DeviceRepr + 'static>(
    source: &dyn RowSource,
    device: &CudaDevice,
    values: for<'a> fn(DenseWeights<'a>) -> Option<&'a [T]>,
) -> Result<CudaSlice<T>> {
    /// Rows of a copy: some megabytes.
    const COPIED: usize = 1024;
    let (rows, cols) = source.shape();
    let mut copy = uninitialized::<T>(device, rows * cols)?;
    for start in (0..rows).step_by(COPIED) {
        let end = rows.min(start + COPIED);
        let mut copied = Ok(());
        source.with_rows(start..end, &mut |rows| {
            copied = match values(rows) {
                Some(values) => {
                    device.memcpy_htod(values, &mut copy.slice_mut(start * cols..end * cols))
                }
                None => {
                    Err(candle_core::Error::msg("rows that are not stored as the first one is"))
                }
            };
        })?;
        copied?;
    }
    Ok(copy)
}
