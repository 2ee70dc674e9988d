//! Bytes that are made as they are read: parts of known lengths, one after the other.

use std::io;

/// The parts, and what each is made of.
#[derive(Debug)]
pub(super) struct Spans<T> {
    spans: Vec<Span<T>>,
    len: u64,
}

#[derive(Debug)]
struct Span<T> {
    /// The first byte.
    start: u64,
    bytes: u64,
    content: T,
}

impl<T> Default for Spans<T> {
    fn default() -> Self {
        Self { spans: Vec::new(), len: 0 }
    }
}

impl<T> Spans<T> {
    /// Adds a part behind the others, and says where it begins; `None` if they would be too many bytes.
    pub fn push(&mut self, bytes: u64, content: T) -> Option<u64> {
        let start = self.len;
        self.len = start.checked_add(bytes)?;
        self.spans.push(Span { start, bytes, content });
        Some(start)
    }

    /// Bytes in all.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Fills `buffer` from the bytes at `offset`, or fails when they end before. `fill` makes the bytes of a part from a place
    /// in it on.
    pub fn read_exact_at(
        &self,
        mut buffer: &mut [u8],
        offset: u64,
        mut fill: impl FnMut(&T, u64, &mut [u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let end = offset.checked_add(buffer.len() as u64);
        if end.is_none_or(|end| end > self.len) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut at = offset;
        let first = self.spans.partition_point(|span| span.start + span.bytes <= at);
        for span in &self.spans[first..] {
            if buffer.is_empty() {
                break;
            }
            let within = at - span.start;
            let here = (span.bytes - within).min(buffer.len() as u64) as usize;
            let (now, later) = buffer.split_at_mut(here);
            fill(&span.content, within, now)?;
            at += here as u64;
            buffer = later;
        }
        Ok(())
    }
}
