//! Shared memory of a block, and who touched it when: races and values that nobody wrote are errors.
//!
//! Two accesses to a word by different threads, one of them a write, must be ordered: by a barrier of the block between them,
//! or, within a warp, by an operation of the warp. Barriers are counted; equal counts mean no order. Of the reads of a word the
//! last one is remembered, the last one by another thread of its warp, and the last one by another warp: a race may go unseen
//! where a warp's operation ordered only some of its reads, but what is reported is one.

/// A thread at a time, counted in barriers of its block and operations of its warp.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct When {
    /// In the block.
    pub thread: usize,
    /// Barriers of the block before.
    pub barriers: u32,
    /// Operations of the warp before.
    pub warp: u32,
}

impl When {
    fn same_warp(self, other: Self) -> bool {
        self.thread / 32 == other.thread / 32
    }

    /// Whether nothing orders the two.
    fn races(self, other: Self) -> bool {
        self.thread != other.thread
            && self.barriers == other.barriers
            && !(self.same_warp(other) && self.warp != other.warp)
    }
}

#[derive(Clone, Copy, Default)]
struct Word {
    written: Option<When>,
    /// Last, by another thread of that warp, by another warp.
    read: [Option<When>; 3],
}

/// Shared memory of a block.
pub struct Shared {
    bytes: Vec<u8>,
    words: Vec<Word>,
}

impl Shared {
    /// `size` bytes that nobody wrote.
    pub fn new(size: usize) -> Self {
        Self { bytes: vec![0xff; size], words: vec![Word::default(); size.div_ceil(4)] }
    }

    /// Bytes to read.
    ///
    /// # Errors
    /// There are fewer; another thread may be writing there; or nobody has.
    pub fn read(&mut self, address: u64, size: usize, when: When) -> Result<&[u8], String> {
        let range = self.range(address, size)?;
        for at in range.start / 4..range.end.div_ceil(4) {
            let word = &mut self.words[at];
            match word.written {
                None => return Err(format!("shared word {at} is read, but was never written")),
                Some(write) if when.races(write) => {
                    return Err(race(at, "read", when, "written", write));
                }
                Some(_) => {}
            }
            let [last, warp, other] = &mut word.read;
            match *last {
                Some(before) if before.thread == when.thread => {}
                Some(before) if before.same_warp(when) => *warp = Some(before),
                Some(before) => (*other, *warp) = (Some(before), None),
                None => {}
            }
            *last = Some(when);
        }
        Ok(&self.bytes[range])
    }

    /// Bytes to write.
    ///
    /// # Errors
    /// There are fewer, or another thread may be reading or writing there.
    pub fn write(&mut self, address: u64, size: usize, when: When) -> Result<&mut [u8], String> {
        let range = self.range(address, size)?;
        for at in range.start / 4..range.end.div_ceil(4) {
            let word = &mut self.words[at];
            // Parts of a word are different places: only whole words are looked at.
            let whole = size >= 4;
            if let Some(write) = word.written.filter(|write| whole && when.races(*write)) {
                return Err(race(at, "written", when, "written", write));
            }
            if let Some(read) = word.read.iter().flatten().find(|read| whole && when.races(**read))
            {
                return Err(race(at, "written", when, "read", *read));
            }
            word.written = Some(when);
        }
        Ok(&mut self.bytes[range])
    }

    fn range(&self, address: u64, size: usize) -> Result<std::ops::Range<usize>, String> {
        let total = self.bytes.len();
        usize::try_from(address)
            .ok()
            .and_then(|first| Some(first..first.checked_add(size)?))
            .filter(|range| range.end <= total)
            .ok_or_else(|| {
                format!("{size} bytes at {address:#x} of shared memory, which has {total}")
            })
    }
}

fn race(word: usize, now: &str, when: When, before: &str, earlier: When) -> String {
    let (thread, other) = (when.thread, earlier.thread);
    format!(
        "a race: shared word {word} is {now} by thread {thread} and {before} by thread {other} with no barrier between"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(thread: usize, barriers: u32, warp: u32) -> When {
        When { thread, barriers, warp }
    }

    #[test]
    fn accesses_without_an_order_are_races() {
        let mut shared = Shared::new(16);
        assert!(shared.read(0, 4, at(0, 0, 0)).is_err(), "never written");
        shared.write(0, 4, at(1, 0, 0)).expect("first");
        assert!(shared.read(0, 4, at(2, 0, 0)).is_err(), "same warp, no operation between");
        assert!(shared.read(0, 4, at(2, 0, 1)).is_ok(), "an operation between");
        assert!(shared.read(0, 4, at(40, 0, 5)).is_err(), "another warp");
        for reader in [40, 2, 3, 70] {
            shared.read(0, 4, at(reader, 1, 0)).expect("a barrier between");
        }
        assert!(shared.write(0, 4, at(1, 1, 1)).is_err(), "read by other warps");
        assert!(shared.write(0, 4, at(1, 2, 1)).is_ok());
        assert!(shared.write(13, 4, at(1, 2, 1)).is_err(), "beyond the end");
    }
}
