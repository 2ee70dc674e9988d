//! The embedding: token ids to rows.

use std::sync::Arc;

use candle_core::{DType, Module, Result, Tensor};

use crate::{ops, rows::Table};

/// An embedding, ids (n) u32 → (n, hidden_size) f32. An id outside the vocabulary is an error.
pub type Embedding = Arc<dyn Module + Send + Sync>;

/// Rows of a tensor, f32 or bf16. Differentiable when f32.
#[derive(Clone, Debug)]
pub struct DenseEmbedding {
    weight: Tensor,
}

impl DenseEmbedding {
    /// `weight` (vocab_size, hidden_size).
    pub fn new(weight: Tensor) -> Self {
        Self { weight }
    }
}

impl Module for DenseEmbedding {
    fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        self.weight.index_select(ids, 0)?.to_dtype(DType::F32)
    }
}

/// Rows read as they are needed.
#[derive(Clone, Debug)]
pub struct StoredEmbedding {
    rows: Table,
}

impl StoredEmbedding {
    /// `rows` (vocab_size, hidden_size).
    pub fn new(rows: Table) -> Self {
        Self { rows }
    }
}

impl Module for StoredEmbedding {
    fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        ops::embed(ids, &self.rows)
    }
}
