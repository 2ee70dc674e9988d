//! What a model file says of its tensors and nodes, read back.

use std::{collections::BTreeMap, path::Path};

use super::wire::{Fields, Value};
use crate::error::{Error, Result};

/// The largest model file that is read: weights are in the other file, so that a graph is a few MB.
const MAX_BYTES: u64 = 256 << 20;

/// What is in a file of ONNX, weights aside.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OnnxGraph {
    /// Program and version that wrote it.
    pub producer: String,
    /// How many nodes there are of each operator.
    pub operators: BTreeMap<String, usize>,
    /// Names of inputs, in order.
    pub inputs: Vec<String>,
    /// Names of outputs, in order.
    pub outputs: Vec<String>,
    /// Tensors in the other file.
    pub external: Vec<ExternalTensor>,
    /// Entries that tell more.
    pub metadata: BTreeMap<String, String>,
}

/// A tensor in another file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExternalTensor {
    /// Its name.
    pub name: String,
    /// Number of its element type.
    pub element_type: u64,
    /// Its shape.
    pub dims: Vec<u64>,
    /// The other file, beside the model's.
    pub file: String,
    /// Where it begins in that.
    pub offset: u64,
    /// How long it is.
    pub bytes: u64,
}

impl OnnxGraph {
    /// Reads the model file at `path`.
    ///
    /// # Errors
    /// A file that cannot be read or is no ONNX model.
    pub fn read(path: &Path) -> Result<Self> {
        let wrong = |reason: &str| Error::Checkpoint { path: path.into(), reason: reason.into() };
        let size = std::fs::metadata(path).map_err(Error::io(path))?.len();
        if size > MAX_BYTES {
            return Err(wrong("is too large for a graph: weights inside it are not supported"));
        }
        let bytes = std::fs::read(path).map_err(Error::io(path))?;
        Self::from_bytes(&bytes).ok_or_else(|| wrong("is no ONNX model, or a damaged one"))
    }

    /// What the bytes of a model file say, if they are one.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let mut found = Self::default();
        let mut has_graph = false;
        for field in Fields::new(bytes) {
            match field? {
                (2, name) => found.producer = name.text()?.into(),
                (3, version) => found.producer = format!("{} {}", found.producer, version.text()?),
                (7, graph) => {
                    has_graph = true;
                    found.graph(graph.bytes()?)?;
                }
                (14, entry) => {
                    let (key, value) = entry_of(entry)?;
                    found.metadata.insert(key, value);
                }
                _ => {}
            }
        }
        has_graph.then_some(found)
    }

    fn graph(&mut self, bytes: &[u8]) -> Option<()> {
        for field in Fields::new(bytes) {
            match field? {
                (1, node) => {
                    *self.operators.entry(text_of(node, 4)?).or_default() += 1;
                }
                (5, tensor) => self.external.extend(ExternalTensor::parse(tensor.bytes()?)?),
                (11, input) => self.inputs.push(text_of(input, 1)?),
                (12, output) => self.outputs.push(text_of(output, 1)?),
                _ => {}
            }
        }
        Some(())
    }
}

impl ExternalTensor {
    /// `Some(None)`: a tensor in the model file itself.
    fn parse(bytes: &[u8]) -> Option<Option<Self>> {
        let (mut found, mut is_external) = (Self::default(), false);
        for field in Fields::new(bytes) {
            match field? {
                (1, Value::Int(dim)) => found.dims.push(dim),
                (2, kind) => found.element_type = kind.int()?,
                (8, name) => found.name = name.text()?.into(),
                (13, entry) => match entry_of(entry)? {
                    (key, file) if key == "location" => found.file = file,
                    (key, offset) if key == "offset" => found.offset = offset.parse().ok()?,
                    (key, bytes) if key == "length" => found.bytes = bytes.parse().ok()?,
                    _ => {}
                },
                (14, location) => is_external = location.int()? == 1,
                _ => {}
            }
        }
        Some(is_external.then_some(found))
    }
}

/// The last text in field `number` of a message.
fn text_of(message: Value, number: u64) -> Option<String> {
    let mut found = None;
    for field in Fields::new(message.bytes()?) {
        let (field, value) = field?;
        if field == number {
            found = Some(value.text()?.to_owned());
        }
    }
    found
}

/// Key and value of a `StringStringEntryProto`.
fn entry_of(message: Value) -> Option<(String, String)> {
    Some((text_of(message, 1)?, text_of(message, 2).unwrap_or_default()))
}
