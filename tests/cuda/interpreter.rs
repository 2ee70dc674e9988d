//! Launches of the PTX that nvcc made, by `tests/ptx`.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use bitnet_model::cuda::launch::Launch;
use ptx_interpreter::{
    block::{self, Order, Size},
    memory::Memory,
    ptx::{Kernel, parse},
};

/// The kernels of a file, read once.
fn kernels(path: PathBuf) -> Arc<Vec<Kernel>> {
    type Modules = HashMap<PathBuf, Arc<Vec<Kernel>>>;
    static MODULES: Mutex<Option<Modules>> = Mutex::new(None);
    let mut modules = MODULES.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let read = |path: &PathBuf| {
        let text = std::fs::read_to_string(path);
        let text = text.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        Arc::new(parse(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display())))
    };
    modules.get_or_insert_default().entry(path).or_insert_with_key(read).clone()
}

/// Executes a launch of a file's kernel for sm_75 or sm_80, whose arguments must have the sizes that the PTX declares.
pub fn run(
    folder: &Path,
    (file, sm75): (&str, bool),
    launch: &Launch,
    args: &[&[u8]],
    order: Order,
    memory: &mut Memory,
) {
    let capability = if sm75 { 75 } else { 80 };
    let kernels = kernels(folder.join(format!("{file}.{capability}.ptx")));
    let kernel = kernels.iter().find(|kernel| kernel.name == launch.function).unwrap();
    let sizes = Vec::from_iter(kernel.params.iter().map(|param| param.size));
    assert_eq!(Vec::from_iter(args.iter().map(|arg| arg.len())), sizes, "{}", kernel.name);
    let mut params = vec![0; kernel.param_bytes];
    for (param, arg) in kernel.params.iter().zip(args) {
        params[param.offset..][..param.size].copy_from_slice(arg);
    }
    let size = Size { grid: launch.grid, block: [launch.block, 1, 1], shared: 0 };
    block::launch(kernel, size, order, &params, memory).unwrap();
}
