//! Files of every format.

use std::{io::Write, path::Path, sync::Arc};

use ::parquet::{
    basic::{Compression, ZstdLevel},
    data_type::{ByteArray, ByteArrayType, Int64Type},
    file::{properties::WriterProperties, writer::SerializedFileWriter},
    schema::parser::parse_message_type,
};
use bitnet_model::hub::Hub;
use flate2::write::GzEncoder;

use super::*;
use crate::dataset::Documents;

fn read_source(source: &Source) -> Result<Vec<String>> {
    let mut texts = Vec::new();
    for file in source.files(&Hub::from_env())? {
        let done = Cell::new(0);
        let flow = read(&file, source, &done, &mut |text| {
            texts.push(text);
            Ok(ControlFlow::Continue(()))
        })?;
        assert!(flow.is_continue());
        assert_eq!(done.get(), file.size);
    }
    Ok(texts)
}

fn source(path: &Path) -> Source {
    Source { documents: None, ..Source::text(path, Documents::Line) }
}

/// What is read from a file of this name and content.
fn read_bytes(name: &str, content: &[u8]) -> Result<Vec<String>> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    std::fs::write(&path, content).unwrap();
    read_source(&source(&path))
}

fn gzip(content: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(content).unwrap();
    encoder.finish().unwrap()
}

#[test]
fn json_comes_in_three_forms() {
    let lines = "{\"text\": \"a\\nb\", \"id\": 1}\r\n\n\"c\"\n{\"text\": null}\n{\"text\": \"é\"}";
    let array =
        "[{\"id\": [1], \"text\": \"a\\nb\"}, \"c\",\n {\"text\": null}, {\"text\": \"é\"}]\n";
    let expected = ["a\nb", "c", "", "é"];
    assert_eq!(read_bytes("x.jsonl", lines.as_bytes()).unwrap(), expected);
    assert_eq!(read_bytes("x.json", lines.as_bytes()).unwrap(), expected);
    assert_eq!(read_bytes("x.json", array.as_bytes()).unwrap(), expected);
    assert_eq!(read_bytes("x.ndjson.gz", &gzip(lines.as_bytes())).unwrap(), expected);
    assert_eq!(read_bytes("x.json.gz", &gzip(array.as_bytes())).unwrap(), expected);
}

#[test]
fn a_malformed_record_is_named_by_its_line() {
    for (name, content, reason) in [
        (
            "x.jsonl",
            "{\"text\": \"a\"}\n{\"text\": 5}",
            "x.jsonl: line 2: `text` must be a string, not a number",
        ),
        (
            "x.jsonl",
            "\n{\"body\": \"a\"}",
            "line 2: the record has no `text`, only `body`; name the key",
        ),
        (
            "x.jsonl",
            "{\"text\": \"a\"}\n{\"text\": \"a",
            "line 2, column 11: EOF while parsing a string",
        ),
        ("x.jsonl", "[1]", "line 1: a record must be an object or a string, not an array"),
        (
            "x.json",
            "[{\"text\": \"a\"},\n {\"text\": true}]",
            "line 2, column 16: `text` must be a string, not a boolean",
        ),
        ("x.json", "[{\"text\": \"a\"},\n", "line 2, column 0: EOF while parsing a value"),
        ("x.json", "[\"a\"] b", "line 1, column 7: trailing characters"),
        ("x.json", "{\"data\": []}", "the record has no `text`, only `data`"),
        ("x.json", "\n nonsense", "line 2, column 3: expected"),
    ] {
        let message = read_bytes(name, content.as_bytes()).unwrap_err().to_string();
        assert!(message.contains(reason), "{content:?}: {message}");
    }
    let mut cut = gzip(b"{\"text\": \"a long enough text\"}");
    cut.truncate(20);
    let message = read_bytes("x.jsonl.gz", &cut).unwrap_err().to_string();
    assert!(message.contains("x.jsonl.gz: "), "{message}");
    let message = read_bytes("x.jsonl", b"{\"text\": \"\xff\"}").unwrap_err().to_string();
    assert!(message.contains("line 1, column"), "{message}");
}

#[test]
fn a_reader_stops_when_it_is_told_to() {
    for (name, content) in [
        ("x.txt", "a\nb\n"),
        ("x.jsonl", "\"a\"\n\"b\""),
        ("x.json", "[\"a\", \"b\"]"),
        ("x.json", "\"a\" \"b\""),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        let source = Source::text(&path, Documents::Line);
        let file = &source.files(&Hub::from_env()).unwrap()[0];
        let stop = &mut |text: String| {
            assert_eq!(text, "a");
            Ok(ControlFlow::Break(()))
        };
        assert!(read(file, &source, &Cell::new(0), stop).unwrap().is_break(), "{name}");
        let fail = &mut |_| Err(Error::Dataset("full".into()));
        let message = read(file, &source, &Cell::new(0), fail).unwrap_err().to_string();
        assert_eq!(message, "dataset: full", "{name}");
    }
}

/// `id` and a nullable `text`, in groups of rows.
fn write_parquet(path: &Path, compression: Compression, groups: &[&[Option<&str>]]) {
    let schema = "message rows { required int64 id; optional binary text (STRING); }";
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let properties = WriterProperties::builder().set_compression(compression).build();
    let file = File::create(path).unwrap();
    let mut writer = SerializedFileWriter::new(file, schema, Arc::new(properties)).unwrap();
    for rows in groups {
        let mut group = writer.next_row_group().unwrap();
        let mut ids = group.next_column().unwrap().unwrap();
        let numbers = Vec::from_iter(0..rows.len() as i64);
        ids.typed::<Int64Type>().write_batch(&numbers, None, None).unwrap();
        ids.close().unwrap();
        let mut texts = group.next_column().unwrap().unwrap();
        let levels: Vec<i16> = rows.iter().map(|row| i16::from(row.is_some())).collect();
        let values: Vec<ByteArray> = rows.iter().flatten().map(|&text| text.into()).collect();
        texts.typed::<ByteArrayType>().write_batch(&values, Some(&levels), None).unwrap();
        texts.close().unwrap();
        group.close().unwrap();
    }
    writer.close().unwrap();
}

#[test]
fn parquet_gives_one_column() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.parquet");
    let long = "a long text ".repeat(100);
    let many: Vec<Option<&str>> = (0..3000).map(|i| (i % 3 > 0).then_some(&*long)).collect();
    for compression in [
        Compression::UNCOMPRESSED,
        Compression::SNAPPY,
        Compression::GZIP(Default::default()),
        Compression::ZSTD(ZstdLevel::default()),
    ] {
        write_parquet(&path, compression, &[&[Some("a"), None, Some("é\n")], &many]);
        let texts = read_source(&source(&path)).unwrap();
        assert_eq!(texts.len(), 2002);
        assert_eq!((texts[0].as_str(), texts[1].as_str(), &texts[2001]), ("a", "é\n", &long));
    }
    let message = |source: &Source| read_source(source).unwrap_err().to_string();
    let other = |field: &str| Source { field: field.into(), ..source(&path) };
    assert!(message(&other("body")).contains("x.parquet: has no column `body`, only `id`, `text`"));
    assert!(message(&other("id")).contains("column `id` must hold one string a row"));
    let whole = std::fs::read(&path).unwrap();
    for damaged in [&whole[..whole.len() / 2], &[], b"PAR1PAR1"] {
        std::fs::write(&path, damaged).unwrap();
        assert!(message(&source(&path)).contains("x.parquet: "));
    }
}
