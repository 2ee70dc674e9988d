//! A model written as an ONNX graph and the file of its weights: both under their names, or none.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use bitnet_model::{
    checkpoint::onnx::{self, OnnxWeights},
    pretrained::Source,
};

use crate::{args::Global, folder, progress};

/// Refuses an `output` that is there, or whose weights are, unless they are files and `force` is given.
pub fn check_free(output: &Path, force: bool) -> anyhow::Result<()> {
    if !output.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("onnx")) {
        bail!("{}: is to be an ONNX file: give it a name that ends in .onnx", output.display());
    }
    for path in [output, &onnx::data_path(output)] {
        match path.symlink_metadata() {
            Err(_) => {}
            Ok(metadata) if !metadata.is_file() => {
                bail!("{}: is there and no file", path.display())
            }
            Ok(_) if force => {}
            Ok(_) => bail!(
                "{}: is there: choose another name, or pass --force to replace it",
                path.display()
            ),
        }
    }
    Ok(())
}

/// Writes `source` to the file `output` and its data beside it, reads both back and compares. Returns how many tensors and
/// bytes they have.
pub fn convert(
    source: &Source,
    weights: OnnxWeights,
    output: &Path,
    global: &Global,
) -> anyhow::Result<(usize, u64)> {
    let (parent, name) = folder::place(output)?;
    let folder = folder::temporary(&parent, &name)?;
    let path = folder.path().join(&name);
    let bar = progress::bar(global, 0, "{msg:8} {bar:30} {pos}/{len} {eta}");
    let step = |position: usize, len: usize| {
        bar.set_length(len as u64);
        bar.set_position(position as u64);
    };
    bar.set_message("writing");
    onnx::write(&source.config, &source.checkpoint, weights, &path, step)?;
    bar.set_message("checking");
    let from = (&source.config, &*source.checkpoint);
    let tensors = onnx::verify(from, weights, &path, step)?;
    bar.finish_and_clear();
    let files = [onnx::data_path(&path), path];
    let mut bytes = 0;
    for file in &files {
        bytes += fs::metadata(file).with_context(|| file.display().to_string())?.len();
    }
    publish(&files, &[onnx::data_path(output), output.to_owned()])?;
    Ok((tensors, bytes))
}

/// Brings weights and graph, in this order, to their places: at no time is there a graph without its weights.
fn publish(from: &[PathBuf; 2], to: &[PathBuf; 2]) -> anyhow::Result<()> {
    let [_, graph] = to;
    match fs::remove_file(graph) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(error).with_context(|| graph.display().to_string());
        }
        _ => {}
    }
    for (from, to) in from.iter().zip(to) {
        fs::rename(from, to).with_context(|| to.display().to_string())?;
    }
    Ok(())
}
