//! Rows of a tensor, read from the file each time they are asked for.

use std::{ops::Range, sync::Arc};

use bytemuck::Pod;

use super::{Checkpoint, Dtype, backend::wrap, header::Entry};
use crate::{
    error::{Error, Result},
    kernels::{DenseWeights, Matrix},
    rows::RowSource,
};

/// A matrix of floats in a checkpoint. Its rows are read by position and do not stay in memory.
#[derive(Debug)]
pub struct StoredRows {
    checkpoint: Arc<Checkpoint>,
    name: String,
    shard: usize,
    entry: Entry,
    shape: (usize, usize),
}

impl StoredRows {
    /// The tensor `name`, of shape (rows, cols).
    ///
    /// # Errors
    /// No such tensor, or not a matrix of BF16, F16 or F32.
    pub fn new(checkpoint: &Arc<Checkpoint>, name: &str) -> Result<Self> {
        let (shard, entry) = checkpoint.find(name)?.clone();
        let shape = match (entry.dtype, &entry.shape[..]) {
            (Dtype::BF16 | Dtype::F16 | Dtype::F32, &[rows, cols]) => (rows, cols),
            (dtype, shape) => {
                let reason = format!("expected a matrix of floats, found {dtype} {shape:?}");
                return Err(checkpoint.wrong(name, reason));
            }
        };
        Ok(Self { checkpoint: checkpoint.clone(), name: name.into(), shard, entry, shape })
    }

    /// The elements of some rows.
    fn read<T: Pod>(&self, range: &Range<usize>) -> Result<Vec<T>, Error> {
        let cols = self.shape.1;
        assert!(range.end <= self.shape.0, "rows {range:?} of {}", self.shape.0);
        let mut data = vec![T::zeroed(); range.len() * cols];
        let start = self.entry.start + (range.start * cols * size_of::<T>()) as u64;
        self.checkpoint.shards[self.shard]
            .1
            .read_exact_at(bytemuck::cast_slice_mut(&mut data), start)
            .map_err(|e| self.checkpoint.wrong(&self.name, format!("cannot be read: {e}")))?;
        Ok(data)
    }
}

impl RowSource for StoredRows {
    fn shape(&self) -> (usize, usize) {
        self.shape
    }

    fn with_rows(
        &self,
        range: Range<usize>,
        visit: &mut dyn FnMut(DenseWeights<'_>),
    ) -> candle_core::Result<()> {
        let (rows, cols) = (range.len(), self.shape.1);
        match self.entry.dtype {
            Dtype::F32 => {
                let data = self.read(&range).map_err(wrap)?;
                visit(DenseWeights::F32(Matrix::new(&data, rows, cols)));
            }
            Dtype::F16 => {
                let data = self.read(&range).map_err(wrap)?;
                visit(DenseWeights::F16(Matrix::new(&data, rows, cols)));
            }
            _ => {
                let data = self.read(&range).map_err(wrap)?;
                visit(DenseWeights::Bf16(Matrix::new(&data, rows, cols)));
            }
        }
        Ok(())
    }
}
