//! Whole rows of a Parquet file, as JSON: lists of groups, such as the turns of a conversation, need more than one column.

use std::{cell::Cell, fs::File, ops::ControlFlow, path::Path};

use parquet::{
    file::reader::{FileReader, SerializedFileReader},
    record::{Field, Row},
};
use serde_json::{Map, Value};

use super::record::{RecordSink, Refusal};
use crate::{Error, Result};

pub(super) fn read(
    path: &Path,
    done: &Cell<u64>,
    sink: &mut dyn RecordSink,
) -> Result<ControlFlow<()>> {
    let refuse = |reason: String| Error::Corpus { path: path.to_owned(), reason };
    let file = File::open(path).map_err(Error::io(path))?;
    let size = file.metadata().map_err(Error::io(path))?.len();
    let reader = SerializedFileReader::new(file).map_err(|error| refuse(error.to_string()))?;
    let rows = reader.get_row_iter(None).map_err(|error| refuse(error.to_string()))?;
    for (number, row) in rows.enumerate() {
        let place = format!("row {}", number + 1);
        let row = row.map_err(|error| refuse(format!("{place}: {error}")))?;
        match sink.take(object(&row)) {
            Ok(ControlFlow::Continue(())) => (),
            Ok(ControlFlow::Break(())) => return Ok(ControlFlow::Break(())),
            Err(Refusal::Failed(error)) => return Err(error),
            Err(Refusal::Malformed(reason)) if sink.skips(path, &place, &reason) => (),
            Err(Refusal::Malformed(reason)) => return Err(refuse(format!("{place}: {reason}"))),
        }
    }
    done.set(done.get() + size);
    Ok(ControlFlow::Continue(()))
}

fn object(row: &Row) -> Value {
    let fields = row.get_column_iter().map(|(name, field)| (name.clone(), value(field)));
    Value::Object(Map::from_iter(fields))
}

/// Texts, lists and groups as they are; what no record of text is made of is told by its print.
fn value(field: &Field) -> Value {
    match field {
        Field::Null => Value::Null,
        Field::Bool(value) => (*value).into(),
        Field::Int(value) => (*value).into(),
        Field::Long(value) => (*value).into(),
        Field::Double(value) => (*value).into(),
        Field::Str(text) => text.as_str().into(),
        // Some writers leave out that a column is text.
        Field::Bytes(bytes) => String::from_utf8_lossy(bytes.data()).into(),
        Field::Group(row) => object(row),
        Field::ListInternal(list) => list.elements().iter().map(value).collect(),
        other => other.to_string().into(),
    }
}
