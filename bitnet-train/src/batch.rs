//! Tokens → batches of windows.
//!
//! A window is `sequence_length + 1` tokens: all but the last are the model's input, all but the first its labels.
//! [`Batches`] draws training windows, every epoch in another order; the batch at a [`Position`] depends on the seed
//! and the position alone, so a run resumes exactly. [`validation_windows`] covers every token of a set once, in order.

use rand::{Rng, SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::{Error, Result, dataset::Tokens, loss::IGNORED};

/// Inputs and labels of one forward pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// `(batch, seq)` row by row.
    pub inputs: Vec<u32>,
    /// The token after each input, or [`IGNORED`].
    pub labels: Vec<i64>,
    /// Tokens in a row.
    pub sequence_length: usize,
}

impl Batch {
    fn with_capacity(rows: usize, sequence_length: usize) -> Self {
        let tokens = rows * sequence_length;
        Self {
            inputs: Vec::with_capacity(tokens),
            labels: Vec::with_capacity(tokens),
            sequence_length,
        }
    }

    /// Appends a window of up to `sequence_length + 1` tokens, padded with ignored labels.
    fn push(&mut self, window: &[u32]) {
        let padding = self.sequence_length + 1 - window.len();
        self.inputs.extend(&window[..window.len() - 1]);
        self.inputs.extend(std::iter::repeat_n(0, padding));
        self.labels.extend(window[1..].iter().map(|&token| i64::from(token)));
        self.labels.extend(std::iter::repeat_n(IGNORED, padding));
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.inputs.len() / self.sequence_length
    }

    /// Number of labels that count.
    pub fn items(&self) -> usize {
        self.labels.iter().filter(|&&label| label != IGNORED).count()
    }
}

/// Where a run stands in its data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Position {
    /// Passes completed over the data.
    pub epoch: u64,
    /// Batches already drawn from this pass.
    pub index: usize,
}

/// An endless sequence of training batches.
///
/// Every epoch shuffles the documents, packs them end to end, cuts the stream into windows at a random offset (so
/// documents are cut elsewhere each time) and shuffles the windows. The rest that fills no window or no batch is left
/// out until the next epoch.
#[derive(Clone, Debug)]
pub struct Batches {
    tokens: Tokens,
    batch_size: usize,
    sequence_length: usize,
    seed: u64,
    position: Position,
    epoch: Epoch,
}

/// The packed stream of one epoch and where its windows start, in the order of their use.
#[derive(Clone, Debug)]
struct Epoch {
    stream: Vec<u32>,
    starts: Vec<usize>,
}

impl Batches {
    /// Batches of `(batch_size, sequence_length)` from the first of the first epoch on.
    pub fn new(
        tokens: Tokens,
        batch_size: usize,
        sequence_length: usize,
        seed: u64,
    ) -> Result<Self> {
        if batch_size == 0 || sequence_length == 0 {
            return Err(Error::Dataset("batch size and sequence length must be at least 1".into()));
        }
        // An offset may take away up to `sequence_length - 1` tokens; each window needs one token beyond its inputs.
        let needed = batch_size
            .checked_add(1)
            .and_then(|windows| windows.checked_mul(sequence_length))
            .ok_or_else(|| Error::Dataset("batch size times sequence length overflows".into()))?;
        if tokens.len() < needed {
            return Err(Error::Dataset(format!(
                "{} training tokens cannot fill a batch of {batch_size} × {sequence_length}; at least {needed} are needed",
                tokens.len()
            )));
        }
        let epoch = Epoch::new(&tokens, sequence_length, seed, 0);
        Ok(Self { tokens, batch_size, sequence_length, seed, position: Position::default(), epoch })
    }

    /// Batches in one epoch. The random offset changes it by at most one from epoch to epoch; this is the least.
    pub fn per_epoch(&self) -> usize {
        (self.tokens.len() / self.sequence_length - 1) / self.batch_size
    }

    /// The position of the next batch.
    pub fn position(&self) -> Position {
        self.position
    }

    /// Continues at a position that [`Batches::position`] returned.
    pub fn seek(&mut self, position: Position) {
        if position.epoch != self.position.epoch {
            self.epoch = Epoch::new(&self.tokens, self.sequence_length, self.seed, position.epoch);
        }
        self.position = position;
    }

    /// Takes the next batch.
    pub fn draw(&mut self) -> Batch {
        if self.epoch.batch(self.position.index, self.batch_size).is_none() {
            self.seek(Position { epoch: self.position.epoch + 1, index: 0 });
        }
        let mut batch = Batch::with_capacity(self.batch_size, self.sequence_length);
        // `Batches::new` made sure that every epoch has a first batch.
        for &start in self.epoch.batch(self.position.index, self.batch_size).unwrap_or_default() {
            batch.push(&self.epoch.stream[start..=start + self.sequence_length]);
        }
        self.position.index += 1;
        batch
    }
}

impl Epoch {
    fn new(tokens: &Tokens, sequence_length: usize, seed: u64, epoch: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(epoch);
        let mut order: Vec<usize> = (0..tokens.documents()).collect();
        order.shuffle(&mut rng);
        let stream: Vec<u32> =
            order.into_iter().flat_map(|index| tokens.document(index)).copied().collect();
        let offset = rng.random_range(0..sequence_length);
        let mut starts: Vec<usize> = (offset..stream.len().saturating_sub(sequence_length))
            .step_by(sequence_length)
            .collect();
        starts.shuffle(&mut rng);
        Self { stream, starts }
    }

    /// Where the windows of one batch start; `None` past the end of the epoch.
    fn batch(&self, index: usize, batch_size: usize) -> Option<&[usize]> {
        let start = index.checked_mul(batch_size)?;
        self.starts.get(start..start.checked_add(batch_size)?)
    }
}

/// Windows that predict every token but the first exactly once, in order; the last one is padded with ignored labels.
pub fn validation_windows(
    tokens: &Tokens,
    batch_size: usize,
    sequence_length: usize,
) -> impl Iterator<Item = Batch> {
    let ids = tokens.ids();
    let last = ids.len() - 1;
    let starts: Vec<usize> = (0..last).step_by(sequence_length).collect();
    let batches: Vec<Vec<usize>> = starts.chunks(batch_size).map(<[usize]>::to_vec).collect();
    batches.into_iter().map(move |starts| {
        let mut batch = Batch::with_capacity(starts.len(), sequence_length);
        for start in starts {
            batch.push(&ids[start..=(start + sequence_length).min(last)]);
        }
        batch
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 40 documents of 1 to 40 tokens, all tokens different.
    fn tokens() -> Tokens {
        let ends: Vec<usize> = (1..=40)
            .scan(0, |end, length| {
                *end += length;
                Some(*end)
            })
            .collect();
        let ids = (0..820).collect();
        Tokens::new(ids, ends, 820).unwrap()
    }

    #[test]
    fn labels_are_the_next_tokens() {
        let mut batches = Batches::new(tokens(), 3, 16, 1).unwrap();
        for _ in 0..200 {
            let batch = batches.draw();
            assert_eq!((batch.inputs.len(), batch.labels.len(), batch.items()), (48, 48, 48));
            for (inputs, labels) in batch.inputs.chunks(16).zip(batch.labels.chunks(16)) {
                assert!(
                    inputs[1..]
                        .iter()
                        .zip(labels)
                        .all(|(&token, &label)| i64::from(token) == label)
                );
            }
        }
        assert!(batches.position().epoch >= 11);
    }

    #[test]
    fn an_epoch_uses_no_token_twice_and_epochs_differ() {
        let mut batches = Batches::new(tokens(), 4, 8, 7).unwrap();
        let mut epochs = vec![Vec::new(); 3];
        loop {
            let batch = batches.draw();
            let Some(epoch) = epochs.get_mut(batches.position().epoch as usize) else { break };
            epoch.extend(batch.inputs);
        }
        for epoch in &epochs {
            let mut unique = epoch.clone();
            unique.sort_unstable();
            unique.dedup();
            assert_eq!(unique.len(), epoch.len());
            assert!(epoch.len() >= batches.per_epoch() * 32 && epoch.len() <= 820);
        }
        assert_ne!(epochs[0], epochs[1]);
        assert_ne!(epochs[1], epochs[2]);
    }

    #[test]
    fn any_position_can_be_resumed() {
        let mut batches = Batches::new(tokens(), 2, 16, 3).unwrap();
        let mut drawn = Vec::new();
        for _ in 0..80 {
            drawn.push((batches.position(), batches.draw()));
        }
        let mut other = Batches::new(tokens(), 2, 16, 3).unwrap();
        for (position, batch) in drawn.iter().rev() {
            other.seek(*position);
            assert_eq!(other.draw(), *batch);
        }
        let mut reseeded = Batches::new(tokens(), 2, 16, 4).unwrap();
        assert_ne!(reseeded.draw(), drawn[0].1);
    }

    #[test]
    fn a_position_beyond_the_epoch_wraps() {
        let mut batches = Batches::new(tokens(), 2, 16, 3).unwrap();
        batches.seek(Position { epoch: 5, index: usize::MAX });
        batches.draw();
        assert_eq!(batches.position(), Position { epoch: 6, index: 1 });
    }

    #[test]
    fn validation_predicts_every_token_once() {
        let tokens = tokens();
        let batches: Vec<Batch> = validation_windows(&tokens, 5, 32).collect();
        let labels: Vec<i64> = batches.iter().flat_map(|batch| &batch.labels).copied().collect();
        let counted: Vec<i64> = labels.iter().copied().filter(|&label| label != IGNORED).collect();
        assert_eq!(counted, (1..820).collect::<Vec<i64>>());
        assert_eq!(batches.iter().map(Batch::rows).collect::<Vec<_>>(), [5, 5, 5, 5, 5, 1]);
    }

    #[test]
    fn too_little_text_is_refused() {
        let message = Batches::new(tokens(), 8, 128, 0).unwrap_err().to_string();
        assert!(message.contains("820 training tokens") && message.contains("1152"), "{message}");
        assert!(Batches::new(tokens(), usize::MAX, 2, 0).is_err());
        assert!(Batches::new(tokens(), 0, 2, 0).is_err());
        // The least that is accepted fills a batch at every offset.
        let least = Tokens::new((0..820).collect(), vec![820], 820).unwrap();
        let mut batches = Batches::new(least, 1, 410, 0).unwrap();
        (0..100).for_each(|_| assert_eq!(batches.draw().rows(), 1));
    }
}
