//! Safetensors files of a training run: written durably, read with every name and shape checked.

use std::{
    borrow::Cow,
    collections::HashMap,
    fs::{self, OpenOptions},
    path::Path,
    str::FromStr,
};

use bitnet_model::checkpoint::{SafetensorsWriter, TensorSpec};
use candle_core::{Tensor, Var};
use safetensors::{Dtype, SafeTensors, View, tensor::TensorView};

use crate::{Error, Result};

/// A tensor of f32 that lies in a slice.
pub struct F32View<'a> {
    /// Its dimensions.
    pub shape: &'a [usize],
    /// Its elements, row-major.
    pub values: Cow<'a, [f32]>,
}

impl View for F32View<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        self.values.iter().flat_map(|value| value.to_le_bytes()).collect()
    }

    fn data_len(&self) -> usize {
        size_of_val(&*self.values)
    }
}

/// Writes tensors and one metadata entry: the file is complete and on the disk, or what it was. Equal contents make equal
/// bytes.
pub fn write_tensors<V: View>(
    path: &Path,
    tensors: impl IntoIterator<Item = (String, V)>,
    metadata: (&str, String),
) -> Result<()> {
    let tensors = Vec::from_iter(tensors);
    let spec = |(name, tensor): &(String, V)| TensorSpec::new(name, tensor.dtype(), tensor.shape());
    let specs = tensors.iter().map(spec).collect();
    let mut writer = SafetensorsWriter::with_metadata(path, specs, metadata)?;
    for (name, tensor) in &tensors {
        writer.write(name, &tensor.data())?;
    }
    Ok(writer.finish()?)
}

/// Waits until a file is on the disk.
pub(super) fn sync(path: &Path) -> Result<()> {
    OpenOptions::new()
        .write(true)
        .open(path)
        .and_then(|file| file.sync_all())
        .map_err(Error::io(path))
}

/// The bytes of a file, for [`TensorFile::parse`].
pub fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).map_err(Error::io(path))
}

/// A safetensors file in memory.
pub struct TensorFile<'a> {
    path: &'a Path,
    tensors: SafeTensors<'a>,
    metadata: HashMap<String, String>,
}

impl<'a> TensorFile<'a> {
    /// Checks the file's header and length; `path` is for messages.
    pub fn parse(path: &'a Path, bytes: &'a [u8]) -> Result<Self> {
        let refuse = |error: safetensors::SafeTensorError| Error::Checkpoint {
            path: path.to_owned(),
            reason: format!("{error}; delete this checkpoint to resume from the one before"),
        };
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(refuse)?;
        let metadata = header.metadata().clone().unwrap_or_default();
        Ok(Self { path, tensors: SafeTensors::deserialize(bytes).map_err(refuse)?, metadata })
    }

    /// The value of a metadata entry.
    pub fn metadata<T: FromStr>(&self, key: &str) -> Result<T> {
        self.metadata.get(key).and_then(|value| value.parse().ok()).ok_or_else(|| {
            Error::Checkpoint {
                path: self.path.to_owned(),
                reason: format!("metadata `{key}` is missing or malformed"),
            }
        })
    }

    /// The elements of an f32 tensor of exactly this shape.
    pub fn read(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let view = self.view(name, shape)?;
        let elements = view.data().as_chunks().0.iter();
        Ok(elements.map(|bytes| f32::from_le_bytes(*bytes)).collect())
    }

    /// Sets a variable to an f32 tensor of exactly its shape.
    pub fn load_var(&self, name: &str, var: &Var) -> Result<()> {
        let values = self.read(name, var.dims())?;
        Ok(var.set(&Tensor::from_vec(values, var.shape(), var.device())?)?)
    }

    /// All tensors by name, each a vector of u8.
    pub fn bytes(&self) -> Result<Vec<(String, Vec<u8>)>> {
        let bytes = |(name, view): (String, TensorView)| {
            if view.dtype() != Dtype::U8 {
                let (path, reason) =
                    (self.path.to_owned(), format!("is {:?}, must be U8", view.dtype()));
                return Err(Error::Tensor { path, name, reason });
            }
            Ok((name, view.data().to_vec()))
        };
        self.tensors.tensors().into_iter().map(bytes).collect()
    }

    fn view(&self, name: &str, shape: &[usize]) -> Result<TensorView<'_>> {
        let refuse = |reason: String| Error::Tensor {
            path: self.path.to_owned(),
            name: name.to_owned(),
            reason,
        };
        let view = self.tensors.tensor(name).map_err(|_| refuse("is missing".into()))?;
        if view.dtype() != Dtype::F32 || view.shape() != shape {
            return Err(refuse(format!(
                "is {:?} {:?}, the model has F32 {shape:?}",
                view.dtype(),
                view.shape()
            )));
        }
        Ok(view)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_read_is_checked() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        let values = [1f32, f32::MIN_POSITIVE, -0., 4., 5., f32::MAX];
        let tensor =
            || [("a.b".to_owned(), F32View { shape: &[2, 3], values: Cow::from(&values[..]) })];
        write_tensors(&path, tensor(), ("updates", "7".into())).unwrap();
        let mut bytes = read(&path).unwrap();
        let file = TensorFile::parse(&path, &bytes).unwrap();
        let found = file.read("a.b", &[2, 3]).unwrap();
        let bits = |values: &[f32]| Vec::from_iter(values.iter().map(|x| x.to_bits()));
        assert_eq!(bits(&found), bits(&values));
        assert_eq!(file.metadata::<u64>("updates").unwrap(), 7);

        let message = |name, shape: &[usize]| file.read(name, shape).unwrap_err().to_string();
        assert!(message("a", &[2, 3]).ends_with("x.safetensors: tensor `a`: is missing"));
        assert!(message("a.b", &[3, 2]).contains("F32 [2, 3], the model has F32 [3, 2]"));
        assert!(file.metadata::<u64>("format").is_err());
        bytes.pop();
        assert!(TensorFile::parse(&path, &bytes).is_err());
        assert!(TensorFile::parse(&path, b"").is_err());
    }
}
