//! Launches of training alone: products of floats, weights quantized on the way, gradients, the loss.

use super::{Address, Arg, GATED, Launch, ROW_THREADS, Rows, dim, levels};
use crate::{config::Activation, cuda::layout::CHUNK, kernels::ROWS, quant::ActivationCodes};

/// `PRODUCT_THREADS` and `PRODUCT_TILE`.
const GEMM: (u32, usize) = (256, 64);
/// `TERNARIZE_THREADS`, and its warps, each of which has a chunk.
const TERNARIZE: (u32, usize) = (256, 8);
/// `MEAN_CHUNK` and `MEAN_CHUNKS`.
const MEAN: (usize, usize) = (1 << 16, 32);
/// `DROPOUT_COLUMNS`.
const DROPOUT_COLUMNS: usize = 1024;
/// `BLEND_WEIGHTS`.
const BLEND_WEIGHTS: usize = 1024;
/// `SHARE_ROWS`.
const SHARE_ROWS: usize = 64;
/// `LOSS_ELEMENTS`.
const LOSS_ELEMENTS: usize = 1024;

/// A factor of a product of matrices: `Factor` in `gemm.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Factor {
    /// Of the value of index 0 at depth 0.
    pub values: Address,
    /// Elements between the values of neighbouring indices, which are rows of the left factor and columns of the right one.
    pub index_stride: u64,
    /// Elements between the values of neighbouring depths.
    pub depth_stride: u64,
}

impl Factor {
    /// Values over the depth are neighbours.
    pub fn depth_inner(stride: usize, values: Address) -> Self {
        Self { values, index_stride: stride as u64, depth_stride: 1 }
    }

    /// Values over the indices are neighbours.
    pub fn index_inner(stride: usize, values: Address) -> Self {
        Self { values, index_stride: 1, depth_stride: stride as u64 }
    }
}

/// How the right factor is stored; the left one is f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // by their names
pub enum Right {
    F32,
    Bf16,
    I8,
}

/// `GemmShape` in `gemm.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct GemmShape {
    /// Of the result.
    pub rows: u32,
    /// Of the result.
    pub cols: u32,
    /// Terms of a sum.
    pub depth: u32,
    /// Multiplies a sum.
    pub scale: f32,
    /// 1 to add to what is there.
    pub add: u32,
    /// 1 to round both factors to bfloat16.
    pub bf16: u32,
    /// Elements between rows of the result.
    pub stride: u64,
    /// Elements between the left factors of a batch.
    pub a_batch: u64,
    /// Elements between the right factors of a batch.
    pub b_batch: u64,
    /// Elements between the results of a batch.
    pub out_batch: u64,
}

impl GemmShape {
    /// One product, with a dense result.
    pub fn new((rows, cols, depth): (usize, usize, usize), add: bool, bf16: bool) -> Self {
        let (rows, stride) = (dim(rows), cols as u64);
        let (cols, depth, add, bf16) = (dim(cols), dim(depth), add.into(), bf16.into());
        let (scale, a_batch, b_batch, out_batch) = (1., 0, 0, 0);
        Self { rows, cols, depth, scale, add, bf16, stride, a_batch, b_batch, out_batch }
    }
}

/// What a kernel drops: a value is 0 if the word of its row's key and its column is below a threshold.
#[derive(Clone, Debug)]
pub struct Dropout {
    /// One a row.
    pub keys: Vec<u32>,
    /// The threshold.
    pub below: u32,
    /// Multiplies the other values.
    pub scale: f32,
}

impl Launch {
    /// `out` = scale · a·b for each of `batch` matrices. Values of the left factor are divided by `divisors` (depth) f32, if
    /// that is not 0.
    pub fn gemm(
        (a, divisors): (Factor, Address),
        (right, b): (Right, Factor),
        shape: GemmShape,
        batch: usize,
        out: Address,
    ) -> Self {
        let function = match right {
            Right::F32 => "gemm_f32",
            Right::Bf16 => "gemm_bf16",
            Right::I8 => "gemm_i8",
        };
        let (threads, tile) = GEMM;
        let args = vec![
            Arg::Factor(a),
            Arg::U64(divisors),
            Arg::Factor(b),
            Arg::Gemm(shape),
            Arg::U64(out),
        ];
        let [cols, rows] = [shape.cols, shape.rows].map(|n| (n as usize).div_ceil(tile));
        Self::new(("gemm", function), [cols, rows, batch], threads, args)
    }

    /// How many sums [`absolute_sums`](Self::absolute_sums) of `count` weights leaves.
    pub fn mean_chunks(count: usize) -> usize {
        count.div_ceil(MEAN.0)
    }

    /// `sums` ([`mean_chunks`](Self::mean_chunks)) f64 of `count` weights.
    pub fn absolute_sums(latent: Address, count: usize, sums: Address) -> Self {
        let args = vec![Arg::U64(latent), Arg::U64(count as u64), Arg::U64(sums)];
        let grid = [Self::mean_chunks(count).div_ceil(MEAN.1), 1, 1];
        Self::new(("ternarize", "absolute_sums"), grid, TERNARIZE.0, args)
    }

    /// `scale` f32 of the sums of `count` weights.
    pub fn absolute_mean(sums: Address, count: usize, scale: Address) -> Self {
        let args = vec![
            Arg::U64(sums),
            Arg::U32(dim(Self::mean_chunks(count))),
            Arg::U64(count as u64),
            Arg::U64(scale),
        ];
        Self::new(("ternarize", "absolute_mean"), [1, 1, 1], 1, args)
    }

    /// The words and bands of a [`Stack`](crate::cuda::layout::Stack) of one matrix, of its `latent` (rows, cols).
    pub fn ternarize(
        (latent, scale): (Address, Address),
        (rows, cols): (usize, usize),
        half_up: bool,
        (words, bands): (Address, Address),
    ) -> Self {
        let args = vec![
            Arg::U64(latent),
            Arg::U32(dim(rows)),
            Arg::U32(dim(cols)),
            Arg::U32(half_up.into()),
            Arg::U64(scale),
            Arg::U64(words),
            Arg::U64(bands),
        ];
        let (threads, warps) = TERNARIZE;
        let grid = [cols.div_ceil(CHUNK).div_ceil(warps), rows.div_ceil(ROWS), 1];
        Self::new(("ternarize", "ternarize"), grid, threads, args)
    }

    /// `y` (count) of `latent` on its way to its quantized values, as far as `lambda` says.
    pub fn blend_weights(
        (latent, scale): (Address, Address),
        count: usize,
        half_up: bool,
        lambda: f32,
        y: Address,
    ) -> Self {
        let args = vec![
            Arg::U64(latent),
            Arg::U64(count as u64),
            Arg::U32(half_up.into()),
            Arg::U64(scale),
            Arg::F32(lambda),
            Arg::U64(y),
        ];
        let grid = [count.div_ceil(BLEND_WEIGHTS), 1, 1];
        Self::new(("ternarize", "blend_weights"), grid, ROW_THREADS, args)
    }

    /// `y` (rows, width) of activations on their way to their quantized values, as far as `lambda` says.
    pub fn blend_rows(x: Rows, input: ActivationCodes, lambda: f32, y: Address) -> Self {
        let mut args = vec![Arg::U64(x.address), Arg::U64(x.stride as u64), Arg::U32(dim(x.width))];
        args.extend(levels(input));
        args.extend([Arg::F32(lambda), Arg::U64(y)]);
        Self::new(("quantize", "blend_rows"), [x.rows, 1, 1], ROW_THREADS, args)
    }

    /// `y` of `count` transforms of `size` values, at most [`HADAMARD_MOST`](Self::HADAMARD_MOST) and a power of two.
    pub fn hadamard(x: Address, (count, size): (usize, usize), y: Address) -> Self {
        let norm = 1. / (size as f32).sqrt();
        let args = vec![Arg::U64(x), Arg::U32(dim(size)), Arg::F32(norm), Arg::U64(y)];
        Self::new(("hadamard", "hadamard"), [count, 1, 1], ROW_THREADS, args)
    }

    /// Values of the largest [`hadamard`](Self::hadamard).
    pub const HADAMARD_MOST: usize = 8192;

    /// `y` of dense rows `x` of `width` values, of which some are dropped; `keys` are on the device.
    pub fn dropout(
        x: Address,
        width: usize,
        (dropout, keys): (&Dropout, Address),
        y: Address,
    ) -> Self {
        let args = vec![
            Arg::U64(x),
            Arg::U32(dim(width)),
            Arg::U64(keys),
            Arg::U32(dropout.below),
            Arg::F32(dropout.scale),
            Arg::U64(y),
        ];
        let grid = [dropout.keys.len(), width.div_ceil(DROPOUT_COLUMNS), 1];
        Self::new(("dropout", "dropout"), grid, ROW_THREADS, args)
    }

    /// `dx` and `inverses` (rows) f32 of dense rows `x` and `dy`.
    pub fn rms_norm_backward(
        x: Rows,
        (weight, eps): (Address, f32),
        dy: Address,
        (dx, inverses): (Address, Address),
    ) -> Self {
        let args = vec![
            Arg::U64(x.address),
            Arg::U64(weight),
            Arg::U64(dy),
            Arg::U32(dim(x.width)),
            Arg::F32(eps),
            Arg::U64(dx),
            Arg::U64(inverses),
        ];
        Self::new(("rms_norm", "rms_norm_backward"), [x.rows, 1, 1], ROW_THREADS, args)
    }

    /// How many rows [`rms_norm_shares`](Self::rms_norm_shares) of so many rows leaves.
    pub fn norm_shares(rows: usize) -> usize {
        rows.div_ceil(SHARE_ROWS)
    }

    /// `shares` ([`norm_shares`](Self::norm_shares), width) of the gradient of a norm's weight, of dense rows `x` and `dy`.
    pub fn rms_norm_shares(x: Rows, dy: Address, inverses: Address, shares: Address) -> Self {
        let args = vec![
            Arg::U64(x.address),
            Arg::U64(dy),
            Arg::U64(inverses),
            Arg::U32(dim(x.rows)),
            Arg::U32(dim(x.width)),
            Arg::U64(shares),
        ];
        let grid = [x.width.div_ceil(ROW_THREADS as usize), Self::norm_shares(x.rows), 1];
        Self::new(("rms_norm", "rms_norm_shares"), grid, ROW_THREADS, args)
    }

    /// `sums` (width) of dense rows, added one after another.
    pub fn sum_rows(x: Rows, sums: Address) -> Self {
        let args = vec![
            Arg::U64(x.address),
            Arg::U32(dim(x.rows)),
            Arg::U32(dim(x.width)),
            Arg::U64(sums),
        ];
        let grid = [x.width.div_ceil(ROW_THREADS as usize), 1, 1];
        Self::new(("rms_norm", "sum_rows"), grid, ROW_THREADS, args)
    }

    /// The gradients of `count` dense values of gate and up.
    pub fn gated_backward(
        act: Activation,
        [gate, up, dy]: [Address; 3],
        count: usize,
        [dgate, dup]: [Address; 2],
    ) -> Self {
        let function = match act {
            Activation::Relu2 => "gated_relu2_backward",
            Activation::Silu => "gated_silu_backward",
        };
        let args = vec![
            Arg::U64(gate),
            Arg::U64(up),
            Arg::U64(dy),
            Arg::U64(count as u64),
            Arg::U64(dgate),
            Arg::U64(dup),
        ];
        Self::new(("gated", function), [count.div_ceil(GATED), 1, 1], ROW_THREADS, args)
    }

    /// Scores and their gradients (heads, queries, keys) to probabilities and those of the scores.
    pub fn softmax_backward(
        (scores, gradients): (Address, Address),
        (visible, begin): (Address, usize),
        (heads, queries, keys): (usize, usize, usize),
        scale: f32,
    ) -> Self {
        let args = vec![
            Arg::U64(scores),
            Arg::U64(gradients),
            Arg::U64(visible),
            Arg::U32(dim(begin)),
            Arg::U32(dim(keys)),
            Arg::F32(scale),
        ];
        let grid = [queries, heads, 1];
        Self::new(("attention_backward", "softmax_backward"), grid, ROW_THREADS, args)
    }

    /// `out` (rows, 3) f32 of dense rows of logits: the largest, Σ exp(logit − that), the logit of the target.
    pub fn exponential_sums(logits: Rows, targets: Address, out: Address) -> Self {
        let args = vec![
            Arg::U64(logits.address),
            Arg::U32(dim(logits.width)),
            Arg::U64(targets),
            Arg::U64(out),
        ];
        Self::new(("loss", "exponential_sums"), [logits.rows, 1, 1], ROW_THREADS, args)
    }

    /// Dense rows of logits to (softmax − onehot) · scale.
    pub fn softmax_minus_onehot(
        logits: Rows,
        targets: Address,
        log_sums: Address,
        scale: f32,
    ) -> Self {
        let args = vec![
            Arg::U64(logits.address),
            Arg::U32(dim(logits.width)),
            Arg::U64(targets),
            Arg::U64(log_sums),
            Arg::F32(scale),
        ];
        let grid = [logits.rows, logits.width.div_ceil(LOSS_ELEMENTS), 1];
        Self::new(("loss", "softmax_minus_onehot"), grid, ROW_THREADS, args)
    }

    /// Rows `ids` of `y` become the dense rows `x`.
    pub fn scatter_rows(ids: Address, x: Rows, y: Address) -> Self {
        let args = vec![Arg::U64(ids), Arg::U64(x.address), Arg::U32(dim(x.width)), Arg::U64(y)];
        Self::new(("dense", "scatter_rows"), [x.rows, 1, 1], ROW_THREADS, args)
    }
}
