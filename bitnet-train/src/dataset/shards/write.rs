//! Documents → shards of bounded size.

use std::{
    fs::File,
    hash::Hasher,
    io::{BufWriter, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use super::{
    header::{HEADER_BYTES, Header, Identity},
    shard_name,
};
use crate::{Error, Result, fingerprint::Fnv};

/// Bytes of tokens at which a shard ends; a longer document makes a longer shard.
pub(in crate::dataset) const SHARD_BYTES: usize = 64 << 20;
/// Documents at which a shard ends: their entries, 16 bytes each, are in memory until it does.
const SHARD_DOCUMENTS: usize = 1 << 20;

/// Writes one set of shards into an empty folder.
#[derive(Debug)]
pub(in crate::dataset) struct Writer {
    dir: PathBuf,
    identity: Identity,
    limit: usize,
    hash: Fnv,
    written: usize,
    shard: Option<Shard>,
}

#[derive(Debug)]
struct Shard {
    path: PathBuf,
    file: BufWriter<File>,
    /// End in tokens and bytes of text of each document.
    entries: Vec<[u64; 2]>,
    tokens: u64,
    bytes: u64,
}

impl Writer {
    /// A shard ends at `limit` bytes of tokens.
    pub fn new(dir: &Path, identity: Identity, limit: usize) -> Self {
        let (dir, hash) = (dir.to_owned(), Fnv::default());
        Self { dir, identity, limit, hash, written: 0, shard: None }
    }

    /// Appends a document of `bytes` bytes of text.
    pub fn push(&mut self, ids: &[u32], bytes: usize) -> Result<()> {
        let is_full = |shard: &Shard| {
            shard.tokens as usize * self.identity.width >= self.limit
                || shard.entries.len() >= SHARD_DOCUMENTS
        };
        if let Some(shard) = self.shard.take_if(|shard| is_full(shard)) {
            self.close(shard, false)?;
        }
        let shard = match &mut self.shard {
            Some(shard) => shard,
            None => self.shard.insert(Shard::create(self.dir.join(shard_name(self.written)))?),
        };
        for &id in ids {
            self.hash.write_u32(id);
            let id = id.to_le_bytes();
            shard.file.write_all(&id[..self.identity.width]).map_err(Error::io(&shard.path))?;
        }
        shard.tokens += ids.len() as u64;
        shard.bytes += bytes as u64;
        shard.entries.push([shard.tokens, bytes as u64]);
        Ok(())
    }

    /// Ends the last shard; all of them are then on the disk.
    pub fn finish(&mut self) -> Result<()> {
        match self.shard.take() {
            Some(shard) => self.close(shard, true),
            None => Err(Error::Dataset("there is no document to write".into())),
        }
    }

    fn close(&mut self, shard: Shard, is_last: bool) -> Result<()> {
        let header = Header {
            width: self.identity.width,
            is_last,
            vocabulary: self.identity.vocabulary,
            source: self.identity.source,
            tokens: shard.tokens,
            documents: shard.entries.len() as u64,
            bytes: shard.bytes,
            hash: self.hash.finish(),
        };
        self.written += 1;
        let path = shard.path.clone();
        shard.close(header).map_err(Error::io(path))
    }
}

impl Shard {
    fn create(path: PathBuf) -> Result<Self> {
        let file = File::create(&path).map_err(Error::io(&path))?;
        let mut file = BufWriter::with_capacity(1 << 20, file);
        file.write_all(&[0; HEADER_BYTES]).map_err(Error::io(&path))?;
        Ok(Self { path, file, entries: Vec::new(), tokens: 0, bytes: 0 })
    }

    fn close(mut self, header: Header) -> std::io::Result<()> {
        for number in self.entries.iter().flatten() {
            self.file.write_all(&number.to_le_bytes())?;
        }
        self.file.seek(SeekFrom::Start(0))?;
        self.file.write_all(&header.to_bytes())?;
        self.file.flush()?;
        self.file.get_ref().sync_all()
    }
}
