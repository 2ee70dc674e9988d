//! Both ends of the network as rows by their numbers: the embedding, and products with the output head. They record no
//! gradients.

use std::sync::Arc;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};

#[cfg(feature = "cuda")]
use crate::cuda;
use crate::{
    head_weights::{HeadWeights, QuantizedHidden},
    kernels::{self, Matrix},
    rows::{Errors, Table, gather},
    storage::{contiguous, with_width},
    threads,
};

/// `hidden` (…, cols) f32 times the transposes of the rows `ids` of a table, or of all of them: (…, rows) f32, in the order of
/// summation of [`dense_matmul`](super::dense_matmul()).
pub fn table_product(hidden: &Tensor, table: &Table, ids: Option<&[u32]>) -> Result<Tensor> {
    let (count, _) = table.source().shape();
    if let Some(id) = ids.into_iter().flatten().find(|id| **id as usize >= count) {
        bail!("row {id} of an output head of {count}");
    }
    let (table, ids) = (table.clone(), ids.map(<[u32]>::to_vec));
    hidden.apply_op1(TableProduct { table, ids })
}

/// `hidden` (…, cols) f32 times the transpose of a head in few bits, with hidden states of 13 bits: (…, rows) f32. NaN for a
/// hidden state that is not finite.
pub fn head_product(hidden: &Tensor, head: &Arc<HeadWeights>) -> Result<Tensor> {
    hidden.apply_op1(HeadProduct { head: head.clone(), quantized: None })
}

/// [`head_product`] for whom the processor has `quantized` the hidden states already.
pub(crate) fn quantized_head_product(
    hidden: &Tensor,
    quantized: QuantizedHidden,
    head: &Arc<HeadWeights>,
) -> Result<Tensor> {
    hidden.apply_op1(HeadProduct { head: head.clone(), quantized: Some(quantized) })
}

/// The rows `ids` (n) u32 of a table: (n, cols) f32. An id that is no row is an error on the CPU, and gives NaN on a device,
/// which cannot refuse.
pub fn embed(ids: &Tensor, table: &Table) -> Result<Tensor> {
    ids.apply_op1(Embed(table.clone()))
}

/// The shape of the product of `hidden` (…, cols) with `rows` rows.
fn product_shape(hidden: &Layout, rows: usize, cols: usize) -> Result<Shape> {
    match with_width(hidden, cols, rows) {
        Some(shape) => Ok(shape),
        None => bail!("hidden states {:?} do not fit an output head of {cols}", hidden.shape()),
    }
}

struct TableProduct {
    table: Table,
    ids: Option<Vec<u32>>,
}

impl TableProduct {
    fn shape(&self, hidden: &Layout) -> Result<Shape> {
        let (rows, cols) = self.table.source().shape();
        product_shape(hidden, self.ids.as_ref().map_or(rows, Vec::len), cols)
    }
}

impl CustomOp1 for TableProduct {
    fn name(&self) -> &'static str {
        "table-product"
    }

    fn cpu_fwd(&self, hidden: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        /// Rows of a task: with the tokens of a block they stay in the second-level cache.
        const TASK_ROWS: usize = 64;
        /// Rows of a task that are read one by one: a few microseconds.
        const LISTED_ROWS: usize = 8;
        let shape = self.shape(layout)?;
        let ((count, cols), source) = (self.table.source().shape(), self.table.source());
        let (rows, step) = match &self.ids {
            Some(ids) => (ids.len(), LISTED_ROWS),
            None => (count, TASK_ROWS),
        };
        let hidden = contiguous::<f32>(hidden, layout)?;
        let tokens = hidden.len() / cols.max(1);
        let hidden = Matrix::new(&hidden, tokens, cols);
        let mut y = vec![0f32; tokens * rows];
        let cuts: Vec<usize> = (0..rows).step_by(step).chain([rows]).collect();
        let (kernel, errors) = (kernels::active(), Errors::default());
        threads::for_each_block(&mut y, tokens.max(1), &cuts, |(_, j), mut block| {
            let (range, width) = (cuts[j]..cuts[j + 1], cuts[j + 1] - cuts[j]);
            let mut out = vec![0f32; tokens * width];
            match &self.ids {
                None => errors.note(source.with_rows(range, &mut |rows| {
                    kernel.matmul_nt(hidden, rows, &mut out, width);
                })),
                Some(ids) => ids[range].iter().enumerate().for_each(|(i, &id)| {
                    let id = id as usize;
                    errors.note(source.with_rows(id..id + 1, &mut |row| {
                        kernel.matmul_nt(hidden, row, &mut out[i..], width);
                    }));
                }),
            }
            out.chunks(width).enumerate().for_each(|(i, out)| block.row(i).copy_from_slice(out));
        });
        errors.first()?;
        Ok((CpuStorage::F32(y), shape))
    }

    crate::no_metal_fwd!(1);

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, hidden: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let shape = self.shape(layout)?;
        cuda::ops::table_product((hidden, layout), &self.table, self.ids.as_deref(), shape)
    }
}

struct HeadProduct {
    head: Arc<HeadWeights>,
    /// Of the input, if it is known.
    quantized: Option<QuantizedHidden>,
}

impl HeadProduct {
    fn shape(&self, hidden: &Layout) -> Result<Shape> {
        let (rows, cols) = self.head.shape();
        product_shape(hidden, rows, cols)
    }
}

impl CustomOp1 for HeadProduct {
    fn name(&self) -> &'static str {
        "head-product"
    }

    fn cpu_fwd(&self, hidden: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let shape = self.shape(layout)?;
        let product = |hidden: &QuantizedHidden| self.head.matmul(kernels::active(), hidden);
        let y = match &self.quantized {
            Some(quantized) => product(quantized),
            None => {
                let hidden = contiguous::<f32>(hidden, layout)?;
                product(&QuantizedHidden::new(&hidden, self.head.shape().1))
            }
        };
        Ok((CpuStorage::F32(y), shape))
    }

    crate::no_metal_fwd!(1);

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, hidden: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        cuda::ops::head_product((hidden, layout), &self.head, self.shape(layout)?)
    }
}

struct Embed(Table);

impl Embed {
    fn shape(&self, ids: &Layout) -> Result<Shape> {
        Ok((ids.shape().dims1()?, self.0.source().shape().1).into())
    }
}

impl CustomOp1 for Embed {
    fn name(&self) -> &'static str {
        "embed"
    }

    fn cpu_fwd(&self, ids: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let shape = self.shape(layout)?;
        let mut rows = vec![0f32; shape.elem_count()];
        gather(self.0.source(), &contiguous::<u32>(ids, layout)?, &mut rows)?;
        Ok((CpuStorage::F32(rows), shape))
    }

    crate::no_metal_fwd!(1);

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, ids: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        cuda::ops::embed((ids, layout), &self.0, self.shape(layout)?)
    }
}
