//! Documents as one stream of tokens: `bos document eos bos document eos …`.

use std::ops::Range;

use super::Vocabulary;
use crate::{Error, Result};

/// The tokens of a corpus and where its documents lie.
#[derive(Clone, Debug)]
pub struct Tokens {
    ids: Vec<u32>,
    ends: Vec<usize>,
    bytes: usize,
}

impl Tokens {
    /// Encodes documents, each between BOS and EOS.
    pub fn encode(documents: &[String], vocabulary: &Vocabulary) -> Result<Self> {
        let encoded = vocabulary.encode_all(documents)?;
        let mut ids = Vec::with_capacity(encoded.iter().map(|document| document.len() + 2).sum());
        let mut ends = Vec::with_capacity(encoded.len());
        for document in encoded {
            ids.push(vocabulary.bos());
            ids.extend(document);
            ids.push(vocabulary.eos());
            ends.push(ids.len());
        }
        Self::new(ids, ends, documents.iter().map(String::len).sum())
    }

    /// A stream of `ids` cut into documents that end before each of `ends`, of `bytes` bytes of text in all.
    pub fn new(ids: Vec<u32>, ends: Vec<usize>, bytes: usize) -> Result<Self> {
        let ascending = ends.iter().zip(ends.iter().skip(1)).all(|(left, right)| left < right);
        if ends.first().is_none_or(|&end| end == 0) || !ascending || ends.last() != Some(&ids.len())
        {
            return Err(Error::Dataset("document ends must ascend to the number of tokens".into()));
        }
        Ok(Self { ids, ends, bytes })
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Whether there are no tokens, which [`Tokens::new`] rules out.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// Number of documents.
    pub fn documents(&self) -> usize {
        self.ends.len()
    }

    /// Number of tokens of one document, BOS and EOS included.
    ///
    /// # Panics
    /// If there are not more than `index` documents.
    pub fn document_len(&self, index: usize) -> usize {
        self.range(index).len()
    }

    /// Appends the tokens `range` of one document to `ids`.
    ///
    /// # Panics
    /// If there are not more than `index` documents, or fewer tokens in it.
    pub fn read(&self, index: usize, range: Range<usize>, ids: &mut Vec<u32>) {
        ids.extend(&self.ids[self.range(index)][range]);
    }

    fn range(&self, index: usize) -> Range<usize> {
        let start = if index == 0 { 0 } else { self.ends[index - 1] };
        start..self.ends[index]
    }

    /// UTF-8 bytes of the documents: the denominator of nats per byte.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// A hash of the tokens (FNV-1a, 64 bits) that tells one dataset from another when a run resumes.
    pub fn fingerprint(&self) -> u64 {
        self.ids.iter().flat_map(|id| id.to_le_bytes()).fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_stand_between_bos_and_eos() {
        let documents = ["ab".to_owned(), "é".to_owned()];
        let vocabulary = Vocabulary::train(&documents, 260).unwrap();
        let tokens = Tokens::encode(&documents, &vocabulary).unwrap();
        assert_eq!((tokens.documents(), tokens.bytes()), (2, 4));
        for (index, text) in documents.iter().enumerate() {
            let mut document = Vec::new();
            tokens.read(index, 0..tokens.document_len(index), &mut document);
            assert_eq!((document.first(), document.last()), (Some(&0), Some(&1)));
            assert_eq!(vocabulary.decode(&document[1..document.len() - 1]).unwrap(), *text);
        }
        assert_eq!(tokens.len(), tokens.document_len(0) + tokens.document_len(1));
    }

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
