//! With the feature `cuda`: compiles `src/cuda/*.cu` to PTX, which the driver turns into machine code for its device.
//!
//! Twice: for sm_75, and for all later processors, which have a wider matrix instruction. Candle's own kernels are compiled
//! with nvcc as well, so it is there; a compiler at run time (NVRTC) would be one more library to be found then.

use std::{
    env,
    error::Error,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// Variables that name the compiler, and those that name a folder with `bin/nvcc` in it; the first that is set counts.
const COMPILER: [&str; 2] = ["BITNET_NVCC", "NVCC"];
const TOOLKIT: [&str; 2] = ["CUDA_HOME", "CUDA_PATH"];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=src/cuda");
    for variable in COMPILER.iter().chain(&TOOLKIT) {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return Ok(());
    }
    let (nvcc, out) = (nvcc(), PathBuf::from(env::var("OUT_DIR")?));
    for source in fs::read_dir("src/cuda")? {
        let source = source?.path();
        if source.extension().is_some_and(|extension| extension == "cu") {
            for capability in ["75", "80"] {
                compile(&nvcc, &source, capability, &out)?;
            }
        }
    }
    Ok(())
}

fn nvcc() -> PathBuf {
    let compiler = COMPILER.iter().find_map(env::var_os).map(PathBuf::from);
    let toolkit =
        || TOOLKIT.iter().find_map(env::var_os).map(|folder| Path::new(&folder).join("bin/nvcc"));
    compiler.or_else(toolkit).unwrap_or_else(|| "nvcc".into())
}

/// Writes `out/NAME.CAPABILITY.ptx`. As scripts/cuda_check.sh does it: without contraction, so that results are the CPU's.
fn compile(nvcc: &Path, source: &Path, capability: &str, out: &Path) -> Result<(), Box<dyn Error>> {
    let name = source.file_stem().ok_or("a source without a name")?.to_string_lossy();
    let status = Command::new(nvcc)
        .args(["-ptx", "-std=c++17", "-O3", "-fmad=false", "-Wno-deprecated-gpu-targets"])
        .arg(format!("-arch=compute_{capability}"))
        .arg("-o")
        .arg(out.join(format!("{name}.{capability}.ptx")))
        .arg(source)
        .status()
        .map_err(|error| {
            let nvcc = nvcc.display();
            format!(
                "{nvcc}: {error}: the feature `cuda` needs NVIDIA's compiler: set NVCC to it, or CUDA_HOME to the toolkit"
            )
        })?;
    match status.success() {
        true => Ok(()),
        false => Err(format!("{} failed on {}: {status}", nvcc.display(), source.display()).into()),
    }
}
