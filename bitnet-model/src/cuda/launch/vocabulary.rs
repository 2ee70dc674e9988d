//! Launches of both ends of the network: rows of the embedding, and products with the output head's.

use super::{Address, Arg, Launch, ROW_THREADS, Rows, dim};
use crate::kernels::{
    ROWS,
    head::{GROUP, HeadFormat},
};

/// `DENSE_THREADS`, `DENSE_ROWS` and `DENSE_TOKENS`.
const DENSE: (u32, usize, usize) = (256, 64, 4);
/// `HEAD_THREADS`, its warps, each of which has a band, and `HEAD_TOKENS`.
const HEAD: (u32, usize, usize) = (256, 8, 4);

/// How floats are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // by their names
pub enum Element {
    F32,
    F16,
    Bf16,
}

/// Rows in memory, or some of them: `DenseRows` in `dense.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct DenseRows {
    /// Of the first row, whichever are meant.
    pub values: Address,
    /// (rows) u32: which; 0: all in order.
    pub ids: Address,
    /// How many are meant.
    pub rows: u32,
    /// Values of a row.
    pub cols: u32,
}

/// Hidden states as integers: `HeadActivations` in `head.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct HeadActivations {
    /// (tokens, groups, 64) int8.
    pub codes: Address,
    /// (tokens, groups) i32.
    pub sums: Address,
    /// (tokens) f32.
    pub scales: Address,
}

/// A head in few bits: `HeadWeights` in `head.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct HeadMatrix {
    /// Of the first word of its [`HeadBands`](crate::cuda::head_layout::HeadBands).
    pub codes: Address,
    /// Of their scales.
    pub scales: Address,
    /// Rows that are not padding.
    pub rows: u32,
    /// [`head_groups`] of a row.
    pub groups: u32,
}

/// Groups of columns of a head of so many columns, or of a hidden state for it: an even number.
pub fn head_groups(cols: usize) -> usize {
    cols.div_ceil(GROUP).next_multiple_of(2)
}

impl Launch {
    /// `y` (x.rows, w.rows) = the product of `x` with the transposes of the rows `w`, whose values are stored as `element`.
    pub fn dense_product(element: Element, x: Rows, w: DenseRows, y: Address) -> Self {
        let function = match element {
            Element::F32 => "dense_product_f32",
            Element::F16 => "dense_product_f16",
            Element::Bf16 => "dense_product_bf16",
        };
        let (threads, block_rows, block_tokens) = DENSE;
        let args = vec![
            Arg::U64(x.address),
            Arg::U64(x.stride as u64),
            Arg::U32(dim(x.rows)),
            Arg::DenseRows(w),
            Arg::U64(y),
        ];
        let grid = [x.rows.div_ceil(block_tokens), (w.rows as usize).div_ceil(block_rows), 1];
        Self::new(("dense", function), grid, threads, args)
    }

    /// `y` (count, cols) f32 = the rows `ids` (count) u32 of the matrix (rows, cols) at `values`; NaN where there is none.
    pub fn gather_rows(
        element: Element,
        (ids, count): (Address, usize),
        (values, rows, cols): (Address, usize, usize),
        y: Address,
    ) -> Self {
        let function = match element {
            Element::F32 => "gather_rows_f32",
            Element::F16 => "gather_rows_f16",
            Element::Bf16 => "gather_rows_bf16",
        };
        let args = vec![
            Arg::U64(ids),
            Arg::U64(values),
            Arg::U32(dim(rows)),
            Arg::U32(dim(cols)),
            Arg::U64(y),
        ];
        Self::new(("dense", function), [count, 1, 1], ROW_THREADS, args)
    }

    /// Hidden states `x` to integers of 13 bits.
    pub fn quantize_hidden(x: Rows, to: HeadActivations) -> Self {
        let args = vec![
            Arg::U64(x.address),
            Arg::U64(x.stride as u64),
            Arg::U32(dim(x.width)),
            Arg::U32(dim(head_groups(x.width))),
            Arg::HeadActivations(to),
        ];
        Self::new(("head", "quantize_hidden"), [x.rows, 1, 1], ROW_THREADS, args)
    }

    /// `y` (tokens, w.rows) = the product of `tokens` hidden states `x` with the transpose of `w`.
    pub fn head_product(
        format: HeadFormat,
        w: HeadMatrix,
        x: HeadActivations,
        tokens: usize,
        y: Address,
    ) -> Self {
        let function = match format {
            HeadFormat::Q8 => "head_q8",
            HeadFormat::Q6 => "head_q6",
            HeadFormat::Q4 => "head_q4",
        };
        let (threads, block_bands, block_tokens) = HEAD;
        let args =
            vec![Arg::HeadMatrix(w), Arg::HeadActivations(x), Arg::U32(dim(tokens)), Arg::U64(y)];
        let bands = (w.rows as usize).div_ceil(ROWS);
        let grid = [tokens.div_ceil(block_tokens), bands.div_ceil(block_bands), 1];
        Self::new(("head", function), grid, threads, args)
    }
}
