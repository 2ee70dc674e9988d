//! Examples → rows.
//!
//! An example is never cut: it lies in one row, behind others or alone, and its tokens see nothing but itself. Rows are
//! packed by best fit, the longest examples first (in a row that is left as little room as possible), which for a given
//! set of lengths gives the same number of rows in every order; rows and padding are as long as the longest row of the
//! batch.

use std::collections::BTreeSet;

use rand::{SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;

use super::{Batch, Cut};
use crate::{Error, Result, loss::IGNORED, sft::Examples};

/// Examples that are packed together: of more than this many, those that come one after another.
const PACKED_TOGETHER: usize = 1 << 14;

/// The rows of one epoch after another: every epoch shuffles the examples, packs them, and shuffles the rows. The last
/// batch may be smaller than the others.
#[derive(Clone, Debug)]
pub(super) struct Rows {
    examples: Examples,
    cut: Cut,
    seed: u64,
    per_epoch: usize,
    /// The examples of each row of this epoch, by number.
    rows: Vec<Vec<u32>>,
}

impl Rows {
    /// The rows of the first epoch.
    pub fn new(examples: Examples, cut: Cut, seed: u64) -> Result<Self> {
        let longest = examples.longest() - 1;
        if longest > cut.sequence_length {
            return Err(Error::Dataset(format!(
                "an example of {longest} tokens does not fit into rows of {}",
                cut.sequence_length
            )));
        }
        let rows = shuffled(&examples, cut, seed, 0);
        let per_epoch = rows.len().div_ceil(cut.batch_size);
        Ok(Self { examples, cut, seed, per_epoch, rows })
    }

    /// Batches of the first epoch.
    pub fn per_epoch(&self) -> usize {
        self.per_epoch
    }

    /// Goes on with the rows of another epoch.
    pub fn begin(&mut self, epoch: u64) {
        self.rows = shuffled(&self.examples, self.cut, self.seed, epoch);
    }

    /// A batch of this epoch; `None` past its end.
    pub fn batch(&self, index: usize) -> Option<Batch> {
        let start = index.checked_mul(self.cut.batch_size)?;
        let left = self.rows.get(start..).filter(|left| !left.is_empty())?;
        Some(batch(&self.examples, &left[..left.len().min(self.cut.batch_size)], self.cut))
    }
}

/// Batches that hold every example once, packed in order.
pub(super) fn in_order(examples: &Examples, cut: Cut) -> impl Iterator<Item = Batch> {
    // There are no more examples than a u32 counts.
    let rows = pack(examples, &Vec::from_iter(0..examples.len() as u32), cut);
    let batches = rows.len().div_ceil(cut.batch_size);
    (0..batches).map(move |index| {
        let start = index * cut.batch_size;
        batch(examples, &rows[start..rows.len().min(start + cut.batch_size)], cut)
    })
}

fn shuffled(examples: &Examples, cut: Cut, seed: u64, epoch: u64) -> Vec<Vec<u32>> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(epoch);
    let mut order: Vec<u32> = (0..examples.len() as u32).collect();
    order.shuffle(&mut rng);
    let mut rows = pack(examples, &order, cut);
    if cut.packing {
        rows.shuffle(&mut rng); // the first ones hold the longest examples
    }
    rows
}

/// The examples of each row.
fn pack(examples: &Examples, order: &[u32], cut: Cut) -> Vec<Vec<u32>> {
    if !cut.packing {
        return order.iter().map(|&example| vec![example]).collect();
    }
    let mut rows: Vec<Vec<u32>> = Vec::new();
    for window in order.chunks(PACKED_TOGETHER) {
        let mut longest_first = window.to_vec();
        longest_first.sort_by_key(|&example| usize::MAX - inputs(examples, example));
        // Room that is left in a row, and its number.
        let mut open: BTreeSet<(usize, usize)> = BTreeSet::new();
        for example in longest_first {
            let length = inputs(examples, example);
            let best = open.range((length, 0)..).next().copied();
            let (room, row) = best.unwrap_or((cut.sequence_length, rows.len()));
            if best.is_some() {
                open.remove(&(room, row));
            } else {
                rows.push(Vec::new());
            }
            rows[row].push(example);
            open.insert((room - length, row));
        }
    }
    rows
}

/// Places that an example takes in a row.
fn inputs(examples: &Examples, example: u32) -> usize {
    examples.get(example as usize).ids.len() - 1
}

fn batch(examples: &Examples, rows: &[Vec<u32>], cut: Cut) -> Batch {
    let taken =
        |row: &Vec<u32>| row.iter().map(|&example| inputs(examples, example)).sum::<usize>();
    let length = rows.iter().map(taken).max().unwrap_or(0);
    let mut batch = Batch::with_capacity(rows.len(), length);
    for (number, row) in rows.iter().enumerate() {
        let begin = number * length;
        for &example in row {
            let example = examples.get(example as usize);
            let start = batch.inputs.len() - begin;
            let next = example.ids.iter().zip(example.trained).skip(1);
            batch.inputs.extend(&example.ids[..example.ids.len() - 1]);
            batch.labels.extend(next.map(|(&id, &is_trained)| match is_trained {
                true => i64::from(id),
                false => IGNORED,
            }));
            batch.starts.resize(batch.inputs.len(), start);
        }
        let end = batch.inputs.len() - begin;
        batch.inputs.resize(begin + length, 0);
        batch.labels.resize(begin + length, IGNORED);
        batch.starts.resize(begin + length, end);
    }
    if !cut.packing {
        batch.starts.clear(); // padding comes last, and nothing sees what comes after it
    }
    batch
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::{
        batch::{Attend, Batches, Position, evaluation},
        dataset::Content,
        sft::Example,
    };

    /// Examples of 2 to 31 tokens, all tokens different and not 0; those of the first half are not trained.
    fn examples(count: u32) -> Examples {
        let mut next = 1;
        let example = |index: u32| {
            let length = 2 + index * 7 % 30;
            let ids: Vec<u32> = (next..next + length).collect();
            next += length;
            let trained = (0..length).map(|at| at >= length.div_ceil(2)).collect();
            Example { ids, trained, bytes: 3 }
        };
        Examples::new((0..count).map(example)).unwrap()
    }

    fn cut(packing: bool) -> Cut {
        Cut { batch_size: 4, sequence_length: 40, attend: Attend::Window, packing }
    }

    /// The examples in a batch: inputs with the last label, and which labels count.
    fn found(batch: &Batch) -> Vec<(Vec<u32>, Vec<bool>)> {
        let mut found: Vec<(Vec<u32>, Vec<bool>)> = Vec::new();
        for row in 0..batch.rows() {
            let mut at = row * batch.sequence_length;
            let end = at + batch.sequence_length;
            while at < end && batch.inputs[at] != 0 {
                let is_same = |next: &usize| match batch.starts.is_empty() {
                    true => batch.inputs[*next] != 0,
                    false => batch.starts[*next] == batch.starts[at],
                };
                let stop = (at..end).take_while(is_same).last().unwrap() + 1;
                let mut ids = batch.inputs[at..stop].to_vec();
                ids.push(batch.labels[stop - 1] as u32);
                let counted = batch.labels[at..stop].iter().map(|&label| label != IGNORED);
                assert!((at..stop - 1).all(|i| {
                    batch.labels[i] == IGNORED || batch.labels[i] == i64::from(batch.inputs[i + 1])
                }));
                found.push((ids, std::iter::once(false).chain(counted).collect()));
                at = stop;
            }
        }
        found
    }

    #[test]
    fn every_epoch_holds_every_example_whole_and_once() {
        let examples = examples(300);
        for packing in [true, false] {
            let mut batches = Batches::new(examples.clone(), cut(packing), 5).unwrap();
            let mut epochs = Vec::new();
            for _ in 0..3 {
                let drawn: Vec<Batch> = (0..batches.per_epoch()).map(|_| batches.draw()).collect();
                epochs.push(drawn.iter().flat_map(found).collect::<Vec<_>>());
                let wide: usize = drawn.iter().map(|batch| batch.inputs.len()).sum();
                let real: usize = drawn.iter().map(Batch::tokens).sum();
                assert_eq!(real, examples.tokens() - 300);
                assert!(!packing || real as f64 > 0.95 * wide as f64, "{real} of {wide}");
            }
            assert_ne!(epochs[0], epochs[1]);
            for epoch in &epochs {
                let by_first: BTreeMap<u32, _> =
                    epoch.iter().map(|(ids, trained)| (ids[0], (ids, trained))).collect();
                assert_eq!((epoch.len(), by_first.len()), (300, 300));
                for index in 0..300 {
                    let example = examples.get(index);
                    let (ids, trained) = by_first[&example.ids[0]];
                    assert_eq!((&ids[..], &trained[..]), (example.ids, example.trained));
                }
            }
        }
    }

    #[test]
    fn any_position_can_be_resumed() {
        let make = |seed| Batches::new(examples(100), cut(true), seed).unwrap();
        let mut batches = make(3);
        let drawn: Vec<_> = (0..40).map(|_| (batches.position(), batches.draw())).collect();
        assert!(batches.position().epoch > 0);
        let mut other = make(3);
        for (position, batch) in drawn.iter().rev() {
            other.seek(*position);
            assert_eq!(other.draw(), *batch);
        }
        assert_ne!(make(4).draw(), drawn[0].1);
        other.seek(Position { epoch: 2, index: usize::MAX });
        other.draw();
        assert_eq!(other.position(), Position { epoch: 3, index: 1 });
    }

    #[test]
    fn evaluation_covers_every_example_once() {
        let examples = examples(50);
        for packing in [true, false] {
            let content = Content::from(examples.clone());
            let batches: Vec<Batch> = evaluation(&content, cut(packing)).collect();
            let mut all: Vec<_> = batches.iter().flat_map(found).map(|(ids, _)| ids).collect();
            all.sort();
            assert_eq!(all.len(), 50);
            assert_eq!(all.concat(), Vec::from_iter(1..=examples.tokens() as u32));
            assert!(batches.iter().all(|batch| batch.rows() <= 4));
        }
    }

    #[test]
    fn few_examples_are_one_batch() {
        let mut batches = Batches::new(examples(3), cut(true), 0).unwrap();
        assert_eq!((batches.per_epoch(), batches.draw().rows()), (1, 1));
        let short = Cut { sequence_length: 3, ..cut(true) };
        let message = Batches::new(examples(3), short, 0).unwrap_err().to_string();
        assert!(message.contains("an example of 15 tokens"), "{message}");
    }
}
