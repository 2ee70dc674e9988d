//! Examples as tokens, in memory: sets of instructions are small.

use std::{hash::Hasher, sync::Arc};

use crate::{Error, Result, fingerprint::Fnv};

/// A text of which some tokens are trained.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Example {
    /// Its tokens.
    pub ids: Vec<u32>,
    /// Which of them the model learns to predict.
    pub trained: Vec<bool>,
    /// UTF-8 bytes of the text of the trained tokens, special ones aside.
    pub bytes: usize,
}

/// An [`Example`] of a set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExampleRef<'a> {
    /// Its tokens, at least two.
    pub ids: &'a [u32],
    /// Which of them are trained; never the first, which nothing predicts.
    pub trained: &'a [bool],
}

/// A set of examples. A copy shares their tokens.
#[derive(Clone, Debug)]
pub struct Examples {
    store: Arc<Store>,
    fingerprint: u64,
}

#[derive(Debug, Default)]
struct Store {
    ids: Vec<u32>,
    trained: Vec<bool>,
    ends: Vec<usize>,
    longest: usize,
    labels: usize,
    bytes: usize,
}

impl Examples {
    /// The set of `examples`, each of at least two tokens, of which at least one after the first is trained. That the
    /// first one is trained is overlooked.
    ///
    /// # Errors
    /// No example; one that does not train; more than 2³² − 1.
    pub fn new(examples: impl IntoIterator<Item = Example>) -> Result<Self> {
        let mut store = Store::default();
        let mut hash = Fnv::default();
        for Example { ids, mut trained, bytes } in examples {
            if let Some(first) = trained.first_mut() {
                *first = false;
            }
            let labels = trained.iter().filter(|&&is_trained| is_trained).count();
            if ids.len() != trained.len() || labels == 0 {
                let reason = format!("example {} trains no token", store.ends.len());
                return Err(Error::Dataset(reason));
            }
            hash.write_u64(ids.len() as u64);
            for (&id, &is_trained) in ids.iter().zip(&trained) {
                hash.write_u32(id);
                hash.write_u8(is_trained.into());
            }
            store.longest = store.longest.max(ids.len());
            store.ids.extend(ids);
            store.trained.extend(trained);
            store.ends.push(store.ids.len());
            store.labels += labels;
            store.bytes += bytes;
        }
        if store.ends.is_empty() {
            return Err(Error::Dataset("there is no example in it".into()));
        }
        if u32::try_from(store.ends.len()).is_err() {
            let count = store.ends.len();
            return Err(Error::Dataset(format!("{count} examples are more than {}", u32::MAX)));
        }
        Ok(Self { store: Arc::new(store), fingerprint: hash.finish() })
    }

    /// Number of examples.
    pub fn len(&self) -> usize {
        self.store.ends.len()
    }

    /// Whether there is no example, which [`Examples::new`] rules out.
    pub fn is_empty(&self) -> bool {
        self.store.ends.is_empty()
    }

    /// One example.
    ///
    /// # Panics
    /// If there are not more than `index`.
    pub fn get(&self, index: usize) -> ExampleRef<'_> {
        let ends = &self.store.ends;
        let range = (if index == 0 { 0 } else { ends[index - 1] })..ends[index];
        ExampleRef { ids: &self.store.ids[range.clone()], trained: &self.store.trained[range] }
    }

    /// Tokens of all examples.
    pub fn tokens(&self) -> usize {
        self.store.ids.len()
    }

    /// Tokens that are trained, of all examples.
    pub fn labels(&self) -> usize {
        self.store.labels
    }

    /// Tokens of the longest example.
    pub fn longest(&self) -> usize {
        self.store.longest
    }

    /// UTF-8 bytes of what is trained: the denominator of nats per byte.
    pub fn bytes(&self) -> usize {
        self.store.bytes
    }

    /// A hash of the tokens and of which are trained (FNV-1a, 64 bits), that tells one set from another when a run
    /// resumes.
    pub fn fingerprint(&self) -> u64 {
        self.fingerprint
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example(ids: &[u32], trained: &[bool]) -> Example {
        Example { ids: ids.into(), trained: trained.into(), bytes: 2 }
    }

    #[test]
    fn examples_are_kept_as_they_are_but_for_the_first_token() {
        let set = [example(&[5, 6, 7], &[true, false, true]), example(&[8, 9], &[false, true])];
        let examples = Examples::new(set).unwrap();
        assert_eq!((examples.len(), examples.tokens(), examples.labels()), (2, 5, 2));
        assert_eq!((examples.longest(), examples.bytes()), (3, 4));
        assert_eq!(examples.get(0).trained, [false, false, true]);
        assert_eq!(examples.get(1).ids, [8, 9]);
    }

    #[test]
    fn what_cannot_train_is_refused() {
        let message =
            |examples: &[Example]| Examples::new(examples.iter().cloned()).unwrap_err().to_string();
        assert!(message(&[]).contains("no example"));
        let good = example(&[1, 2], &[false, true]);
        for bad in [
            example(&[1, 2], &[true, false]),
            example(&[1], &[true]),
            example(&[1, 2], &[true]),
            Example::default(),
        ] {
            assert!(message(&[good.clone(), bad]).contains("example 1 trains no token"));
        }
    }

    #[test]
    fn the_fingerprint_tells_sets_apart() {
        let fingerprint =
            |examples: &[Example]| Examples::new(examples.iter().cloned()).unwrap().fingerprint();
        let all = fingerprint(&[example(&[1, 2, 3, 4], &[false, true, true, true])]);
        let some = fingerprint(&[example(&[1, 2, 3, 4], &[false, false, true, true])]);
        let two = [example(&[1, 2], &[false, true]), example(&[3, 4], &[false, true])];
        assert_ne!(all, some);
        assert_ne!(all, fingerprint(&two));
        assert_eq!(fingerprint(&two), fingerprint(&two.clone()));
    }
}
