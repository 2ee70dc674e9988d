//! Event files for TensorBoard: the numbers of `metrics.jsonl` as scalars.
//!
//! A file is a sequence of frames: length (u64, little-endian), masked CRC-32C of the length, a protocol buffer
//! `Event`, masked CRC-32C of that (TensorFlow's `record_writer.h`). Of `Event` three fields are written, in this
//! order: `wall_time` (1, double), `step` (2, varint) and either `file_version` (3) or `summary` (5), which holds a
//! `Value` (1) of `tag` (1, string) and `simple_value` (2, float) for every number.
//!
//! A run has one file of a fixed name. A resumed run cuts it after the last event of the step it resumes from, as
//! it does with the metrics: no point is there twice, and none is missing.

use std::{
    fs::{self, File, OpenOptions},
    io::{BufWriter, Write},
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use crate::{Error, Result, metrics::Record};

/// TensorBoard takes every file whose name contains `tfevents`.
const FILE: &str = "events.out.tfevents.0.bitnet";

/// What the first event has to say.
const VERSION: &[u8] = b"brain.Event:2";

const WALL_TIME: u8 = 0x09; // field 1, 64 bits
const STEP: u8 = 0x10; // field 2, varint
const FILE_VERSION: u8 = 0x1a; // field 3, bytes
const SUMMARY: u8 = 0x2a; // field 5, bytes
const VALUE: u8 = 0x0a; // Summary: field 1, bytes
const TAG: u8 = 0x0a; // Value: field 1, bytes
const SIMPLE_VALUE: u8 = 0x15; // Value: field 2, 32 bits

/// An event file open at its end.
#[derive(Debug)]
pub struct EventFile {
    path: PathBuf,
    file: BufWriter<File>,
}

impl EventFile {
    /// Starts the file of the folder `dir`, or continues it after `step`. One that has no event of a run under way
    /// starts with the `records` so far.
    ///
    /// # Errors
    /// A file that cannot be read or written.
    pub fn open(dir: &Path, step: usize, records: &[Record]) -> Result<Self> {
        let path = dir.join(FILE);
        let mut kept = 0;
        let mut last = None;
        if step > 0 && path.exists() {
            let bytes = fs::read(&path).map_err(Error::io(&path))?;
            for event in (Frames { rest: &bytes }) {
                match step_of(event) {
                    Some(of_event) if of_event <= step as u64 => last = Some(of_event),
                    _ => break,
                }
                kept += frame_len(event);
            }
        }
        let is_whole = last == records.last().map(|record| record.step() as u64) && kept > 0;
        if !is_whole {
            kept = 0;
        }
        let open = || {
            let file = OpenOptions::new().create(true).append(true).open(&path)?;
            file.set_len(kept as u64)?;
            Ok(file)
        };
        let file = BufWriter::new(open().map_err(Error::io(&path))?);
        let mut events = Self { path, file };
        if kept == 0 {
            events.append(&event(0, FILE_VERSION, VERSION))?;
            records.iter().try_for_each(|record| events.append(&of_record(record)))?;
            events.flush()?;
        }
        Ok(events)
    }

    /// Appends the numbers of a record, which a reader sees at once.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn write(&mut self, record: &Record) -> Result<()> {
        self.append(&of_record(record))?;
        self.flush()
    }

    /// Waits until all events are on the disk.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn sync(&mut self) -> Result<()> {
        self.file.get_ref().sync_data().map_err(Error::io(&self.path))
    }

    fn append(&mut self, event: &[u8]) -> Result<()> {
        let length = (event.len() as u64).to_le_bytes();
        let parts = [&length[..], &masked_crc(&length), event, &masked_crc(event)];
        self.file.write_all(&parts.concat()).map_err(Error::io(&self.path))
    }

    fn flush(&mut self) -> Result<()> {
        self.file.flush().map_err(Error::io(&self.path))
    }
}

fn of_record(record: &Record) -> Vec<u8> {
    let mut summary = Vec::new();
    for (name, value) in record.scalars() {
        let mut scalar = Vec::new();
        put_bytes(&mut scalar, TAG, name.as_bytes());
        scalar.push(SIMPLE_VALUE);
        scalar.extend((value as f32).to_le_bytes());
        put_bytes(&mut summary, VALUE, &scalar);
    }
    event(record.step() as u64, SUMMARY, &summary)
}

fn event(step: u64, what: u8, content: &[u8]) -> Vec<u8> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    let mut event = vec![WALL_TIME];
    event.extend(now.to_le_bytes());
    event.push(STEP);
    put_varint(&mut event, step);
    put_bytes(&mut event, what, content);
    event
}

fn put_bytes(out: &mut Vec<u8>, key: u8, bytes: &[u8]) {
    out.push(key);
    put_varint(out, bytes.len() as u64);
    out.extend(bytes);
}

/// Seven bits a byte, the lowest first; the top bit says that more follow.
fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// The step of an event that [`event`] made.
fn step_of(event: &[u8]) -> Option<u64> {
    let [WALL_TIME, _, _, _, _, _, _, _, _, STEP, varint @ ..] = event else { return None };
    let end = varint.iter().position(|byte| byte & 0x80 == 0)?;
    let bits = |(i, &byte): (usize, &u8)| u64::from(byte & 0x7f).checked_shl(7 * i as u32);
    varint[..=end].iter().enumerate().map(bits).try_fold(0, |step, bits| Some(step | bits?))
}

/// The checksum of TFRecord files: CRC-32C, rotated and offset because it is stored beside what it covers.
fn masked_crc(bytes: &[u8]) -> [u8; 4] {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
}

/// Bytes of the frame around `event`.
fn frame_len(event: &[u8]) -> usize {
    8 + 4 + event.len() + 4
}

/// The events of a file up to the first frame that is cut short or damaged.
struct Frames<'a> {
    rest: &'a [u8],
}

impl<'a> Iterator for Frames<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        let (length, rest) = self.rest.split_first_chunk::<8>()?;
        let (length_crc, rest) = rest.split_first_chunk::<4>()?;
        let (event, rest) =
            rest.split_at_checked(usize::try_from(u64::from_le_bytes(*length)).ok()?)?;
        let (event_crc, rest) = rest.split_first_chunk::<4>()?;
        self.rest = rest;
        (masked_crc(length) == *length_crc && masked_crc(event) == *event_crc).then_some(event)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::TrainRecord;

    fn record(step: usize) -> Record {
        Record::Train(TrainRecord { step, loss: 2.5, ..TrainRecord::default() })
    }

    fn steps(dir: &Path) -> Vec<u64> {
        let bytes = fs::read(dir.join(FILE)).unwrap();
        let steps: Vec<u64> =
            Frames { rest: &bytes }.map(|event| step_of(event).unwrap()).collect();
        assert_eq!(Frames { rest: &bytes }.map(frame_len).sum::<usize>(), bytes.len());
        steps
    }

    #[test]
    fn the_checksum_is_the_published_one() {
        // The CRC-32C check value, and its mask as in leveldb's crc32c_test.cc.
        assert_eq!(crc32c::crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(masked_crc(b"123456789"), 0xc78a_b0e5_u32.to_le_bytes());
    }

    #[test]
    fn an_event_is_the_published_protocol_buffer() {
        let event = of_record(&record(300));
        assert_eq!(event[9..12], [0x10, 0xac, 0x02]); // step 300
        let loss = b"\x0a\x11\x0a\x0atrain/loss\x15\x00\x00\x20\x40";
        assert!(event.windows(loss.len()).any(|window| window == loss), "{event:?}");
    }

    #[test]
    fn a_resumed_file_has_every_step_once() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let mut events = EventFile::open(dir, 0, &[]).unwrap();
        (1..=300).for_each(|step| events.write(&record(step)).unwrap());
        events.sync().unwrap();
        drop(events);
        let all: Vec<u64> = (0..=300).collect();
        assert_eq!(steps(dir), all);
        // A process that dies leaves half a frame.
        let whole = fs::read(dir.join(FILE)).unwrap();
        fs::write(dir.join(FILE), &whole[..whole.len() - 7]).unwrap();
        let records: Vec<Record> = (1..=200).map(record).collect();
        let mut events = EventFile::open(dir, 200, &records).unwrap();
        assert_eq!(
            fs::read(dir.join(FILE)).unwrap(),
            whole[..fs::metadata(dir.join(FILE)).unwrap().len() as usize]
        );
        (201..=300).for_each(|step| events.write(&record(step)).unwrap());
        assert_eq!(steps(dir), all);
        // One that is damaged, or was not written so far, is made again.
        for damaged in [&b""[..], b"not an event file"] {
            fs::write(dir.join(FILE), damaged).unwrap();
            EventFile::open(dir, 200, &records).unwrap();
            assert_eq!(steps(dir), all[..=200]);
        }
        EventFile::open(dir, 0, &[]).unwrap();
        assert_eq!(steps(dir), [0]);
    }
}
