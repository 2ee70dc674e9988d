//! JSON records: one a line, in an array, or one after another.

use std::{
    fmt,
    io::{self, BufRead},
    ops::ControlFlow,
    path::Path,
};

use serde::de::{DeserializeSeed, Deserializer as _, Error as _, SeqAccess, Visitor};
use serde_json::{Deserializer, Value};

use super::record::{RecordSink, Refusal};
use crate::{Error, Result};

/// One object, or one string, a line; blank lines are skipped.
pub(super) fn read_lines(
    mut reader: impl BufRead,
    path: &Path,
    sink: &mut dyn RecordSink,
) -> Result<ControlFlow<()>> {
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        if reader.read_until(b'\n', &mut line).map_err(Error::io(path))? == 0 {
            break;
        }
        if line.trim_ascii().is_empty() {
            continue;
        }
        let mut place = format!("line {number}");
        let taken = match serde_json::from_slice(line.trim_ascii_end()) {
            Ok(record) => sink.take(record),
            Err(error) => {
                place += &format!(", column {}", error.column());
                Err(Refusal::Malformed(cause(&error)))
            }
        };
        match taken {
            Ok(ControlFlow::Continue(())) => (),
            Ok(ControlFlow::Break(())) => return Ok(ControlFlow::Break(())),
            Err(Refusal::Failed(error)) => return Err(error),
            Err(Refusal::Malformed(reason)) if sink.skips(path, &place, &reason) => (),
            Err(Refusal::Malformed(reason)) => {
                return Err(refuse(path, format!("{place}: {reason}")));
            }
        }
    }
    Ok(ControlFlow::Continue(()))
}

/// An array of records, or records one after another.
pub(super) fn read(
    mut reader: impl BufRead,
    path: &Path,
    sink: &mut dyn RecordSink,
) -> Result<ControlFlow<()>> {
    let mut records = Records { path, sink, count: 0, stop: None };
    let first = first_byte(&mut reader).map_err(Error::io(path))?;
    let mut deserializer = Deserializer::from_reader(reader);
    let read = match first {
        Some(b'[') => deserializer.deserialize_seq(&mut records).and_then(|()| deserializer.end()),
        _ => deserializer.into_iter::<Value>().try_for_each(|record| records.take(record?)),
    };
    match (records.stop, read) {
        (Some(Stop::Error(error)), _) => Err(error),
        (Some(Stop::Break), _) => Ok(ControlFlow::Break(())),
        (None, Ok(())) => Ok(ControlFlow::Continue(())),
        (None, Err(error)) if error.is_io() => Err(Error::io(path)(error.into())),
        // A record that is refused between two others has no place of its own.
        (None, Err(error)) if error.line() == 0 => Err(refuse(path, cause(&error))),
        (None, Err(error)) => {
            let place = format!("line {}, column {}", error.line(), error.column());
            Err(refuse(path, format!("{place}: {}", cause(&error))))
        }
    }
}

/// The first byte that is no white space, which is left to be read.
fn first_byte(reader: &mut impl BufRead) -> io::Result<Option<u8>> {
    loop {
        let buffer = reader.fill_buf()?;
        if buffer.is_empty() {
            return Ok(None);
        }
        // A byte order mark is no JSON: the parser refuses it with its place.
        match buffer.iter().find(|byte| !byte.is_ascii_whitespace()) {
            Some(&byte) => return Ok(Some(byte)),
            None => {
                let count = buffer.len();
                reader.consume(count);
            }
        }
    }
}

/// Hands on each element of an array, without holding the array.
struct Records<'a> {
    path: &'a Path,
    sink: &'a mut dyn RecordSink,
    /// Records read.
    count: usize,
    stop: Option<Stop>,
}

/// Why the parser was stopped from outside.
enum Stop {
    Break,
    Error(Error),
}

impl Records<'_> {
    fn take(&mut self, record: Value) -> serde_json::Result<()> {
        self.count += 1;
        self.stop = match self.sink.take(record) {
            Ok(ControlFlow::Continue(())) => return Ok(()),
            Ok(ControlFlow::Break(())) => Some(Stop::Break),
            Err(Refusal::Failed(error)) => Some(Stop::Error(error)),
            Err(Refusal::Malformed(reason)) => {
                return match self.sink.skips(self.path, &format!("record {}", self.count), &reason)
                {
                    true => Ok(()),
                    false => Err(serde_json::Error::custom(reason)),
                };
            }
        };
        Err(serde_json::Error::custom("stopped"))
    }
}

impl<'de> Visitor<'de> for &mut Records<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an array of records")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut array: A) -> Result<(), A::Error> {
        while array.next_element_seed(&mut *self)?.is_some() {}
        Ok(())
    }
}

impl<'de> DeserializeSeed<'de> for &mut Records<'_> {
    type Value = ();

    fn deserialize<D: serde::Deserializer<'de>>(self, element: D) -> Result<(), D::Error> {
        let record = serde::Deserialize::deserialize(element)?;
        self.take(record).map_err(|error| D::Error::custom(cause(&error)))
    }
}

/// The parser's reason without the place it appends.
fn cause(error: &serde_json::Error) -> String {
    let text = error.to_string();
    text.split(" at line ").next().unwrap_or_default().to_owned()
}

fn refuse(path: &Path, reason: String) -> Error {
    Error::Corpus { path: path.to_owned(), reason }
}
