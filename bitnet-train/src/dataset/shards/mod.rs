//! Encoded documents on the disk: shard files that are mapped into memory, so that a corpus may be larger than it.
//!
//! ```text
//! shard-00000.tokens   header (64 bytes)
//!                      tokens, u16 while the vocabulary has no more than 65536 of them, else u32
//!                      for each document where it ends in the shard (u64, tokens) and the bytes of its text (u64)
//! shard-00001.tokens   …
//! ```
//! All numbers are little-endian. A set of shards is written to a hidden folder and then renamed: what has its name is
//! complete.

mod header;
mod write;

use std::{
    fs::{self, File},
    ops::Range,
    path::{Path, PathBuf},
};

use memmap2::Mmap;

use self::header::{HEADER_BYTES, Header};
pub(super) use self::{
    header::Identity,
    write::{SHARD_BYTES, Writer},
};
use crate::{Error, Result};

/// Bytes of a document's entry behind the tokens.
const ENTRY_BYTES: usize = 16;

/// The shards of one corpus.
#[derive(Debug)]
pub(super) struct Shards {
    shards: Vec<Shard>,
}

#[derive(Debug)]
struct Shard {
    map: Mmap,
    header: Header,
    /// Number of the first document.
    first: usize,
}

fn shard_name(index: usize) -> String {
    format!("shard-{index:05}.tokens")
}

impl Shards {
    /// Maps the set in `dir`, which `identity` was written with.
    ///
    /// # Errors
    /// A file that is no shard, is one of another set, or is damaged: it is named, and the folder may be deleted.
    pub fn open(dir: &Path, identity: Identity) -> Result<Self> {
        let (mut shards, mut first) = (Vec::new(), 0);
        loop {
            let path = dir.join(shard_name(shards.len()));
            let shard = Shard::open(&path, identity, first)?;
            first += shard.documents();
            let is_last = shard.header.is_last;
            shards.push(shard);
            if is_last {
                return Ok(Self { shards });
            }
        }
    }

    /// Number of documents.
    pub fn documents(&self) -> usize {
        self.shards.iter().map(Shard::documents).sum()
    }

    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        self.shards.iter().map(|shard| shard.header.tokens as usize).sum()
    }

    /// UTF-8 bytes of the documents.
    pub fn bytes(&self) -> usize {
        self.shards.iter().map(|shard| shard.header.bytes as usize).sum()
    }

    /// The hash of all tokens.
    pub fn fingerprint(&self) -> u64 {
        self.shards.last().map_or(0, |shard| shard.header.hash)
    }

    /// Number of tokens of one document, which exists.
    pub fn document_len(&self, index: usize) -> usize {
        let (shard, index) = self.find(index);
        shard.range(index).len()
    }

    /// UTF-8 bytes of one document, which exists.
    pub fn document_bytes(&self, index: usize) -> usize {
        let (shard, index) = self.find(index);
        shard.entry(index).1
    }

    /// Appends the tokens `range` of one document, which has them, to `ids`.
    pub fn read(&self, index: usize, range: Range<usize>, ids: &mut Vec<u32>) {
        let (shard, index) = self.find(index);
        let document = shard.range(index);
        assert!(range.end <= document.len(), "document {index} is shorter than {}", range.end);
        shard.read(document.start + range.start..document.start + range.end, ids);
    }

    fn find(&self, index: usize) -> (&Shard, usize) {
        let at = self.shards.partition_point(|shard| shard.first <= index) - 1;
        (&self.shards[at], index - self.shards[at].first)
    }
}

impl Shard {
    fn open(path: &Path, identity: Identity, first: usize) -> Result<Self> {
        let refuse = |reason: String| Error::Corpus { path: path.to_owned(), reason };
        let file = File::open(path).map_err(Error::io(path))?;
        // SAFETY: the map is read only. Shards are written under another name, renamed when complete and never written
        // again; whoever changes one in place while it is in use breaks what the module's documentation says.
        #[allow(unsafe_code)]
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io(path))?;
        let header = Header::read(&map, identity).map_err(refuse)?;
        let expected = (header.tokens as usize)
            .checked_mul(header.width)
            .zip((header.documents as usize).checked_mul(ENTRY_BYTES))
            .and_then(|(ids, entries)| ids.checked_add(entries)?.checked_add(HEADER_BYTES));
        if expected != Some(map.len()) {
            let reason = format!(
                "is {} bytes long, and not as its header says; delete its folder, it is written again",
                map.len()
            );
            return Err(refuse(reason));
        }
        let shard = Self { map, header, first };
        let mut end = 0;
        let ends_ascend = (0..shard.documents()).all(|index| {
            let before = std::mem::replace(&mut end, shard.entry(index).0);
            before < end
        });
        if !ends_ascend || end != header.tokens as usize {
            let reason = "its documents do not ascend; delete its folder, it is written again";
            return Err(refuse(reason.into()));
        }
        Ok(shard)
    }

    fn documents(&self) -> usize {
        self.header.documents as usize
    }

    /// Where a document ends, in tokens, and the bytes of its text.
    fn entry(&self, index: usize) -> (usize, usize) {
        let at =
            HEADER_BYTES + self.header.tokens as usize * self.header.width + index * ENTRY_BYTES;
        let number = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&self.map[at..at + 8]);
            u64::from_le_bytes(bytes) as usize
        };
        (number(at), number(at + 8))
    }

    fn range(&self, index: usize) -> Range<usize> {
        let start = if index == 0 { 0 } else { self.entry(index - 1).0 };
        start..self.entry(index).0
    }

    fn read(&self, range: Range<usize>, ids: &mut Vec<u32>) {
        let width = self.header.width;
        let bytes = &self.map[HEADER_BYTES + range.start * width..HEADER_BYTES + range.end * width];
        match width {
            2 => ids.extend(
                bytes.chunks_exact(2).map(|id| u32::from(u16::from_le_bytes([id[0], id[1]]))),
            ),
            _ => ids.extend(
                bytes.chunks_exact(4).map(|id| u32::from_le_bytes([id[0], id[1], id[2], id[3]])),
            ),
        }
    }
}

/// The set in `dir`, written by `fill` unless it is there. Another process that is writing it is waited for.
pub(super) fn open_or_write(
    dir: &Path,
    identity: Identity,
    fill: impl FnOnce(&mut Writer) -> Result<()>,
) -> Result<Shards> {
    let (parent, name) = match (dir.parent(), dir.file_name()) {
        (Some(parent), Some(name)) => (parent, name.to_string_lossy()),
        _ => return Err(Error::Input(format!("{}: is no folder for tokens", dir.display()))),
    };
    if dir.is_dir() {
        return Shards::open(dir, identity); // also where nothing can be written
    }
    fs::create_dir_all(parent).map_err(Error::io(parent))?;
    let lock_path = parent.join(format!(".{name}.lock"));
    let lock = File::create(&lock_path).map_err(Error::io(&lock_path))?;
    // A file system without locks leaves this process to write by itself.
    let _ = lock.lock();
    // Another process may have been faster.
    if !dir.is_dir() {
        let partial: PathBuf = parent.join(format!(".{name}.partial"));
        if partial.exists() {
            fs::remove_dir_all(&partial).map_err(Error::io(&partial))?; // of a process that was killed
        }
        fs::create_dir(&partial).map_err(Error::io(&partial))?;
        let mut writer = Writer::new(&partial, identity, SHARD_BYTES);
        if let Err(error) = fill(&mut writer).and_then(|()| writer.finish()) {
            // The disk may be full: give back what was taken. The first error is the one to report.
            let _ = fs::remove_dir_all(&partial);
            return Err(error);
        }
        fs::rename(&partial, dir).map_err(Error::io(dir))?;
    }
    Shards::open(dir, identity)
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDENTITY: Identity = Identity { vocabulary: 7, source: 8, width: 2 };

    fn write(dir: &Path, identity: Identity, limit: usize) {
        let mut writer = Writer::new(dir, identity, limit);
        for length in 1..=20u32 {
            writer.push(&Vec::from_iter(0..length), length as usize * 3).unwrap();
        }
        writer.finish().unwrap();
    }

    #[test]
    fn what_is_written_is_read_whatever_the_shards_are() {
        let fingerprints = [(2, 1 << 20), (2, 60), (4, 1), (4, 100)].map(|(width, limit)| {
            let dir = tempfile::tempdir().unwrap();
            let identity = Identity { width, ..IDENTITY };
            write(dir.path(), identity, limit);
            let shards = Shards::open(dir.path(), identity).unwrap();
            assert_eq!((shards.documents(), shards.tokens(), shards.bytes()), (20, 210, 630));
            for index in 0..20 {
                assert_eq!(shards.document_len(index), index + 1);
                assert_eq!(shards.document_bytes(index), 3 * (index + 1));
                let mut ids = Vec::new();
                shards.read(index, index / 2..index + 1, &mut ids);
                assert_eq!(ids, Vec::from_iter(index as u32 / 2..index as u32 + 1));
            }
            shards.fingerprint()
        });
        assert!(fingerprints.iter().all(|&fingerprint| fingerprint == fingerprints[0]));
    }

    #[test]
    fn damage_and_other_sets_are_named() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), IDENTITY, 60);
        let message = |identity| Shards::open(dir.path(), identity).unwrap_err().to_string();
        for (identity, reason) in [
            (Identity { vocabulary: 1, ..IDENTITY }, "another vocabulary"),
            (Identity { source: 1, ..IDENTITY }, "other text"),
        ] {
            let message = message(identity);
            assert!(
                message.contains("shard-00000.tokens") && message.contains(reason),
                "{message}"
            );
        }
        let path = dir.path().join(shard_name(1));
        let whole = fs::read(&path).unwrap();
        let mut far = whole.clone();
        far[32..40].copy_from_slice(&u64::MAX.to_le_bytes());
        let mut unsorted = whole.clone();
        let entry = unsorted.len() - ENTRY_BYTES;
        unsorted[entry..entry + 8].copy_from_slice(&0u64.to_le_bytes());
        for (bytes, reason) in [
            (&whole[..whole.len() - 1], "as its header says"),
            (&whole[..40], "40 bytes"),
            (&far, "as its header says"),
            (&unsorted, "do not ascend"),
            (&[0; 100], "no shard"),
        ] {
            fs::write(&path, bytes).unwrap();
            let message = message(IDENTITY);
            assert!(
                message.contains("shard-00001.tokens") && message.contains(reason),
                "{message}"
            );
        }
        fs::remove_file(&path).unwrap();
        assert!(message(IDENTITY).contains("shard-00001.tokens"));
    }

    #[test]
    fn a_set_is_written_once_and_only_as_a_whole() {
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join("set");
        let failed = open_or_write(&dir, IDENTITY, |writer| {
            writer.push(&[1], 1)?;
            Err(Error::Dataset("the disk is full".into()))
        });
        assert!(failed.unwrap_err().to_string().contains("full") && !dir.exists());
        fs::create_dir(parent.path().join(".set.partial")).unwrap();
        fs::write(parent.path().join(".set.partial/shard-00000.tokens"), "half").unwrap();
        open_or_write(&dir, IDENTITY, |writer| writer.push(&[1, 2], 1)).unwrap();
        let again = open_or_write(&dir, IDENTITY, |_| panic!("it is there")).unwrap();
        assert_eq!(again.tokens(), 2);
        assert!(!parent.path().join(".set.partial").exists());
    }
}
