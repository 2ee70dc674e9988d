//! The bytes of a file from the front: numbers and strings, none of which may claim more than the file has left.

use std::{io, path::Path};

use crate::{
    checkpoint::source::Source,
    error::{Error, Result},
};

/// Bytes read at a time.
const BUFFER_BYTES: u64 = 64 << 10;

/// Where reading stands.
pub(super) struct Reader<'a> {
    path: &'a Path,
    source: &'a Source,
    /// What was read last, and how much of it is used up.
    buffer: Vec<u8>,
    used: usize,
    /// The first byte behind the buffer.
    next: u64,
    end: u64,
}

impl<'a> Reader<'a> {
    /// From `at` to `end` or to the end of the file, whichever is first.
    pub fn new(path: &'a Path, source: &'a Source, at: u64, end: u64) -> Self {
        let end = end.min(source.len());
        Self { path, source, buffer: Vec::new(), used: 0, next: at.min(end), end }
    }

    /// Position in the file.
    pub fn position(&self) -> u64 {
        self.next - self.buffered()
    }

    /// Bytes left.
    pub fn left(&self) -> u64 {
        self.end - self.position()
    }

    /// An error about what stands here.
    pub fn malformed(&self, reason: impl Into<String>) -> Error {
        Error::Checkpoint { path: self.path.into(), reason: reason.into() }
    }

    /// The error of a read behind the end; `what` has `bytes`.
    fn short(&self, what: &str, bytes: u64) -> Error {
        self.malformed(format!(
            "{what} at byte {} takes {bytes} bytes, and there are {}: an incomplete download, or a damaged file",
            self.position(),
            self.left()
        ))
    }

    fn buffered(&self) -> u64 {
        (self.buffer.len() - self.used) as u64
    }

    /// The next `N` bytes, of `what`.
    pub fn bytes<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.fill(&mut bytes, what)?;
        Ok(bytes)
    }

    /// A u32.
    pub fn u32(&mut self, what: &str) -> Result<u32> {
        self.bytes(what).map(u32::from_le_bytes)
    }

    /// A u64.
    pub fn u64(&mut self, what: &str) -> Result<u64> {
        self.bytes(what).map(u64::from_le_bytes)
    }

    /// A string of UTF-8, with its length before it, of at most `max` bytes.
    pub fn string(&mut self, what: &str, max: u64) -> Result<String> {
        let len = self.u64(what)?;
        if len > self.left() {
            return Err(self.short(what, len));
        }
        if len > max {
            return Err(self.malformed(format!("{what} has {len} bytes; at most {max} are read")));
        }
        let mut bytes = vec![0; len as usize];
        self.fill(&mut bytes, what)?;
        String::from_utf8(bytes).map_err(|_| self.malformed(format!("{what} is not UTF-8")))
    }

    /// Passes over `len` bytes of `what`.
    pub fn skip(&mut self, len: u64, what: &str) -> Result<()> {
        if len > self.left() {
            return Err(self.short(what, len));
        }
        match self.buffered() {
            buffered if len <= buffered => self.used += len as usize,
            buffered => {
                self.next += len - buffered;
                (self.buffer, self.used) = (Vec::new(), 0);
            }
        }
        Ok(())
    }

    fn fill(&mut self, mut out: &mut [u8], what: &str) -> Result<()> {
        if out.len() as u64 > self.left() {
            return Err(self.short(what, out.len() as u64));
        }
        while !out.is_empty() {
            if self.buffered() == 0 {
                self.refill().map_err(Error::io(self.path))?;
            }
            let here = out.len().min(self.buffer.len() - self.used);
            let (now, later) = out.split_at_mut(here);
            now.copy_from_slice(&self.buffer[self.used..][..here]);
            self.used += here;
            out = later;
        }
        Ok(())
    }

    fn refill(&mut self) -> io::Result<()> {
        let len = BUFFER_BYTES.min(self.end - self.next);
        self.buffer.resize(len as usize, 0);
        self.used = 0;
        self.source.read_exact_at(&mut self.buffer, self.next)?;
        self.next += len;
        Ok(())
    }
}
