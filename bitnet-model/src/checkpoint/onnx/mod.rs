//! ONNX: the graph of a model with its packed weights, written for ONNX Runtime.
//!
//! Two files: `NAME.onnx`, the graph, and `NAME.onnx.data`, the weights, which may then be larger than the 2 GB that a
//! protocol buffer can hold. Inputs, outputs and their shapes are those of Hugging Face's optimum for decoders.

mod decoder;
mod graph;
mod layout;
mod read;
mod wire;

use std::{
    collections::{BTreeSet, HashMap},
    path::{Path, PathBuf},
};

use self::{
    decoder::{Decoder, Projection, ones_name},
    graph::{ElementType, Graph, Place},
};
pub use self::{
    layout::OnnxWeights,
    read::{ExternalTensor, OnnxGraph},
};
use super::{
    Checkpoint, Dtype,
    export::{b158, ternary},
    source::Source,
    write::AtomicFile,
    write::write_atomic,
};
use crate::{
    config::{Config, Quantization},
    error::{Error, Result},
};

/// Tensors begin at pages, so that they can be mapped.
const ALIGNMENT: u64 = 4096;

/// The file of the weights of the model at `path`.
pub fn data_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".data");
    name.into()
}

/// Writes `path` and its [`data_path`]; `on_tensor` hears of each tensor written and how many there are. The graph appears
/// last, and each file complete.
///
/// Embedding and head keep their element type, norms become f32.
///
/// # Errors
/// What the graph has no place for: full precision, other quantizers than b1.58's, sums that are not exact; tensors that do
/// not fit the configuration; files that cannot be written.
pub fn write(
    config: &Config,
    checkpoint: &Checkpoint,
    weights: OnnxWeights,
    path: &Path,
    mut on_tensor: impl FnMut(usize, usize),
) -> Result<()> {
    config.check_tensors(checkpoint)?;
    let quantization = quantization(config, checkpoint)?;
    let tensors = plan(config, checkpoint, weights)?;
    let data = data_path(path);
    let mut file = AtomicFile::create(&data)?;
    let mut projections = HashMap::new();
    let mut end = 0;
    for (index, tensor) in tensors.iter().enumerate() {
        file.write(&vec![0; (tensor.offset - end) as usize])?;
        end = tensor.offset + tensor.bytes();
        let mut put = |bytes: &[u8]| file.write(bytes);
        match tensor.content {
            Content::Stored => checkpoint.bytes_in_pieces(&tensor.name, put)?,
            Content::Floats => checkpoint
                .floats_in_pieces(&tensor.name, 1, |floats| put(bytemuck::cast_slice(floats)))?,
            Content::Ones => {
                let ones = vec![1f32; tensor.dims.iter().product()];
                put(bytemuck::cast_slice(&ones))?;
            }
            Content::Codes(shape) => {
                let weight = ternary(checkpoint, &tensor.name, shape, quantization)?;
                put(&weights.encode(&weight))?;
                let scale = weight.scale();
                projections.insert(tensor.name.clone(), Projection { shape, scale });
            }
        }
        on_tensor(index + 1, tensors.len());
    }
    file.commit()?;
    let mut graph = Graph::default();
    let file = data.file_name().unwrap_or_default().to_string_lossy();
    for tensor in &tensors {
        let place = Place { file: &file, offset: tensor.offset, bytes: tensor.bytes() };
        graph.external(&tensor.name, tensor.kind, &tensor.dims, place);
    }
    Decoder { config, quantization, weights, projections: &projections }.build(&mut graph);
    let name = path.file_stem().unwrap_or_default().to_string_lossy();
    let metadata = [("config.json", config.to_json().to_string())];
    write_atomic(path, graph.into_model(&name, &metadata).as_bytes())
}

/// How the model is quantized, if the graph has a place for it.
fn quantization(config: &Config, checkpoint: &Checkpoint) -> Result<Quantization> {
    let other = "says of other quantizers than b1.58's: only absmean weights and int8 activations are written as ONNX";
    b158(config, checkpoint, other)
}

/// A tensor of the other file.
struct Planned {
    name: String,
    kind: ElementType,
    dims: Vec<usize>,
    content: Content,
    offset: u64,
}

/// What a tensor is made of.
#[derive(Clone, Copy)]
enum Content {
    /// The tensor of the same name, as it is.
    Stored,
    /// The same in f32.
    Floats,
    /// The projection of the same name, (out_features, in_features).
    Codes((usize, usize)),
    Ones,
}

impl Planned {
    fn bytes(&self) -> u64 {
        (self.dims.iter().product::<usize>() * self.kind.bytes()) as u64
    }
}

/// All tensors in the order of the file.
fn plan(config: &Config, checkpoint: &Checkpoint, weights: OnnxWeights) -> Result<Vec<Planned>> {
    let mut tensors: Vec<Planned> = Vec::new();
    let mut add = |name: &str, kind: ElementType, dims: Vec<usize>, content| {
        let end = tensors.last().map_or(0, |last| last.offset + last.bytes());
        let offset = end.next_multiple_of(ALIGNMENT);
        tensors.push(Planned { name: name.into(), kind, dims, content, offset });
    };
    let projections: HashMap<String, (usize, usize)> = config.projections().collect();
    let mut ones = BTreeSet::new();
    for name in names(config) {
        let Some(info) = checkpoint.get(&name) else { continue };
        if let Some(&shape @ (out_features, in_features)) = projections.get(&name) {
            weights.check(in_features).map_err(|reason| checkpoint.wrong(&name, reason))?;
            let (kind, dims) = weights.tensor(shape);
            add(&name, kind, dims, Content::Codes(shape));
            if weights == OnnxWeights::Int2 {
                ones.insert((out_features, layout::blocks(in_features)));
            }
            continue;
        }
        let is_matrix = info.shape.len() == 2;
        let (kind, content) = match info.dtype {
            Dtype::BF16 if is_matrix => (ElementType::Bfloat16, Content::Stored),
            Dtype::F16 if is_matrix => (ElementType::Float16, Content::Stored),
            _ => (ElementType::Float, Content::Floats),
        };
        add(&name, kind, info.shape.to_vec(), content);
    }
    for (out_features, blocks) in ones {
        let name = ones_name(out_features, blocks);
        add(&name, ElementType::Float, vec![out_features, blocks], Content::Ones);
    }
    Ok(tensors)
}

/// The tensors of the graph, by the Hub's names; `check_tensors` has found them all.
fn names(config: &Config) -> Vec<String> {
    let mut names = vec!["model.embed_tokens.weight".to_owned()];
    for layer in (0..config.num_hidden_layers).map(|layer| format!("model.layers.{layer}")) {
        names.push(format!("{layer}.input_layernorm.weight"));
        names.push(format!("{layer}.post_attention_layernorm.weight"));
        if let Some((attention, feed_forward)) = config.sub_norm_names() {
            names.push(format!("{layer}.self_attn.{attention}.weight"));
            names.push(format!("{layer}.mlp.{feed_forward}.weight"));
        }
    }
    let has_input_norms = config.quantization.is_some_and(|q| q.input_norm_eps.is_some());
    for (weight, _) in config.projections() {
        if has_input_norms {
            names.push(format!("{}.rms_norm.weight", weight.trim_end_matches(".weight")));
        }
        names.push(weight);
    }
    names.push("model.norm.weight".to_owned());
    if !config.tie_word_embeddings {
        names.push("lm_head.weight".to_owned());
    }
    names
}

/// Reads back what [`write()`] wrote and compares every projection's codes. `on_matrix` hears of each compared and how many
/// there are. Returns how many tensors there are.
///
/// # Errors
/// The first tensor that is not as it was.
pub fn verify(
    (config, checkpoint): (&Config, &Checkpoint),
    weights: OnnxWeights,
    path: &Path,
    mut on_matrix: impl FnMut(usize, usize),
) -> Result<usize> {
    let quantization = quantization(config, checkpoint)?;
    let graph = OnnxGraph::read(path)?;
    let data = data_path(path);
    let source = Source::open(&data)?;
    let wrong = |name: &str, reason: &str| Error::Tensor {
        path: data.clone(),
        name: name.into(),
        reason: reason.into(),
    };
    let matrices: Vec<(String, (usize, usize))> = config.projections().collect();
    for (index, (name, shape)) in matrices.iter().enumerate() {
        let Some(tensor) = graph.external.iter().find(|tensor| tensor.name == *name) else {
            return Err(wrong(name, "read back, it is not in the graph"));
        };
        let mut bytes = vec![0; tensor.bytes as usize];
        let read = source.read_exact_at(&mut bytes, tensor.offset);
        read.map_err(|e| wrong(name, &format!("cannot be read back: {e}")))?;
        if !weights.holds(&bytes, &ternary(checkpoint, name, *shape, quantization)?) {
            return Err(wrong(name, "read back, its codes are not the source's"));
        }
        on_matrix(index + 1, matrices.len());
    }
    Ok(graph.external.len())
}
