//! The key/value cache: keys and values of all positions seen, so that each token is computed once.
//!
//! Preallocated for a while and doubled when it fills up, never beyond the model's maximum. Rows of a
//! batch share their slots; a row that is padded on the left starts later. What a row holds was computed with its adapter,
//! so a row keeps the one it was given.

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor, bail};
use half::{bf16, f16, vec::HalfBitsVecExt};

use crate::{
    adapter::{Adaptation, RowAdapters},
    config::Config,
    ops::KvType,
    pages,
};

/// Slots allocated at first.
const INITIAL_CAPACITY: usize = 256;

/// Keys and values of every layer.
#[derive(Debug)]
pub struct KvCache {
    kv_type: KvType,
    layers: Vec<Layer>,
    /// First slot of each row that is not padding.
    starts: Vec<usize>,
    /// Of each row; empty if no row has one.
    adapters: Vec<Option<Arc<Adaptation>>>,
    len: usize,
    max_len: usize,
    kv_heads: usize,
    head_dim: usize,
    device: Device,
}

/// One layer's storage, each (batch, kv_heads, capacity, stored row); absent until the first token.
#[derive(Debug, Default)]
struct Layer {
    kv: Option<(Tensor, Tensor)>,
}

/// One layer's view of a cache, handed to its attention.
#[derive(Debug)]
pub struct LayerCache<'a> {
    layer: &'a mut Layer,
    kv_type: KvType,
    starts: &'a [usize],
    adapters: RowAdapters<'a>,
    len: usize,
    max_len: usize,
}

impl KvCache {
    /// A cache for the model of `config` and `starts.len()` sequences, of at most
    /// `max_position_embeddings` tokens each; row `i` begins at slot `starts[i]`, what is before it is
    /// padding. [`Model::cache`](crate::model::Model::cache) makes one.
    pub fn new(config: &Config, kv_type: KvType, starts: Vec<usize>, device: &Device) -> Self {
        Self {
            kv_type,
            layers: (0..config.num_hidden_layers).map(|_| Layer::default()).collect(),
            starts,
            adapters: Vec::new(),
            len: 0,
            max_len: config.max_position_embeddings,
            kv_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
            device: device.clone(),
        }
    }

    /// Runs row `row` with these adapters, beside those that the model itself may have; `None` takes them away. The others
    /// keep theirs, and their bits.
    ///
    /// # Errors
    /// A cache that holds tokens, which were computed otherwise; a row that is not there; adapters for another depth, or
    /// that replace whole tensors, which the rows share.
    pub fn adapt(&mut self, row: usize, adapters: Option<Arc<Adaptation>>) -> Result<()> {
        let batch = self.starts.len();
        if row >= batch {
            bail!("there is no row {row} in a batch of {batch}");
        }
        if self.len > 0 {
            bail!(
                "row {row} holds tokens that were computed with its adapter: empty the cache first"
            );
        }
        if let Some(adapters) = &adapters {
            let (found, layers) = (adapters.blocks().len(), self.layers.len());
            if found != layers {
                bail!("an adapter for {found} layers does not fit a model of {layers}");
            }
            if let Some(first) = adapters.replaced().next() {
                bail!(
                    "an adapter that replaces `{first}` cannot be beside one row, as the rows share it: put it beside \
                     the whole model"
                );
            }
        }
        self.adapters.resize(batch, None);
        self.adapters[row] = adapters;
        Ok(())
    }

    /// The adapter of row `row`.
    pub fn adapter(&self, row: usize) -> Option<&Arc<Adaptation>> {
        self.adapters.get(row)?.as_ref()
    }

    /// A cache of the same sequences that holds only their first `len` tokens, with room for `room` in all.
    ///
    /// # Errors
    /// More tokens than are held, or than the model's context.
    pub fn prefix(&self, len: usize, room: usize) -> Result<Self> {
        if len > self.len {
            bail!("the cache holds {} tokens, not {len}", self.len);
        }
        let layers = (0..self.layers.len()).map(|_| Layer::default()).collect();
        let (starts, adapters, device) =
            (self.starts.clone(), self.adapters.clone(), self.device.clone());
        let mut prefix = Self { layers, starts, adapters, device, len: 0, ..*self };
        prefix.reserve(room.max(len))?;
        for (new, old) in prefix.layers.iter().zip(&self.layers) {
            let (Some(new), Some(old)) = (&new.kv, &old.kv) else { continue };
            for (new, old) in [(&new.0, &old.0), (&new.1, &old.1)] {
                new.slice_set(&old.narrow(2, 0, len)?.contiguous()?, 2, 0)?;
            }
        }
        prefix.len = len;
        Ok(prefix)
    }

    /// Bytes of a sequence for which room for `tokens` tokens was [reserved](Self::reserve) at once.
    pub fn reserved_bytes(config: &Config, kv_type: KvType, tokens: usize) -> usize {
        let slots = tokens.max(INITIAL_CAPACITY).min(config.max_position_embeddings);
        slots * Self::token_bytes(config, kv_type)
    }

    /// Bytes of one token of one sequence.
    pub fn token_bytes(config: &Config, kv_type: KvType) -> usize {
        let rows = 2 * config.num_hidden_layers * config.num_key_value_heads; // keys and values
        rows * kv_type.bytes(config.head_dim)
    }

    /// Rows of the batch.
    pub fn batch(&self) -> usize {
        self.starts.len()
    }

    /// Tokens held, padding included.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is held yet.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The most tokens it can hold.
    pub fn max_len(&self) -> usize {
        self.max_len
    }

    /// Forgets everything from slot `len` on.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// How keys and values are stored.
    pub fn kv_type(&self) -> KvType {
        self.kv_type
    }

    /// Bytes allocated now.
    pub fn bytes(&self) -> usize {
        let tensors = self.layers.iter().filter_map(|layer| layer.kv.as_ref());
        let elements: usize = tensors.map(|(k, v)| k.elem_count() + v.elem_count()).sum();
        elements * self.kv_type.dtype().size_in_bytes()
    }

    /// The positions of `seq` new tokens in every row, row-major: slots counted from the row's start.
    pub(crate) fn positions(&self, seq: usize) -> Vec<usize> {
        let slots = self.len..self.len + seq;
        self.starts
            .iter()
            .flat_map(|&start| slots.clone().map(move |slot| slot.saturating_sub(start)))
            .collect()
    }

    /// Makes room for `seq` more tokens in every layer, so that no pass allocates until then.
    ///
    /// # Errors
    /// More tokens than the model's context holds.
    pub fn reserve(&mut self, seq: usize) -> Result<()> {
        let needed = self.len + seq;
        if needed > self.max_len {
            bail!(
                "the context is full: {} tokens and {seq} more exceed the model's \
                 max_position_embeddings of {}; shorten the prompt or ask for fewer new tokens",
                self.len,
                self.max_len
            );
        }
        for layer in &mut self.layers {
            let capacity = match &layer.kv {
                Some((k, _)) => k.dim(2)?,
                None => 0,
            };
            if needed <= capacity {
                continue;
            }
            let doubled = needed.max(2 * capacity).max(INITIAL_CAPACITY).min(self.max_len);
            let width = self.kv_type.width(self.head_dim);
            let shape = [2, self.starts.len(), self.kv_heads, doubled, width];
            let both = zeros(shape, self.kv_type.dtype(), &self.device)?;
            let (keys, values) = (both.get(0)?, both.get(1)?);
            if let Some((old_keys, old_values)) = layer.kv.take() {
                keys.slice_set(&old_keys, 2, 0)?;
                values.slice_set(&old_values, 2, 0)?;
            }
            layer.kv = Some((keys, values));
        }
        Ok(())
    }

    /// The view of layer `index`.
    pub(crate) fn layer(&mut self, index: usize) -> LayerCache<'_> {
        LayerCache {
            layer: &mut self.layers[index],
            kv_type: self.kv_type,
            starts: &self.starts,
            adapters: RowAdapters::new(&self.adapters, index),
            len: self.len,
            max_len: self.max_len,
        }
    }

    /// Counts `seq` tokens that every layer has appended.
    pub(crate) fn advance(&mut self, seq: usize) {
        self.len += seq;
    }
}

/// A tensor of zeros; on the processor in large pages, as far as it fills them.
fn zeros(shape: [usize; 5], dtype: DType, device: &Device) -> Result<Tensor> {
    let len = shape.iter().product();
    match (dtype, device.is_cpu()) {
        (DType::F32, true) => Tensor::from_vec(pages::zeros::<f32>(len), &shape, device),
        (DType::F16, true) => {
            let zeros: Vec<f16> = pages::zeros::<u16>(len).reinterpret_into();
            Tensor::from_vec(zeros, &shape, device)
        }
        (DType::BF16, true) => {
            let zeros: Vec<bf16> = pages::zeros::<u16>(len).reinterpret_into();
            Tensor::from_vec(zeros, &shape, device)
        }
        (DType::U8, true) => Tensor::from_vec(pages::zeros::<u8>(len), &shape, device),
        _ => Tensor::zeros(&shape, dtype, device),
    }
}

impl<'a> LayerCache<'a> {
    /// The adapters of the rows.
    pub(crate) fn adapters(&self) -> RowAdapters<'a> {
        self.adapters
    }

    /// The first slot that each of `seq` new tokens of every row sees, (batch, seq) row-major; empty if no row is padded.
    pub(crate) fn query_starts(&self, seq: usize) -> Vec<usize> {
        if self.starts.iter().all(|&start| start == 0) {
            return Vec::new();
        }
        self.starts.iter().flat_map(|&start| std::iter::repeat_n(start, seq)).collect()
    }

    /// Stores `k` and `v` (batch, kv_heads, seq, head_dim) behind what is there and returns all of it as stored,
    /// (batch, kv_heads, context, stored row) views.
    pub(crate) fn append(self, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let Some((keys, values)) = &self.layer.kv else {
            bail!("the cache has no room reserved for {} tokens", self.max_len)
        };
        keys.slice_set(&self.kv_type.encode(k)?, 2, self.len)?;
        values.slice_set(&self.kv_type.encode(v)?, 2, self.len)?;
        let context = self.len + k.dim(2)?;
        Ok((keys.narrow(2, 0, context)?, values.narrow(2, 0, context)?))
    }
}
