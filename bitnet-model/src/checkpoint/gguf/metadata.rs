//! The metadata of a file: typed values by key.
//!
//! Lists stay in the file until somebody asks for them: a vocabulary has hundreds of thousands of strings.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use super::reader::Reader;
use crate::{
    checkpoint::source::Source,
    error::{Error, Result},
};

/// The format's own bound on a key.
const MAX_KEY_BYTES: u64 = 65_535;
/// Chat templates, the longest strings there are, have some thousands.
const MAX_STRING_BYTES: u64 = 4 << 20;
/// A token or a merge.
const MAX_ITEM_BYTES: u64 = 1 << 16;
/// Lists of lists are allowed by the format; nobody writes them.
const MAX_DEPTH: u32 = 2;
/// A key, a type and a value of one byte: what an entry takes at least.
const MIN_ENTRY_BYTES: u64 = 8 + 4 + 1;

/// The type of a value, by the format's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    String,
    List,
    U64,
    I64,
    F64,
}

impl Kind {
    const ALL: [Self; 13] = [
        Self::U8,
        Self::I8,
        Self::U16,
        Self::I16,
        Self::U32,
        Self::I32,
        Self::F32,
        Self::Bool,
        Self::String,
        Self::List,
        Self::U64,
        Self::I64,
        Self::F64,
    ];

    fn read(reader: &mut Reader, what: &str) -> Result<Self> {
        let number = reader.u32(what)?;
        let kind = Self::ALL.get(number as usize).copied();
        kind.ok_or_else(|| reader.malformed(format!("{what} has the unknown type {number}")))
    }

    /// Bytes of a value, if all have as many.
    fn size(self) -> Option<u64> {
        match self {
            Self::U8 | Self::I8 | Self::Bool => Some(1),
            Self::U16 | Self::I16 => Some(2),
            Self::U32 | Self::I32 | Self::F32 => Some(4),
            Self::U64 | Self::I64 | Self::F64 => Some(8),
            Self::String | Self::List => None,
        }
    }
}

/// One value.
#[derive(Clone, Debug, PartialEq)]
enum Value {
    Integer(i128),
    Float(f64),
    Bool(bool),
    String(String),
    /// Values of one type, from a byte of the file on.
    List {
        kind: Kind,
        len: u64,
        at: u64,
    },
}

impl Value {
    fn read(reader: &mut Reader, kind: Kind, what: &str) -> Result<Self> {
        Ok(match kind {
            Kind::U8 => Self::Integer(u8::from_le_bytes(reader.bytes(what)?).into()),
            Kind::I8 => Self::Integer(i8::from_le_bytes(reader.bytes(what)?).into()),
            Kind::U16 => Self::Integer(u16::from_le_bytes(reader.bytes(what)?).into()),
            Kind::I16 => Self::Integer(i16::from_le_bytes(reader.bytes(what)?).into()),
            Kind::U32 => Self::Integer(u32::from_le_bytes(reader.bytes(what)?).into()),
            Kind::I32 => Self::Integer(i32::from_le_bytes(reader.bytes(what)?).into()),
            Kind::U64 => Self::Integer(u64::from_le_bytes(reader.bytes(what)?).into()),
            Kind::I64 => Self::Integer(i64::from_le_bytes(reader.bytes(what)?).into()),
            Kind::F32 => Self::Float(widened(f32::from_le_bytes(reader.bytes(what)?))),
            Kind::F64 => Self::Float(f64::from_le_bytes(reader.bytes(what)?)),
            Kind::Bool => match reader.bytes(what)? {
                [0] => Self::Bool(false),
                [1] => Self::Bool(true),
                [byte] => {
                    let reason = format!("{what} is the byte {byte}, neither true nor false");
                    return Err(reader.malformed(reason));
                }
            },
            Kind::String => Self::String(reader.string(what, MAX_STRING_BYTES)?),
            Kind::List => {
                let kind = Kind::read(reader, what)?;
                let len = reader.u64(what)?;
                let at = reader.position();
                skip_items(reader, kind, len, what, 1)?;
                Self::List { kind, len, at }
            }
        })
    }

    /// For a message.
    fn shown(&self) -> String {
        match self {
            Self::Integer(value) => value.to_string(),
            Self::Float(value) => value.to_string(),
            Self::Bool(value) => value.to_string(),
            Self::String(text) => format!("{:?}", text.chars().take(80).collect::<String>()),
            Self::List { kind, len, .. } => format!("a list of {len} {kind:?}"),
        }
    }
}

/// The f64 of the same shortest decimal: what a configuration said before it was written as an f32.
fn widened(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(value.into())
}

fn skip_items(reader: &mut Reader, kind: Kind, len: u64, what: &str, depth: u32) -> Result<()> {
    if let Some(size) = kind.size() {
        return reader.skip(len.saturating_mul(size), what);
    }
    // Every string, and every list, has its length before it.
    if len > reader.left() / 8 {
        let left = reader.left();
        return Err(reader
            .malformed(format!("{what} claims {len} values, and the file has {left} bytes left")));
    }
    for _ in 0..len {
        match kind {
            Kind::List if depth == MAX_DEPTH => {
                return Err(reader.malformed(format!("{what} has lists in lists in lists")));
            }
            Kind::List => {
                let kind = Kind::read(reader, what)?;
                let len = reader.u64(what)?;
                skip_items(reader, kind, len, what, depth + 1)?;
            }
            _ => {
                let len = reader.u64(what)?;
                reader.skip(len, what)?;
            }
        }
    }
    Ok(())
}

/// All values.
#[derive(Clone, Debug)]
pub(super) struct Metadata {
    path: PathBuf,
    values: BTreeMap<String, Value>,
}

impl Metadata {
    /// Reads `count` of them.
    pub fn read(reader: &mut Reader, path: &Path, count: u64) -> Result<Self> {
        if count > reader.left() / MIN_ENTRY_BYTES {
            let left = reader.left();
            return Err(reader.malformed(format!(
                "claims {count} metadata values, and the file has {left} bytes left"
            )));
        }
        let mut values = BTreeMap::new();
        for index in 0..count {
            let key =
                reader.string(&format!("the key of metadata value {index}"), MAX_KEY_BYTES)?;
            let what = format!("`{}`", key.escape_debug());
            let kind = Kind::read(reader, &what)?;
            let value = Value::read(reader, kind, &what)?;
            if values.insert(key, value).is_some() {
                return Err(reader.malformed(format!("{what} is there twice")));
            }
        }
        Ok(Self { path: path.into(), values })
    }

    /// An error about the value of `key`.
    pub fn error(&self, key: &str, reason: impl Into<String>) -> Error {
        Error::Config { path: self.path.clone(), field: key.into(), reason: reason.into() }
    }

    /// Whether there is a value of this key.
    pub fn has(&self, key: &str) -> bool {
        self.values.contains_key(key)
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.values.get(key) else { return Ok(None) };
        read(value)
            .map(Some)
            .ok_or_else(|| self.error(key, format!("expected {expected}, found {}", value.shown())))
    }

    /// A count, an id, a version: what is no negative integer.
    pub fn integer(&self, key: &str) -> Result<Option<u64>> {
        self.typed(key, "a non-negative integer", |value| match value {
            Value::Integer(value) => u64::try_from(*value).ok(),
            _ => None,
        })
    }

    /// A finite number.
    pub fn number(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a finite number", |value| match value {
            Value::Integer(value) => Some(*value as f64),
            Value::Float(value) => Some(*value).filter(|value| value.is_finite()),
            _ => None,
        })
    }

    /// True or false.
    pub fn boolean(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "true or false", |value| match value {
            Value::Bool(value) => Some(*value),
            _ => None,
        })
    }

    /// A string.
    pub fn string(&self, key: &str) -> Result<Option<&str>> {
        self.typed(key, "a string", |value| match value {
            Value::String(text) => Some(text.as_str()),
            _ => None,
        })
    }

    /// A list of strings, read from `source`.
    pub fn strings(&self, source: &Source, key: &str) -> Result<Option<Vec<String>>> {
        self.list(source, key, "a list of strings", &[Kind::String], |reader, _, what| {
            reader.string(what, MAX_ITEM_BYTES)
        })
    }

    /// A list of floats.
    pub fn floats(&self, source: &Source, key: &str) -> Result<Option<Vec<f32>>> {
        self.list(source, key, "a list of floats", &[Kind::F32], |reader, _, what| {
            reader.bytes(what).map(f32::from_le_bytes)
        })
    }

    /// A list of 32-bit integers.
    pub fn integers(&self, source: &Source, key: &str) -> Result<Option<Vec<i64>>> {
        let kinds = [Kind::I32, Kind::U32];
        self.list(source, key, "a list of 32-bit integers", &kinds, |reader, kind, what| {
            let bytes = reader.bytes(what)?;
            Ok(match kind {
                Kind::I32 => i32::from_le_bytes(bytes).into(),
                _ => u32::from_le_bytes(bytes).into(),
            })
        })
    }

    fn list<T>(
        &self,
        source: &Source,
        key: &str,
        expected: &str,
        kinds: &[Kind],
        read: impl Fn(&mut Reader, Kind, &str) -> Result<T>,
    ) -> Result<Option<Vec<T>>> {
        let list = self.typed(key, expected, |value| match value {
            Value::List { kind, len, at } if kinds.contains(kind) => Some((*kind, *len, *at)),
            _ => None,
        })?;
        let Some((kind, len, at)) = list else { return Ok(None) };
        let what = format!("`{}`", key.escape_debug());
        let mut reader = Reader::new(&self.path, source, at, u64::MAX);
        // All of it was there when the file was opened, so the length is no lie.
        let items = (0..len).map(|_| read(&mut reader, kind, &what));
        items.collect::<Result<_>>().map(Some)
    }
}
