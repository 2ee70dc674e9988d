//! Both ends of the network: the embedding and the output head, which are often the same rows.

use std::sync::Arc;

use candle_core::{Result, Tensor};
use candle_nn::{Init, VarBuilder};

use super::{
    DenseEmbedding, DenseLinear, Embedding, HeadPrecision, LmHead, QuantizedHead, ScreenedHead,
    StoredEmbedding,
};
use crate::rows::Table;

/// Embedding and output head.
#[derive(Clone)]
pub struct Vocabulary {
    /// Token ids to hidden states.
    pub embed_tokens: Embedding,
    /// Hidden states to logits.
    pub lm_head: Arc<dyn LmHead>,
}

impl Vocabulary {
    /// Tensors of (vocab_size, hidden_size) in the dtype of `vb`, which train if they are variables: `lm_head.weight`
    /// unless the head is `tied` to `model.embed_tokens.weight`.
    pub fn load(
        (vocab_size, hidden_size): (usize, usize),
        tied: bool,
        vb: VarBuilder,
    ) -> Result<Self> {
        let init = Init::Randn { mean: 0., stdev: 0.02 };
        let weight = |vb: VarBuilder| vb.get_with_hints((vocab_size, hidden_size), "weight", init);
        let embed_tokens = weight(vb.pp("model").pp("embed_tokens"))?;
        let lm_head = match tied {
            true => embed_tokens.clone(),
            false => weight(vb.pp("lm_head"))?,
        };
        Ok(Self::from_tensors(embed_tokens, lm_head))
    }

    /// Tensors of (vocab_size, hidden_size), multiplied as they are.
    pub fn from_tensors(embed_tokens: Tensor, lm_head: Tensor) -> Self {
        Self {
            embed_tokens: Arc::new(DenseEmbedding::new(embed_tokens)),
            lm_head: Arc::new(DenseLinear::new(lm_head, None)),
        }
    }

    /// Rows that are read as they are needed, and beside them a head in memory as `precision` says. Records no gradients.
    ///
    /// # Errors
    /// Rows that cannot be read, or no memory.
    pub fn from_rows(
        embed_tokens: Table,
        lm_head: Table,
        precision: HeadPrecision,
    ) -> Result<Self> {
        let lm_head: Arc<dyn LmHead> = match precision {
            HeadPrecision::Exact => Arc::new(ScreenedHead::new(lm_head)?),
            HeadPrecision::Quantized(format) => {
                Arc::new(QuantizedHead::new(lm_head.source(), format)?)
            }
        };
        Ok(Self { embed_tokens: Arc::new(StoredEmbedding::new(embed_tokens)), lm_head })
    }
}
