//! Parts of a tensor, read from the file each time they are asked for: rows of floats, and packed codes.

use std::{cell::Cell, ops::Range, sync::Arc};

use bytemuck::Pod;

use super::{Checkpoint, Dtype, backend::wrap, header::Entry};
use crate::{
    error::{Error, Result},
    kernels::{DenseWeights, Matrix},
    packed::PackedSource,
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

    /// Calls `visit` with the elements of some rows.
    fn read<T: Pod>(&self, range: &Range<usize>, visit: impl FnOnce(&[T])) -> Result<(), Error> {
        thread_local! {
            /// The last rows read, or room for the next: a new buffer each time would have to be zeroed.
            static BUFFER: Cell<Vec<u32>> = const { Cell::new(Vec::new()) };
        }
        let cols = self.shape.1;
        assert!(range.end <= self.shape.0, "rows {range:?} of {}", self.shape.0);
        let bytes = range.len() * cols * size_of::<T>();
        let mut buffer = BUFFER.take();
        buffer.resize(buffer.len().max(bytes.div_ceil(size_of::<u32>())), 0);
        let data = &mut bytemuck::cast_slice_mut(&mut buffer)[..bytes];
        let start = self.entry.start + (range.start * cols * size_of::<T>()) as u64;
        self.checkpoint.shards[self.shard]
            .1
            .read_exact_at(data, start)
            .map_err(|e| self.checkpoint.wrong(&self.name, format!("cannot be read: {e}")))?;
        visit(bytemuck::cast_slice(data));
        BUFFER.set(buffer);
        Ok(())
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
        let read = match self.entry.dtype {
            Dtype::F32 => self.read(&range, |data: &[f32]| {
                visit(DenseWeights::F32(Matrix::new(data, rows, cols)));
            }),
            Dtype::F16 => self.read(&range, |data: &[u16]| {
                visit(DenseWeights::F16(Matrix::new(data, rows, cols)));
            }),
            _ => self.read(&range, |data: &[u16]| {
                visit(DenseWeights::Bf16(Matrix::new(data, rows, cols)));
            }),
        };
        read.map_err(wrap)
    }
}

impl Checkpoint {
    /// The place of a tensor of bytes.
    fn packed(&self, name: &str) -> Result<&(usize, Entry), Error> {
        let found = self.find(name)?;
        match found.1.dtype {
            Dtype::U8 => Ok(found),
            dtype => Err(self.wrong(name, format!("expected packed codes (U8), found {dtype}"))),
        }
    }
}

impl PackedSource for Checkpoint {
    fn packed_len(&self, name: &str) -> candle_core::Result<usize> {
        self.packed(name).map(|(_, entry)| entry.bytes).map_err(wrap)
    }

    fn read_packed(&self, name: &str, offset: usize, out: &mut [u8]) -> candle_core::Result<()> {
        let (shard, entry) = self.packed(name).map_err(wrap)?;
        let within = offset.checked_add(out.len()).is_some_and(|end| end <= entry.bytes);
        assert!(within, "{} bytes at {offset} of {}", out.len(), entry.bytes);
        let read = self.shards[*shard].1.read_exact_at(out, entry.start + offset as u64);
        read.map_err(|e| wrap(self.wrong(name, format!("cannot be read: {e}"))))
    }
}
