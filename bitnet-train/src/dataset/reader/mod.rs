//! Files → documents, one at a time: no file is ever in memory as a whole, unless it is one document.

mod json;
mod parquet;
pub(crate) mod record;
mod rows;
mod text;

use std::{
    cell::Cell,
    fs::File,
    io::{self, BufRead, BufReader, Read},
    ops::ControlFlow,
};

use flate2::read::MultiGzDecoder;

use self::record::Texts;
pub(crate) use self::{
    record::{RecordSink, Refusal},
    rows::read as read_rows,
};
use super::source::{Format, InputFile, Source};
use crate::{Error, Result};

/// Takes documents until it breaks off.
type Sink<'a> = dyn FnMut(String) -> Result<ControlFlow<()>> + 'a;

/// Bytes read from the disk at a time.
const BUFFER_BYTES: usize = 256 << 10;

/// Hands the documents of `file` to `sink`, in order. `done` grows by the bytes read from the disk.
pub(super) fn read(
    file: &InputFile,
    source: &Source,
    done: &Cell<u64>,
    sink: &mut Sink,
) -> Result<ControlFlow<()>> {
    match &file.format {
        Format::Text(documents) => text::read(open(file, done)?, &file.path, documents, sink),
        Format::JsonLines | Format::Json => {
            read_records(file, done, &mut Texts { field: &source.field, sink })
        }
        Format::Parquet => parquet::read(&file.path, &source.field, done, sink),
    }
}

/// Hands the records of `file` to `sink`, in order; a document of a text is a string. `done` grows by the bytes read from
/// the disk.
pub(crate) fn read_records(
    file: &InputFile,
    done: &Cell<u64>,
    sink: &mut dyn RecordSink,
) -> Result<ControlFlow<()>> {
    match &file.format {
        Format::JsonLines => json::read_lines(open(file, done)?, &file.path, sink),
        Format::Json => json::read(open(file, done)?, &file.path, sink),
        Format::Parquet => rows::read(&file.path, done, sink),
        Format::Text(documents) => {
            let mut take = |text: String| match sink.take(text.into()) {
                Ok(flow) => Ok(flow),
                Err(Refusal::Failed(error)) => Err(error),
                Err(Refusal::Malformed(reason)) => {
                    Err(Error::Corpus { path: file.path.clone(), reason })
                }
            };
            text::read(open(file, done)?, &file.path, documents, &mut take)
        }
    }
}

fn open<'a>(file: &InputFile, done: &'a Cell<u64>) -> Result<Box<dyn BufRead + 'a>> {
    let raw = File::open(&file.path).map_err(Error::io(&file.path))?;
    let counted = BufReader::with_capacity(BUFFER_BYTES, Counted { raw, done });
    Ok(match file.is_gzip {
        true => Box::new(BufReader::with_capacity(BUFFER_BYTES, MultiGzDecoder::new(counted))),
        false => Box::new(counted),
    })
}

struct Counted<'a> {
    raw: File,
    done: &'a Cell<u64>,
}

impl Read for Counted<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.raw.read(buffer)?;
        self.done.set(self.done.get() + count as u64);
        Ok(count)
    }
}

#[cfg(test)]
mod tests;
