//! CUDA: whether this build computes there, and what of it the machine has.
//!
//! Nothing is linked or loaded to find the driver: its library is looked for where the loader looks, its version and its
//! devices in the files of its kernel module. What the devices can do is asked of the driver by builds with the feature.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use serde::Serialize;

/// The driver's library.
const LIBRARY: &str = "libcuda.so.1";

/// Where it lies if neither the environment nor the loader's cache says so; the last is Windows' Subsystem for Linux.
const FOLDERS: [&str; 6] = [
    "usr/lib/x86_64-linux-gnu",
    "usr/lib/aarch64-linux-gnu",
    "usr/lib64",
    "usr/lib",
    "usr/local/nvidia/lib64",
    "usr/lib/wsl/lib",
];

/// NVIDIA's devices, and what is between them and this program.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Cuda {
    /// Whether this build has the feature `cuda`.
    pub built: bool,
    /// The driver's library.
    pub library: Option<PathBuf>,
    /// The version of its kernel module.
    pub driver: Option<String>,
    /// Devices that the kernel module names.
    pub present: Vec<String>,
    /// Devices that the driver lets this build use.
    pub devices: Vec<Device>,
    /// What the driver says if it lets it use none.
    pub error: Option<String>,
}

/// A device.
#[derive(Clone, Debug, Serialize)]
pub struct Device {
    /// What `--device` calls it.
    pub name: String,
    /// The product.
    pub model: String,
    /// Compute capability, `8.0`.
    pub capability: String,
    /// Bytes of its memory.
    pub memory_bytes: usize,
}

impl Cuda {
    /// Looks; the system's files lie below `root`.
    pub fn examine(root: &Path) -> Self {
        let version = fs::read_to_string(root.join("proc/driver/nvidia/version")).ok();
        let (devices, error) = match devices() {
            Ok(devices) => (devices, None),
            Err(error) => (Vec::new(), Some(error)),
        };
        Self {
            built: cfg!(feature = "cuda"),
            library: library(root, env::var_os("LD_LIBRARY_PATH").as_deref()),
            driver: version.and_then(|text| version_of(&text)),
            present: present(root),
            devices,
            error,
        }
    }
}

/// A library of this name where the loader would find it.
fn library(root: &Path, path: Option<&std::ffi::OsStr>) -> Option<PathBuf> {
    let named: Vec<PathBuf> = path.map(|path| env::split_paths(path).collect()).unwrap_or_default();
    let cache = fs::read(root.join("etc/ld.so.cache")).unwrap_or_default();
    // Among other things the cache has paths, which end with a zero byte.
    let cached = cache.split(|&byte| byte == 0).filter_map(|text| std::str::from_utf8(text).ok());
    let cached = cached.filter(|path| path.ends_with(&format!("/{LIBRARY}")));
    let cached = cached.map(|path| root.join(path.trim_start_matches('/')));
    let named = named.into_iter().map(|folder| folder.join(LIBRARY));
    let usual = FOLDERS.into_iter().map(|folder| root.join(folder).join(LIBRARY));
    named.chain(cached).chain(usual).find(|path| path.exists())
}

/// `535.129.03` of `NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 …`.
fn version_of(text: &str) -> Option<String> {
    let is_version =
        |word: &&str| word.contains('.') && word.chars().all(|c| c.is_ascii_digit() || c == '.');
    text.lines().next()?.split_whitespace().find(is_version).map(str::to_owned)
}

/// Names of the devices that the driver's kernel module has.
fn present(root: &Path) -> Vec<String> {
    let Ok(folders) = fs::read_dir(root.join("proc/driver/nvidia/gpus")) else { return Vec::new() };
    let texts = folders.flatten();
    let texts = texts.filter_map(|gpu| fs::read_to_string(gpu.path().join("information")).ok());
    let name = |text: String| {
        Some(text.lines().find_map(|line| line.strip_prefix("Model:"))?.trim().to_owned())
    };
    texts.filter_map(name).collect()
}

/// What the driver lets this process use.
#[cfg(feature = "cuda")]
fn devices() -> Result<Vec<Device>, String> {
    use candle_core::cuda_backend::cudarc::driver::{CudaContext, DriverError};

    let device = |index: usize| -> Result<Device, DriverError> {
        let context = CudaContext::new(index)?;
        let (major, minor) = context.compute_capability()?;
        Ok(Device {
            name: format!("cuda:{index}"),
            model: context.name()?,
            capability: format!("{major}.{minor}"),
            memory_bytes: context.total_mem()?,
        })
    };
    let count = CudaContext::device_count().map_err(|error| error.to_string())?;
    let devices = (0..count.max(0) as usize).map(device);
    devices.collect::<Result<_, _>>().map_err(|error| error.to_string())
}

#[cfg(not(feature = "cuda"))]
fn devices() -> Result<Vec<Device>, String> {
    Ok(Vec::new())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_driver_is_found_without_loading_it() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        assert_eq!(library(root, None), None);
        let write = |path: &str, bytes: &[u8]| {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, bytes).unwrap();
            path
        };
        let usual = write("usr/lib64/libcuda.so.1", b"");
        assert_eq!(library(root, None), Some(usual.clone()));
        write(
            "etc/ld.so.cache",
            b"glibc-ld.so\xff\0libcuda.so.1\0/opt/gone/libcuda.so.1\0/opt/cuda/libcuda.so.1\0",
        );
        assert_eq!(library(root, None), Some(usual));
        let cached = write("opt/cuda/libcuda.so.1", b"");
        assert_eq!(library(root, None), Some(cached));
        let named = write("mine/libcuda.so.1", b"");
        let path = env::join_paths([root.join("nothing"), root.join("mine")]).unwrap();
        assert_eq!(library(root, Some(&path)), Some(named));

        let text = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 2023\n\
                    GCC version:  gcc version 12.2.0\n";
        assert_eq!(version_of(text).as_deref(), Some("535.129.03"));
        assert_eq!(version_of("no driver"), None);
        let gpu = "proc/driver/nvidia/gpus/0000:01:00.0/information";
        write(gpu, b"Model: \t\t NVIDIA A100-SXM4-40GB\nIRQ:   \t\t 31\n");
        assert_eq!(present(root), ["NVIDIA A100-SXM4-40GB"]);
    }
}
