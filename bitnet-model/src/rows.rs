//! The rows of a matrix that need not be in memory: of the embedding, and of the output head, which are read row by row.

use std::{fmt::Debug, ops::Range, sync::Arc};

use candle_core::{DType, Result, Tensor, bail};
use half::{bf16, slice::HalfFloatSliceExt};

#[cfg(feature = "cuda")]
use crate::cuda::resident::{Resident, RowsCopy};
use crate::{
    kernels::{DenseWeights, Matrix},
    storage::with_slice,
    threads,
};

/// A matrix (rows, cols) of floats that hands out some of its rows.
pub trait RowSource: Debug + Send + Sync {
    /// Rows and columns.
    fn shape(&self) -> (usize, usize);

    /// Calls `visit` with the rows `range`, as they are stored.
    ///
    /// # Errors
    /// The rows cannot be read.
    ///
    /// # Panics
    /// If there are no such rows.
    fn with_rows(&self, range: Range<usize>, visit: &mut dyn FnMut(DenseWeights<'_>))
    -> Result<()>;
}

/// Rows that several read: an embedding and a head that is tied to it. A device has one copy of them, made when it first
/// needs it.
#[derive(Clone, Debug)]
pub struct Table {
    source: Arc<dyn RowSource>,
    #[cfg(feature = "cuda")]
    resident: Resident<RowsCopy>,
}

impl Table {
    /// The rows of `source`.
    pub fn new(source: Arc<dyn RowSource>) -> Self {
        Self {
            source,
            #[cfg(feature = "cuda")]
            resident: Resident::default(),
        }
    }

    /// Where the rows are read.
    pub fn source(&self) -> &dyn RowSource {
        &*self.source
    }

    /// The copy on a device.
    #[cfg(feature = "cuda")]
    pub(crate) fn resident(&self) -> &Resident<RowsCopy> {
        &self.resident
    }
}

/// Rows in memory.
#[derive(Clone, Debug)]
pub struct TensorRows {
    tensor: Tensor,
    shape: (usize, usize),
}

impl TensorRows {
    /// Of a matrix of f32 or bf16 on the CPU.
    ///
    /// # Errors
    /// Another tensor.
    pub fn new(tensor: &Tensor) -> Result<Self> {
        let shape = tensor.dims2()?;
        if !matches!(tensor.dtype(), DType::F32 | DType::BF16) || !tensor.device().is_cpu() {
            bail!("rows are f32 or bf16 on the CPU, not {:?}", tensor.dtype());
        }
        Ok(Self { tensor: tensor.detach().contiguous()?, shape })
    }
}

impl RowSource for TensorRows {
    fn shape(&self) -> (usize, usize) {
        self.shape
    }

    fn with_rows(
        &self,
        range: Range<usize>,
        visit: &mut dyn FnMut(DenseWeights<'_>),
    ) -> Result<()> {
        let cols = self.shape.1;
        let elements = range.start * cols..range.end * cols;
        match self.tensor.dtype() {
            DType::F32 => with_slice::<f32, _>(&self.tensor, |w| {
                visit(DenseWeights::F32(Matrix::new(&w[elements], range.len(), cols)));
                Ok(())
            }),
            _ => with_slice::<bf16, _>(&self.tensor, |w| {
                let bits = w[elements].reinterpret_cast();
                visit(DenseWeights::Bf16(Matrix::new(bits, range.len(), cols)));
                Ok(())
            }),
        }
    }
}

/// Reads the rows `ids` into `out` (ids, cols) f32, on all threads if they are many.
///
/// # Errors
/// An id that is no row, or rows that cannot be read.
pub fn gather(rows: &dyn RowSource, ids: &[u32], out: &mut [f32]) -> Result<()> {
    let (count, cols) = rows.shape();
    if let Some(id) = ids.iter().find(|id| **id as usize >= count) {
        bail!("row {id} of a matrix of {count}");
    }
    let errors = Errors::default();
    threads::for_each_chunk(out, (ROWS_OF_A_TASK * cols).max(1), |task, out| {
        let ids = &ids[task * ROWS_OF_A_TASK..];
        for (out, id) in out.chunks_mut(cols).zip(ids) {
            let id = *id as usize;
            errors.note(rows.with_rows(id..id + 1, &mut |row| row.widen_row(0, out)));
        }
    });
    errors.first()
}

/// Rows that one task reads: a few microseconds.
const ROWS_OF_A_TASK: usize = 8;

/// The first error of tasks that run side by side.
#[derive(Default)]
pub(crate) struct Errors(std::sync::Mutex<Option<candle_core::Error>>);

impl Errors {
    /// Keeps the error, if it is one and the first.
    pub fn note(&self, result: Result<()>) {
        if let Err(error) = result {
            let mut first = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            first.get_or_insert(error);
        }
    }

    /// The first error.
    pub fn first(self) -> Result<()> {
        match self.0.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner) {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }
}
