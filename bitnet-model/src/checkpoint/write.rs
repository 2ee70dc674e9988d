//! Writing files so that nobody ever sees half of one: temporary file, `fsync`, rename.

use std::{
    collections::HashMap,
    io::{self, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use candle_core::Tensor;
use safetensors::tensor::{Metadata, TensorInfo, View};
use tempfile::NamedTempFile;

use super::{Dtype, header::data_bytes};
use crate::error::{Error, Result};

/// Name, element type and shape of a tensor to write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Full name, such as `model.norm.weight`.
    pub name: String,
    /// Element type as stored.
    pub dtype: Dtype,
    /// Dimensions as stored.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// A tensor of the given name, element type and shape.
    pub fn new(name: impl Into<String>, dtype: Dtype, shape: impl Into<Vec<usize>>) -> Self {
        Self { name: name.into(), dtype, shape: shape.into() }
    }
}

/// Writes a safetensors file whose tensors are declared first and delivered one at a time, in any
/// order.
///
/// The file is byte for byte what the `safetensors` crate writes. It appears under its name with [`finish`](Self::finish),
/// complete, or not at all.
#[derive(Debug)]
pub struct SafetensorsWriter {
    file: AtomicFile,
    data_start: u64,
    pending: HashMap<String, Pending>,
}

/// A declared tensor and how many of its bytes are written.
#[derive(Debug)]
struct Pending {
    info: TensorInfo,
    written: usize,
}

impl SafetensorsWriter {
    /// Declares the contents of `path` and writes the header, with the metadata `{"format": "pt"}`, which transformers
    /// demands.
    pub fn create(path: &Path, tensors: Vec<TensorSpec>) -> Result<Self> {
        Self::with_metadata(path, tensors, ("format", "pt".into()))
    }

    /// [`create`](Self::create) with another entry of metadata.
    pub fn with_metadata(
        path: &Path,
        mut tensors: Vec<TensorSpec>,
        (key, value): (&str, String),
    ) -> Result<Self> {
        // The crate's order: widest element first, so that every tensor is aligned to its element;
        // then by name.
        tensors.sort_by(|a, b| b.dtype.cmp(&a.dtype).then_with(|| a.name.cmp(&b.name)));
        let mut pending = HashMap::with_capacity(tensors.len());
        let mut infos = Vec::with_capacity(tensors.len());
        let mut begin = 0usize;
        for TensorSpec { name, dtype, shape } in tensors {
            let wrong = |reason| Error::Tensor { path: path.into(), name: name.clone(), reason };
            let end =
                data_bytes(dtype, &shape).and_then(|bytes| begin.checked_add(bytes)).ok_or_else(
                    || wrong(format!("shape {shape:?} of {dtype} is too large to write")),
                )?;
            let info = TensorInfo { dtype, shape, data_offsets: (begin, end) };
            if pending.insert(name.clone(), Pending { info: info.clone(), written: 0 }).is_some() {
                return Err(wrong("declared twice".into()));
            }
            infos.push((name, info));
            begin = end;
        }
        let malformed = |e: &dyn std::fmt::Display| Error::Checkpoint {
            path: path.into(),
            reason: e.to_string(),
        };
        let entries = HashMap::from([(key.to_owned(), value)]);
        let metadata = Metadata::new(Some(entries), infos).map_err(|e| malformed(&e))?;
        let mut header = serde_json::to_vec(&metadata).map_err(|e| malformed(&e))?;
        header.resize(header.len().next_multiple_of(8), b' ');

        let mut file = AtomicFile::create(path)?;
        file.write(&(header.len() as u64).to_le_bytes())?;
        file.write(&header)?;
        Ok(Self { file, data_start: 8 + header.len() as u64, pending })
    }

    /// Writes one declared tensor: little-endian, row-major, exactly as many bytes as declared.
    pub fn write(&mut self, name: &str, data: &[u8]) -> Result<()> {
        let Pending { info, written } = self.pending(name)?;
        let (begin, end) = info.data_offsets;
        if data.len() != end - begin - written {
            let reason = format!(
                "{} of shape {:?} takes {} bytes, got {}",
                info.dtype,
                info.shape,
                end - begin,
                written + data.len()
            );
            return Err(self.wrong(name, reason));
        }
        self.append(name, data)
    }

    /// Writes the next bytes of a declared tensor: for one that is too large to be in memory at once.
    pub fn append(&mut self, name: &str, data: &[u8]) -> Result<()> {
        let Pending { info, written } = self.pending(name)?;
        let (begin, end) = info.data_offsets;
        let (from, to) = (begin + written, begin + written + data.len());
        if to > end {
            let reason = format!("{} bytes more than declared", to - end);
            return Err(self.wrong(name, reason));
        }
        self.file.write_at(self.data_start + from as u64, data)?;
        match to == end {
            true => drop(self.pending.remove(name)),
            false => {
                if let Some(pending) = self.pending.get_mut(name) {
                    pending.written = to - begin;
                }
            }
        }
        Ok(())
    }

    fn pending(&self, name: &str) -> Result<&Pending> {
        self.pending
            .get(name)
            .ok_or_else(|| self.wrong(name, "not declared, or already written".into()))
    }

    /// Writes one declared tensor of the declared element type and shape.
    pub fn write_tensor(&mut self, name: &str, tensor: &Tensor) -> Result<()> {
        let found = (View::dtype(tensor), tensor.dims());
        if let Some(Pending { info, .. }) = self.pending.get(name)
            && (info.dtype, info.shape.as_slice()) != found
        {
            let reason =
                format!("declared {} {:?}, got {} {:?}", info.dtype, info.shape, found.0, found.1);
            return Err(self.wrong(name, reason));
        }
        self.write(name, &View::data(tensor))
    }

    /// Makes the file durable and visible. Fails when a declared tensor was not written.
    pub fn finish(self) -> Result<()> {
        if let Some(name) = self.pending.keys().min() {
            return Err(self.wrong(name, "declared but never written".into()));
        }
        self.file.commit()
    }

    fn wrong(&self, name: &str, reason: String) -> Error {
        Error::Tensor { path: self.file.path.clone(), name: name.into(), reason }
    }
}

/// Replaces the file at `path` by `data`: after a crash it holds the old bytes or the new ones.
pub fn write_atomic(path: &Path, data: &[u8]) -> Result<()> {
    let mut file = AtomicFile::create(path)?;
    file.write(data)?;
    file.commit()
}

/// A temporary file beside `path` that becomes it on `commit` and vanishes when dropped before.
#[derive(Debug)]
pub(super) struct AtomicFile {
    path: PathBuf,
    temporary: NamedTempFile,
}

impl AtomicFile {
    pub fn create(path: &Path) -> Result<Self> {
        let mut builder = tempfile::Builder::new();
        builder.prefix(".").suffix(".tmp");
        // Temporary files are private by default; this one ends as an ordinary file, subject to the
        // umask.
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let temporary = builder.tempfile_in(parent(path)).map_err(Error::io(path))?;
        Ok(Self { path: path.into(), temporary })
    }

    pub fn write(&mut self, data: &[u8]) -> Result<()> {
        self.temporary.write_all(data).map_err(Error::io(&self.path))
    }

    fn write_at(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        self.temporary.seek(SeekFrom::Start(offset)).map_err(Error::io(&self.path))?;
        self.write(data)
    }

    pub fn commit(self) -> Result<()> {
        let Self { path, temporary } = self;
        let persist = || -> io::Result<()> {
            temporary.as_file().sync_all()?;
            temporary.persist(&path).map_err(|e| e.error)?;
            // The rename itself is durable once the directory is.
            #[cfg(unix)]
            std::fs::File::open(parent(&path))?.sync_all()?;
            Ok(())
        };
        persist().map_err(Error::io(&path))
    }
}

/// The folder of `path`, `.` for a bare file name.
fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}
