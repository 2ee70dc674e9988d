//! Launches as values: a kernel, its grid, and its arguments in the order of its declaration.
//!
//! Addresses are those of the device, already at the first element of a view. A launch without threads is not to be carried
//! out: there is nothing to compute.

use super::layout::{Band, CHUNK};
use crate::{
    config::Activation,
    kernels::ROWS,
    quant::{ActivationCodes, Rounding},
};

mod optimizer;
mod training;
mod vocabulary;

pub use training::{Dropout, Factor, GemmShape, Right};
pub use vocabulary::{DenseRows, Element, HeadActivations, HeadMatrix, head_groups};

/// Threads of a block of the kernels that take a row each (`ROW_THREADS`), and of those that take any block.
const ROW_THREADS: u32 = 256;
/// `GEMV_THREADS`.
const GEMV_THREADS: u32 = 256;
/// `GEMV_TOKENS`.
const GEMV_TOKENS: usize = 8;
/// Tokens from which the product of matrices is taken: below, most of what it computes would be padding.
const GEMM_FROM: usize = 33;
/// `GEMM_THREADS`, `GEMM_BANDS` and `GEMM_TOKENS`.
const GEMM: (u32, usize, usize) = (128, 8, 64);
/// `BACKWARD_THREADS` and `BACKWARD_TOKENS`.
const BACKWARD: (u32, usize) = (256, 64);
/// `GATED`.
const GATED: usize = 1024;
/// `ATTENTION_THREADS` and `ATTENTION_HEADS`.
const ATTENTION: (u32, usize) = (128, 4);
/// `KEYS`.
const KEYS: usize = 256;

/// An address on the device.
pub type Address = u64;

/// One launch of a kernel.
#[derive(Clone, Debug)]
pub struct Launch {
    /// The file of `src/cuda` without its extension.
    pub file: &'static str,
    /// The kernel's name.
    pub function: &'static str,
    /// Blocks in x, y and z.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: u32,
    /// As the kernel declares them.
    pub args: Vec<Arg>,
}

/// An argument of a kernel.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)] // named as what they hold
pub enum Arg {
    U32(u32),
    F32(f32),
    /// An address or a `size_t`.
    U64(u64),
    Weights(Weights),
    Activations(Activations),
    Backward(BackwardMatrix),
    Attention(AttentionShape),
    Strides(Strides),
    DenseRows(DenseRows),
    HeadActivations(HeadActivations),
    HeadMatrix(HeadMatrix),
    Factor(Factor),
    Gemm(GemmShape),
}

/// Rows of f32 on the device.
#[derive(Clone, Copy, Debug)]
pub struct Rows {
    /// Of the first value.
    pub address: Address,
    /// Values between the beginnings of rows.
    pub stride: usize,
    /// Number of rows.
    pub rows: usize,
    /// Values of a row.
    pub width: usize,
}

/// Rows of activations as integers: `Activations` in `ternary.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Activations {
    /// (tokens, chunks · 128) int8.
    pub codes: Address,
    /// (tokens) i32.
    pub sums: Address,
    /// (tokens) f32.
    pub factors: Address,
}

/// A run of bands of a [`Stack`](super::layout::Stack): `Weights` in `ternary.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Weights {
    /// Of the run's first word.
    pub codes: Address,
    /// Of the run's first [`Band`].
    pub bands: Address,
    /// Bands of the run.
    pub count: u32,
    /// Chunks of a row.
    pub chunks: u32,
    /// `first` of the run's first band.
    pub first: u32,
}

/// One matrix of a stack: `BackwardMatrix` in `ternary_backward.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct BackwardMatrix {
    /// Of its first word.
    pub codes: Address,
    /// Of its first [`Band`].
    pub bands: Address,
    /// out_features.
    pub rows: u32,
    /// in_features.
    pub cols: u32,
    /// Chunks of a row.
    pub chunks: u32,
}

/// `AttentionShape` in `attention.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AttentionShape {
    /// Queries of a row of the batch: the last positions of the context.
    pub seq: u32,
    /// Query heads.
    pub heads: u32,
    /// Key/value heads.
    pub kv_heads: u32,
    /// Positions of keys and values.
    pub context: u32,
    /// Elements of a head.
    pub head_dim: u32,
    /// Blocks of keys.
    pub blocks: u32,
    /// 1 / √head_dim.
    pub scale: f32,
}

/// Where keys or values lie, in elements: `Strides` in `attention.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Strides {
    /// Between rows of the batch.
    pub batch: u64,
    /// Between heads.
    pub head: u64,
    /// Between positions.
    pub position: u64,
}

/// A dimension for the device. No row, and no grid that may be launched, is longer than 2³².
fn dim(size: usize) -> u32 {
    u32::try_from(size).unwrap_or(u32::MAX)
}

impl Launch {
    fn new(
        (file, function): (&'static str, &'static str),
        grid: [usize; 3],
        block: u32,
        args: Vec<Arg>,
    ) -> Self {
        Self { file, function, grid: grid.map(dim), block, args }
    }

    /// Whether there is nothing to compute.
    pub fn is_empty(&self) -> bool {
        self.grid.contains(&0)
    }

    /// `x` to integers: codes padded with 0 to whole chunks, sums and factors, a row each.
    pub fn quantize_rows(x: Rows, input: ActivationCodes, to: Activations) -> Self {
        let mut args = vec![Arg::U64(x.address), Arg::U64(x.stride as u64), Arg::U32(dim(x.width))];
        args.extend(quantized(x.width, input, to));
        Self::new(("quantize", "quantize_rows"), [x.rows, 1, 1], ROW_THREADS, args)
    }

    /// `y` (rows, width) = `weight` (width) · x · rsqrt(mean(x²) + `eps`).
    pub fn rms_norm(x: Rows, weight: Address, eps: f32, y: Address) -> Self {
        let mut args = norm(x, weight, eps);
        args.push(Arg::U64(y));
        Self::new(("rms_norm", "rms_norm"), [x.rows, 1, 1], ROW_THREADS, args)
    }

    /// [`rms_norm`](Self::rms_norm) and [`quantize_rows`](Self::quantize_rows) of its result in one.
    pub fn rms_norm_quantize(
        x: Rows,
        weight: Address,
        eps: f32,
        input: ActivationCodes,
        to: Activations,
    ) -> Self {
        let mut args = norm(x, weight, eps);
        args.extend(quantized(x.width, input, to));
        Self::new(("rms_norm", "rms_norm_quantize"), [x.rows, 1, 1], ROW_THREADS, args)
    }

    /// `y` (x.rows, x.width), heads of `2 · half` turned by `cos` and `sin` (angle_rows, half), row `i` by row
    /// `i mod angle_rows`.
    pub fn rope(
        x: Rows,
        (cos, sin): (Address, Address),
        (angle_rows, half): (usize, usize),
        y: Address,
    ) -> Self {
        let heads = x.width.checked_div(2 * half).unwrap_or(0);
        let args = vec![
            Arg::U64(x.address),
            Arg::U64(x.stride as u64),
            Arg::U64(cos),
            Arg::U64(sin),
            Arg::U32(dim(angle_rows)),
            Arg::U32(dim(heads)),
            Arg::U32(dim(half)),
            Arg::U64(y),
        ];
        Self::new(("rope", "rope"), [x.rows, 1, 1], ROW_THREADS, args)
    }

    /// `y` (rows, width) = act(gate) · up.
    pub fn gated(act: Activation, gate: Rows, up: Rows, y: Address) -> Self {
        let function = match act {
            Activation::Relu2 => "gated_relu2",
            Activation::Silu => "gated_silu",
        };
        let args = vec![
            Arg::U64(gate.address),
            Arg::U64(gate.stride as u64),
            Arg::U64(up.address),
            Arg::U64(up.stride as u64),
            Arg::U32(dim(gate.width)),
            Arg::U64(y),
        ];
        let grid = [gate.rows, gate.width.div_ceil(GATED), 1];
        Self::new(("gated", function), grid, ROW_THREADS, args)
    }

    /// `y` (tokens, width) = the product of `tokens` rows `x` with the transposes of `weights`, whose rows are `width`.
    pub fn ternary_product(
        weights: Weights,
        x: Activations,
        (tokens, width): (usize, usize),
        y: Address,
    ) -> Self {
        let (bands, width) = (weights.count as usize, Arg::U32(dim(width)));
        let (weights, x) = (Arg::Weights(weights), Arg::Activations(x));
        let (count, y) = (Arg::U32(dim(tokens)), Arg::U64(y));
        let all = vec![weights, x, count, width, y];
        match tokens {
            0..=1 => Self::new(
                ("ternary_gemv", "ternary_gemv"),
                [bands, tokens, 1],
                GEMV_THREADS,
                vec![weights, x, width, y],
            ),
            2..GEMM_FROM => Self::new(
                ("ternary_gemv", "ternary_gemv_tokens"),
                [bands, tokens.div_ceil(GEMV_TOKENS), 1],
                GEMV_THREADS,
                all,
            ),
            GEMM_FROM.. => {
                let (threads, block_bands, block_tokens) = GEMM;
                let grid = [bands.div_ceil(block_bands), tokens.div_ceil(block_tokens), 1];
                Self::new(("ternary_gemm", "ternary_gemm"), grid, threads, all)
            }
        }
    }

    /// `dx` (tokens, cols) = scale · dy·W, or that added to what is there, of `dy` (tokens, w.rows), rounded to bfloat16
    /// before if `bf16`.
    pub fn ternary_backward(
        w: BackwardMatrix,
        dy: Rows,
        add: bool,
        bf16: bool,
        dx: Address,
    ) -> Self {
        let (threads, block_tokens) = BACKWARD;
        let args = vec![
            Arg::Backward(w),
            Arg::U64(dy.address),
            Arg::U64(dy.stride as u64),
            Arg::U32(dim(dy.rows)),
            Arg::U32(add.into()),
            Arg::U32(bf16.into()),
            Arg::U64(dx),
        ];
        let grid = [w.chunks as usize, dy.rows.div_ceil(block_tokens), 1];
        Self::new(("ternary_backward", "ternary_backward"), grid, threads, args)
    }

    /// What `queries` positions (batch · seq) learn from each block of keys. `function` says how keys and values are
    /// stored; `starts` (queries) u32 are the first positions they see, or 0; `partials` and `values` have room for
    /// [`partials`](AttentionShape::partials) of 2 and of head_dim f32.
    pub fn attention_block(
        function: &'static str,
        shape: AttentionShape,
        queries: usize,
        inputs: AttentionInputs,
        (partials, values): (Address, Address),
    ) -> Self {
        let AttentionInputs { q, k: (k, k_strides), v: (v, v_strides), starts } = inputs;
        let (threads, block_heads) = ATTENTION;
        let group = shape.heads.checked_div(shape.kv_heads).unwrap_or(0) as usize;
        let parts = group.div_ceil(block_heads);
        let args = vec![
            Arg::Attention(shape),
            Arg::U64(q),
            Arg::U64(k),
            Arg::Strides(k_strides),
            Arg::U64(v),
            Arg::Strides(v_strides),
            Arg::U64(starts),
            Arg::U64(partials),
            Arg::U64(values),
        ];
        let grid = [queries, shape.kv_heads as usize * parts, shape.blocks as usize];
        Self::new(("attention", function), grid, threads, args)
    }

    /// `out` (queries, heads, head_dim) of what [`attention_block`](Self::attention_block) left.
    pub fn attention_merge(
        shape: AttentionShape,
        queries: usize,
        (partials, values): (Address, Address),
        out: Address,
    ) -> Self {
        let args = vec![
            Arg::U64(partials),
            Arg::U64(values),
            Arg::U32(shape.blocks),
            Arg::U32(shape.head_dim),
            Arg::U64(out),
        ];
        let grid = [queries * shape.heads as usize, 1, 1];
        Self::new(("attention", "attention_merge"), grid, ATTENTION.0, args)
    }
}

/// What attention reads.
#[derive(Clone, Copy, Debug)]
pub struct AttentionInputs {
    /// (queries, heads, head_dim) f32, dense.
    pub q: Address,
    /// Keys.
    pub k: (Address, Strides),
    /// Values.
    pub v: (Address, Strides),
    /// (queries) u32, or 0.
    pub starts: Address,
}

impl AttentionShape {
    /// The shape of `seq` queries of `heads` heads over `context` positions of `kv_heads` heads of `head_dim` elements.
    pub fn new(seq: usize, heads: (usize, usize), context: usize, head_dim: usize) -> Self {
        Self {
            seq: dim(seq),
            heads: dim(heads.0),
            kv_heads: dim(heads.1),
            context: dim(context),
            head_dim: dim(head_dim),
            blocks: dim(context.div_ceil(KEYS)),
            scale: 1. / (head_dim as f32).sqrt(),
        }
    }

    /// Partial results of so many queries.
    pub fn partials(&self, queries: usize) -> usize {
        queries * self.heads as usize * self.blocks as usize
    }
}

/// Bytes of the codes of a row of `width` activations: whole chunks.
pub fn padded(width: usize) -> usize {
    width.next_multiple_of(CHUNK)
}

/// The first bytes of the words of a run that begins at band `first` of a stack, and of its bands.
pub fn band_offsets(first: usize, chunks: usize) -> (usize, usize) {
    (first * chunks * ROWS * CHUNK / 4, first * size_of::<Band>())
}

fn norm(x: Rows, weight: Address, eps: f32) -> Vec<Arg> {
    vec![
        Arg::U64(x.address),
        Arg::U64(x.stride as u64),
        Arg::U64(weight),
        Arg::U32(dim(x.width)),
        Arg::F32(eps),
    ]
}

/// The codes of a row's largest value, and whether halves are rounded up.
fn levels(input: ActivationCodes) -> [Arg; 2] {
    let (levels, rounding) = match input {
        ActivationCodes::Int8(rounding) => (127., rounding),
        ActivationCodes::Int4(rounding) => (7., rounding),
    };
    [Arg::F32(levels), Arg::U32((rounding == Rounding::HalfUp).into())]
}

fn quantized(width: usize, input: ActivationCodes, to: Activations) -> [Arg; 6] {
    let [levels, half_up] = levels(input);
    [
        Arg::U32(dim(padded(width))),
        levels,
        half_up,
        Arg::U64(to.codes),
        Arg::U64(to.sums),
        Arg::U64(to.factors),
    ]
}
