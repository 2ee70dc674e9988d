//! What data files hold: records, and their fields.

use std::{
    cell::Cell,
    fs::{self, File},
    io,
    ops::ControlFlow,
    path::Path,
};

use flate2::read::MultiGzDecoder;
use serde_json::Value;

use crate::{
    Error, Result,
    dataset::reader::{RecordSink, Refusal, read_rows},
};

/// A record, and where it stands.
pub struct Record<'a> {
    /// The file.
    pub path: &'a Path,
    /// Its line, or its number in an array or a table, from 1 on.
    pub place: String,
    /// Its fields.
    pub value: &'a Value,
}

/// The records of a file: objects, one a line or in an array, or rows of Parquet; of plain text, what `pages` makes of it.
///
/// # Errors
/// A file that cannot be read or holds something else.
pub fn read<T>(
    path: &Path,
    pages: Option<fn(&str) -> Vec<Value>>,
    take: impl FnMut(&Record<'_>) -> Result<T>,
) -> Result<Vec<T>> {
    let is = |ending: &str| path.extension().is_some_and(|found| found == ending);
    let all = if is("parquet") { read_table(path, take)? } else { read_text(path, pages, take)? };
    match all.is_empty() {
        true => Err(Error::Corpus { path: path.into(), reason: "holds no records".into() }),
        false => Ok(all),
    }
}

fn read_text<T>(
    path: &Path,
    pages: Option<fn(&str) -> Vec<Value>>,
    mut take: impl FnMut(&Record<'_>) -> Result<T>,
) -> Result<Vec<T>> {
    let is = |ending: &str| path.extension().is_some_and(|found| found == ending);
    let text = match is("gz") {
        true => File::open(path).and_then(|file| io::read_to_string(MultiGzDecoder::new(file))),
        false => fs::read_to_string(path),
    };
    let text = text.map_err(Error::io(path))?;
    let refuse = |reason: String| Error::Corpus { path: path.into(), reason };
    let mut all = Vec::new();
    if is("txt") || is("json") {
        let (kind, values) = match (is("txt"), pages) {
            (true, Some(pages)) => ("page", pages(&text)),
            (true, None) => {
                return Err(refuse("is plain text, but this task needs records".into()));
            }
            (false, _) => (
                "record",
                serde_json::from_str(&text)
                    .map_err(|error| refuse(format!("is no array of objects: {error}")))?,
            ),
        };
        for (index, value) in values.iter().enumerate() {
            all.push(take(&Record { path, place: format!("{kind} {}", index + 1), value })?);
        }
    } else {
        for (index, line) in text.lines().enumerate() {
            if line.trim().is_empty() {
                continue;
            }
            let place = format!("line {}", index + 1);
            let value: Value = serde_json::from_str(line)
                .map_err(|error| refuse(format!("{place}: is no JSON: {error}")))?;
            all.push(take(&Record { path, place, value: &value })?);
        }
    }
    Ok(all)
}

fn read_table<T>(path: &Path, take: impl FnMut(&Record<'_>) -> Result<T>) -> Result<Vec<T>> {
    let mut rows = Rows { path, take, all: Vec::new() };
    let _ = read_rows(path, &Cell::new(0), &mut rows)?;
    Ok(rows.all)
}

/// Keeps what `take` makes of rows.
struct Rows<'a, T, F> {
    path: &'a Path,
    take: F,
    all: Vec<T>,
}

impl<T, F: FnMut(&Record<'_>) -> Result<T>> RecordSink for Rows<'_, T, F> {
    fn take(&mut self, value: Value) -> Result<ControlFlow<()>, Refusal> {
        let place = format!("row {}", self.all.len() + 1);
        self.all.push((self.take)(&Record { path: self.path, place, value: &value })?);
        Ok(ControlFlow::Continue(()))
    }
}

impl Record<'_> {
    /// Says what is wrong with a field.
    pub fn refuse(&self, field: &str, reason: impl Into<String>) -> Error {
        let reason = format!("{}: `{field}`: {}", self.place, reason.into());
        Error::Corpus { path: self.path.into(), reason }
    }

    /// Whether there is a field of this name.
    pub fn has(&self, field: &str) -> bool {
        self.value.get(field).is_some()
    }

    /// A field.
    ///
    /// # Errors
    /// It is not there.
    pub fn get(&self, field: &str) -> Result<&Value> {
        self.value.get(field).ok_or_else(|| self.refuse(field, "is missing"))
    }

    /// A text.
    ///
    /// # Errors
    /// It is not there, or no text.
    pub fn text(&self, field: &str) -> Result<&str> {
        self.get(field)?.as_str().ok_or_else(|| self.refuse(field, "must be a string"))
    }

    /// A list of at least two texts, none of them empty.
    ///
    /// # Errors
    /// It is something else.
    pub fn choices(&self, field: &str) -> Result<Vec<String>> {
        self.choices_of(field, self.get(field)?)
    }

    /// The same of a value inside a field.
    ///
    /// # Errors
    /// It is something else.
    pub fn choices_of(&self, field: &str, value: &Value) -> Result<Vec<String>> {
        let texts = value.as_array().and_then(|values| {
            let text = |value: &Value| Some(value.as_str()?.to_owned()).filter(|t| !t.is_empty());
            values.iter().map(text).collect::<Option<Vec<_>>>()
        });
        texts.filter(|texts| texts.len() > 1).ok_or_else(|| {
            self.refuse(field, "must be a list of two or more strings that are not empty")
        })
    }

    /// The number of one of `count` choices, from 0 on.
    ///
    /// # Errors
    /// It is something else.
    pub fn index(&self, field: &str, count: usize) -> Result<usize> {
        let index = self.get(field)?.as_u64().and_then(|index| usize::try_from(index).ok());
        index.filter(|&index| index < count).ok_or_else(|| {
            self.refuse(field, format!("must be a whole number from 0 to {}", count - 1))
        })
    }
}
