//! Products with rows of floats and with output heads, and rows by their numbers.

use candle_core::{
    CudaStorage, DType, Layout, Result, Shape,
    backend::BackendStorage,
    bail,
    cuda_backend::cudarc::driver::{CudaSlice, CudaStream},
};
use half::bf16;

use super::Tensor;
use crate::{
    cuda::{
        device::{Gathered, Memory, RowsOf, launch, result, uninitialized},
        launch::{DenseRows, Element, HeadActivations, HeadMatrix, Launch, Right, head_groups},
        resident::{HeadCopy, RowsCopy},
    },
    head_weights::HeadWeights,
    kernels::head::GROUP,
    rows::Table,
};

impl RowsCopy {
    fn memory<'a>(&'a self, stream: &'a CudaStream) -> Memory<'a> {
        match self {
            Self::F32(values) => Memory::read(values, 0, stream),
            Self::F16(values) | Self::Bf16(values) => Memory::read(values, 0, stream),
        }
    }
}

/// A dense matrix as it lies, f32 or bf16.
pub(super) enum DenseMatrix<'a> {
    F32(Gathered<'a, f32>),
    Bf16(Gathered<'a, bf16>),
}

impl<'a> DenseMatrix<'a> {
    pub fn new(op: &str, weight: &'a CudaStorage, layout: &Layout) -> Result<Self> {
        match weight.dtype() {
            DType::F32 => Ok(Self::F32(Gathered::contiguous(weight, layout)?)),
            DType::BF16 => Ok(Self::Bf16(Gathered::contiguous(weight, layout)?)),
            other => bail!("{op}: a weight of {other:?} on CUDA, f32 or bf16 is needed"),
        }
    }

    pub fn memory<'b>(&'b self, stream: &'b CudaStream) -> Result<Memory<'b>> {
        match self {
            Self::F32(weight) => weight.memory(stream),
            Self::Bf16(weight) => weight.memory(stream),
        }
    }

    fn element(&self) -> Element {
        match self {
            Self::F32(_) => Element::F32,
            Self::Bf16(_) => Element::Bf16,
        }
    }

    /// As the right factor of a product.
    pub fn right(&self) -> Right {
        match self {
            Self::F32(_) => Right::F32,
            Self::Bf16(_) => Right::Bf16,
        }
    }
}

/// `x` (…, cols) times the transpose of `weight` (rows, cols), f32 or bf16.
pub fn dense_product(
    (x, layout): (&CudaStorage, &Layout),
    (weight, weight_layout): (&CudaStorage, &Layout),
    shape: Shape,
) -> Result<Tensor> {
    let (rows, cols) = weight_layout.shape().dims2()?;
    let stream = weight.device().cuda_stream();
    let weight = DenseMatrix::new("dense-matmul", weight, weight_layout)?;
    let w = (weight.element(), weight.memory(&stream)?);
    product("dense-matmul", (x, layout), w, (None, rows, cols), shape)
}

/// `hidden` (…, cols) times the transposes of the rows `ids` of a table, which it has, or of all.
pub fn table_product(
    (hidden, layout): (&CudaStorage, &Layout),
    table: &Table,
    ids: Option<&[u32]>,
    shape: Shape,
) -> Result<Tensor> {
    let device = hidden.device();
    let stream = device.cuda_stream();
    let (rows, cols) = table.source().shape();
    let copy = table.resident().get_or_copy(device, || RowsCopy::new(table.source(), device))?;
    let w = (copy.element(), copy.memory(&stream));
    let rows = ids.map_or(rows, <[u32]>::len);
    let ids = ids.filter(|ids| !ids.is_empty()).map(|ids| device.clone_htod(ids)).transpose()?;
    product("output head", (hidden, layout), w, (ids.as_ref(), rows, cols), shape)
}

/// The product of `x` with so many rows, or those of `ids`, of a matrix.
fn product(
    op: &str,
    (x, layout): (&CudaStorage, &Layout),
    (element, values): (Element, Memory<'_>),
    (ids, rows, cols): (Option<&CudaSlice<u32>>, usize, usize),
    shape: Shape,
) -> Result<Tensor> {
    let device = x.device();
    let stream = device.cuda_stream();
    let x = RowsOf::new(op, x, layout)?;
    let (x, _x) = x.memory(&stream)?;
    let mut y = uninitialized::<f32>(device, shape.elem_count())?;
    {
        let ids = ids.map(|ids| Memory::read(ids, 0, &stream));
        let y = Memory::written(&mut y, &stream);
        let w = DenseRows {
            values: values.address,
            ids: ids.as_ref().map_or(0, |ids| ids.address),
            rows: rows as u32,
            cols: cols as u32,
        };
        // SAFETY: the caller checked that `x` has as many columns and that `ids` are rows; all buffers are held.
        unsafe { launch(device, &Launch::dense_product(element, x, w, y.address)) }?;
    }
    Ok(result(y, device, shape))
}

/// `hidden` (…, cols) times the transpose of a head in few bits.
pub fn head_product(
    (hidden, layout): (&CudaStorage, &Layout),
    head: &HeadWeights,
    shape: Shape,
) -> Result<Tensor> {
    let device = hidden.device();
    let stream = device.cuda_stream();
    let (rows, cols) = head.shape();
    let copy = head.resident().get_or_copy(device, || HeadCopy::new(head, device))?;
    let x = RowsOf::new("output head", hidden, layout)?;
    let (x, _x) = x.memory(&stream)?;
    let groups = x.rows * head_groups(cols);
    let mut codes = uninitialized::<i8>(device, groups * 2 * GROUP)?;
    let mut sums = uninitialized::<i32>(device, groups)?;
    let mut scales = uninitialized::<f32>(device, x.rows)?;
    let mut y = uninitialized::<f32>(device, shape.elem_count())?;
    {
        let (words, row_scales) =
            (Memory::read(&copy.words, 0, &stream), Memory::read(&copy.scales, 0, &stream));
        let (codes, sums) =
            (Memory::written(&mut codes, &stream), Memory::written(&mut sums, &stream));
        let (scales, y) = (Memory::written(&mut scales, &stream), Memory::written(&mut y, &stream));
        let to =
            HeadActivations { codes: codes.address, sums: sums.address, scales: scales.address };
        let w = HeadMatrix {
            codes: words.address,
            scales: row_scales.address,
            rows: rows as u32,
            groups: copy.groups as u32,
        };
        // SAFETY: the caller checked that `hidden` has as many columns; all buffers have the sizes that `Launch` documents,
        // and are held.
        unsafe {
            launch(device, &Launch::quantize_hidden(x, to))?;
            launch(device, &Launch::head_product(head.format(), w, to, x.rows, y.address))?;
        }
    }
    Ok(result(y, device, shape))
}

/// The rows `ids` of a table; NaN for an id that is no row.
pub fn embed(
    (ids, layout): (&CudaStorage, &Layout),
    table: &Table,
    shape: Shape,
) -> Result<Tensor> {
    let device = ids.device();
    let stream = device.cuda_stream();
    let (rows, cols) = table.source().shape();
    let copy = table.resident().get_or_copy(device, || RowsCopy::new(table.source(), device))?;
    let ids = Gathered::<u32>::contiguous(ids, layout)?;
    let mut y = uninitialized::<f32>(device, shape.elem_count())?;
    {
        let (ids, values) = (ids.memory(&stream)?, copy.memory(&stream));
        let y = Memory::written(&mut y, &stream);
        let (ids, values) =
            ((ids.address, layout.shape().elem_count()), (values.address, rows, cols));
        // SAFETY: the kernel reads no row that is not there; all buffers are held.
        unsafe { launch(device, &Launch::gather_rows(copy.element(), ids, values, y.address)) }?;
    }
    Ok(result(y, device, shape))
}
