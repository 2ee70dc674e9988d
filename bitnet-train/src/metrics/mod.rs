//! The metrics of a run: `metrics.jsonl`, one JSON object a line, and on request the same numbers for TensorBoard.
//!
//! Every update, every evaluation and every census of the codes is a line. A resumed run first drops the lines after
//! the step it resumes from, so that in the end the file says the same as an uninterrupted run's, but for the timings.

use std::{
    fs::{self, File, OpenOptions},
    io::{BufWriter, Write},
    path::{Path, PathBuf},
};

use crate::{Error, Result, tensorboard::EventFile};

mod memory;
mod record;

pub use memory::memory;
pub use record::{
    CodesRecord, Diversity, EvaluationRecord, LayerCodes, Memory, Record, SamplesRecord,
    TrainRecord,
};

/// The name of a run's metrics file.
pub const FILE: &str = "metrics.jsonl";

/// The metrics files of one run, open at their ends.
#[derive(Debug)]
pub struct Metrics {
    path: PathBuf,
    file: BufWriter<File>,
    events: Option<EventFile>,
}

impl Metrics {
    /// Starts the files of the folder `dir`, or continues them after `step`: later lines, and one cut short by a
    /// killed process, go. With `tensorboard` there is an event file too; one that a resumed run lacks is made from
    /// the lines there are.
    pub fn open(dir: &Path, step: usize, tensorboard: bool) -> Result<Self> {
        let path = dir.join(FILE);
        let mut kept = 0;
        let mut records = Vec::new();
        if step > 0 && path.exists() {
            let bytes = fs::read(&path).map_err(Error::io(&path))?;
            for line in bytes.split_inclusive(|&byte| byte == b'\n') {
                match serde_json::from_slice::<Record>(line) {
                    Ok(record) if line.ends_with(b"\n") && record.step() <= step => {
                        kept += line.len();
                        records.push(record);
                    }
                    _ => break,
                }
            }
        }
        let open = || {
            let file = OpenOptions::new().create(true).append(true).open(&path)?;
            file.set_len(kept as u64)?;
            Ok(file)
        };
        let file = BufWriter::new(open().map_err(Error::io(&path))?);
        let events = match tensorboard {
            true => Some(EventFile::open(dir, step, &records)?),
            false => None,
        };
        Ok(Self { path, file, events })
    }

    /// Appends a line, which a reader sees at once.
    pub fn write(&mut self, record: &Record) -> Result<()> {
        let json = serde_json::to_string(record)
            .map_err(|error| Error::Input(format!("metrics cannot be written as JSON: {error}")))?;
        writeln!(self.file, "{json}")
            .and_then(|()| self.file.flush())
            .map_err(Error::io(&self.path))?;
        self.events.as_mut().map_or(Ok(()), |events| events.write(record))
    }

    /// Waits until all lines are on the disk.
    pub fn sync(&mut self) -> Result<()> {
        self.file.get_ref().sync_data().map_err(Error::io(&self.path))?;
        self.events.as_mut().map_or(Ok(()), EventFile::sync)
    }
}

/// The records of a metrics file. A last line that is cut short, by a process that died in it or is still writing
/// it, is left out.
pub fn read(path: &Path) -> Result<Vec<Record>> {
    let text = fs::read_to_string(path).map_err(Error::io(path))?;
    let parse = |(number, line)| {
        serde_json::from_str(line).map_err(|error| Error::Corpus {
            path: path.to_owned(),
            reason: format!("line {}: {error}", number + 1),
        })
    };
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    whole.lines().enumerate().map(parse).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn train(step: usize) -> Record {
        Record::Train(TrainRecord {
            step,
            loss: 0.1 + 0.2,
            terms: BTreeMap::from([("cross_entropy".into(), 0.1 + 0.2)]),
            lr: 1e-3,
            weight_decay: 0.1,
            grad_norm: 1. / 3.,
            tokens: 1 << 40,
            tokens_per_second: 7.5,
            ..TrainRecord::default()
        })
    }

    fn evaluation(step: usize) -> Record {
        let (nats_per_token, nats_per_byte) = (2.5, 0.7);
        Record::Evaluation(EvaluationRecord {
            step,
            nats_per_token,
            nats_per_byte,
            tokens: 9,
            seconds: 0.5,
            ..EvaluationRecord::default()
        })
    }

    #[test]
    fn a_resumed_file_loses_what_comes_after() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        let mut metrics = Metrics::open(dir.path(), 0, false).unwrap();
        for record in [train(1), train(2), evaluation(2), train(3), train(4), evaluation(4)] {
            metrics.write(&record).unwrap();
        }
        metrics.sync().unwrap();
        fs::write(&path, [fs::read(&path).unwrap().as_slice(), b"{\"kind\":\"tr"].concat())
            .unwrap();
        Metrics::open(dir.path(), 4, false).unwrap();
        assert_eq!(read(&path).unwrap().len(), 6);
        Metrics::open(dir.path(), 2, false).unwrap().write(&train(3)).unwrap();
        assert_eq!(read(&path).unwrap(), [train(1), train(2), evaluation(2), train(3)]);
        Metrics::open(dir.path(), 0, false).unwrap();
        assert_eq!(read(&path).unwrap(), []);
    }

    #[test]
    fn a_malformed_line_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        fs::write(&path, "{\"kind\":\"train\"}\n").unwrap();
        let message = read(&path).unwrap_err().to_string();
        assert!(message.contains("metrics.jsonl: line 1: missing field `step`"), "{message}");
    }
}
