//! One column of a Parquet file, by way of the column reader: no other column is read.

use std::{cell::Cell, fs::File, ops::ControlFlow, path::Path};

use parquet::{
    basic::Type,
    column::reader::ColumnReader,
    errors::ParquetError,
    file::reader::{FileReader, SerializedFileReader},
};

use super::Sink;
use crate::{Error, Result};

/// Records decoded at a time: few, for they may be books.
const RECORDS: usize = 64;

pub(super) fn read(
    path: &Path,
    column: &str,
    done: &Cell<u64>,
    sink: &mut Sink,
) -> Result<ControlFlow<()>> {
    let refuse = |reason: String| Error::Corpus { path: path.to_owned(), reason };
    let broken = |error: ParquetError| match error {
        ParquetError::General(reason) | ParquetError::EOF(reason) => refuse(reason),
        other => refuse(other.to_string()),
    };
    let file = File::open(path).map_err(Error::io(path))?;
    let size = file.metadata().map_err(Error::io(path))?.len();
    let reader = SerializedFileReader::new(file).map_err(broken)?;
    let columns = reader.metadata().file_metadata().schema_descr().columns();
    let names = || {
        let names: Vec<String> = columns
            .iter()
            .take(8)
            .map(|column| format!("`{}`", column.path().string().escape_debug()))
            .collect();
        names.join(", ")
    };
    let Some(index) = columns.iter().position(|found| found.path().string() == column) else {
        let reason = format!("has no column `{column}`, only {}; name it in `field`", names());
        return Err(refuse(reason));
    };
    if columns[index].physical_type() != Type::BYTE_ARRAY || columns[index].max_rep_level() > 0 {
        return Err(refuse(format!("column `{column}` must hold one string a row")));
    }
    let (before, groups) = (done.get(), reader.num_row_groups());
    let mut row = 0;
    for group in 0..groups {
        let group_reader = reader.get_row_group(group).map_err(broken)?;
        let column_reader = group_reader.get_column_reader(index).map_err(broken)?;
        let ColumnReader::ByteArrayColumnReader(mut values) = column_reader else {
            return Err(refuse(format!("column `{column}` must hold strings")));
        };
        loop {
            // Nulls have a level and no value.
            let (mut levels, mut texts) = (Vec::new(), Vec::new());
            let (records, _, _) = values
                .read_records(RECORDS, Some(&mut levels), None, &mut texts)
                .map_err(broken)?;
            if records == 0 {
                break;
            }
            for text in texts {
                let text = std::str::from_utf8(text.data()).map_err(|error| {
                    let last = row + records;
                    let at = error.valid_up_to();
                    refuse(format!(
                        "column `{column}`, rows {row} to {last}: byte {at} of a text is not UTF-8"
                    ))
                })?;
                if sink(text.to_owned())?.is_break() {
                    return Ok(ControlFlow::Break(()));
                }
            }
            row += records;
        }
        // Pages are read here and there: count the groups.
        done.set(before + size * (group as u64 + 1) / groups as u64);
    }
    done.set(before + size);
    Ok(ControlFlow::Continue(()))
}
