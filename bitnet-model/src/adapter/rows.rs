//! Adapters of single sequences in a batch: each row has its own, or none.

use std::sync::Arc;

use candle_core::{Result, Tensor};

use super::{Adaptation, LowRank};

/// The adapters of a batch's rows, as one block sees them. Rows without one keep the bits they have without any.
#[derive(Clone, Copy, Debug)]
pub struct RowAdapters<'a> {
    /// One a row; empty if there is none at all.
    rows: &'a [Option<Arc<Adaptation>>],
    layer: usize,
}

impl<'a> RowAdapters<'a> {
    /// Of no row.
    pub const NONE: RowAdapters<'static> = RowAdapters { rows: &[], layer: 0 };

    /// `rows`, one for each row of the batch or none at all, in the block `layer`.
    pub fn new(rows: &'a [Option<Arc<Adaptation>>], layer: usize) -> Self {
        Self { rows, layer }
    }

    /// Whether no row has any.
    pub(crate) fn is_empty(&self) -> bool {
        self.rows.iter().all(Option::is_none)
    }

    /// `y` (batch, seq, out_features), the product of `x` (batch, seq, in_features) and the projection `name`, and in rows
    /// with an adapter what that adds to it.
    pub fn add(&self, name: &str, x: &Tensor, mut y: Tensor) -> Result<Tensor> {
        let mut done: Vec<&Arc<Adaptation>> = Vec::new();
        for adapter in self.rows.iter().flatten() {
            if done.iter().any(|other| Arc::ptr_eq(other, adapter)) {
                continue;
            }
            done.push(adapter);
            let pairs = adapter.blocks().get(self.layer).map_or(&[][..], |block| block.pairs(name));
            if !pairs.is_empty() {
                y = add_to_rows(y, x, pairs, &self.rows_of(adapter))?;
            }
        }
        Ok(y)
    }

    /// [`add`](Self::add) for the products of `x` with several projections.
    pub(crate) fn add_all<const N: usize>(
        &self,
        names: [&str; N],
        x: &Tensor,
        products: Vec<Tensor>,
    ) -> Result<Vec<Tensor>> {
        names.iter().zip(products).map(|(name, y)| self.add(name, x, y)).collect()
    }

    /// The rows of the batch that have `adapter`.
    fn rows_of(&self, adapter: &Arc<Adaptation>) -> Vec<u32> {
        let is_it = |row: &Option<Arc<Adaptation>>| {
            row.as_ref().is_some_and(|other| Arc::ptr_eq(other, adapter))
        };
        (0..).zip(self.rows).filter(|(_, row)| is_it(row)).map(|(index, _)| index).collect()
    }
}

/// Adds the `pairs` to `rows` of the batch.
fn add_to_rows(y: Tensor, x: &Tensor, pairs: &[LowRank], rows: &[u32]) -> Result<Tensor> {
    if rows.len() == x.dim(0)? {
        return super::add_pairs(y, x, pairs);
    }
    let rows = Tensor::new(rows, x.device())?;
    let x = x.contiguous()?.index_select(&rows, 0)?; // (rows, seq, in_features)
    let y = y.contiguous()?;
    super::low_rank::products(&x, pairs).try_fold(y, |y, product| y.index_add(&rows, &product?, 0))
}
