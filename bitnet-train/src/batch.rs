//! Tokens → batches of windows.
//!
//! A window is `sequence_length + 1` tokens: all but the last are the model's input, all but the first its labels.
//! Documents are packed end to end, so a window may hold several and cut the first and the last; [`Attend`] says whether
//! they see each other.
//! [`Batches`] draws training windows, every epoch in another order; the batch at a [`Position`] depends on the seed
//! and the position alone, so a run resumes exactly. [`validation_windows`] covers every token of a set once, in order.

use rand::{Rng, SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::{
    Error, Result,
    dataset::{Stream, Tokens, Window},
    loss::IGNORED,
};

/// What a token of a window attends to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Attend {
    /// `window`: everything before it in the window, also of other documents.
    #[default]
    Window,
    /// `document`: what is before it of its own document. Positions count from the document's first token in the window,
    /// and the end of one document does not predict the beginning of the next.
    Document,
}

/// How a stream of tokens is cut into batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// Windows in a batch.
    pub batch_size: usize,
    /// Tokens in a window.
    pub sequence_length: usize,
    /// What they attend to.
    pub attend: Attend,
}

/// Inputs and labels of one forward pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// `(batch, seq)` row by row.
    pub inputs: Vec<u32>,
    /// The token after each input, or [`IGNORED`].
    pub labels: Vec<i64>,
    /// The position in its row at which each input's document begins, as
    /// [`Model::document_states`](bitnet_model::model::Model::document_states) takes it; empty for [`Attend::Window`].
    pub starts: Vec<usize>,
    /// Tokens in a row.
    pub sequence_length: usize,
}

impl Batch {
    fn with_capacity(rows: usize, sequence_length: usize) -> Self {
        let tokens = rows * sequence_length;
        Self {
            inputs: Vec::with_capacity(tokens),
            labels: Vec::with_capacity(tokens),
            starts: Vec::new(),
            sequence_length,
        }
    }

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

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.inputs.len() / self.sequence_length
    }

    /// The rows of `rank` of `size`, where every rank has equally many.
    pub fn share(&self, rank: usize, size: usize) -> Self {
        let tokens = self.inputs.len() / self.sequence_length / size * self.sequence_length;
        let range = rank * tokens..(rank + 1) * tokens;
        Self {
            inputs: self.inputs[range.clone()].to_vec(),
            labels: self.labels[range.clone()].to_vec(),
            starts: self.starts.get(range).unwrap_or_default().to_vec(),
            sequence_length: self.sequence_length,
        }
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
/// out until the next epoch. What is shuffled are numbers: the tokens stay where they are.
#[derive(Clone, Debug)]
pub struct Batches {
    tokens: Tokens,
    cut: Cut,
    seed: u64,
    position: Position,
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

impl Batches {
    /// Batches from the first of the first epoch on.
    pub fn new(tokens: Tokens, cut: Cut, seed: u64) -> Result<Self> {
        let Cut { batch_size, sequence_length, .. } = cut;
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
        if u32::try_from(tokens.len() / sequence_length).is_err() {
            return Err(Error::Dataset(format!(
                "{} training tokens are more than {} windows of {sequence_length}; lengthen `data.sequence_length`",
                tokens.len(),
                u32::MAX
            )));
        }
        let epoch = Epoch::new(&tokens, sequence_length, seed, 0);
        Ok(Self { tokens, cut, seed, position: Position::default(), epoch })
    }

    /// Batches in one epoch. The random offset changes it by at most one from epoch to epoch; this is the least.
    pub fn per_epoch(&self) -> usize {
        (self.tokens.len() / self.cut.sequence_length - 1) / self.cut.batch_size
    }

    /// The position of the next batch.
    pub fn position(&self) -> Position {
        self.position
    }

    /// Continues at a position that [`Batches::position`] returned.
    pub fn seek(&mut self, position: Position) {
        if position.epoch != self.position.epoch {
            let sequence_length = self.cut.sequence_length;
            self.epoch = Epoch::new(&self.tokens, sequence_length, self.seed, position.epoch);
        }
        self.position = position;
    }

    /// Takes the next batch.
    pub fn draw(&mut self) -> Batch {
        let Cut { batch_size, sequence_length, attend } = self.cut;
        if self.epoch.batch(self.position.index, batch_size).is_none() {
            self.seek(Position { epoch: self.position.epoch + 1, index: 0 });
        }
        let mut batch = Batch::with_capacity(batch_size, sequence_length);
        // `Batches::new` made sure that every epoch has a first batch.
        for &window in self.epoch.batch(self.position.index, batch_size).unwrap_or_default() {
            let start = self.epoch.offset + window as usize * sequence_length;
            let range = start..start + sequence_length + 1;
            batch.push(&self.epoch.stream.window(&self.tokens, range), attend);
        }
        self.position.index += 1;
        batch
    }
}

impl Epoch {
    fn new(tokens: &Tokens, sequence_length: usize, seed: u64, epoch: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(epoch);
        let stream = Stream::shuffled(tokens, &mut rng);
        let offset = rng.random_range(0..sequence_length);
        let windows = (tokens.len() - offset).saturating_sub(1) / sequence_length;
        // `Batches::new` made sure that they can be counted.
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
pub fn validation_windows(tokens: &Tokens, cut: Cut) -> impl Iterator<Item = Batch> {
    let Cut { batch_size, sequence_length, attend } = cut;
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
        Cut { batch_size, sequence_length, attend: Attend::Window }
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
        let batches: Vec<Batch> = validation_windows(&tokens, cut(5, 32)).collect();
        let labels: Vec<i64> = batches.iter().flat_map(|batch| &batch.labels).copied().collect();
        let counted: Vec<i64> = labels.iter().copied().filter(|&label| label != IGNORED).collect();
        assert_eq!(counted, (1..820).collect::<Vec<i64>>());
        assert_eq!(batches.iter().map(Batch::rows).collect::<Vec<_>>(), [5, 5, 5, 5, 5, 1]);
    }

    #[test]
    fn documents_that_do_not_see_each_other_start_anew() {
        let tokens = Tokens::new((10..20).collect(), vec![3, 4, 10], 10).unwrap();
        let cut = Cut { batch_size: 2, sequence_length: 5, attend: Attend::Document };
        let batches: Vec<Batch> = validation_windows(&tokens, cut).collect();
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
