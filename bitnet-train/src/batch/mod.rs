//! Tokens → batches.
//!
//! [`Batches`] draws training batches, every epoch in another order, from a stream of text (`windows`) or from
//! examples (`rows`); the batch at a [`Position`] depends on the seed and the position alone, so a run resumes
//! exactly. [`evaluation`] covers held-out text or examples once, in order.

mod rows;
mod windows;

use serde::{Deserialize, Serialize};

use self::{rows::Rows, windows::Windows};
use crate::{Error, Result, dataset::Content, loss::IGNORED};

/// What a token of a window of text attends to. Examples never attend to each other.
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

/// How tokens are cut into batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// Windows, or rows of examples, in a batch.
    pub batch_size: usize,
    /// Tokens in a window; of a row of examples the most.
    pub sequence_length: usize,
    /// What the tokens of a window attend to.
    pub attend: Attend,
    /// Whether several examples share a row.
    pub packing: bool,
}

/// Inputs and labels of one forward pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// `(batch, seq)` row by row.
    pub inputs: Vec<u32>,
    /// The token after each input, or [`IGNORED`].
    pub labels: Vec<i64>,
    /// The position in its row at which each input's document or example begins, as
    /// [`Model::document_states`](bitnet_model::model::Model::document_states) takes it; empty where a row is one.
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

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.inputs.len() / self.sequence_length
    }

    /// The rows of `rank` of `size`. Every rank has equally many: where they do not suffice, the last ranks have rows
    /// without a label.
    pub fn share(&self, rank: usize, size: usize) -> Self {
        let tokens = self.rows().div_ceil(size) * self.sequence_length;
        let (start, end) = (rank * tokens, (rank + 1) * tokens);
        let range = start.min(self.inputs.len())..end.min(self.inputs.len());
        let mut share = Self {
            inputs: self.inputs[range.clone()].to_vec(),
            labels: self.labels[range.clone()].to_vec(),
            starts: self.starts.get(range).unwrap_or_default().to_vec(),
            sequence_length: self.sequence_length,
        };
        share.inputs.resize(tokens, 0);
        share.labels.resize(tokens, IGNORED);
        if !self.starts.is_empty() {
            share.starts.resize(tokens, 0);
        }
        share
    }

    /// Number of labels that count.
    pub fn items(&self) -> usize {
        self.labels.iter().filter(|&&label| label != IGNORED).count()
    }

    /// Number of inputs, without the padding that ends a row.
    pub fn tokens(&self) -> usize {
        let length = self.sequence_length;
        let padding = |(row, labels): (usize, &[i64])| {
            let ignored = labels.iter().rev().take_while(|&&label| label == IGNORED).count();
            match self.starts.get((row + 1) * length - 1) {
                // Padding is as a document of its own; before it there may be ignored labels of the last one.
                Some(start) if length - start <= ignored => length - start,
                Some(_) => 0,
                None => ignored,
            }
        };
        self.inputs.len() - self.labels.chunks(length).enumerate().map(padding).sum::<usize>()
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
#[derive(Clone, Debug)]
pub struct Batches {
    position: Position,
    source: Source,
}

/// One pass over the data, and how the next is made.
#[derive(Clone, Debug)]
enum Source {
    Windows(Windows),
    Rows(Rows),
}

impl Batches {
    /// Batches from the first of the first epoch on. The same content, cut and seed give the same batches.
    ///
    /// # Errors
    /// A cut without a row or a token; text that fills no batch.
    pub fn new(content: impl Into<Content>, cut: Cut, seed: u64) -> Result<Self> {
        if cut.batch_size == 0 || cut.sequence_length == 0 {
            return Err(Error::Dataset("batch size and sequence length must be at least 1".into()));
        }
        let source = match content.into() {
            Content::Stream(tokens) => Source::Windows(Windows::new(tokens, cut, seed)?),
            Content::Examples(examples) => Source::Rows(Rows::new(examples, cut, seed)?),
        };
        Ok(Self { position: Position::default(), source })
    }

    /// Batches in one epoch: of text the least, as another random offset may give one more; of examples those of the
    /// first epoch, as another order may fill a few rows more or less.
    pub fn per_epoch(&self) -> usize {
        match &self.source {
            Source::Windows(windows) => windows.per_epoch(),
            Source::Rows(rows) => rows.per_epoch(),
        }
    }

    /// The position of the next batch.
    pub fn position(&self) -> Position {
        self.position
    }

    /// Continues at a position that [`Batches::position`] returned.
    pub fn seek(&mut self, position: Position) {
        if position.epoch != self.position.epoch {
            match &mut self.source {
                Source::Windows(windows) => windows.begin(position.epoch),
                Source::Rows(rows) => rows.begin(position.epoch),
            }
        }
        self.position = position;
    }

    /// Takes the next batch.
    pub fn draw(&mut self) -> Batch {
        loop {
            let batch = match &self.source {
                Source::Windows(windows) => windows.batch(self.position.index),
                Source::Rows(rows) => rows.batch(self.position.index),
            };
            match batch {
                Some(batch) => {
                    self.position.index += 1;
                    return batch;
                }
                // Every epoch has a first batch, of which `new` made sure.
                None => self.seek(Position { epoch: self.position.epoch + 1, index: 0 }),
            }
        }
    }
}

/// Batches that predict every token of `content` that counts exactly once, in order. The last rows are padded with
/// ignored labels, and the last batch may have fewer.
pub fn evaluation(content: &Content, cut: Cut) -> Box<dyn Iterator<Item = Batch> + '_> {
    match content {
        Content::Stream(tokens) => Box::new(windows::in_order(tokens, cut)),
        Content::Examples(examples) => Box::new(rows::in_order(examples, cut)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(rows: usize, starts: Vec<usize>) -> Batch {
        let inputs = (0..2 * rows as u32).collect();
        let labels = (1..=2 * rows as i64).collect();
        Batch { inputs, labels, starts, sequence_length: 2 }
    }

    #[test]
    fn ranks_share_the_rows() {
        let whole = batch(5, vec![0; 10]);
        let shares: Vec<Batch> = (0..4).map(|rank| whole.share(rank, 4)).collect();
        assert!(shares.iter().all(|share| (share.rows(), share.starts.len()) == (2, 4)));
        assert_eq!(shares[2].labels, [9, 10, IGNORED, IGNORED]);
        assert_eq!(shares.iter().map(Batch::items).sum::<usize>(), whole.items());
        assert_eq!(shares[3].items(), 0);
        assert!(batch(4, Vec::new()).share(1, 2).starts.is_empty());
        assert_eq!(batch(4, Vec::new()).share(1, 2).inputs, [4, 5, 6, 7]);
    }

    #[test]
    fn padding_is_no_token() {
        let mut batch = Batch {
            inputs: vec![7; 8],
            labels: vec![1, IGNORED, 2, IGNORED, 3, IGNORED, 4, 5],
            starts: Vec::new(),
            sequence_length: 4,
        };
        assert_eq!(batch.tokens(), 7);
        // The last token of the first row belongs to a document that began before.
        batch.starts = vec![0, 0, 2, 2, 0, 0, 2, 2];
        assert_eq!(batch.tokens(), 8);
        batch.starts[3] = 3;
        assert_eq!(batch.tokens(), 7);
    }
}
