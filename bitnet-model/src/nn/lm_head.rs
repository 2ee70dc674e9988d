//! The output head: hidden states to logits, of all tokens or of those that matter.

use std::sync::Arc;

use candle_core::{Module, Result, Tensor, bail};

use super::DenseLinear;
use crate::{head_weights::HeadWeights, kernels::head::HeadFormat, ops, rows::RowSource};

/// What will be asked of a row of logits.
#[derive(Clone, Debug, PartialEq)]
pub enum Need {
    /// The logit of every token.
    All,
    /// The `k` largest.
    Top {
        /// How many; at least 1.
        k: usize,
        /// Tokens whose logits are not looked at as they are.
        changed: Changed,
    },
    /// Every token that is not improbable at a temperature: what is left out has, in all, less than
    /// [`NEGLIGIBLE`] of the probability.
    Mass {
        /// Divides the logits; above 0.
        temperature: f32,
        /// Tokens whose logits are not looked at as they are.
        changed: Changed,
    },
}

/// Tokens whose logits a sampler changes before it compares them. They do not count for what the others are measured by.
/// Ids outside the vocabulary are passed over.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Changed {
    /// Changed in any way: their logits are exact in every case.
    pub freely: Vec<u32>,
    /// Lowered or left: they matter only if their logits as they are do.
    pub downwards: Vec<u32>,
}

/// The part of the probability that [`Need::Mass`] may leave out.
pub const NEGLIGIBLE: f64 = 1e-6;

/// A row of logits.
#[derive(Clone, Debug, PartialEq)]
pub struct Logits {
    /// (vocab_size): −∞ for a token that was proved not to matter, else its logit.
    pub values: Vec<f32>,
    /// The rows of the head that were multiplied exactly after a screening: all if it left too many. `None` if there was
    /// no screening.
    pub rescored: Option<usize>,
}

/// How many rows of the head were [rescored](Logits::rescored), for how many screened rows of logits.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rescored {
    screened: usize,
    rows: usize,
}

impl Rescored {
    /// Counts more rows of logits.
    pub fn count(&mut self, logits: &[Logits]) {
        for rows in logits.iter().filter_map(|logits| logits.rescored) {
            self.add(Self { screened: 1, rows });
        }
    }

    /// Counts what `other` counted.
    pub fn add(&mut self, other: Self) {
        self.screened += other.screened;
        self.rows += other.rows;
    }

    /// Rows of the head for a row of logits; `None` if none was screened.
    pub fn mean(self) -> Option<f64> {
        (self.screened > 0).then(|| self.rows as f64 / self.screened as f64)
    }
}

/// An output head.
pub trait LmHead: Send + Sync {
    /// `hidden` (…, hidden_size) → all logits (…, vocab_size), f32.
    fn forward(&self, hidden: &Tensor) -> Result<Tensor>;

    /// The rows (vocab_size, hidden_size) that it multiplies, if they are a tensor and nothing is added.
    fn weight(&self) -> Option<&Tensor> {
        None
    }

    /// Bytes of the weights that are read in order for the [needed](Self::logits) logits, of one row or of several.
    fn bytes(&self) -> usize;

    /// Bytes read for each row that is [rescored](Logits::rescored).
    fn rescored_row_bytes(&self) -> usize {
        0
    }

    /// The logits of each row of `hidden` (rows, hidden_size), as far as `needs`, one a row, asks for them.
    fn logits(&self, hidden: &Tensor, needs: &[Need]) -> Result<Vec<Logits>> {
        check_needs(hidden, needs)?;
        let rows = self.forward(hidden)?.to_vec2()?;
        Ok(rows.into_iter().map(|values| Logits { values, rescored: None }).collect())
    }
}

/// One need a row.
pub(super) fn check_needs(hidden: &Tensor, needs: &[Need]) -> Result<()> {
    match hidden.dims2()? {
        (rows, _) if rows == needs.len() => Ok(()),
        (rows, _) => bail!("{rows} hidden states, but {} needs", needs.len()),
    }
}

impl LmHead for DenseLinear {
    fn forward(&self, hidden: &Tensor) -> Result<Tensor> {
        Module::forward(self, hidden)
    }

    fn weight(&self) -> Option<&Tensor> {
        self.plain_weight()
    }

    fn bytes(&self) -> usize {
        self.weight_bytes()
    }
}

/// How the output head of a model is stored and multiplied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HeadPrecision {
    /// Logits are those of the checkpoint's own rows, bit for bit.
    #[default]
    Exact,
    /// Logits of rows in 8, 6 or 4 bits.
    Quantized(HeadFormat),
}

impl HeadPrecision {
    /// Its name: `exact`, `q8`, `q6` or `q4`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::Quantized(HeadFormat::Q8) => "q8",
            Self::Quantized(HeadFormat::Q6) => "q6",
            Self::Quantized(HeadFormat::Q4) => "q4",
        }
    }
}

/// A head in fewer bits than its checkpoint's: its logits are those of the quantized rows.
#[derive(Debug)]
pub struct QuantizedHead {
    weights: Arc<HeadWeights>,
}

impl QuantizedHead {
    /// Quantizes `rows` (vocab_size, hidden_size).
    ///
    /// # Errors
    /// Rows that cannot be read, or no memory.
    pub fn new(rows: &dyn RowSource, format: HeadFormat) -> Result<Self> {
        Ok(Self { weights: Arc::new(HeadWeights::quantize(rows, format)?) })
    }
}

impl LmHead for QuantizedHead {
    fn forward(&self, hidden: &Tensor) -> Result<Tensor> {
        refuse_gradients(hidden)?;
        ops::head_product(hidden, &self.weights)
    }

    fn bytes(&self) -> usize {
        self.weights.bytes()
    }
}

/// For heads that record no gradient.
pub(super) fn refuse_gradients(hidden: &Tensor) -> Result<()> {
    match hidden.track_op() {
        true => bail!("this output head records no gradients: load the model to train it"),
        false => Ok(()),
    }
}
