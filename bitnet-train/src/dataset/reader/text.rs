//! UTF-8 text, line by line.

use std::{io::BufRead, ops::ControlFlow, path::Path};

use super::Sink;
use crate::{
    Error, Result,
    dataset::{Documents, documents::Splitter},
};

pub(super) fn read(
    mut reader: impl BufRead,
    path: &Path,
    documents: &Documents,
    sink: &mut Sink,
) -> Result<ControlFlow<()>> {
    let mut splitter = Splitter::new(documents);
    let (mut line, mut offset) = (Vec::new(), 0);
    loop {
        line.clear();
        let count = reader.read_until(b'\n', &mut line).map_err(Error::io(path))?;
        if count == 0 {
            break;
        }
        let text = std::str::from_utf8(&line).map_err(|error| Error::Corpus {
            path: path.to_owned(),
            reason: format!("byte {} is not UTF-8", offset + error.valid_up_to()),
        })?;
        let text = text.strip_prefix('\u{feff}').filter(|_| offset == 0).unwrap_or(text);
        let text = text.strip_suffix('\n').unwrap_or(text);
        let text = text.strip_suffix('\r').unwrap_or(text);
        if let Some(document) = splitter.line(text)
            && sink(document)?.is_break()
        {
            return Ok(ControlFlow::Break(()));
        }
        offset += count;
    }
    match splitter.finish() {
        Some(document) => sink(document),
        None => Ok(ControlFlow::Continue(())),
    }
}
