//! The kernels as `build.rs` compiled them.

/// A file of kernels, for sm_75 and for later processors.
struct Module {
    name: &'static str,
    /// Candle keeps modules by name for each device, and a device is of one kind.
    module: &'static str,
    sm75: &'static str,
    sm80: &'static str,
}

macro_rules! modules {
    ($($name:literal),*) => {
        [$(Module {
            name: $name,
            module: concat!("bitnet::", $name),
            sm75: include_str!(concat!(env!("OUT_DIR"), "/", $name, ".75.ptx")),
            sm80: include_str!(concat!(env!("OUT_DIR"), "/", $name, ".80.ptx")),
        }),*]
    };
}

static MODULES: [Module; 17] = modules![
    "adamw",
    "attention",
    "attention_backward",
    "dense",
    "dropout",
    "gated",
    "gemm",
    "hadamard",
    "head",
    "loss",
    "quantize",
    "rms_norm",
    "rope",
    "ternarize",
    "ternary_backward",
    "ternary_gemm",
    "ternary_gemv"
];

/// The oldest processors that are supported: those with int8 matrix instructions.
pub const OLDEST: (i32, i32) = (7, 5);

/// The name of a file's module, unique among all of a process, and its PTX for a processor.
pub fn module(file: &str, capability: (i32, i32)) -> Option<(&'static str, &'static str)> {
    let module = MODULES.iter().find(|module| module.name == file)?;
    let ptx = if capability < (8, 0) { module.sm75 } else { module.sm80 };
    (capability >= OLDEST).then_some((module.module, ptx))
}
