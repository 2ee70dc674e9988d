//! Carries out launches, and gives tensors' addresses to them.

use candle_core::{
    CudaDevice, CudaStorage, DType, Layout, Result, Shape,
    backend::{BackendDevice, BackendStorage},
    bail,
    cuda_backend::{
        CudaDType, WrapErr,
        cudarc::driver::{
            CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DeviceRepr, LaunchConfig,
            PushKernelArg, SyncOnDrop,
        },
    },
};

use super::{
    launch::{
        Activations, Arg, AttentionShape, BackwardMatrix, DenseRows, Factor, GemmShape,
        HeadActivations, HeadMatrix, Launch, Rows, Strides, Weights,
    },
    modules,
};
use crate::storage::row_stride;

// SAFETY: `repr(C)` structs of integers, addresses and floats, as the kernels declare them.
unsafe impl DeviceRepr for Weights {}
// SAFETY: as above.
unsafe impl DeviceRepr for Activations {}
// SAFETY: as above.
unsafe impl DeviceRepr for BackwardMatrix {}
// SAFETY: as above.
unsafe impl DeviceRepr for AttentionShape {}
// SAFETY: as above.
unsafe impl DeviceRepr for Strides {}
// SAFETY: as above.
unsafe impl DeviceRepr for DenseRows {}
// SAFETY: as above.
unsafe impl DeviceRepr for HeadActivations {}
// SAFETY: as above.
unsafe impl DeviceRepr for HeadMatrix {}
// SAFETY: as above.
unsafe impl DeviceRepr for Factor {}
// SAFETY: as above.
unsafe impl DeviceRepr for GemmShape {}

/// Largest grid in each dimension.
const GRID: [u32; 3] = [i32::MAX as u32, 65535, 65535];

/// Queues a launch.
///
/// # Safety
/// Its addresses must be those of memory of this device that is as large as the kernel's documentation says, held until the
/// launch is queued.
pub(super) unsafe fn launch(device: &CudaDevice, launch: &Launch) -> Result<()> {
    if launch.is_empty() {
        return Ok(());
    }
    let Launch { file, function, grid, block, args } = launch;
    if grid.iter().zip(GRID).any(|(blocks, most)| *blocks > most) {
        bail!(
            "{function}: a grid of {grid:?} blocks is larger than a device takes ({GRID:?}): fewer tokens at once"
        );
    }
    let capability = device.cuda_stream().context().compute_capability().w()?;
    let Some((module, ptx)) = modules::module(file, capability) else {
        let ((major, minor), (oldest, oldest_minor)) = (capability, modules::OLDEST);
        bail!(
            "{function}: this device has compute capability {major}.{minor}, {oldest}.{oldest_minor} is needed"
        );
    };
    let kernel = device.get_or_load_custom_func(function, module, ptx)?;
    let mut builder = kernel.builder();
    for arg in args {
        match arg {
            Arg::U32(x) => builder.arg(x),
            Arg::F32(x) => builder.arg(x),
            Arg::U64(x) => builder.arg(x),
            Arg::Weights(x) => builder.arg(x),
            Arg::Activations(x) => builder.arg(x),
            Arg::Backward(x) => builder.arg(x),
            Arg::Attention(x) => builder.arg(x),
            Arg::Strides(x) => builder.arg(x),
            Arg::DenseRows(x) => builder.arg(x),
            Arg::HeadActivations(x) => builder.arg(x),
            Arg::HeadMatrix(x) => builder.arg(x),
            Arg::Factor(x) => builder.arg(x),
            Arg::Gemm(x) => builder.arg(x),
        };
    }
    let [x, y, z] = *grid;
    let config =
        LaunchConfig { grid_dim: (x, y, z), block_dim: (*block, 1, 1), shared_mem_bytes: 0 };
    // SAFETY: `Launch` makes arguments as the kernel declares them; the memory is the caller's promise.
    unsafe { builder.launch(config) }.w()?;
    Ok(())
}

/// Memory for the next launches of a stream, which wait for what other streams do with it now; these wait in turn for what
/// is launched while it is held.
pub(super) struct Memory<'a> {
    pub address: u64,
    _until_queued: SyncOnDrop<'a>,
}

impl<'a> Memory<'a> {
    /// The elements of a slice from `first` on, to read.
    pub fn read<T>(slice: &'a CudaSlice<T>, first: usize, stream: &'a CudaStream) -> Self {
        let (address, guard) = slice.device_ptr(stream);
        Self { address: address + (first * size_of::<T>()) as u64, _until_queued: guard }
    }

    /// The elements of a slice, to write and read.
    pub fn written<T>(slice: &'a mut CudaSlice<T>, stream: &'a CudaStream) -> Self {
        let (address, guard) = slice.device_ptr_mut(stream);
        Self { address, _until_queued: guard }
    }
}

/// New memory, whose elements are what was there before.
pub(super) fn uninitialized<T: DeviceRepr>(
    device: &CudaDevice,
    len: usize,
) -> Result<CudaSlice<T>> {
    // SAFETY: elements are numbers, which any bits are; each use is a result that a launch writes as a whole.
    unsafe { device.alloc::<T>(len.max(1)) }
}

/// A dense copy of what a layout sees.
pub(super) fn gathered(storage: &CudaStorage, layout: &Layout) -> Result<CudaStorage> {
    let device = storage.device();
    // SAFETY: the copy below writes every element.
    let mut copy = unsafe { device.alloc_uninit(layout.shape(), storage.dtype()) }?;
    storage.copy_strided_src(&mut copy, 0, layout)?;
    Ok(copy)
}

/// Elements of a tensor that lie in rows, gathered if they do not.
pub(super) enum Gathered<'a, T> {
    Borrowed(&'a CudaSlice<T>, usize),
    Owned(CudaStorage),
}

impl<'a, T: CudaDType> Gathered<'a, T> {
    /// Dense elements in row-major order.
    pub fn contiguous(storage: &'a CudaStorage, layout: &Layout) -> Result<Self> {
        match layout.contiguous_offsets() {
            Some((first, _)) => Ok(Self::Borrowed(storage.as_cuda_slice()?, first)),
            None => Ok(Self::Owned(gathered(storage, layout)?)),
        }
    }

    pub fn memory<'b>(&'b self, stream: &'b CudaStream) -> Result<Memory<'b>>
    where
        T: 'b,
    {
        Ok(match self {
            Self::Borrowed(slice, first) => Memory::read(slice, *first, stream),
            Self::Owned(storage) => Memory::read(storage.as_cuda_slice::<T>()?, 0, stream),
        })
    }
}

/// Rows of the last dimension, as [`storage::Rows`](crate::storage::Rows) on the CPU.
pub(super) struct RowsOf<'a> {
    data: Gathered<'a, f32>,
    stride: usize,
    rows: usize,
    width: usize,
}

impl<'a> RowsOf<'a> {
    pub fn new(op: &str, storage: &'a CudaStorage, layout: &Layout) -> Result<Self> {
        if storage.dtype() != DType::F32 {
            bail!("{op}: {:?} on CUDA, f32 is needed", storage.dtype());
        }
        let width = layout.dims().last().copied().unwrap_or(1);
        let rows = layout.shape().elem_count().checked_div(width).unwrap_or(0);
        let (data, stride) = match row_stride(layout) {
            Some(stride) => {
                (Gathered::Borrowed(storage.as_cuda_slice()?, layout.start_offset()), stride)
            }
            None => (Gathered::Owned(gathered(storage, layout)?), width),
        };
        Ok(Self { data, stride, rows, width })
    }

    /// The rows, and what holds their memory.
    pub fn memory<'b>(&'b self, stream: &'b CudaStream) -> Result<(Rows, Memory<'b>)> {
        let memory = self.data.memory(stream)?;
        let (stride, rows, width) = (self.stride, self.rows, self.width);
        Ok((Rows { address: memory.address, stride, rows, width }, memory))
    }
}

/// A result of an op.
pub(super) fn result(y: CudaSlice<f32>, device: &CudaDevice, shape: Shape) -> (CudaStorage, Shape) {
    (CudaStorage::wrap_cuda_slice(y, device.clone()), shape)
}
