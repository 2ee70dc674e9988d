//! What a run minimizes: a weighted sum of named terms.

use bitnet_model::{model::Model, ops::gemm::Precision};
use candle_core::{D, Tensor};

use crate::{Result, batch::Batch, head_loss::head_loss, loss::cross_entropy};

/// A term of the loss.
#[derive(Clone, Debug)]
pub struct Term {
    /// Its name in the metrics.
    pub name: &'static str,
    /// A scalar, f32, that gradients can be taken of.
    pub value: Tensor,
    /// What it is multiplied by in the loss.
    pub weight: f64,
}

/// What a forward pass has computed.
#[derive(Clone, Copy)]
pub struct Output<'a> {
    /// The model, for its head.
    pub model: &'a Model,
    /// The final norm's output, (batch, seq, hidden_size) f32.
    pub hidden: &'a Tensor,
    /// The inputs and labels.
    pub batch: &'a Batch,
    /// Sums over tokens are divided by it: the labels that count in all batches of the update.
    pub items: usize,
}

/// The loss of a language model. Its terms are asked for in the order of the backward pass: first those of the output, then
/// those of the blocks, the last block first.
pub trait Objective {
    /// Called before the forward pass of `batch`.
    fn prepare(&self, _batch: &Batch) -> Result<()> {
        Ok(())
    }

    /// The terms that depend on the output.
    fn of_output(&self, output: Output<'_>) -> Result<Vec<Term>>;

    /// The terms that depend on what happened inside block `layer`, which has just been computed.
    fn of_block(&self, _layer: usize, _batch: &Batch, _items: usize) -> Result<Vec<Term>> {
        Ok(Vec::new())
    }
}

/// The name of the one term that every loss of a language model has.
pub const CROSS_ENTROPY: &str = "cross_entropy";

/// Cross-entropy of the next token.
#[derive(Clone, Copy, Debug, Default)]
pub struct NextToken {
    /// Of the products of the output head.
    pub precision: Precision,
}

impl Objective for NextToken {
    fn of_output(&self, output: Output<'_>) -> Result<Vec<Term>> {
        let Output { model, hidden, batch, items } = output;
        let value = match model.lm_head().weight() {
            Some(weight) => head_loss(hidden, weight, &batch.labels, items, self.precision)?,
            None => {
                let logits = model.logits(hidden)?.flatten_to(D::Minus2)?;
                cross_entropy(&logits, &batch.labels, Some(items))?
            }
        };
        Ok(vec![Term { name: "cross_entropy", value, weight: 1. }])
    }
}
