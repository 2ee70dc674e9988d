//! Data files: where they lie, and the fields of their records.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use flate2::read::MultiGzDecoder;
use serde_json::Value;

use crate::{Error, Result};

/// What may stand between a task's name and `.jsonl`, `.json`, `.txt` or `.jsonl.gz`, in the order in which it is looked for.
const TEST: [&str; 7] = ["", "_test", "_validation", "_val", "_valid", "_test_norm", "_val_norm"];
/// The same for a file of examples.
const TRAIN: [&str; 3] = ["_train", "_train_norm", "_train_first64"];

/// A record, and where it stands.
pub struct Record<'a> {
    /// The file.
    pub path: &'a Path,
    /// Its line, or its number in an array, from 1 on.
    pub place: String,
    /// Its fields.
    pub value: &'a Value,
}

/// The file of what is asked, of the first of `names` that one of `folders` has.
///
/// # Errors
/// None of them has one.
pub fn test_file(folders: &[PathBuf], names: &[&str]) -> Result<PathBuf> {
    find(folders, names, &TEST)
}

/// The file of examples.
///
/// # Errors
/// There is none.
pub fn train_file(folders: &[PathBuf], names: &[&str]) -> Result<PathBuf> {
    find(folders, names, &TRAIN)
}

fn find(folders: &[PathBuf], names: &[&str], parts: &[&str]) -> Result<PathBuf> {
    for folder in folders {
        for name in names {
            for part in parts {
                for ending in ["jsonl", "json", "txt", "jsonl.gz"] {
                    let path = folder.join(format!("{name}{part}.{ending}"));
                    if path.is_file() {
                        return Ok(path);
                    }
                }
            }
        }
    }
    let folders = Vec::from_iter(folders.iter().map(|folder| folder.display().to_string()));
    let first = names.first().copied().unwrap_or_default();
    let parts = Vec::from_iter(parts.iter().map(|part| format!("{first}{part}.jsonl")));
    Err(Error::Input(format!(
        "{}: has no file of `{first}`: it may be called {}",
        folders.join(", "),
        parts.join(", ")
    )))
}

/// The records of a file: objects, one a line or in an array; of plain text, what `pages` makes of it.
///
/// # Errors
/// A file that cannot be read or holds something else.
pub fn read<T>(
    path: &Path,
    pages: Option<fn(&str) -> Vec<Value>>,
    mut take: impl FnMut(&Record<'_>) -> Result<T>,
) -> Result<Vec<T>> {
    let is_packed = path.extension().is_some_and(|found| found == "gz");
    let text = match is_packed {
        true => File::open(path).and_then(|file| io::read_to_string(MultiGzDecoder::new(file))),
        false => fs::read_to_string(path),
    };
    let text = text.map_err(Error::io(path))?;
    let refuse = |reason: String| Error::Corpus { path: path.into(), reason };
    let is = |ending: &str| path.extension().is_some_and(|found| found == ending);
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
    match all.is_empty() {
        true => Err(refuse("holds no records".into())),
        false => Ok(all),
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
