//! Products with weights that are quantized on the way, and their gradients: quantization-aware training.

use candle_core::{
    CudaDevice, CudaStorage, Layout, Result, Shape, Tensor as CandleTensor,
    backend::BackendStorage,
    cuda_backend::cudarc::driver::{CudaSlice, CudaStream},
};

use super::{
    Quantized, Tensor,
    gradients::{read, tensor},
    quantize::absmean_rounding,
};
use crate::{
    cuda::{
        device::{Gathered, Memory, RowsOf, launch, result, uninitialized},
        launch::{BackwardMatrix, Factor, GemmShape, Launch, Right, Weights, padded},
        layout::{Band, CHUNK},
    },
    kernels::ROWS,
    quant::{ActivationCodes, Rounding, WeightQuantizer},
};

/// One ternary matrix on a device, made of a latent one there.
struct Ternary {
    words: CudaSlice<u32>,
    /// Three words each.
    bands: CudaSlice<u32>,
    shape: (usize, usize),
}

impl Ternary {
    /// Quantizes `latent` (rows, cols) f32.
    fn new((latent, layout): (&CudaStorage, &Layout), quantizer: WeightQuantizer) -> Result<Self> {
        let rounding = absmean_rounding("qat-matmul", quantizer)?;
        let shape @ (rows, cols) = layout.shape().dims2()?;
        let device = latent.device();
        let stream = device.cuda_stream();
        let (count, bands) = (rows * cols, rows.div_ceil(ROWS));
        let latent = Gathered::<f32>::contiguous(latent, layout)?;
        let latent = latent.memory(&stream)?;
        let scale = mean_scale(device, &latent, count)?;
        let words = bands * cols.div_ceil(CHUNK) * ROWS * CHUNK / 16;
        let mut new = Self {
            words: uninitialized(device, words)?,
            bands: uninitialized(device, bands * size_of::<Band>() / size_of::<u32>())?,
            shape,
        };
        {
            let scale = Memory::read(&scale, 0, &stream);
            let (words, bands) = (
                Memory::written(&mut new.words, &stream),
                Memory::written(&mut new.bands, &stream),
            );
            let half_up = rounding == Rounding::HalfUp;
            let from = (latent.address, scale.address);
            let to = (words.address, bands.address);
            // SAFETY: all buffers have the sizes that `Launch` documents, and are held.
            unsafe { launch(device, &Launch::ternarize(from, shape, half_up, to)) }?;
        }
        Ok(new)
    }

    fn chunks(&self) -> u32 {
        self.shape.1.div_ceil(CHUNK) as u32
    }

    /// Words and bands.
    fn memory<'a>(&'a self, stream: &'a CudaStream) -> [Memory<'a>; 2] {
        [Memory::read(&self.words, 0, stream), Memory::read(&self.bands, 0, stream)]
    }
}

/// β of `count` weights.
pub(super) fn mean_scale(
    device: &CudaDevice,
    latent: &Memory<'_>,
    count: usize,
) -> Result<CudaSlice<f32>> {
    let stream = device.cuda_stream();
    let mut sums = uninitialized::<f64>(device, Launch::mean_chunks(count))?;
    let mut scale = uninitialized::<f32>(device, 1)?;
    {
        let (sums, scale) =
            (Memory::written(&mut sums, &stream), Memory::written(&mut scale, &stream));
        // SAFETY: all buffers have the sizes that `Launch` documents, and are held.
        unsafe {
            launch(device, &Launch::absolute_sums(latent.address, count, sums.address))?;
            launch(device, &Launch::absolute_mean(sums.address, count, scale.address))?;
        }
    }
    Ok(scale)
}

/// Rows as integers, and how many.
fn quantized(
    (x, layout): (&CudaStorage, &Layout),
    input: ActivationCodes,
    device: &CudaDevice,
) -> Result<(Quantized, usize)> {
    let stream = device.cuda_stream();
    let x = RowsOf::new("qat-matmul", x, layout)?;
    let (rows, _x) = x.memory(&stream)?;
    let mut quantized = Quantized::new(device, rows.rows, rows.width)?;
    {
        let written = quantized.written(&stream);
        // SAFETY: all buffers have the sizes that `Launch` documents, and are held.
        unsafe { launch(device, &Launch::quantize_rows(rows, input, written.addresses())) }?;
    }
    Ok((quantized, rows.rows))
}

/// `x` (…, cols) times the transpose of `latent` (rows, cols), both quantized on the way.
pub fn latent_product(
    x: (&CudaStorage, &Layout),
    latent: (&CudaStorage, &Layout),
    (weight, input): (WeightQuantizer, ActivationCodes),
    shape: Shape,
) -> Result<Tensor> {
    let device = x.0.device();
    let stream = device.cuda_stream();
    let ternary = Ternary::new(latent, weight)?;
    let (mut quantized, tokens) = quantized(x, input, device)?;
    let (out_features, _) = ternary.shape;
    let mut y = uninitialized::<f32>(device, tokens * out_features)?;
    {
        let [words, bands] = ternary.memory(&stream);
        let (from, y) = (quantized.written(&stream), Memory::written(&mut y, &stream));
        let weights = Weights {
            codes: words.address,
            bands: bands.address,
            count: out_features.div_ceil(ROWS) as u32,
            chunks: ternary.chunks(),
            first: 0,
        };
        let shape = (tokens, out_features);
        let multiply = Launch::ternary_product(weights, from.addresses(), shape, y.address);
        // SAFETY: as above.
        unsafe { launch(device, &multiply) }?;
    }
    Ok(result(y, device, shape))
}

/// The gradient of `x`: `dy` (…, rows) times `latent` (rows, cols) as it was quantized.
pub fn latent_input_gradient(
    dy: &CandleTensor,
    latent: &CandleTensor,
    (weight, bf16): (WeightQuantizer, bool),
    shape: &Shape,
) -> Result<CandleTensor> {
    let [dy, latent] = [dy, latent].map(read);
    let device = dy.storage()?.device();
    let stream = device.cuda_stream();
    let ternary = Ternary::new((latent.storage()?, latent.layout), weight)?;
    let dy = RowsOf::new("qat-matmul", dy.storage()?, dy.layout)?;
    let (rows, _dy) = dy.memory(&stream)?;
    let mut dx = uninitialized::<f32>(device, shape.elem_count())?;
    {
        let [words, bands] = ternary.memory(&stream);
        let dx = Memory::written(&mut dx, &stream);
        let (out_features, in_features) = ternary.shape;
        let matrix = BackwardMatrix {
            codes: words.address,
            bands: bands.address,
            rows: out_features as u32,
            cols: in_features as u32,
            chunks: ternary.chunks(),
        };
        // SAFETY: `dx` is (tokens, cols), and all buffers are held.
        unsafe {
            launch(device, &Launch::ternary_backward(matrix, rows, false, bf16, dx.address))
        }?;
    }
    Ok(tensor(dx, device, shape))
}

/// The gradient of the latent weight: the transpose of `dy` (tokens, rows) times `x` (tokens, cols) as it was quantized.
pub fn latent_weight_gradient(
    dy: &CandleTensor,
    x: &CandleTensor,
    (input, bf16): (ActivationCodes, bool),
    shape: &Shape,
) -> Result<CandleTensor> {
    let [dy, x] = [dy, x].map(read);
    let device = dy.storage()?.device();
    let stream = device.cuda_stream();
    let (rows, cols) = shape.dims2()?;
    let (mut quantized, tokens) = quantized((x.storage()?, x.layout), input, device)?;
    let dy = dy.dense()?;
    let mut dw = uninitialized::<f32>(device, rows * cols)?;
    {
        let dy = dy.memory(&stream)?;
        let (codes, dw) = (quantized.written(&stream), Memory::written(&mut dw, &stream));
        let codes = codes.addresses();
        // x = code / a of its token: the token's factor goes to the gradient, so that the codes stay integers.
        let a = (Factor::index_inner(rows, dy.address), codes.factors);
        let b = (Right::I8, Factor::index_inner(padded(cols), codes.codes));
        let gemm = GemmShape::new((rows, cols, tokens), false, bf16);
        // SAFETY: the factors are (tokens, rows) and (tokens, padded cols), and all buffers are held.
        unsafe { launch(device, &Launch::gemm(a, b, gemm, 1, dw.address)) }?;
    }
    Ok(tensor(dw, device, shape))
}
