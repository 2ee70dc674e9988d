//! A stream of text → windows.
//!
//! A window is `sequence_length + 1` tokens: all but the last are the model's input, all but the first its labels.
//! Documents are packed end to end, so a window may hold several and cut the first and the last; [`Attend`] says whether
//! they see each other.

use rand::{Rng, SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;

use super::{Attend, Batch, Cut};
use crate::{
    Error, Result,
    dataset::{Stream, Tokens, Window},
    loss::IGNORED,
};

impl Batch {
    /// Appends a window of up to `sequence_length + 1` tokens, padded with ignored labels.
    fn push(&mut self, Window { ids, starts }: &Window, attend: Attend) {
        let padding = self.sequence_length + 1 - ids.len();
        let inputs = ids.len() - 1;
        let label = |next: usize| match attend {
            Attend::Document if starts[next] == next => IGNORED,
            _ => i64::from(ids[next]),
        };
        self.inputs.extend(&ids[..inputs]);
        self.labels.extend((1..ids.len()).map(label));
        self.inputs.extend(std::iter::repeat_n(0, padding));
        self.labels.extend(std::iter::repeat_n(IGNORED, padding));
        if attend == Attend::Document {
            self.starts.extend(&starts[..inputs]);
            self.starts.extend(std::iter::repeat_n(inputs, padding));
        }
    }
}

/// The windows of one epoch after another.
///
/// Every epoch shuffles the documents, packs them end to end, cuts the stream into windows at a random offset (so
/// documents are cut elsewhere each time) and shuffles the windows. The rest that fills no window or no batch is left
/// out until the next epoch. What is shuffled are numbers: the tokens stay where they are.
#[derive(Clone, Debug)]
pub(super) struct Windows {
    tokens: Tokens,
    cut: Cut,
    seed: u64,
    epoch: Epoch,
}

/// The packed stream of one epoch and its windows in the order of their use: window `i` starts at
/// `offset + i · sequence_length`.
#[derive(Clone, Debug)]
struct Epoch {
    stream: Stream,
    offset: usize,
    windows: Vec<u32>,
}

impl Windows {
    /// The windows of the first epoch.
    pub fn new(tokens: Tokens, cut: Cut, seed: u64) -> Result<Self> {
        let Cut { batch_size, sequence_length, .. } = cut;
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
        if u32::try_from(tokens.len() / sequence_length).is_err() {
            return Err(Error::Dataset(format!(
                "{} training tokens are more than {} windows of {sequence_length}; lengthen `data.sequence_length`",
                tokens.len(),
                u32::MAX
            )));
        }
        let epoch = Epoch::new(&tokens, sequence_length, seed, 0);
        Ok(Self { tokens, cut, seed, epoch })
    }

    /// Batches in one epoch. The random offset changes it by at most one from epoch to epoch; this is the least.
    pub fn per_epoch(&self) -> usize {
        (self.tokens.len() / self.cut.sequence_length - 1) / self.cut.batch_size
    }

    /// Goes on with the windows of another epoch.
    pub fn begin(&mut self, epoch: u64) {
        self.epoch = Epoch::new(&self.tokens, self.cut.sequence_length, self.seed, epoch);
    }

    /// A batch of this epoch; `None` past its end.
    pub fn batch(&self, index: usize) -> Option<Batch> {
        let Cut { batch_size, sequence_length, attend, .. } = self.cut;
        let mut batch = Batch::with_capacity(batch_size, sequence_length);
        for &window in self.epoch.batch(index, batch_size)? {
            let start = self.epoch.offset + window as usize * sequence_length;
            let range = start..start + sequence_length + 1;
            batch.push(&self.epoch.stream.window(&self.tokens, range), attend);
        }
        Some(batch)
    }
}

impl Epoch {
    fn new(tokens: &Tokens, sequence_length: usize, seed: u64, epoch: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(epoch);
        let stream = Stream::shuffled(tokens, &mut rng);
        let offset = rng.random_range(0..sequence_length);
        let windows = (tokens.len() - offset).saturating_sub(1) / sequence_length;
        // `Windows::new` made sure that they can be counted.
        let mut windows: Vec<u32> = (0..windows as u32).collect();
        windows.shuffle(&mut rng);
        Self { stream, offset, windows }
    }

    /// The windows of one batch; `None` past the end of the epoch.
    fn batch(&self, index: usize, batch_size: usize) -> Option<&[u32]> {
        let start = index.checked_mul(batch_size)?;
        self.windows.get(start..start.checked_add(batch_size)?)
    }
}

/// Windows that predict every token but the first (of all, or of each document where they do not see each other) exactly
/// once, in order; the last one is padded with ignored labels.
pub(super) fn in_order(tokens: &Tokens, cut: Cut) -> impl Iterator<Item = Batch> {
    let Cut { batch_size, sequence_length, attend, .. } = cut;
    let stream = Stream::in_order(tokens);
    let last = tokens.len() - 1;
    let windows = last.div_ceil(sequence_length);
    (0..windows).step_by(batch_size).map(move |first| {
        let rows = batch_size.min(windows - first);
        let mut batch = Batch::with_capacity(rows, sequence_length);
        for start in (first..first + rows).map(|window| window * sequence_length) {
            let range = start..(start + sequence_length).min(last) + 1;
            batch.push(&stream.window(tokens, range), attend);
        }
        batch
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::{Batches, Position};

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

    fn cut(batch_size: usize, sequence_length: usize) -> Cut {
        Cut { batch_size, sequence_length, attend: Attend::Window, packing: true }
    }

    #[test]
    fn labels_are_the_next_tokens() {
        let mut batches = Batches::new(tokens(), cut(3, 16), 1).unwrap();
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
        let mut batches = Batches::new(tokens(), cut(4, 8), 7).unwrap();
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
        let mut batches = Batches::new(tokens(), cut(2, 16), 3).unwrap();
        let mut drawn = Vec::new();
        for _ in 0..80 {
            drawn.push((batches.position(), batches.draw()));
        }
        let mut other = Batches::new(tokens(), cut(2, 16), 3).unwrap();
        for (position, batch) in drawn.iter().rev() {
            other.seek(*position);
            assert_eq!(other.draw(), *batch);
        }
        let mut reseeded = Batches::new(tokens(), cut(2, 16), 4).unwrap();
        assert_ne!(reseeded.draw(), drawn[0].1);
    }

    #[test]
    fn a_position_beyond_the_epoch_wraps() {
        let mut batches = Batches::new(tokens(), cut(2, 16), 3).unwrap();
        batches.seek(Position { epoch: 5, index: usize::MAX });
        batches.draw();
        assert_eq!(batches.position(), Position { epoch: 6, index: 1 });
    }

    #[test]
    fn validation_predicts_every_token_once() {
        let tokens = tokens();
        let batches: Vec<Batch> = in_order(&tokens, cut(5, 32)).collect();
        let labels: Vec<i64> = batches.iter().flat_map(|batch| &batch.labels).copied().collect();
        let counted: Vec<i64> = labels.iter().copied().filter(|&label| label != IGNORED).collect();
        assert_eq!(counted, (1..820).collect::<Vec<i64>>());
        assert_eq!(batches.iter().map(Batch::rows).collect::<Vec<_>>(), [5, 5, 5, 5, 5, 1]);
    }

    #[test]
    fn documents_that_do_not_see_each_other_start_anew() {
        let tokens = Tokens::new((10..20).collect(), vec![3, 4, 10], 10).unwrap();
        let cut =
            Cut { batch_size: 2, sequence_length: 5, attend: Attend::Document, packing: true };
        let batches: Vec<Batch> = in_order(&tokens, cut).collect();
        assert_eq!(batches.len(), 1);
        assert_eq!(batches[0].inputs, [10, 11, 12, 13, 14, 15, 16, 17, 18, 0]);
        let ignored = IGNORED;
        assert_eq!(batches[0].labels, [11, 12, ignored, ignored, 15, 16, 17, 18, 19, ignored]);
        assert_eq!(batches[0].starts, [0, 0, 0, 3, 4, 0, 0, 0, 0, 4]);
    }

    #[test]
    fn batches_that_heed_documents_hold_the_same_tokens() {
        let batches = |attend| Batches::new(tokens(), Cut { attend, ..cut(3, 16) }, 9).unwrap();
        let (mut heedless, mut heeding) = (batches(Attend::Window), batches(Attend::Document));
        for _ in 0..30 {
            let (plain, batch) = (heedless.draw(), heeding.draw());
            assert_eq!((&plain.inputs, plain.starts.len()), (&batch.inputs, 0));
            assert_eq!(batch.starts.len(), 48);
            for (at, (&label, &plain)) in batch.labels.iter().zip(&plain.labels).enumerate() {
                let ends_row = at % 16 == 15;
                let starts_next = !ends_row && batch.starts[at + 1] == at % 16 + 1;
                assert!(label == plain || label == IGNORED, "{label} {plain}");
                assert!(ends_row || (label == IGNORED) == starts_next);
            }
        }
    }

    #[test]
    fn too_little_text_is_refused() {
        let message = Batches::new(tokens(), cut(8, 128), 0).unwrap_err().to_string();
        assert!(message.contains("820 training tokens") && message.contains("1152"), "{message}");
        assert!(Batches::new(tokens(), cut(usize::MAX, 2), 0).is_err());
        assert!(Batches::new(tokens(), cut(0, 2), 0).is_err());
        // The least that is accepted fills a batch at every offset.
        let least = Tokens::new((0..820).collect(), vec![820], 820).unwrap();
        let mut batches = Batches::new(least, cut(1, 410), 0).unwrap();
        (0..100).for_each(|_| assert_eq!(batches.draw().rows(), 1));
    }
}
