//! [`Checkpoint`] as the source of a Candle `VarBuilder`.

use std::sync::Arc;

use candle_core::{DType, Device, Result, Shape, Tensor};
use candle_nn::{Init, var_builder::SimpleBackend};

use super::{Checkpoint, Dtype, is_float};
use crate::error::Error;

/// A shared checkpoint; shapes and element types are checked here, by name.
pub(super) struct Backend(pub Arc<Checkpoint>);

impl SimpleBackend for Backend {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        _: Init,
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        if let Some(info) = self.0.get(name)
            && info.shape != shape.dims()
        {
            let reason = format!("expected shape {:?}, found {:?}", shape.dims(), info.shape);
            return Err(wrap(self.0.wrong(name, reason)));
        }
        self.get_unchecked(name, dtype, device)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        let requested = Dtype::from(dtype);
        if let Some(stored) = self.0.get(name).map(|info| info.dtype)
            && stored != requested
            && !(is_float(stored) && dtype.is_float())
        {
            let reason = format!("holds {stored}, which cannot be read as {requested}");
            return Err(wrap(self.0.wrong(name, reason)));
        }
        let tensor = self.0.read(name).map_err(wrap)?;
        tensor.to_device(device)?.to_dtype(dtype)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.0.get(name).is_some()
    }
}

/// Our error inside Candle's, without the backtrace `candle_core::Error::wrap` appends: the message
/// says where.
pub(super) fn wrap(error: Error) -> candle_core::Error {
    candle_core::Error::Wrapped(Box::new(error))
}
