//! Whole rows of a Parquet file, as JSON: lists of groups, such as the turns of a conversation, need more than one column.

use std::{cell::Cell, fs::File, ops::ControlFlow, path::Path};

use parquet::{
    file::reader::{FileReader, SerializedFileReader},
    record::{Field, Row},
};
use serde_json::{Map, Value};

use super::record::{RecordSink, Refusal};
use crate::{Error, Result};

/// Hands the rows of a Parquet file to `sink`, in order.
pub(crate) fn read(
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use parquet::{
        data_type::{ByteArrayType, Int32Type},
        file::{properties::WriterProperties, writer::SerializedFileWriter},
        schema::parser::parse_message_type,
    };
    use serde_json::json;

    use super::*;

    struct Collected(Vec<Value>);

    impl RecordSink for Collected {
        fn take(&mut self, record: Value) -> Result<ControlFlow<()>, Refusal> {
            self.0.push(record);
            match self.0.len() {
                3 => Err(Refusal::Malformed("too many".into())),
                _ => Ok(ControlFlow::Continue(())),
            }
        }
    }

    /// Conversations as the Hub's tools write them, a list of groups, beside a number; `turns` are those of each row.
    fn write(path: &Path, turns: &[&[(&str, &str)]]) {
        let schema = "message schema {
            required int32 id;
            optional group messages (LIST) { repeated group list { optional group element {
                optional binary role (STRING); optional binary content (STRING); } } }
        }";
        let schema = Arc::new(parse_message_type(schema).unwrap());
        let properties = Arc::new(WriterProperties::builder().build());
        let mut writer =
            SerializedFileWriter::new(File::create(path).unwrap(), schema, properties).unwrap();
        let mut group = writer.next_row_group().unwrap();
        let mut ids = group.next_column().unwrap().unwrap();
        let numbers: Vec<i32> = (0..turns.len() as i32).collect();
        ids.typed::<Int32Type>().write_batch(&numbers, None, None).unwrap();
        ids.close().unwrap();
        let all: Vec<(&str, &str)> = turns.concat();
        let repeated: Vec<i16> =
            turns.iter().flat_map(|row| (0..row.len()).map(|at| i16::from(at > 0))).collect();
        for first in [true, false] {
            let texts = all.iter().map(|turn| if first { turn.0 } else { turn.1 }.into());
            let texts: Vec<parquet::data_type::ByteArray> = texts.collect();
            let mut column = group.next_column().unwrap().unwrap();
            let defined = vec![4; texts.len()];
            column
                .typed::<ByteArrayType>()
                .write_batch(&texts, Some(&defined), Some(&repeated))
                .unwrap();
            column.close().unwrap();
        }
        group.close().unwrap();
        writer.close().unwrap();
    }

    #[test]
    fn rows_are_objects() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.parquet");
        let turns: [&[(&str, &str)]; 2] = [&[("user", "é?"), ("assistant", "✓")], &[("user", "a")]];
        write(&path, &turns);
        let (mut found, done) = (Collected(Vec::new()), Cell::new(0));
        assert!(read(&path, &done, &mut found).unwrap().is_continue());
        let messages =
            json!([{"role": "user", "content": "é?"}, {"role": "assistant", "content": "✓"}]);
        assert_eq!(found.0[0], json!({"id": 0, "messages": messages}));
        assert_eq!(found.0[1], json!({"id": 1, "messages": [{"role": "user", "content": "a"}]}));
        assert_eq!(done.get(), std::fs::metadata(&path).unwrap().len());
        let message = read(&path, &done, &mut found).unwrap_err().to_string();
        assert!(message.ends_with("x.parquet: row 1: too many"), "{message}");
        std::fs::write(&path, "PAR1PAR1").unwrap();
        let message = read(&path, &done, &mut found).unwrap_err().to_string();
        assert!(message.contains("x.parquet: "), "{message}");
    }
}
