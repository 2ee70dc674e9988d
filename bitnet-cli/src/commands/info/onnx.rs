//! What an ONNX file is, from its graph alone.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    fs,
    io::{self, Write},
    path::Path,
};

use anyhow::Context;
use bitnet_model::{checkpoint::onnx::OnnxGraph, config::Config};
use serde::Serialize;

use super::{Geometry, TensorRow, family};
use crate::progress::bytes;

/// Everything that is known of a graph.
#[derive(Serialize)]
pub struct OnnxInfo {
    graph: String,
    /// Program and version that wrote it.
    producer: String,
    /// Of a graph that this program wrote.
    family: Option<&'static str>,
    geometry: Option<Geometry>,
    inputs: Vec<String>,
    outputs: Vec<String>,
    /// Nodes of each operator.
    operators: BTreeMap<String, usize>,
    /// Files of the graph and of its weights.
    files: BTreeMap<String, u64>,
    /// Tensors of each element type in the other file.
    dtypes: BTreeMap<String, usize>,
    tensors: Vec<TensorRow>,
}

impl OnnxInfo {
    /// Whether `path` is named as such a file.
    pub fn is_onnx(path: &Path) -> bool {
        let extension = path.extension();
        path.is_file() && extension.is_some_and(|extension| extension.eq_ignore_ascii_case("onnx"))
    }

    /// Of the file at `path`.
    ///
    /// # Errors
    /// No ONNX file, a damaged one, or one whose weights are not there.
    pub fn of(path: &Path) -> anyhow::Result<Self> {
        let graph = OnnxGraph::read(path)?;
        let mut files = BTreeMap::new();
        let others = graph.external.iter().map(|tensor| path.with_file_name(&tensor.file));
        for file in others.chain([path.to_owned()]) {
            let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if let Entry::Vacant(entry) = files.entry(name) {
                let size = fs::metadata(&file)
                    .with_context(|| format!("{}: of {}", file.display(), path.display()))?;
                entry.insert(size.len());
            }
        }
        let config = graph.metadata.get("config.json");
        let config = config.map(|json| Config::from_json(path, json)).transpose()?;
        let tensors: Vec<TensorRow> = graph
            .external
            .iter()
            .map(|tensor| TensorRow {
                name: tensor.name.clone(),
                dtype: dtype(tensor.element_type),
                shape: tensor.dims.iter().map(|&dim| dim as usize).collect(),
                bytes: tensor.bytes as usize,
            })
            .collect();
        Ok(Self {
            graph: path.display().to_string(),
            producer: graph.producer,
            family: config.as_ref().map(family),
            geometry: config.as_ref().map(Geometry::of),
            inputs: graph.inputs,
            outputs: graph.outputs,
            operators: graph.operators,
            files,
            dtypes: TensorRow::dtypes(&tensors),
            tensors,
        })
    }

    /// As a table, `with_tensors` below it.
    pub fn print(&self, with_tensors: bool, out: &mut impl Write) -> io::Result<()> {
        let mut row = |name: &str, value: String| writeln!(out, "{name:16}{value}");
        row("graph", format!("{} (ONNX, by {})", self.graph, self.producer))?;
        if let (Some(family), Some(g)) = (self.family, &self.geometry) {
            row("family", family.into())?;
            let (layers, hidden) = (g.num_hidden_layers, g.hidden_size);
            row(
                "geometry",
                format!("{layers} layers, hidden {hidden}, vocabulary {}", g.vocab_size),
            )?;
        }
        row("inputs", shortened(&self.inputs))?;
        row("outputs", shortened(&self.outputs))?;
        let mut operators: Vec<_> = self.operators.iter().collect();
        operators.sort_by_key(|(name, count)| (std::cmp::Reverse(**count), *name));
        let nodes: usize = self.operators.values().sum();
        let operators = operators.iter().map(|(name, count)| format!("{count} {name}"));
        row("nodes", format!("{nodes} ({})", Vec::from_iter(operators).join(", ")))?;
        for (index, (name, size)) in self.files.iter().enumerate() {
            row(if index == 0 { "files" } else { "" }, format!("{name}, {}", bytes(*size)))?;
        }
        let dtypes: Vec<String> = self.dtypes.iter().map(|(d, n)| format!("{n} {d}")).collect();
        row("tensors", format!("{} ({})", self.tensors.len(), dtypes.join(", ")))?;
        match with_tensors {
            true => TensorRow::print(&self.tensors, out),
            false => Ok(()),
        }
    }
}

/// The first names, and how many more there are.
fn shortened(names: &[String]) -> String {
    /// The tokens, and the first layer's keys and values.
    const SHOWN: usize = 5;
    let mut text = names[..names.len().min(SHOWN)].join(", ");
    if names.len() > SHOWN {
        text += &format!(" and {} more", names.len() - SHOWN);
    }
    text
}

/// An element type of ONNX by the name that safetensors has for it.
fn dtype(number: u64) -> String {
    match number {
        1 => "F32".into(),
        2 => "U8".into(),
        3 => "I8".into(),
        7 => "I64".into(),
        10 => "F16".into(),
        16 => "BF16".into(),
        other => format!("type {other}"),
    }
}
