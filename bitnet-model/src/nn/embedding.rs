//! The embedding: token ids to rows.

use std::sync::Arc;

use candle_core::{DType, Module, Result, Tensor};

use crate::rows::{RowSource, gather};

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
    rows: Arc<dyn RowSource>,
}

impl StoredEmbedding {
    /// `rows` (vocab_size, hidden_size).
    pub fn new(rows: Arc<dyn RowSource>) -> Self {
        Self { rows }
    }
}

impl Module for StoredEmbedding {
    fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        let (_, hidden_size) = self.rows.shape();
        let rows = ids.to_vec1::<u32>()?;
        let mut embedded = vec![0f32; rows.len() * hidden_size];
        gather(&*self.rows, &rows, &mut embedded)?;
        Tensor::from_vec(embedded, (rows.len(), hidden_size), ids.device())
    }
}
