//! The metrics of a run: `metrics.jsonl`, one JSON object a line.
//!
//! Every update and every evaluation is a line. A resumed run first drops the lines after the step it resumes from,
//! so that in the end the file says the same as an uninterrupted run's, but for the timings.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io::{BufWriter, Write},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// One line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Record {
    /// An update.
    Train(TrainRecord),
    /// An evaluation.
    Evaluation(EvaluationRecord),
}

/// What one update did.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainRecord {
    /// The update, counted from 1.
    pub step: usize,
    /// Mean loss of its tokens, nats.
    pub loss: f64,
    /// The terms of the loss by name, before weighting.
    #[serde(default)]
    pub terms: BTreeMap<String, f64>,
    /// Learning rate.
    pub lr: f64,
    /// Weight decay.
    pub weight_decay: f64,
    /// Norm of all gradients before clipping.
    pub grad_norm: f64,
    /// Tokens trained on so far.
    pub tokens: u64,
    /// Speed of this update.
    pub tokens_per_second: f64,
}

/// What one evaluation found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EvaluationRecord {
    /// Updates made before it.
    pub step: usize,
    /// Held-out loss a token.
    pub nats_per_token: f64,
    /// Held-out loss a byte of text, which compares across vocabularies.
    pub nats_per_byte: f64,
    /// Tokens predicted.
    pub tokens: usize,
    /// How long it took.
    pub seconds: f64,
}

impl Record {
    /// Updates made when it was written.
    pub fn step(&self) -> usize {
        match self {
            Self::Train(record) => record.step,
            Self::Evaluation(record) => record.step,
        }
    }
}

/// A metrics file open at its end.
#[derive(Debug)]
pub struct Metrics {
    path: PathBuf,
    file: BufWriter<File>,
}

impl Metrics {
    /// Starts a file, or continues one after `step`: later lines, and one cut short by a killed process, go.
    pub fn open(path: &Path, step: usize) -> Result<Self> {
        let mut kept = 0;
        if step > 0 && path.exists() {
            let bytes = fs::read(path).map_err(Error::io(path))?;
            let is_kept = |line: &&[u8]| {
                line.ends_with(b"\n")
                    && serde_json::from_slice(line)
                        .is_ok_and(|record: Record| record.step() <= step)
            };
            kept = bytes
                .split_inclusive(|&byte| byte == b'\n')
                .take_while(is_kept)
                .map(<[u8]>::len)
                .sum();
        }
        let open = || {
            let file = OpenOptions::new().create(true).append(true).open(path)?;
            file.set_len(kept as u64)?;
            Ok(file)
        };
        let file = open().map_err(Error::io(path))?;
        Ok(Self { path: path.to_owned(), file: BufWriter::new(file) })
    }

    /// Appends a line, which a reader sees at once.
    pub fn write(&mut self, record: &Record) -> Result<()> {
        let json = serde_json::to_string(record)
            .map_err(|error| Error::Input(format!("metrics cannot be written as JSON: {error}")))?;
        writeln!(self.file, "{json}")
            .and_then(|()| self.file.flush())
            .map_err(Error::io(&self.path))
    }

    /// Waits until all lines are on the disk.
    pub fn sync(&mut self) -> Result<()> {
        self.file.get_ref().sync_data().map_err(Error::io(&self.path))
    }
}

/// The records of a metrics file.
pub fn read(path: &Path) -> Result<Vec<Record>> {
    let text = fs::read_to_string(path).map_err(Error::io(path))?;
    let parse = |(number, line)| {
        serde_json::from_str(line).map_err(|error| Error::Corpus {
            path: path.to_owned(),
            reason: format!("line {}: {error}", number + 1),
        })
    };
    text.lines().enumerate().map(parse).collect()
}

#[cfg(test)]
mod tests {
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
        })
    }

    #[test]
    fn a_resumed_file_loses_what_comes_after() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let mut metrics = Metrics::open(&path, 0).unwrap();
        for record in [train(1), train(2), evaluation(2), train(3), train(4), evaluation(4)] {
            metrics.write(&record).unwrap();
        }
        metrics.sync().unwrap();
        fs::write(&path, [fs::read(&path).unwrap().as_slice(), b"{\"kind\":\"tr"].concat())
            .unwrap();
        Metrics::open(&path, 4).unwrap();
        assert_eq!(read(&path).unwrap().len(), 6);
        Metrics::open(&path, 2).unwrap().write(&train(3)).unwrap();
        assert_eq!(read(&path).unwrap(), [train(1), train(2), evaluation(2), train(3)]);
        Metrics::open(&path, 0).unwrap();
        assert_eq!(read(&path).unwrap(), []);
    }

    #[test]
    fn a_malformed_line_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        fs::write(&path, "{\"kind\":\"train\"}\n").unwrap();
        let message = read(&path).unwrap_err().to_string();
        assert!(message.contains("metrics.jsonl: line 1: missing field `step`"), "{message}");
    }
}
