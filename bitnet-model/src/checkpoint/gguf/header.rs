//! What stands in front of the data: the magic, the metadata, and where each tensor lies.
//!
//! The rules are those of ggml's own reader (`gguf.cpp`): offsets are multiples of the alignment, names are unique, and
//! no tensor reaches into the next one or beyond the file.

use std::{collections::BTreeMap, path::Path};

use super::{blocks::BlockType, metadata::Metadata, reader::Reader};
use crate::{
    checkpoint::source::Source,
    error::{Error, Result},
};

const MAGIC: [u8; 4] = *b"GGUF";
/// Version 1 had shorter lengths; nobody writes it.
const VERSIONS: [u32; 2] = [2, 3];
/// Metadata of a vocabulary of 262 144 tokens take 20 MB.
const MAX_HEADER_BYTES: u64 = 512 << 20;
/// ggml allows 64.
const MAX_NAME_BYTES: u64 = 1024;
const MAX_DIMENSIONS: u32 = 4;
/// A name, the number of dimensions and one of them, a type and an offset: what the entry of a tensor takes at least.
const MIN_TENSOR_BYTES: u64 = 8 + 4 + 8 + 4 + 8;
const ALIGNMENT: &str = "general.alignment";
const DEFAULT_ALIGNMENT: u64 = 32;
const MAX_ALIGNMENT: u64 = 1 << 20;
/// From this number on, what a type means depends on who wrote the file.
const FIRST_AMBIGUOUS: u32 = 36;

/// A tensor's place.
#[derive(Clone, Debug)]
pub(super) struct Stored {
    /// Rows and columns; a vector is one row.
    pub shape: (usize, usize),
    /// Its dimensions, outermost first.
    pub dims: Vec<usize>,
    /// The number of its element type.
    number: u32,
    /// The first byte, from the start of the file.
    pub start: u64,
    /// Bytes up to the next tensor or the end of the file.
    span: u64,
}

/// Everything in front of the data.
#[derive(Debug)]
pub(super) struct Header {
    pub metadata: Metadata,
    pub tensors: BTreeMap<String, Stored>,
    alignment: u64,
}

impl Header {
    pub fn read(path: &Path, source: &Source) -> Result<Self> {
        let reader = &mut Reader::new(path, source, 0, MAX_HEADER_BYTES);
        if reader.left() < 4 || reader.bytes("the magic")? != MAGIC {
            return Err(reader.malformed("is no GGUF file: it does not begin with `GGUF`"));
        }
        let version = reader.u32("the version")?;
        if VERSIONS.contains(&version.swap_bytes()) {
            return Err(reader.malformed(
                "is big-endian, which is not supported: convert it with `gguf_convert_endian.py` of llama.cpp",
            ));
        }
        if !VERSIONS.contains(&version) {
            return Err(reader.malformed(format!(
                "is GGUF version {version}, which is not supported; supported: 2, 3"
            )));
        }
        let tensors = reader.u64("the number of tensors")?;
        let values = reader.u64("the number of metadata values")?;
        let metadata = Metadata::read(reader, path, values)?;
        let alignment = alignment(&metadata)?;
        let tensors = tensors_of(reader, path, tensors, alignment, source.len())?;
        Ok(Self { metadata, tensors, alignment })
    }

    /// How the tensor `name` at `stored` lies there, and its bytes.
    ///
    /// # Errors
    /// A type that is not supported, rows that are no whole blocks, a tensor that reaches beyond its place.
    pub fn block(&self, stored: &Stored) -> Result<(BlockType, u64), String> {
        let number = stored.number;
        let Some(block) = BlockType::of(number) else {
            let other = match number {
                38 | 39 => ", as TL1 and TL2 of bitnet.cpp have",
                135 | 134 => ", as IQ1_BN and IQ2_BN of ik_llama.cpp have",
                _ => "",
            };
            return Err(format!(
                "has the element type {number}{other}, which is not supported; supported: {}",
                BlockType::names()
            ));
        };
        let (rows, cols) = stored.shape;
        let (weights, bytes) = block.block();
        if !cols.is_multiple_of(weights) {
            return Err(format!(
                "has rows of {cols}, no whole blocks of {weights} {}",
                block.name()
            ));
        }
        let bytes = (cols / weights).checked_mul(bytes).and_then(|row| row.checked_mul(rows));
        let bytes = bytes.and_then(|bytes| bytes.checked_add(block.tail()));
        let Some(bytes) = bytes.map(|bytes| bytes as u64).filter(|bytes| *bytes <= stored.span)
        else {
            return Err(format!(
                "has {rows} × {cols} {} and only {} bytes up to the next tensor or the end of the file: an incomplete \
                 download, or a damaged file",
                block.name(),
                stored.span
            ));
        };
        if number >= FIRST_AMBIGUOUS && bytes.next_multiple_of(self.alignment) < stored.span {
            return Err(format!(
                "has the element type {number}: {} would take {bytes} bytes, and there are {}, so it means another type \
                 here",
                block.name(),
                stored.span
            ));
        }
        Ok((block, bytes))
    }
}

fn alignment(metadata: &Metadata) -> Result<u64> {
    match metadata.integer(ALIGNMENT)? {
        None => Ok(DEFAULT_ALIGNMENT),
        Some(value) if value.is_power_of_two() && (8..=MAX_ALIGNMENT).contains(&value) => Ok(value),
        Some(value) => {
            let reason = format!("{value} is no power of two from 8 to {MAX_ALIGNMENT}");
            Err(metadata.error(ALIGNMENT, reason))
        }
    }
}

fn tensors_of(
    reader: &mut Reader,
    path: &Path,
    count: u64,
    alignment: u64,
    file_bytes: u64,
) -> Result<BTreeMap<String, Stored>> {
    if count > reader.left() / MIN_TENSOR_BYTES {
        let left = reader.left();
        return Err(
            reader.malformed(format!("claims {count} tensors, and the file has {left} bytes left"))
        );
    }
    let mut tensors = BTreeMap::new();
    for index in 0..count {
        let name = reader.string(&format!("the name of tensor {index}"), MAX_NAME_BYTES)?;
        let stored = tensor(reader, &name, alignment).map_err(|error| match error {
            Error::Checkpoint { path, reason } => {
                Error::Tensor { path, name: name.clone(), reason }
            }
            other => other,
        })?;
        if tensors.contains_key(&name) {
            let reason = "is there twice".into();
            return Err(Error::Tensor { path: path.into(), name, reason });
        }
        tensors.insert(name, stored);
    }
    let data = reader.position().next_multiple_of(alignment);
    let mut places: Vec<(&String, &mut Stored)> = tensors.iter_mut().collect();
    places.sort_by_key(|(_, stored)| stored.start);
    let mut end = file_bytes;
    for (name, stored) in places.into_iter().rev() {
        let start = data.checked_add(stored.start).filter(|start| *start <= end);
        let Some(start) = start else {
            let reason = format!(
                "begins at byte {} of the data, behind the end of the file: an incomplete download, or a damaged file",
                stored.start
            );
            return Err(Error::Tensor { path: path.into(), name: name.clone(), reason });
        };
        (stored.start, stored.span) = (start, end - start);
        end = start;
    }
    Ok(tensors)
}

/// The entry of one tensor; its `start` counts from the beginning of the data, its `span` is open.
fn tensor(reader: &mut Reader, name: &str, alignment: u64) -> Result<Stored> {
    let what = format!("the entry of `{}`", name.escape_debug());
    let count = reader.u32(&what)?;
    if !(1..=MAX_DIMENSIONS).contains(&count) {
        return Err(
            reader.malformed(format!("has {count} dimensions; 1 to {MAX_DIMENSIONS} are read"))
        );
    }
    let mut dims = Vec::with_capacity(MAX_DIMENSIONS as usize);
    for _ in 0..count {
        dims.push(reader.u64(&what)?);
    }
    let number = reader.u32(&what)?;
    let start = reader.u64(&what)?;
    if !start.is_multiple_of(alignment) {
        return Err(reader.malformed(format!(
            "begins at byte {start} of the data, which is no multiple of the alignment {alignment}"
        )));
    }
    // In the file the innermost dimension is first; what is 1 beyond the first is no dimension.
    while dims.len() > 1 && dims.last() == Some(&1) {
        dims.pop();
    }
    dims.reverse();
    let elements = dims.iter().try_fold(1u64, |product, dim| product.checked_mul(*dim));
    // A signed 64-bit number of bytes is what files and memory are measured in; no element takes more than 4.
    let is_possible = elements.is_some_and(|n| n > 0 && n <= isize::MAX as u64 / 4);
    let sizes: Option<Vec<usize>> = dims.iter().map(|dim| usize::try_from(*dim).ok()).collect();
    let Some(dims) = sizes.filter(|_| is_possible) else {
        return Err(reader.malformed(format!("has the shape {dims:?}, which no tensor can have")));
    };
    let cols = dims[dims.len() - 1];
    let rows = dims[..dims.len() - 1].iter().product();
    Ok(Stored { shape: (rows, cols), dims, number, start, span: 0 })
}
