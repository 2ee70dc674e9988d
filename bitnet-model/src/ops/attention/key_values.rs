//! Keys and values as a cache stores them: in full or half precision, or as int8 with one scale a head and token.

use candle_core::{CpuStorage, DType, Layout, Result, Tensor, bail};
use half::slice::HalfFloatSliceExt;

use super::backward::KvStrides;
use crate::{
    kernels::{DenseWeights, Matrix},
    storage::with_slice,
};

/// How keys and values are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum KvType {
    /// As computed, 4 bytes an element.
    F32,
    /// Half precision, 11 significant bits; elements beyond ±65504 are refused.
    #[default]
    F16,
    /// bfloat16, 8 significant bits and the range of f32.
    Bf16,
    /// `round(x / scale)` in a byte with `scale = max|x| / 127` of the head and token as f32 behind them.
    Int8,
}

/// Bytes of the scale behind a row of int8 codes.
pub const SCALE_BYTES: usize = size_of::<f32>();

impl KvType {
    /// Every type.
    pub const ALL: [Self; 4] = [Self::F32, Self::F16, Self::Bf16, Self::Int8];

    /// Its name: `f32`, `f16`, `bf16` or `int8`.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
        }
    }

    /// The dtype of tensors that hold it.
    pub fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
            Self::Bf16 => DType::BF16,
            Self::Int8 => DType::U8,
        }
    }

    /// Elements of the stored row of one head and token.
    pub fn width(self, head_dim: usize) -> usize {
        match self {
            Self::Int8 => head_dim + SCALE_BYTES,
            Self::F32 | Self::F16 | Self::Bf16 => head_dim,
        }
    }

    /// Bytes of the stored row of one head and token.
    pub fn bytes(self, head_dim: usize) -> usize {
        self.width(head_dim) * self.dtype().size_in_bytes()
    }

    /// `x` (…, head_dim) f32 as stored: (…, [width](Self::width)) of [dtype](Self::dtype), contiguous.
    ///
    /// # Errors
    /// An element that half precision cannot hold.
    pub fn encode(self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::F32 => x.contiguous(),
            Self::F16 => {
                let half = x.contiguous()?.to_dtype(DType::F16)?;
                with_slice::<half::f16, _>(&half, |elements| {
                    match elements.iter().any(|x| x.is_infinite()) {
                        true => bail!(
                            "a key or value exceeds 65504, the limit of half precision: keep the cache in bf16 or f32"
                        ),
                        false => Ok(()),
                    }
                })?;
                Ok(half)
            }
            Self::Bf16 => x.contiguous()?.to_dtype(DType::BF16),
            Self::Int8 => quantize_rows(x),
        }
    }
}

/// Rows of the last dimension as [`KvType::Int8`] stores them.
pub fn quantize_rows(x: &Tensor) -> Result<Tensor> {
    let mut shape = x.dims().to_vec();
    let Some(width) = shape.last_mut() else { bail!("int8: a scalar has no rows") };
    let head_dim = std::mem::replace(width, *width + SCALE_BYTES);
    let bytes = with_slice::<f32, _>(x, |x| {
        let mut bytes = Vec::with_capacity(x.len() / head_dim.max(1) * (head_dim + SCALE_BYTES));
        for row in x.chunks(head_dim.max(1)) {
            let max = row.iter().fold(0f32, |max, x| if x.abs() > max { x.abs() } else { max });
            let scale = max / 127.;
            let inverse = if scale > 0. { 1. / scale } else { 0. };
            bytes.extend(row.iter().map(|x| (x * inverse).round_ties_even() as i8 as u8));
            let finite = row.iter().all(|x| x.is_finite());
            bytes.extend((if finite { scale } else { f32::NAN }).to_le_bytes());
        }
        Ok(bytes)
    })?;
    Tensor::from_vec(bytes, shape, x.device())
}

/// Keys or values of all rows of a batch, (batch, kv_heads, context, stored row).
#[derive(Clone, Copy)]
pub(super) struct KeyValues<'a> {
    elements: Elements<'a>,
    batch_stride: usize,
    head_stride: usize,
    stride: usize,
}

#[derive(Clone, Copy)]
enum Elements<'a> {
    F32(&'a [f32]),
    F16(&'a [u16]),
    Bf16(&'a [u16]),
    Int8(&'a [u8]),
}

impl<'a> KeyValues<'a> {
    /// f32 rows, laid out as these strides say.
    pub fn from_f32(data: &'a [f32], strides: KvStrides) -> Self {
        let KvStrides { row, head, position } = strides;
        let elements = Elements::F32(data);
        Self { elements, batch_stride: row, head_stride: head, stride: position }
    }

    pub fn new(storage: &'a CpuStorage, layout: &Layout) -> Result<Self> {
        let [batch_stride, head_stride, stride, 1] = *layout.stride() else {
            bail!("attention: the innermost dimension must be dense, not {:?}", layout.stride())
        };
        let first = layout.start_offset();
        let elements = match storage {
            CpuStorage::F32(data) => Elements::F32(&data[first..]),
            CpuStorage::F16(data) => Elements::F16(data[first..].reinterpret_cast()),
            CpuStorage::BF16(data) => Elements::Bf16(data[first..].reinterpret_cast()),
            CpuStorage::U8(data) => Elements::Int8(&data[first..]),
            _ => bail!("attention: keys and values are f32, f16, bf16 or int8"),
        };
        Ok(Self { elements, batch_stride, head_stride, stride })
    }

    /// The width of a stored row whose first `head_dim` elements are codes or values.
    pub fn head_dim(&self, width: usize) -> usize {
        match self.elements {
            Elements::Int8(_) => width.saturating_sub(SCALE_BYTES),
            Elements::F32(_) | Elements::F16(_) | Elements::Bf16(_) => width,
        }
    }

    fn first(&self, (row, head): (usize, usize), position: usize) -> usize {
        row * self.batch_stride + head * self.head_stride + position * self.stride
    }

    /// `count` positions of one row and head from `position` on, not yet scaled.
    pub fn rows(
        &self,
        head: (usize, usize),
        position: usize,
        count: usize,
        head_dim: usize,
    ) -> DenseWeights<'a> {
        let (first, stride) = (self.first(head, position), self.stride);
        match self.elements {
            Elements::F32(x) => {
                DenseWeights::F32(Matrix::strided(&x[first..], count, head_dim, stride))
            }
            Elements::F16(x) => {
                DenseWeights::F16(Matrix::strided(&x[first..], count, head_dim, stride))
            }
            Elements::Bf16(x) => {
                DenseWeights::Bf16(Matrix::strided(&x[first..], count, head_dim, stride))
            }
            Elements::Int8(x) => {
                let codes = bytemuck::cast_slice(&x[first..]);
                DenseWeights::I8(Matrix::strided(codes, count, head_dim, stride))
            }
        }
    }

    /// Multiplies `x[j]` by the scale of position `position + j`, if positions have scales.
    pub fn scale(&self, head: (usize, usize), position: usize, head_dim: usize, x: &mut [f32]) {
        let Elements::Int8(bytes) = self.elements else { return };
        let first = self.first(head, position) + head_dim;
        for (j, x) in x.iter_mut().enumerate() {
            let mut scale = [0; SCALE_BYTES];
            scale.copy_from_slice(&bytes[first + j * self.stride..][..SCALE_BYTES]);
            *x *= f32::from_le_bytes(scale);
        }
    }
}
