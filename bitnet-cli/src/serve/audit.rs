//! The audit log: a line of JSON for each request, written by a thread of its own, so that a slow or full disk holds up nobody.

use std::{
    fs::{File, OpenOptions},
    io::{self, ErrorKind, Write},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{self, SyncSender},
    },
    thread,
};

use anyhow::Context;
use serde_json::Value;

/// Lines that may wait for the disk.
const WAITING: usize = 4096;

/// Takes lines; clones write to the same file.
#[derive(Clone)]
pub struct Audit {
    lines: SyncSender<Message>,
    /// Whether the last line could be written.
    works: Arc<AtomicBool>,
}

enum Message {
    Line(String),
    /// Answered when all lines before are on the disk.
    Sync(SyncSender<()>),
}

impl Audit {
    /// Appends to `path`.
    ///
    /// # Errors
    /// A file that cannot be opened.
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        let mut options = OpenOptions::new();
        options.append(true).create(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600); // it says who asked when
        let file = options.open(path).with_context(|| format!("{}", path.display()))?;
        let (lines, receiver) = mpsc::sync_channel(WAITING);
        let works = Arc::new(AtomicBool::new(true));
        let (path, flag) = (path.display().to_string(), works.clone());
        thread::Builder::new()
            .name("audit".into())
            .spawn(move || write_all(file, &receiver, &path, &flag))?;
        Ok(Self { lines, works })
    }

    /// Takes a line, and says whether it is likely to be written: not if too many wait, or the disk took none lately.
    pub fn write(&self, line: &Value) -> bool {
        let taken = self.lines.try_send(Message::Line(format!("{line}\n"))).is_ok();
        taken && self.works.load(Ordering::Relaxed)
    }

    /// Waits until all lines so far are on the disk.
    pub fn sync(&self) {
        let (sender, receiver) = mpsc::sync_channel(1);
        if self.lines.send(Message::Sync(sender)).is_ok() {
            let _ = receiver.recv(); // the thread ends with the last handle only
        }
    }
}

fn write_all(mut file: File, lines: &mpsc::Receiver<Message>, path: &str, works: &AtomicBool) {
    let mut torn = false;
    for message in lines {
        let line = match message {
            Message::Line(line) => line,
            Message::Sync(done) => {
                let _ = file.sync_data();
                let _ = done.send(());
                continue;
            }
        };
        let written = append(&mut file, line, &mut torn);
        let worked = works.swap(written.is_ok(), Ordering::Relaxed);
        match written {
            Err(error) if worked => tracing::error!("{path}: {error}; the audit log has a gap"),
            Ok(()) if !worked => tracing::warn!("{path}: the audit log goes on"),
            _ => {}
        }
    }
}

/// Writes a line, on a new one if a full disk has torn the one before. One write for a line: appends of several processes don't
/// mix.
fn append(file: &mut impl Write, line: String, torn: &mut bool) -> io::Result<()> {
    let line = if *torn { format!("\n{line}") } else { line };
    let mut rest = line.as_bytes();
    while !rest.is_empty() {
        match file.write(rest) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(count) => {
                rest = &rest[count..];
                *torn = !rest.is_empty();
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes so many bytes and no more.
    struct Disk {
        bytes: Vec<u8>,
        room: usize,
    }

    impl Write for Disk {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let count = bytes.len().min(self.room);
            if count == 0 {
                return Err(ErrorKind::StorageFull.into());
            }
            self.bytes.extend(&bytes[..count]);
            self.room -= count;
            Ok(count)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_full_disk_tears_one_line_and_not_the_next() {
        let (mut disk, mut torn) = (Disk { bytes: Vec::new(), room: 6 }, false);
        append(&mut disk, "one\n".into(), &mut torn).unwrap();
        for line in ["two\n", "three\n"] {
            assert!(append(&mut disk, line.into(), &mut torn).is_err(), "{line}");
        }
        disk.room = 100;
        append(&mut disk, "four\n".into(), &mut torn).unwrap();
        append(&mut disk, "five\n".into(), &mut torn).unwrap();
        assert_eq!(String::from_utf8(disk.bytes).unwrap(), "one\ntw\nfour\nfive\n");
    }
}
