//! Documents as tokens: `bos document eos` each, in memory or in mapped shards.

use std::{hash::Hasher, ops::Range, sync::Arc};

use super::{shards::Shards, split::Split};
use crate::{Error, Result, fingerprint::Fnv};

/// The documents of a corpus, or some of them. A copy shares their tokens.
#[derive(Clone, Debug)]
pub struct Tokens {
    store: Store,
    /// Numbers in the store of the documents that count; all of them if absent.
    selection: Option<Arc<[u32]>>,
    len: usize,
    bytes: usize,
    fingerprint: u64,
}

#[derive(Clone, Debug)]
enum Store {
    /// Tokens, and where the documents end.
    Memory(Arc<(Vec<u32>, Vec<usize>)>),
    Mapped(Arc<Shards>),
}

impl Tokens {
    /// A stream of `ids` cut into documents that end before each of `ends`, of `bytes` bytes of text in all.
    pub fn new(ids: Vec<u32>, ends: Vec<usize>, bytes: usize) -> Result<Self> {
        let ascending = ends.iter().zip(ends.iter().skip(1)).all(|(left, right)| left < right);
        if ends.first().is_none_or(|&end| end == 0) || !ascending || ends.last() != Some(&ids.len())
        {
            return Err(Error::Dataset("document ends must ascend to the number of tokens".into()));
        }
        let mut hash = Fnv::default();
        ids.iter().for_each(|&id| hash.write_u32(id));
        let (len, fingerprint) = (ids.len(), hash.finish());
        let store = Store::Memory(Arc::new((ids, ends)));
        Self { store, selection: None, len, bytes, fingerprint }.counted()
    }

    /// All documents of `shards`.
    pub(super) fn mapped(shards: Shards) -> Result<Self> {
        let (len, bytes, fingerprint) = (shards.tokens(), shards.bytes(), shards.fingerprint());
        let store = Store::Mapped(Arc::new(shards));
        Self { store, selection: None, len, bytes, fingerprint }.counted()
    }

    fn counted(self) -> Result<Self> {
        match u32::try_from(self.documents()) {
            Ok(_) => Ok(self),
            Err(_) => {
                let most = u32::MAX;
                let reason =
                    format!("{} documents are more than {most}; join some", self.documents());
                Err(Error::Dataset(reason))
            }
        }
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no tokens, which [`Tokens::new`] rules out.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Number of documents.
    pub fn documents(&self) -> usize {
        match (&self.selection, &self.store) {
            (Some(selection), _) => selection.len(),
            (None, Store::Memory(memory)) => memory.1.len(),
            (None, Store::Mapped(shards)) => shards.documents(),
        }
    }

    /// Number of tokens of one document, BOS and EOS included.
    ///
    /// # Panics
    /// If there are not more than `index` documents.
    pub fn document_len(&self, index: usize) -> usize {
        let stored = self.stored(index);
        match &self.store {
            Store::Memory(memory) => range(&memory.1, stored).len(),
            Store::Mapped(shards) => shards.document_len(stored),
        }
    }

    /// Appends the tokens `range` of one document to `ids`.
    ///
    /// # Panics
    /// If there are not more than `index` documents, or fewer tokens in it.
    pub fn read(&self, index: usize, part: Range<usize>, ids: &mut Vec<u32>) {
        let stored = self.stored(index);
        match &self.store {
            Store::Memory(memory) => ids.extend(&memory.0[range(&memory.1, stored)][part]),
            Store::Mapped(shards) => shards.read(stored, part, ids),
        }
    }

    /// UTF-8 bytes of the documents: the denominator of nats per byte.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// A hash of the tokens (FNV-1a, 64 bits; of those of the whole corpus and of the choice, if it is a part) that
    /// tells one dataset from another when a run resumes.
    pub fn fingerprint(&self) -> u64 {
        self.fingerprint
    }

    /// The documents that are trained on, and those that are held out: of these the first, of about `limit` bytes.
    pub(super) fn split(&self, split: Split, limit: Option<usize>) -> Result<(Self, Self)> {
        let (mut train, mut held_out, mut bytes) = (Vec::new(), Vec::new(), 0);
        let mut found = false;
        for index in 0..self.documents() {
            // `counted` made sure that they can be counted.
            match split.holds_out(index) {
                true if limit.is_none_or(|limit| bytes < limit) => {
                    bytes += self.document_bytes(index);
                    held_out.push(index as u32);
                }
                true => {}
                false => train.push(index as u32),
            }
            found = !train.is_empty() && !held_out.is_empty();
        }
        if !found {
            let reason = format!(
                "leaves {} documents to train on and {} to evaluate on; change it, or cut the text into more documents",
                train.len(),
                held_out.len()
            );
            return Err(Error::recipe("data.validation_split", reason));
        }
        Ok((self.select(train), self.select(held_out)))
    }

    /// The documents with these numbers of a set that was not selected from.
    fn select(&self, selection: Vec<u32>) -> Self {
        let mut hash = Fnv::default();
        hash.write_u64(self.fingerprint);
        selection.iter().for_each(|&index| hash.write_u32(index));
        let (mut len, mut bytes) = (0, 0);
        for &index in &selection {
            len += self.document_len(index as usize);
            bytes += self.document_bytes(index as usize);
        }
        let (store, fingerprint) = (self.store.clone(), hash.finish());
        Self { store, selection: Some(selection.into()), len, bytes, fingerprint }
    }

    /// UTF-8 bytes of one document; in memory they are not told apart and counted as tokens.
    fn document_bytes(&self, index: usize) -> usize {
        match &self.store {
            Store::Memory(_) => self.document_len(index),
            Store::Mapped(shards) => shards.document_bytes(self.stored(index)),
        }
    }

    fn stored(&self, index: usize) -> usize {
        self.selection.as_ref().map_or(index, |selection| selection[index] as usize)
    }
}

fn range(ends: &[usize], index: usize) -> Range<usize> {
    let start = if index == 0 { 0 } else { ends[index - 1] };
    start..ends[index]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contradictory_ends_are_refused() {
        for ends in [vec![], vec![0], vec![2], vec![2, 2, 3], vec![3, 2], vec![0, 3]] {
            assert!(Tokens::new(vec![1, 2, 3], ends.clone(), 3).is_err(), "{ends:?}");
        }
    }

    #[test]
    fn the_fingerprint_depends_on_every_token() {
        let fingerprint =
            |ids: [u32; 3]| Tokens::new(ids.into(), vec![3], 3).unwrap().fingerprint();
        assert_eq!(fingerprint([1, 2, 3]), fingerprint([1, 2, 3]));
        assert_ne!(fingerprint([1, 2, 3]), fingerprint([1, 3, 2]));
    }
}
