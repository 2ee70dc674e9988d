//! One model in one file or several: `model.safetensors`, or `model-0000i-of-0000n.safetensors` and the index that says where
//! each tensor is, as transformers writes and reads them.

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
};

use candle_core::Tensor;
use serde_json::json;

use super::{SafetensorsWriter, TensorSpec, header::data_bytes, write_atomic};
use crate::error::{Error, Result};

/// Where a model is written, and in files of which size.
#[derive(Clone, Copy, Debug)]
pub struct Output<'a> {
    /// The folder.
    pub folder: &'a Path,
    /// The most bytes of tensors in a file, unless one tensor has more; `None`: all in one file.
    pub max_shard_bytes: Option<u64>,
}

impl<'a, P: AsRef<Path> + ?Sized> From<&'a P> for Output<'a> {
    /// All in one file.
    fn from(folder: &'a P) -> Self {
        Self { folder: folder.as_ref(), max_shard_bytes: None }
    }
}

/// Writers of all files of a model.
pub(super) struct Shards {
    folder: PathBuf,
    writers: Vec<(PathBuf, SafetensorsWriter)>,
    /// Of each tensor, its writer.
    shard: HashMap<String, usize>,
    bytes: usize,
}

impl Shards {
    /// Declares tensors, which fill files in this order.
    pub fn create(output: Output, specs: Vec<TensorSpec>) -> Result<Self> {
        let Output { folder, max_shard_bytes } = output;
        let max = max_shard_bytes.unwrap_or(u64::MAX);
        let (mut parts, mut filled, mut total) = (vec![Vec::new()], 0u64, 0);
        for spec in specs {
            let Some(bytes) = data_bytes(spec.dtype, &spec.shape) else {
                let reason = format!("shape {:?} is too large to write", spec.shape);
                return Err(Error::Tensor { path: folder.into(), name: spec.name, reason });
            };
            let is_full = filled > 0 && filled.saturating_add(bytes as u64) > max;
            if is_full {
                parts.push(Vec::new());
                filled = 0;
            }
            filled += bytes as u64;
            total += bytes;
            if let Some(part) = parts.last_mut() {
                part.push(spec);
            }
        }
        let (mut writers, mut shard, count) = (Vec::new(), HashMap::new(), parts.len());
        for (index, specs) in parts.into_iter().enumerate() {
            let path = folder.join(match count {
                1 => "model.safetensors".into(),
                _ => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
            });
            shard.extend(specs.iter().map(|spec| (spec.name.clone(), index)));
            let writer = SafetensorsWriter::create(&path, specs)?;
            writers.push((path, writer));
        }
        Ok(Self { folder: folder.into(), writers, shard, bytes: total })
    }

    fn writer(&mut self, name: &str) -> Result<&mut SafetensorsWriter> {
        let writer = self.shard.get(name).and_then(|&index| self.writers.get_mut(index));
        writer.map(|(_, writer)| writer).ok_or_else(|| Error::Tensor {
            path: self.folder.clone(),
            name: name.into(),
            reason: "not declared".into(),
        })
    }

    /// As [`SafetensorsWriter::write`].
    pub fn write(&mut self, name: &str, data: &[u8]) -> Result<()> {
        self.writer(name)?.write(name, data)
    }

    /// As [`SafetensorsWriter::append`].
    pub fn append(&mut self, name: &str, data: &[u8]) -> Result<()> {
        self.writer(name)?.append(name, data)
    }

    /// As [`SafetensorsWriter::write_tensor`].
    pub fn write_tensor(&mut self, name: &str, tensor: &Tensor) -> Result<()> {
        self.writer(name)?.write_tensor(name, tensor)
    }

    /// Makes all files durable and visible, and then the index. Returns the paths of the files.
    pub fn finish(self) -> Result<Vec<PathBuf>> {
        let names: Vec<String> = self
            .writers
            .iter()
            .map(|(path, _)| path.file_name().unwrap_or_default().to_string_lossy().into_owned())
            .collect();
        let mut paths = Vec::new();
        for (path, writer) in self.writers {
            writer.finish()?;
            paths.push(path);
        }
        if let [_, _, ..] = names[..] {
            let weight_map: BTreeMap<&str, &str> =
                self.shard.iter().map(|(name, &index)| (&name[..], &names[index][..])).collect();
            let index = json!({"metadata": {"total_size": self.bytes}, "weight_map": weight_map});
            let path = self.folder.join("model.safetensors.index.json");
            write_atomic(&path, format!("{index:#}\n").as_bytes())?;
        }
        Ok(paths)
    }
}
