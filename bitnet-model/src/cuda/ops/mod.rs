//! The ops of [`ops`](crate::ops) on a device: buffers and launches.

use std::ops::Range;

use candle_core::{
    CudaDevice, CudaStorage, DType, Layout, Result, Shape,
    backend::BackendStorage,
    bail,
    cuda_backend::cudarc::driver::{CudaSlice, CudaStream},
};

use super::{
    device::{Gathered, Memory, RowsOf, gathered, launch, result, uninitialized},
    launch::{
        Activations, AttentionInputs, AttentionShape, BackwardMatrix, Launch, Strides, Weights,
        band_offsets, padded,
    },
    layout::bands_of,
    resident::StackCopy,
};
use crate::{config::Activation, quant::ActivationCodes, weights::TernaryWeight};

mod gradients;
mod latent;
mod loss;
mod low_rank;
mod optimizer;
mod quantize;
mod vocabulary;

pub use gradients::{
    KeyStrides, attention_gradients, dense_input_gradient, dense_weight_gradient, gated_gradients,
    rms_norm_gradients,
};
pub use latent::{latent_input_gradient, latent_product, latent_weight_gradient};
pub use loss::{HeadLoss, HeadLossOf, head_loss};
pub use low_rank::{BaseOf, LowRankOf, low_rank, low_rank_gradients};
pub use optimizer::{Moments, adamw, sums_of_squares};
pub use quantize::{blend_rows, blend_weights, hadamard};
pub use vocabulary::{dense_product, embed, head_product, table_product};

type Tensor = (CudaStorage, Shape);

/// The elements of a tensor on a device, once more.
pub fn copy(tensor: &candle_core::Tensor) -> Result<CudaStorage> {
    let tensor = gradients::read(tensor);
    gathered(tensor.storage()?, tensor.layout)
}

/// Rows of activations as integers.
struct Quantized {
    codes: CudaSlice<i8>,
    sums: CudaSlice<i32>,
    factors: CudaSlice<f32>,
}

impl Quantized {
    fn new(device: &CudaDevice, rows: usize, width: usize) -> Result<Self> {
        Ok(Self {
            codes: uninitialized(device, rows * padded(width))?,
            sums: uninitialized(device, rows)?,
            factors: uninitialized(device, rows)?,
        })
    }

    fn written<'a>(&'a mut self, stream: &'a CudaStream) -> QuantizedMemory<'a> {
        QuantizedMemory {
            codes: Memory::written(&mut self.codes, stream),
            sums: Memory::written(&mut self.sums, stream),
            factors: Memory::written(&mut self.factors, stream),
        }
    }
}

/// Of [`Quantized`].
struct QuantizedMemory<'a> {
    codes: Memory<'a>,
    sums: Memory<'a>,
    factors: Memory<'a>,
}

impl QuantizedMemory<'_> {
    fn addresses(&self) -> Activations {
        let Self { codes, sums, factors } = self;
        Activations { codes: codes.address, sums: sums.address, factors: factors.address }
    }
}

fn out_features(weights: &[TernaryWeight]) -> usize {
    weights.iter().map(TernaryWeight::out_features).sum()
}

/// The weight of a norm, and its ε.
type Norm<'a> = (&'a CudaStorage, &'a Layout, f32);

/// `x`, normalized first if there is a norm, quantized by rows, times the transposes of some of `weights`.
pub fn ternary_product(
    (x, layout): (&CudaStorage, &Layout),
    norm: Option<Norm<'_>>,
    (weights, part): (&[TernaryWeight], Range<usize>),
    input: ActivationCodes,
    shape: Shape,
) -> Result<Tensor> {
    let device = x.device();
    let stream = device.cuda_stream();
    let x = RowsOf::new("ternary-matmul", x, layout)?;
    let (rows, _x) = x.memory(&stream)?;
    let norm = match norm {
        Some((weight, layout, eps)) => Some((Gathered::<f32>::contiguous(weight, layout)?, eps)),
        None => None,
    };
    let width = out_features(&weights[part.clone()]);
    let mut y = uninitialized::<f32>(device, rows.rows * width)?;
    let Some(first) = weights.first() else { return Ok(result(y, device, shape)) };
    let stack = first.resident().get_or_copy(device, || StackCopy::new(weights, device))?;
    let mut quantized = Quantized::new(device, rows.rows, rows.width)?;
    {
        let written = quantized.written(&stream);
        let to = written.addresses();
        let (words, bands) =
            (Memory::read(&stack.words, 0, &stream), Memory::read(&stack.bands, 0, &stream));
        let skipped = weights[..part.start].iter().map(bands_of).sum();
        let (word, band) = band_offsets(skipped, stack.chunks);
        let weights = Weights {
            codes: words.address + word as u64,
            bands: bands.address + band as u64,
            count: weights[part.clone()].iter().map(bands_of).sum::<usize>() as u32,
            chunks: stack.chunks as u32,
            first: out_features(&weights[..part.start]) as u32,
        };
        let y = Memory::written(&mut y, &stream);
        let norm = match &norm {
            Some((weight, eps)) => Some((weight.memory(&stream)?, *eps)),
            None => None,
        };
        let quantize = match &norm {
            Some((weight, eps)) => Launch::rms_norm_quantize(rows, weight.address, *eps, input, to),
            None => Launch::quantize_rows(rows, input, to),
        };
        let multiply = Launch::ternary_product(weights, to, (rows.rows, width), y.address);
        // SAFETY: all buffers have the sizes that `Launch` documents, and are held.
        unsafe {
            launch(device, &quantize)?;
            launch(device, &multiply)?;
        }
    }
    Ok(result(y, device, shape))
}

/// `dx = Σ scale · dy·codes`, where `dy` is the gradient of the product with some of `weights`.
pub fn ternary_gradient(
    dy: &CudaStorage,
    layout: &Layout,
    (weights, part): (&[TernaryWeight], Range<usize>),
    bf16: bool,
    shape: Shape,
) -> Result<Tensor> {
    let device = dy.device();
    let stream = device.cuda_stream();
    let dy = RowsOf::new("ternary-matmul", dy, layout)?;
    let (mut rows, _dy) = dy.memory(&stream)?;
    let mut dx = uninitialized::<f32>(device, shape.elem_count())?;
    let Some(first) = weights.first() else { return Ok(result(dx, device, shape)) };
    let stack = first.resident().get_or_copy(device, || StackCopy::new(weights, device))?;
    {
        let (words, bands) =
            (Memory::read(&stack.words, 0, &stream), Memory::read(&stack.bands, 0, &stream));
        let dx = Memory::written(&mut dx, &stream);
        let mut band: usize = weights[..part.start].iter().map(bands_of).sum();
        for (index, weight) in weights[part].iter().enumerate() {
            rows.width = weight.out_features();
            let (word_offset, band_offset) = band_offsets(band, stack.chunks);
            let matrix = BackwardMatrix {
                codes: words.address + word_offset as u64,
                bands: bands.address + band_offset as u64,
                rows: weight.out_features() as u32,
                cols: weight.in_features() as u32,
                chunks: stack.chunks as u32,
            };
            let backward = Launch::ternary_backward(matrix, rows, index > 0, bf16, dx.address);
            // SAFETY: `dx` is (tokens, in_features), and all buffers are held.
            unsafe { launch(device, &backward) }?;
            rows.address += (size_of::<f32>() * weight.out_features()) as u64;
            band += bands_of(weight);
        }
    }
    Ok(result(dx, device, shape))
}

/// `weight · x · rsqrt(mean(x²) + eps)` of rows.
pub fn rms_norm(
    (x, layout): (&CudaStorage, &Layout),
    (weight, weight_layout): (&CudaStorage, &Layout),
    eps: f32,
) -> Result<Tensor> {
    let device = x.device();
    let stream = device.cuda_stream();
    let (x, weight) =
        (RowsOf::new("rms-norm", x, layout)?, Gathered::<f32>::contiguous(weight, weight_layout)?);
    let (rows, _x) = x.memory(&stream)?;
    let mut y = uninitialized::<f32>(device, layout.shape().elem_count())?;
    {
        let (weight, y) = (weight.memory(&stream)?, Memory::written(&mut y, &stream));
        let norm = Launch::rms_norm(rows, weight.address, eps, y.address);
        // SAFETY: the caller checked that the weight is as long as a row; all buffers are held.
        unsafe { launch(device, &norm) }?;
    }
    Ok(result(y, device, layout.shape().clone()))
}

/// Turns the heads of `x` (batch, seq, heads · head_dim) by angles (batch or 1, seq, head_dim / 2), which fit it.
pub fn rope(
    (x, layout): (&CudaStorage, &Layout),
    (cos, cos_layout): (&CudaStorage, &Layout),
    (sin, sin_layout): (&CudaStorage, &Layout),
    shape: Shape,
) -> Result<Tensor> {
    let device = x.device();
    let stream = device.cuda_stream();
    let (angle_rows, angle_seq, half) = cos_layout.shape().dims3()?;
    let x = RowsOf::new("rope", x, layout)?;
    let (cos, sin) = (
        Gathered::<f32>::contiguous(cos, cos_layout)?,
        Gathered::<f32>::contiguous(sin, sin_layout)?,
    );
    let (rows, _x) = x.memory(&stream)?;
    let mut y = uninitialized::<f32>(device, shape.elem_count())?;
    {
        let (cos, sin) = (cos.memory(&stream)?, sin.memory(&stream)?);
        let y = Memory::written(&mut y, &stream);
        let angles = (cos.address, sin.address);
        let rope = Launch::rope(rows, angles, (angle_rows * angle_seq, half), y.address);
        // SAFETY: the caller checked that the shapes fit together; all buffers are held.
        unsafe { launch(device, &rope) }?;
    }
    Ok(result(y, device, shape))
}

/// `act(gate) · up`, of equal shapes.
pub fn gated(
    act: Activation,
    (gate, gate_layout): (&CudaStorage, &Layout),
    (up, up_layout): (&CudaStorage, &Layout),
) -> Result<Tensor> {
    let device = gate.device();
    let stream = device.cuda_stream();
    let (gate, up) =
        (RowsOf::new("gated", gate, gate_layout)?, RowsOf::new("gated", up, up_layout)?);
    let ((gate, _gate), (up, _up)) = (gate.memory(&stream)?, up.memory(&stream)?);
    let mut y = uninitialized::<f32>(device, gate_layout.shape().elem_count())?;
    {
        let y = Memory::written(&mut y, &stream);
        // SAFETY: the caller checked that the shapes are equal; all buffers are held.
        unsafe { launch(device, &Launch::gated(act, gate, up, y.address)) }?;
    }
    Ok(result(y, device, gate_layout.shape().clone()))
}

/// Keys or values of a cache, whose head's elements are dense.
enum Stored<'a> {
    F32(&'a CudaSlice<f32>),
    F16(&'a CudaSlice<half::f16>),
    Bf16(&'a CudaSlice<half::bf16>),
    Int8(&'a CudaSlice<u8>),
}

impl<'a> Stored<'a> {
    fn new(storage: &'a CudaStorage, layout: &Layout) -> Result<(Self, Strides)> {
        let [batch, head, position, 1] = *layout.stride() else {
            bail!("attention: the innermost dimension must be dense, not {:?}", layout.stride())
        };
        let stored = match storage.dtype() {
            DType::F32 => Self::F32(storage.as_cuda_slice()?),
            DType::F16 => Self::F16(storage.as_cuda_slice()?),
            DType::BF16 => Self::Bf16(storage.as_cuda_slice()?),
            DType::U8 => Self::Int8(storage.as_cuda_slice()?),
            other => bail!("attention: keys and values are f32, f16, bf16 or int8, not {other:?}"),
        };
        let [batch, head, position] = [batch, head, position].map(|stride| stride as u64);
        Ok((stored, Strides { batch, head, position }))
    }

    fn kernel(&self) -> &'static str {
        match self {
            Self::F32(_) => "attention_block_f32",
            Self::F16(_) => "attention_block_f16",
            Self::Bf16(_) => "attention_block_bf16",
            Self::Int8(_) => "attention_block_int8",
        }
    }

    fn memory<'b>(&'b self, first: usize, stream: &'b CudaStream) -> Memory<'b> {
        match self {
            Self::F32(slice) => Memory::read(slice, first, stream),
            Self::F16(slice) => Memory::read(slice, first, stream),
            Self::Bf16(slice) => Memory::read(slice, first, stream),
            Self::Int8(slice) => Memory::read(slice, first, stream),
        }
    }
}

/// Sizes of an attention, which fit the tensors.
#[derive(Clone, Copy)]
pub struct AttentionSizes {
    /// Rows of the batch.
    pub batch: usize,
    /// Queries of a row.
    pub seq: usize,
    /// Query heads, and key/value heads.
    pub heads: (usize, usize),
    /// Positions of keys and values.
    pub context: usize,
    /// Elements of a head.
    pub head_dim: usize,
}

/// `softmax(q·kᵀ/√d)·v` of `q` (batch, seq, heads, head_dim), `k` and `v` (batch, kv_heads, context, head_dim) from the
/// first position that each query sees, as [`attention`](crate::ops::attention()) says; the result has `shape`.
pub fn attention(
    sizes: AttentionSizes,
    [(q, q_layout), (k, k_layout), (v, v_layout)]: [(&CudaStorage, &Layout); 3],
    starts: &[usize],
    shape: Shape,
) -> Result<Tensor> {
    let device = q.device();
    let stream = device.cuda_stream();
    if k.dtype() != v.dtype() {
        bail!("attention: keys are {:?} and values {:?}", k.dtype(), v.dtype());
    }
    let AttentionSizes { batch, seq, heads, context, head_dim } = sizes;
    let q = Gathered::<f32>::contiguous(q, q_layout)?;
    let ((k, k_strides), (v, v_strides)) = (Stored::new(k, k_layout)?, Stored::new(v, v_layout)?);
    let starts = Vec::from_iter(starts.iter().map(|start| *start as u32));
    let starts = (!starts.is_empty()).then(|| device.clone_htod(&starts)).transpose()?;
    let (sizes, queries) = (AttentionShape::new(seq, heads, context, head_dim), batch * seq);
    let count = sizes.partials(queries);
    let mut partials = uninitialized::<f32>(device, 2 * count)?;
    let mut sums = uninitialized::<f32>(device, head_dim * count)?;
    let mut out = uninitialized::<f32>(device, q_layout.shape().elem_count())?;
    {
        let q = q.memory(&stream)?;
        let (keys, values) = (
            k.memory(k_layout.start_offset(), &stream),
            v.memory(v_layout.start_offset(), &stream),
        );
        let starts = starts.as_ref().map(|starts| Memory::read(starts, 0, &stream));
        let (partials, sums) =
            (Memory::written(&mut partials, &stream), Memory::written(&mut sums, &stream));
        let out = Memory::written(&mut out, &stream);
        let inputs = AttentionInputs {
            q: q.address,
            k: (keys.address, k_strides),
            v: (values.address, v_strides),
            starts: starts.as_ref().map_or(0, |starts| starts.address),
        };
        let between = (partials.address, sums.address);
        let blocks = Launch::attention_block(k.kernel(), sizes, queries, inputs, between);
        let merge = Launch::attention_merge(sizes, queries, between, out.address);
        // SAFETY: the caller checked that the shapes fit together; all buffers are held.
        unsafe {
            launch(device, &blocks)?;
            launch(device, &merge)?;
        }
    }
    Ok(result(out, device, shape))
}
