//! Compiles the CUDA kernels for the host, for `cuda.rs`. Without a C++ compiler its tests are left out, and that is said.

use std::{env, path::Path};

fn main() {
    let kernels = Path::new("../bitnet-model/src/cuda");
    println!("cargo::rustc-check-cfg=cfg(cuda_emulator)");
    for folder in [Path::new("cuda/emulator"), kernels] {
        println!("cargo::rerun-if-changed={}", folder.display());
    }
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++17")
        .cpp_link_stdlib(None) // nothing of it is called
        .cargo_metadata(false) // which would link it to the library, not to the test
        .opt_level(2)
        .include(kernels)
        .flag("-ffp-contract=off")
        .flag("-fno-exceptions")
        .flag("-fno-rtti")
        .flag("-Wno-unknown-pragmas")
        // A misaligned access, an index outside of an array or a signed overflow ends the process.
        .flag("-fsanitize=undefined")
        .flag("-fsanitize-undefined-trap-on-error")
        .warnings_into_errors(true)
        .files(
            ["fibers", "kernels", "kernels_sm75"].map(|name| format!("cuda/emulator/{name}.cpp")),
        );
    match build.try_compile("cuda_emulator") {
        Ok(()) => {
            println!("cargo::rustc-cfg=cuda_emulator");
            println!("cargo::rustc-link-search=native={}", env::var("OUT_DIR").unwrap_or_default());
        }
        Err(error) => {
            println!(
                "cargo::warning=the CUDA kernels are NOT tested: they cannot be compiled for the host: {error}"
            );
        }
    }
}
