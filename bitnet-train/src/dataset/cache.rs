//! Vocabulary and tokens on the disk, so that a corpus is read and encoded once.
//!
//! ```text
//! CACHE/vocabulary-<key>.json   trained on these files, at this size
//!       <key>/shard-00000.tokens …
//! ```
//! A key is the fingerprint of what the content follows from: another file, setting or vocabulary has another key, and
//! what was written for it is not touched.

use std::{
    fs,
    hash::Hasher,
    ops::ControlFlow,
    path::{Path, PathBuf},
};

use bitnet_model::checkpoint::write_atomic;

use super::{
    Progress, Stage, Tokens, Vocabulary,
    corpus::{Corpus, Document},
    sample::Sample,
    shards::{Identity, SHARD_BYTES, Writer, open_or_write},
    split::Split,
};
use crate::{Error, Result, fingerprint::Fnv};

/// A vocabulary is trained on at most this much text: more changes it little and takes memory.
const SAMPLE_BYTES: usize = 64 << 20;
/// Text encoded at a time, by all threads; between two of these progress is told.
const BATCH_BYTES: usize = 4 << 20;

/// A folder of vocabularies and tokens.
pub(super) struct Cache<'a> {
    dir: PathBuf,
    observe: &'a mut dyn FnMut(Progress) -> ControlFlow<()>,
    /// What was asked for, by file name.
    used: Vec<String>,
}

impl<'a> Cache<'a> {
    /// Creates the folder if need be.
    pub fn open(
        dir: &Path,
        observe: &'a mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<Self> {
        fs::create_dir_all(dir).map_err(Error::io(dir))?;
        Ok(Self { dir: dir.to_owned(), observe, used: Vec::new() })
    }

    /// The vocabulary of `size` tokens trained on the documents of `corpus` that are not held out.
    pub fn vocabulary(
        &mut self,
        corpus: &Corpus,
        size: usize,
        split: Option<Split>,
    ) -> Result<Vocabulary> {
        let mut hash = Fnv::default();
        hash.write_u64(corpus.fingerprint());
        hash.write_u64(size as u64);
        hash.write_u64(SAMPLE_BYTES as u64);
        if let Some(Split { share, seed }) = split {
            hash.write_u64(share.to_bits());
            hash.write_u64(seed);
        }
        let name = format!("vocabulary-{:016x}.json", hash.finish());
        let path = self.dir.join(&name);
        self.used.push(name);
        if path.is_file() {
            return Vocabulary::from_file(&path);
        }
        let mut sample = Sample::new(SAMPLE_BYTES);
        let total = corpus.bytes();
        let mut told = 0;
        corpus.read(&mut |Document { index, text, read }| {
            if split.is_none_or(|split| !split.holds_out(index)) {
                sample.offer(index, text);
            }
            if read - told >= BATCH_BYTES as u64 {
                told = read;
                tell(self.observe, Progress { stage: Stage::Vocabulary, done: read, total })?;
            }
            Ok(ControlFlow::Continue(()))
        })?;
        tell(self.observe, Progress { stage: Stage::Vocabulary, done: total, total })?;
        let vocabulary = Vocabulary::train(&sample.into_texts(), size)?;
        write_atomic(&path, vocabulary.to_json()?.as_bytes())?;
        Ok(vocabulary)
    }

    /// The tokens of the documents of `corpus`: of its first `limit` bytes of text, a few less if that would cut a
    /// character.
    pub fn tokens(
        &mut self,
        corpus: &Corpus,
        vocabulary: &Vocabulary,
        limit: Option<usize>,
        stage: Stage,
    ) -> Result<Tokens> {
        let mut source = Fnv::default();
        source.write_u64(corpus.fingerprint());
        source.write_u64(limit.map_or(u64::MAX, |limit| limit as u64));
        let identity = Identity {
            vocabulary: vocabulary.fingerprint()?,
            source: source.finish(),
            width: if vocabulary.size() <= 1 << 16 { 2 } else { 4 },
        };
        let mut key = Fnv::default();
        for number in [identity.vocabulary, identity.source, SHARD_BYTES as u64] {
            key.write_u64(number);
        }
        let name = format!("{:016x}", key.finish());
        let dir = self.dir.join(&name);
        self.used.push(name);
        let shards = open_or_write(&dir, identity, |writer| {
            let mut encoder = Encoder { vocabulary, writer, texts: Vec::new(), bytes: 0 };
            let (total, mut left) = (corpus.bytes(), limit.unwrap_or(usize::MAX));
            corpus.read(&mut |Document { mut text, read, .. }| {
                let is_last = text.len() >= left;
                let end = (0..=left.min(text.len())).rev().find(|&end| text.is_char_boundary(end));
                text.truncate(end.unwrap_or(0));
                left -= text.len();
                if !text.is_empty() && encoder.push(text)? {
                    tell(self.observe, Progress { stage, done: read, total })?;
                }
                Ok(if is_last { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
            })?;
            encoder.flush()?;
            tell(self.observe, Progress { stage, done: total, total })
        })?;
        Tokens::mapped(shards)
    }

    /// Deletes what was not asked for: the folder belongs to one run.
    pub fn clear_unused(&self) -> Result<()> {
        for entry in fs::read_dir(&self.dir).map_err(Error::io(&self.dir))? {
            let entry = entry.map_err(Error::io(&self.dir))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let path = entry.path();
            if self.used.contains(&name) {
                continue;
            }
            // What a killed process left of text or a vocabulary that are no longer asked for.
            let left = name.strip_prefix('.').and_then(|rest| rest.strip_suffix(".partial"));
            if left.is_some_and(|key| self.used.iter().any(|used| used == key)) {
                continue;
            }
            let is_key = |key: &str| key.len() == 16 && u64::from_str_radix(key, 16).is_ok();
            let vocabulary =
                name.strip_prefix("vocabulary-").and_then(|rest| rest.strip_suffix(".json"));
            if is_key(left.unwrap_or(&name)) && path.is_dir() {
                fs::remove_dir_all(&path).map_err(Error::io(&path))?;
            } else if vocabulary.is_some_and(is_key) {
                fs::remove_file(&path).map_err(Error::io(&path))?;
            }
        }
        Ok(())
    }
}

fn tell(observe: &mut dyn FnMut(Progress) -> ControlFlow<()>, progress: Progress) -> Result<()> {
    match observe(progress) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(Error::Interrupted),
    }
}

/// Documents on their way to a [`Writer`], encoded in batches by all threads.
struct Encoder<'a> {
    vocabulary: &'a Vocabulary,
    writer: &'a mut Writer,
    texts: Vec<String>,
    bytes: usize,
}

impl Encoder<'_> {
    /// Takes a document and says whether a batch was written.
    fn push(&mut self, text: String) -> Result<bool> {
        self.bytes += text.len();
        self.texts.push(text);
        let is_full = self.bytes >= BATCH_BYTES;
        if is_full {
            self.flush()?;
        }
        Ok(is_full)
    }

    fn flush(&mut self) -> Result<()> {
        let mut document = Vec::new();
        for (text, ids) in self.texts.iter().zip(self.vocabulary.encode_all(&self.texts)?) {
            document.clear();
            document.push(self.vocabulary.bos());
            document.extend(ids);
            document.push(self.vocabulary.eos());
            self.writer.push(&document, text.len())?;
        }
        self.texts.clear();
        self.bytes = 0;
        Ok(())
    }
}
