//! Checkpoints on disk: [safetensors](https://huggingface.co/docs/safetensors) files, one or many
//! shards, and [`gguf`] files.
//!
//! [`Checkpoint`] validates every header once and then hands out one tensor at a time, so that a
//! model is never in memory twice. [`SafetensorsWriter`] is its mirror. What the tensors mean is
//! [`Config`](crate::config::Config)'s matter.

mod backend;
pub mod difference;
pub mod export;
mod generated;
pub mod gguf;
mod header;
mod rows;
mod source;
mod spans;
#[cfg(test)]
mod tests;
mod write;

use std::{
    collections::BTreeMap,
    collections::btree_map,
    path::{Path, PathBuf},
    sync::Arc,
};

use bytemuck::Pod;
use candle_core::{DType, Device, Tensor, WithDType};
use candle_nn::VarBuilder;
use half::{bf16, f16, vec::HalfBitsVecExt};
use rayon::prelude::*;
pub use safetensors::Dtype;

use self::{backend::Backend, header::Entry, source::Source};
pub use self::{
    generated::{Content, GeneratedTensor},
    rows::StoredRows,
    write::{SafetensorsWriter, TensorSpec, write_atomic},
};
use crate::error::{Error, Result};

// The format is little-endian and its bytes are read straight into numbers.
const _: () = assert!(cfg!(target_endian = "little"), "big-endian machines are not supported");

/// Large tensors are read in pieces of this size, by several threads.
const READ_BYTES: usize = 8 << 20;

/// Validated, read-only tensors by name. Cheap to open (headers only); `Send + Sync`.
#[derive(Debug)]
pub struct Checkpoint {
    /// The folder, or the single file: what errors about an absent tensor name.
    origin: PathBuf,
    shards: Vec<(PathBuf, Source)>,
    tensors: BTreeMap<String, (usize, Entry)>,
}

/// What the header says about one tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorInfo<'a> {
    /// Element type as stored.
    pub dtype: Dtype,
    /// Dimensions as stored: packed matrices are `[out_features / 4, in_features]`.
    pub shape: &'a [usize],
    /// The file that holds it.
    pub file: &'a Path,
    /// Size of its data.
    pub bytes: usize,
}

impl Checkpoint {
    /// Opens the shards of one model. Fails unless every header is consistent with its file and no
    /// name appears twice.
    pub fn open(paths: &[PathBuf]) -> Result<Self> {
        let origin = match paths {
            [] => return Err(Error::Input("a checkpoint needs at least one file".into())),
            [file] => file.clone(),
            [first, ..] => first.parent().unwrap_or(first).to_owned(),
        };
        let open = |path: &PathBuf| Ok((path.clone(), Source::open(path)?));
        Self::from_sources(origin, paths.iter().map(open).collect::<Result<_>>()?)
    }

    /// A checkpoint in the program itself; `name` stands for the path in errors.
    pub fn from_static(name: &str, bytes: &'static [u8]) -> Result<Self> {
        Self::from_sources(name.into(), vec![(name.into(), Source::Memory(bytes.into()))])
    }

    fn from_sources(origin: PathBuf, shards: Vec<(PathBuf, Source)>) -> Result<Self> {
        let mut tensors = BTreeMap::new();
        for (index, (path, source)) in shards.iter().enumerate() {
            let entries = match source {
                Source::Gguf(view) => view.entries().to_vec(),
                _ => header::read(path, source)?,
            };
            for (name, entry) in entries {
                match tensors.entry(name) {
                    btree_map::Entry::Vacant(slot) => slot.insert((index, entry)),
                    btree_map::Entry::Occupied(slot) => {
                        let first: &(usize, Entry) = slot.get();
                        let reason = format!("also in {}", shards[first.0].0.display());
                        let name = slot.key().clone();
                        return Err(Error::Tensor { path: path.clone(), name, reason });
                    }
                };
            }
        }
        Ok(Self { origin, shards, tensors })
    }

    /// The single file, or the folder of the shards.
    pub fn path(&self) -> &Path {
        &self.origin
    }

    /// All tensor names, sorted.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// What is known about a tensor without reading it.
    pub fn get(&self, name: &str) -> Option<TensorInfo<'_>> {
        let (shard, entry) = self.tensors.get(name)?;
        let Entry { dtype, ref shape, bytes, .. } = *entry;
        Some(TensorInfo { dtype, shape, file: &self.shards[*shard].0, bytes })
    }

    /// A tensor's bytes as stored: little-endian, row-major.
    pub fn read_bytes(&self, name: &str) -> Result<Vec<u8>> {
        let (shard, entry) = self.find(name)?;
        self.read_vec(name, *shard, entry)
    }

    /// A tensor as stored, on the CPU.
    pub fn read(&self, name: &str) -> Result<Tensor> {
        let (shard, entry) = self.find(name)?;
        match entry.dtype {
            Dtype::U8 => self.tensor(entry, self.read_vec::<u8>(name, *shard, entry)?),
            Dtype::U32 => self.tensor(entry, self.read_vec::<u32>(name, *shard, entry)?),
            Dtype::I16 => self.tensor(entry, self.read_vec::<i16>(name, *shard, entry)?),
            Dtype::I32 => self.tensor(entry, self.read_vec::<i32>(name, *shard, entry)?),
            Dtype::I64 => self.tensor(entry, self.read_vec::<i64>(name, *shard, entry)?),
            Dtype::F32 => self.tensor(entry, self.read_vec::<f32>(name, *shard, entry)?),
            Dtype::F64 => self.tensor(entry, self.read_vec::<f64>(name, *shard, entry)?),
            Dtype::BF16 => {
                let bits = self.read_vec::<u16>(name, *shard, entry)?;
                self.tensor(entry, bits.reinterpret_into::<bf16>())
            }
            Dtype::F16 => {
                let bits = self.read_vec::<u16>(name, *shard, entry)?;
                self.tensor(entry, bits.reinterpret_into::<f16>())
            }
            other => Err(self.wrong(name, format!("element type {other} is not supported"))),
        }
    }

    /// A `weight_scale`: one finite, positive float, `[1]` or a scalar.
    pub fn read_scale(&self, name: &str) -> Result<f32> {
        let (_, entry) = self.find(name)?;
        let (dtype, shape) = (entry.dtype, &entry.shape);
        if !is_float(dtype) || !matches!(shape[..], [] | [1]) {
            let reason = format!("expected one BF16, F16 or F32 value, found {dtype} {shape:?}");
            return Err(self.wrong(name, reason));
        }
        let scale = self.read(name)?.to_dtype(DType::F32)?.flatten_all()?.get(0)?.to_scalar()?;
        if !(f32::is_finite(scale) && scale > 0.) {
            return Err(
                self.wrong(name, format!("a scale must be finite and positive, found {scale}"))
            );
        }
        Ok(scale)
    }

    /// A builder over this checkpoint for tensors of `dtype` on `device`.
    ///
    /// Floats are converted to the requested float type (widening is exact). Anything else must be
    /// asked for as what it is: packed codes come with `get_with_hints_dtype(.., DType::U8)` only,
    /// never as numbers.
    pub fn var_builder(self: &Arc<Self>, dtype: DType, device: &Device) -> VarBuilder<'static> {
        VarBuilder::from_backend(Box::new(Backend(Arc::clone(self))), dtype, device.clone())
    }

    fn find(&self, name: &str) -> Result<&(usize, Entry)> {
        self.tensors.get(name).ok_or_else(|| self.wrong(name, "not in the checkpoint".into()))
    }

    /// An error about `name`, naming the file that holds it.
    pub(crate) fn wrong(&self, name: &str, reason: String) -> Error {
        let path = self.get(name).map_or(self.origin.as_path(), |info| info.file);
        Error::Tensor { path: path.into(), name: name.into(), reason }
    }

    fn tensor<T: WithDType>(&self, entry: &Entry, data: Vec<T>) -> Result<Tensor> {
        Ok(Tensor::from_vec(data, entry.shape.as_slice(), &Device::Cpu)?)
    }

    /// The data straight into numbers of the stored width: no second copy.
    fn read_vec<T: Pod + Send>(&self, name: &str, shard: usize, entry: &Entry) -> Result<Vec<T>> {
        let len = entry.bytes / size_of::<T>();
        // Asked for first: a sparse file can claim more than this machine has, which is an error
        // and not an abort.
        Vec::<T>::new().try_reserve_exact(len).map_err(|_| {
            self.wrong(name, format!("not enough memory for its {} bytes", entry.bytes))
        })?;
        // Zeroed by the system, so that every page is first touched by the read itself.
        let mut data = vec![T::zeroed(); len];
        let source = &self.shards[shard].1;
        bytemuck::cast_slice_mut(&mut data)
            .par_chunks_mut(READ_BYTES)
            .enumerate()
            .try_for_each(|(index, chunk): (usize, &mut [u8])| {
                source.read_exact_at(chunk, entry.start + (index * READ_BYTES) as u64)
            })
            .map_err(|e| self.wrong(name, format!("cannot be read: {e}")))?;
        Ok(data)
    }
}

/// The float types a checkpoint of this family may use.
pub(crate) fn is_float(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::BF16 | Dtype::F16 | Dtype::F32)
}
