//! The header of a safetensors file: `n: u64 LE`, then `n` bytes of JSON, then the data it
//! describes.
//!
//! The rules are those of the `safetensors` crate (its `Metadata::validate`): offsets start at
//! zero, are contiguous and end with the file, and every tensor's bytes are exactly `shape ×
//! dtype`. They are checked here because the crate needs the whole file in memory, does not say
//! which tensor is wrong, and lets the last of two tensors of one name win.

use std::{
    collections::{HashMap, HashSet},
    fmt,
    path::Path,
};

use safetensors::{Dtype, tensor::TensorInfo};
use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};

use super::source::Source;
use crate::error::{Error, Result};

/// The format's own bound on `n`.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// The length of `n` itself.
const PREFIX_BYTES: u64 = 8;

/// One tensor's place in its file.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// The first byte, from the start of the file.
    pub start: u64,
    pub bytes: usize,
}

/// Reads and validates the header of `source`; the file at `path` is only named in errors.
pub(super) fn read(path: &Path, source: &Source) -> Result<Vec<(String, Entry)>> {
    let malformed = |reason: String| Error::Checkpoint { path: path.into(), reason };
    let file_bytes = source.len();
    if file_bytes < PREFIX_BYTES {
        return Err(malformed(format!(
            "not a safetensors file: {file_bytes} bytes long, shorter than its header"
        )));
    }
    let mut prefix = [0; PREFIX_BYTES as usize];
    source.read_exact_at(&mut prefix, 0).map_err(Error::io(path))?;
    let header_bytes = u64::from_le_bytes(prefix);
    if header_bytes > MAX_HEADER_BYTES || header_bytes > file_bytes - PREFIX_BYTES {
        return Err(malformed(format!(
            "not a safetensors file, or cut short: its header claims {header_bytes} bytes \
             (the file has {file_bytes}, the format allows {MAX_HEADER_BYTES})"
        )));
    }
    let mut json = vec![0; header_bytes as usize];
    source.read_exact_at(&mut json, PREFIX_BYTES).map_err(Error::io(path))?;
    let invalid =
        |e: &dyn fmt::Display| malformed(format!("the safetensors header is not valid: {e}"));
    // As text: from bytes, serde_json does not look into the strings it skips.
    let json = str::from_utf8(&json).map_err(|e| invalid(&e))?;
    let Header(mut tensors) = serde_json::from_str(json).map_err(|e| invalid(&e))?;

    tensors.sort_by_key(|(_, info)| info.data_offsets);
    let data_start = PREFIX_BYTES + header_bytes;
    let mut expected_begin = 0;
    let mut entries = Vec::with_capacity(tensors.len());
    for (name, TensorInfo { dtype, shape, data_offsets: (begin, end) }) in tensors {
        let wrong =
            |reason: String| Error::Tensor { path: path.into(), name: name.clone(), reason };
        if begin != expected_begin || end < begin {
            return Err(wrong(format!(
                "data offsets [{begin}, {end}] leave a gap or overlap; \
                 expected to begin at {expected_begin}"
            )));
        }
        let bytes = data_bytes(dtype, &shape).ok_or_else(|| {
            wrong(format!(
                "shape {shape:?} of {dtype} is not a whole, representable number of bytes"
            ))
        })?;
        if end - begin != bytes {
            return Err(wrong(format!(
                "shape {shape:?} of {dtype} takes {bytes} bytes, its data offsets span {}",
                end - begin
            )));
        }
        expected_begin = end;
        entries.push((name, Entry { dtype, shape, start: data_start + begin as u64, bytes }));
    }
    let end = data_start.checked_add(expected_begin as u64);
    if end != Some(file_bytes) {
        return Err(malformed(format!(
            "the header describes {expected_begin} bytes of data, the file holds {}: \
             incomplete download or damaged file",
            file_bytes - data_start
        )));
    }
    Ok(entries)
}

/// Bytes of a tensor; `None` for a fraction of a byte or when any partial product of the dimensions
/// overflows, also with a zero among them (strides are such products).
pub(super) fn data_bytes(dtype: Dtype, shape: &[usize]) -> Option<usize> {
    let bits = shape.iter().try_fold(dtype.bitsize(), |bits, &dim| bits.checked_mul(dim.max(1)))?;
    let bits = if shape.contains(&0) { 0 } else { bits };
    bits.is_multiple_of(8).then_some(bits / 8)
}

/// The JSON object with its tensors in file order and no name twice.
struct Header(Vec<(String, TensorInfo)>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Tensors;
        impl<'de> Visitor<'de> for Tensors {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(
                self,
                mut map: A,
            ) -> std::result::Result<Header, A::Error> {
                let mut names = HashSet::new();
                let mut tensors = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if !names.insert(name.clone()) {
                        return Err(A::Error::custom(format_args!(
                            "tensor `{name}` appears twice"
                        )));
                    }
                    if name == "__metadata__" {
                        map.next_value::<Option<HashMap<String, String>>>()?;
                        continue;
                    }
                    let info = map
                        .next_value()
                        .map_err(|e| A::Error::custom(format_args!("tensor `{name}`: {e}")))?;
                    tensors.push((name, info));
                }
                Ok(Header(tensors))
            }
        }
        deserializer.deserialize_map(Tensors)
    }
}
