//! CUDA: the kernels' sources (`*.cu`, one concept a file), how weights lie for them, and their launches as values.
//!
//! What a launch is, its grid, arguments and order, is decided here without a device ([`launch`], [`layout`]). What carries
//! it out is either a device, with the feature `cuda`, or the tests' emulator, which compiles the same sources for the host.

pub mod head_layout;
pub mod launch;
pub mod layout;

#[cfg(feature = "cuda")]
#[allow(unsafe_code)] // launches, and types that they take
mod device;
#[cfg(feature = "cuda")]
mod modules;
#[cfg(feature = "cuda")]
#[allow(unsafe_code)] // launches
pub mod ops;
#[cfg(feature = "cuda")]
pub(crate) mod resident;
