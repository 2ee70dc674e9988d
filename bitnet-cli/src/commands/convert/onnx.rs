//! A model written as an ONNX graph and the file of its weights.

use std::{fs, io, path::Path};

use anyhow::{Context, bail};
use bitnet_model::{
    checkpoint::onnx::{self, OnnxWeights},
    pretrained::Source,
};

use super::{
    Args, Written, checked,
    place::{self, Place, card_path},
};
use crate::args::Global;

/// Refuses an `output` that is no ONNX file by its name, or that is there.
pub fn check_free(output: &Path, force: bool) -> anyhow::Result<()> {
    if !output.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("onnx")) {
        bail!("{}: is to be an ONNX file: give it a name that ends in .onnx", output.display());
    }
    place::check_free(output, &[onnx::data_path(output)], force)
}

/// Writes the files of `args`.
pub fn convert(
    source: &Source,
    weights: OnnxWeights,
    args: &Args,
    global: &Global,
) -> anyhow::Result<Written> {
    let (graph, card_output) = (&*args.output, card_path(&args.output));
    let data = onnx::data_path(graph);
    let place = Place::new(graph)?;
    let file = place.of(graph);
    let from = (&source.config, &*source.checkpoint);
    let bar = checked::Bar::new(global);
    onnx::write(from.0, from.1, weights, &file, |done, all| bar.writing(done, all))?;
    let tensors = onnx::verify(from, weights, &file, |done, all| bar.checking(done, all))?;
    bar.finish();
    let bytes = place.bytes(graph)? + place.bytes(&data)?;
    let projections = match weights {
        OnnxWeights::Int2 => "2 bits, for ONNX Runtime's MatMulNBits",
        OnnxWeights::Int8 => "int8, for MatMulInteger",
    };
    let types = [
        ("projections", projections.into()),
        ("embedding and head", "as in the source".into()),
        ("norms", "F32".into()),
    ];
    args.card(source, &source.config, &types, bytes).write(&place.of(&card_output))?;
    // At no time is there a graph without its weights.
    match fs::remove_file(graph) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(error).with_context(|| graph.display().to_string());
        }
        _ => {}
    }
    place.publish(&[&data, graph, &card_output])?;
    Ok(Written { tensors, bytes })
}
