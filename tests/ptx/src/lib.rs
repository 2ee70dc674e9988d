//! Executes PTX on the processor, and stands where NVIDIA's driver would: a `libcuda.so` without a device.
//!
//! Device memory is the host's, and launches are interpreted, so that nvcc's instructions, Candle's `Device::new_cuda` and the
//! launches behind it run as they are. Every access is checked: against the allocation, its alignment, and, in shared memory,
//! against races and values that nobody wrote. Not proven: timing, streams (all is done at once, in order), the memory model.
//!
//! `cuBLAS`, `cuRAND` and the run-time library get as many functions as it takes to make a device; a call of another ends the
//! process with its name.

pub mod block;
pub mod collective;
pub mod driver;
pub mod float;
pub mod instruction;
mod libraries;
pub mod memory;
mod missing;

pub mod operation;
pub mod ptx;
pub mod shared;
