//! The driver's functions that Candle and its `cudarc` call, with the signatures of `cuda.h`.
//!
//! One device, one context; streams and events are numbers, since everything is done when it is asked for. Environment:
//! `BITNET_CUDA_CAPABILITY` (75, 80, …; default 80), `BITNET_CUDA_ORDER` (`descending`), `BITNET_CUDA_PTX` (a folder with the PTX
//! of modules that name only their source, as `scripts/nvcc_stand_in.sh` makes them), `BITNET_CUDA_TRACE` (launches to stderr).

#![allow(clippy::missing_safety_doc, non_snake_case, unsafe_code)] // those of the CUDA driver API

use std::{
    env,
    ffi::{CStr, c_char, c_int, c_uint, c_void},
    path::Path,
    ptr,
    sync::{
        Mutex, MutexGuard,
        atomic::{AtomicUsize, Ordering},
    },
};

use crate::{
    block::{self, Order, Size},
    memory::Memory,
    ptx::{self, Kernel},
};

const SUCCESS: c_uint = 0;
const INVALID_VALUE: c_uint = 1;
const INVALID_DEVICE: c_uint = 101;
const INVALID_PTX: c_uint = 218;
const NOT_FOUND: c_uint = 500;
const ILLEGAL_ADDRESS: c_uint = 700;

static MEMORY: Mutex<Memory> = Mutex::new(Memory::new());
static HANDLES: AtomicUsize = AtomicUsize::new(1);

fn memory() -> MutexGuard<'static, Memory> {
    MEMORY.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// A handle that means nothing.
fn handle() -> *mut c_void {
    ptr::without_provenance_mut(HANDLES.fetch_add(1, Ordering::Relaxed))
}

/// Says what went wrong, which the driver's numbers do not.
fn refuse(code: c_uint, what: &str) -> c_uint {
    eprintln!("libcuda stand-in: {what}");
    code
}

fn done(result: Result<(), String>) -> c_uint {
    match result {
        Ok(()) => SUCCESS,
        Err(what) => refuse(ILLEGAL_ADDRESS, &what),
    }
}

/// The compute capability, as 10 · major + minor.
fn capability() -> c_int {
    env::var("BITNET_CUDA_CAPABILITY").ok().and_then(|n| n.parse().ok()).unwrap_or(80)
}

/// Defines functions whose results are written through pointers that the driver API wants to be valid.
macro_rules! driver {
    ($($(#[$doc:meta])* fn $name:ident($($arg:ident: $type:ty),*) $body:block)*) => {$(
        $(#[$doc])*
        #[unsafe(no_mangle)]
        #[allow(unused_unsafe)] // not all use a pointer
        pub unsafe extern "C" fn $name($($arg: $type),*) -> c_uint {
            // SAFETY: pointers are the caller's promise, as for the driver.
            unsafe { $body }
        }
    )*};
}

driver! {
    /// Nothing to initialize.
    fn cuInit(_flags: c_uint) { SUCCESS }
    /// One device.
    fn cuDeviceGetCount(count: *mut c_int) {
        *count = 1;
        SUCCESS
    }
    /// Device 0.
    fn cuDeviceGet(device: *mut c_int, ordinal: c_int) {
        *device = ordinal;
        if ordinal == 0 { SUCCESS } else { INVALID_DEVICE }
    }
    /// Compute capability and memory pools; nothing else is asked for.
    fn cuDeviceGetAttribute(value: *mut c_int, attribute: c_uint, _device: c_int) {
        *value = match attribute {
            75 => capability() / 10,
            76 => capability() % 10,
            115 => 1,
            _ => return refuse(INVALID_VALUE, &format!("device attribute {attribute}")),
        };
        SUCCESS
    }
    /// A name.
    fn cuDeviceGetName(name: *mut c_char, room: c_int, _device: c_int) {
        let text = c"PTX interpreter".to_bytes_with_nul();
        let count = text.len().min(room.max(0) as usize);
        ptr::copy_nonoverlapping(text.as_ptr().cast(), name, count);
        SUCCESS
    }
    /// 8 GiB, so that sizes which are worked out from it are ordinary.
    fn cuDeviceTotalMem_v2(bytes: *mut usize, _device: c_int) {
        *bytes = 8 << 30;
        SUCCESS
    }
    /// As if all of it were free.
    fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) {
        (*free, *total) = (8 << 30, 8 << 30);
        SUCCESS
    }
    /// The context.
    fn cuDevicePrimaryCtxRetain(context: *mut *mut c_void, _device: c_int) {
        *context = ptr::without_provenance_mut(1);
        SUCCESS
    }
    /// Stays.
    fn cuDevicePrimaryCtxRelease_v2(_device: c_int) { SUCCESS }
    /// The context.
    fn cuCtxGetCurrent(context: *mut *mut c_void) {
        *context = ptr::without_provenance_mut(1);
        SUCCESS
    }
    /// There is one.
    fn cuCtxSetCurrent(_context: *mut c_void) { SUCCESS }
    /// All is done.
    fn cuCtxSynchronize() { SUCCESS }
    /// A number.
    fn cuStreamCreate(stream: *mut *mut c_void, _flags: c_uint) {
        *stream = handle();
        SUCCESS
    }
    /// A number.
    fn cuStreamCreateWithPriority(stream: *mut *mut c_void, _flags: c_uint, _priority: c_int) {
        *stream = handle();
        SUCCESS
    }
    /// It was a number.
    fn cuStreamDestroy_v2(_stream: *mut c_void) { SUCCESS }
    /// All is done.
    fn cuStreamSynchronize(_stream: *mut c_void) { SUCCESS }
    /// All is done.
    fn cuStreamWaitEvent(_stream: *mut c_void, _event: *mut c_void, _flags: c_uint) { SUCCESS }
    /// Never.
    fn cuStreamIsCapturing(_stream: *mut c_void, status: *mut c_uint) {
        *status = 0;
        SUCCESS
    }
    /// A number.
    fn cuEventCreate(event: *mut *mut c_void, _flags: c_uint) {
        *event = handle();
        SUCCESS
    }
    /// It was a number.
    fn cuEventDestroy_v2(_event: *mut c_void) { SUCCESS }
    /// All before it is done.
    fn cuEventRecord(_event: *mut c_void, _stream: *mut c_void) { SUCCESS }
    /// All before it is done.
    fn cuEventSynchronize(_event: *mut c_void) { SUCCESS }
    /// All before it is done.
    fn cuEventQuery(_event: *mut c_void) { SUCCESS }
    /// New memory.
    fn cuMemAlloc_v2(address: *mut u64, size: usize) {
        if size == 0 {
            return refuse(INVALID_VALUE, "an allocation of no bytes");
        }
        *address = memory().allocate(size);
        SUCCESS
    }
    /// New memory.
    fn cuMemAllocAsync(address: *mut u64, size: usize, _stream: *mut c_void) {
        cuMemAlloc_v2(address, size)
    }
    /// Gives memory back.
    fn cuMemFree_v2(address: u64) {
        match memory().free(address) {
            true => SUCCESS,
            false => refuse(INVALID_VALUE, &format!("{address:#x} is freed, and was not allocated")),
        }
    }
    /// Gives memory back.
    fn cuMemFreeAsync(address: u64, _stream: *mut c_void) { cuMemFree_v2(address) }
    /// To the device.
    fn cuMemcpyHtoD_v2(to: u64, from: *const c_void, size: usize) {
        done(memory().bytes(to, size).map(|to| ptr::copy_nonoverlapping(from.cast(), to.as_mut_ptr(), size)))
    }
    /// To the device.
    fn cuMemcpyHtoDAsync_v2(to: u64, from: *const c_void, size: usize, _stream: *mut c_void) {
        cuMemcpyHtoD_v2(to, from, size)
    }
    /// From the device.
    fn cuMemcpyDtoH_v2(to: *mut c_void, from: u64, size: usize) {
        done(memory().bytes(from, size).map(|from| ptr::copy_nonoverlapping(from.as_ptr(), to.cast(), size)))
    }
    /// From the device.
    fn cuMemcpyDtoHAsync_v2(to: *mut c_void, from: u64, size: usize, _stream: *mut c_void) {
        cuMemcpyDtoH_v2(to, from, size)
    }
    /// On the device.
    fn cuMemcpyDtoD_v2(to: u64, from: u64, size: usize) {
        let mut memory = memory();
        let copy = memory.bytes(from, size).map(|from| from.to_vec());
        done(copy.and_then(|copy| memory.bytes(to, size).map(|to| to.copy_from_slice(&copy))))
    }
    /// On the device.
    fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, size: usize, _stream: *mut c_void) {
        cuMemcpyDtoD_v2(to, from, size)
    }
    /// Sets bytes.
    fn cuMemsetD8_v2(to: u64, value: u8, size: usize) {
        done(memory().bytes(to, size).map(|to| to.fill(value)))
    }
    /// Sets bytes.
    fn cuMemsetD8Async(to: u64, value: u8, size: usize, _stream: *mut c_void) {
        cuMemsetD8_v2(to, value, size)
    }
    /// Reads PTX; a module stays until the process ends.
    fn cuModuleLoadData(module: *mut *mut c_void, image: *const c_void) {
        let Ok(text) = CStr::from_ptr(image.cast()).to_str() else {
            return refuse(INVALID_PTX, "a module that is no text");
        };
        match load(text) {
            Ok(kernels) => {
                *module = Box::into_raw(Box::new(kernels)).cast();
                SUCCESS
            }
            Err(what) => refuse(INVALID_PTX, &what),
        }
    }
    /// It stays.
    fn cuModuleUnload(_module: *mut c_void) { SUCCESS }
    /// A kernel of a module.
    fn cuModuleGetFunction(function: *mut *mut c_void, module: *mut c_void, name: *const c_char) {
        let (kernels, name) = (&*module.cast_const().cast::<Vec<Kernel>>(), CStr::from_ptr(name));
        let kernel = kernels.iter().find(|kernel| kernel.name.as_bytes() == name.to_bytes());
        match kernel {
            Some(kernel) => {
                *function = ptr::from_ref(kernel).cast_mut().cast();
                SUCCESS
            }
            None => refuse(NOT_FOUND, &format!("no kernel {name:?} in a module")),
        }
    }
    /// Names of errors: the message has been written.
    fn cuGetErrorName(_error: c_uint, name: *mut *const c_char) {
        *name = c"an error of the CUDA stand-in".as_ptr();
        SUCCESS
    }
    /// As `cuGetErrorName`.
    fn cuGetErrorString(_error: c_uint, name: *mut *const c_char) {
        *name = c"see the message before".as_ptr();
        SUCCESS
    }
}

/// Kernels of PTX, or of the file that it names.
fn load(text: &str) -> Result<Vec<Kernel>, String> {
    let Some(name) = text.strip_prefix("// not compiled: ").map(str::trim) else {
        return ptx::parse(text);
    };
    let folder = env::var("BITNET_CUDA_PTX").map_err(|_| {
        format!("module {name} was not compiled: set BITNET_CUDA_PTX to a folder with {name}.ptx")
    })?;
    let path = Path::new(&folder).join(format!("{name}.ptx"));
    let text =
        std::fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    ptx::parse(&text)
}

/// Executes a kernel.
///
/// # Safety
/// `function` is one of `cuModuleGetFunction`, and `params` points to the addresses of as many values as it has parameters,
/// of their sizes.
#[unsafe(no_mangle)]
#[allow(clippy::too_many_arguments)] // the driver's
pub unsafe extern "C" fn cuLaunchKernel(
    function: *mut c_void,
    grid_x: c_uint,
    grid_y: c_uint,
    grid_z: c_uint,
    block_x: c_uint,
    block_y: c_uint,
    block_z: c_uint,
    shared: c_uint,
    _stream: *mut c_void,
    params: *mut *mut c_void,
    _extra: *mut *mut c_void,
) -> c_uint {
    // SAFETY: a kernel of a module, and modules are never freed.
    let kernel = unsafe { &*function.cast_const().cast::<Kernel>() };
    let (grid, block) = ([grid_x, grid_y, grid_z], [block_x, block_y, block_z]);
    let size = Size { grid, block, shared: shared as usize };
    if env::var_os("BITNET_CUDA_TRACE").is_some() {
        eprintln!("{} {grid:?} {block:?}", kernel.name);
    }
    let threads = block.iter().map(|n| u64::from(*n)).product::<u64>();
    let most = kernel.most_threads.unwrap_or(1024).min(1024);
    let limits = [(1 << 31) - 1, 65535, 65535];
    if grid.contains(&0) || threads == 0 || grid.iter().zip(limits).any(|(n, most)| *n > most) {
        return refuse(
            INVALID_VALUE,
            &format!("{}: a grid of {grid:?} blocks of {block:?}", kernel.name),
        );
    }
    if threads > most.into() {
        return refuse(
            INVALID_VALUE,
            &format!("{}: {threads} threads a block, at most {most}", kernel.name),
        );
    }
    let mut bytes = vec![0; kernel.param_bytes];
    for (i, param) in kernel.params.iter().enumerate() {
        // SAFETY: the caller's promise.
        let from = unsafe { std::slice::from_raw_parts((*params.add(i)).cast::<u8>(), param.size) };
        bytes[param.offset..param.offset + param.size].copy_from_slice(from);
    }
    let order = match env::var("BITNET_CUDA_ORDER").as_deref() {
        Ok("descending") => Order::Descending,
        _ => Order::Ascending,
    };
    done(block::launch(kernel, size, order, &bytes, &mut memory()))
}
