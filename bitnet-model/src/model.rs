//! The model: `embed_tokens → blocks → norm → lm_head`. One type for inference, training and
//! adapters; what differs is the [`LinearFactory`] it is loaded with.

use std::sync::Arc;

use candle_core::{Device, IndexOp, Module, Result, Tensor, bail};
use candle_nn::VarBuilder;

use crate::{
    adapter::{Adaptation, RowAdapters},
    config::Config,
    kv_cache::KvCache,
    nn::{
        Angles, Block, Context, DenseEmbedding, DenseLinear, LinearFactory, LmHead, Logits, Need,
        RmsNorm, RotaryEmbedding, Vocabulary,
    },
    ops::{KvType, gemm::Precision},
};

/// A decoder-only language model. Immutable and shared; state lives in a [`KvCache`].
pub struct Model {
    config: Config,
    vocabulary: Vocabulary,
    blocks: Vec<Block>,
    norm: RmsNorm,
    rope: RotaryEmbedding,
    device: Device,
    projection_bytes: Option<usize>,
}

/// New tokens of one sequence among others.
#[derive(Debug)]
pub struct Next<'a> {
    /// Their ids, at least one.
    pub tokens: &'a [u32],
    /// What they continue, of this sequence alone.
    pub cache: &'a mut KvCache,
}

impl Model {
    /// Loads all weights as tensors, which train if they are variables. Embedding and head keep the dtype of `vb` (f32
    /// or bf16), everything else computes in f32.
    pub fn load(config: &Config, linears: &dyn LinearFactory, vb: VarBuilder) -> Result<Self> {
        let shape = (config.vocab_size, config.hidden_size);
        let vocabulary = Vocabulary::load(shape, config.tie_word_embeddings, vb.clone())?;
        Self::with_vocabulary(config, linears, vocabulary, vb)
    }

    /// Loads all weights but those of embedding and head.
    pub fn with_vocabulary(
        config: &Config,
        linears: &dyn LinearFactory,
        vocabulary: Vocabulary,
        vb: VarBuilder,
    ) -> Result<Self> {
        let model = vb.pp("model");
        let bytes_before = linears.weight_bytes();
        let blocks = (0..config.num_hidden_layers)
            .map(|layer| Block::load(config, linears, model.pp("layers").pp(layer)))
            .collect::<Result<_>>()?;
        Ok(Self {
            config: config.clone(),
            vocabulary,
            blocks,
            norm: RmsNorm::load(config.hidden_size, config.rms_norm_eps, model.pp("norm"))?,
            rope: RotaryEmbedding::new(config.head_dim, config.rope_theta),
            device: vb.device().clone(),
            projection_bytes: linears
                .weight_bytes()
                .zip(bytes_before)
                .map(|(after, before)| after - before),
        })
    }

    /// This model with adapters beside it, or with those of `adaptation` beside its own. It shares all weights and takes
    /// no memory but theirs.
    ///
    /// # Errors
    /// An adaptation for a model of another depth.
    pub fn adapted(&self, adaptation: &Adaptation) -> Result<Self> {
        let (blocks, layers) = (adaptation.blocks(), self.blocks.len());
        if blocks.len() != layers {
            bail!("an adapter for {} layers does not fit a model of {layers}", blocks.len());
        }
        let mut vocabulary = self.vocabulary.clone();
        if let Some(rows) = adaptation.whole("model.embed_tokens.weight") {
            vocabulary.embed_tokens = Arc::new(DenseEmbedding::new(rows.clone()));
        }
        if let Some(rows) = adaptation.whole("lm_head.weight") {
            vocabulary.lm_head = Arc::new(DenseLinear::new(rows.clone(), None));
        }
        let blocks = self.blocks.iter().zip(blocks);
        Ok(Self {
            config: self.config.clone(),
            vocabulary,
            blocks: blocks.map(|(block, adaptation)| block.adapted(adaptation)).collect(),
            norm: self.norm.replaced(adaptation.whole("model.norm.weight")),
            rope: self.rope.clone(),
            device: self.device.clone(),
            projection_bytes: self.projection_bytes.map(|bytes| bytes + adaptation.pair_bytes()),
        })
    }

    /// The validated configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Where the weights are.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Bytes of the projections' weights as they lie in memory, all of which every token reads; `None` if their factory
    /// does not count them.
    pub fn projection_bytes(&self) -> Option<usize> {
        self.projection_bytes
    }

    /// The output head.
    pub fn lm_head(&self) -> &dyn LmHead {
        &*self.vocabulary.lm_head
    }

    /// An empty cache for `batch` sequences.
    pub fn cache(&self, kv_type: KvType, batch: usize) -> KvCache {
        self.padded_cache(kv_type, vec![0; batch])
    }

    /// An empty cache for rows padded on the left: row `i` begins at slot `starts[i]`.
    pub fn padded_cache(&self, kv_type: KvType, starts: Vec<usize>) -> KvCache {
        KvCache::new(&self.config, kv_type, starts, &self.device)
    }

    /// The blocks, for looking at the residual stream between them.
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// Rotary angles for `positions`, (rows, seq) row-major.
    pub fn angles(&self, positions: &[usize], rows: usize) -> Result<Angles> {
        self.rope.angles(positions, rows, &self.device)
    }

    /// Embeds `tokens` (batch, seq) u32: (batch, seq, hidden_size) f32.
    ///
    /// # Errors
    /// A token id outside the vocabulary.
    pub fn embed(&self, tokens: &Tensor) -> Result<Tensor> {
        let (batch, seq) = tokens.dims2()?;
        let ids = tokens.flatten_all()?;
        let vocab_size = self.config.vocab_size;
        if let Some(id) = ids.to_vec1::<u32>()?.into_iter().find(|&id| id as usize >= vocab_size) {
            bail!("token id {id} is outside the model's vocabulary of {vocab_size}");
        }
        let rows = self.vocabulary.embed_tokens.forward(&ids)?;
        rows.reshape((batch, seq, self.config.hidden_size))
    }

    /// The final norm's output for `tokens` (batch, seq) u32: (batch, seq, hidden_size) f32.
    ///
    /// With a cache the tokens continue what it holds, which they then extend; without, they are whole
    /// sequences and gradients flow.
    pub fn hidden_states(&self, tokens: &Tensor, cache: Option<&mut KvCache>) -> Result<Tensor> {
        let Some(cache) = cache else { return self.document_states(tokens, &[]) };
        let (batch, seq) = tokens.dims2()?;
        if cache.batch() != batch {
            bail!("{batch} rows of tokens, but the cache holds {}", cache.batch());
        }
        cache.reserve(seq)?;
        let angles = self.angles(&cache.positions(seq), batch)?;
        let states = self.states(tokens, &angles, Some(&mut *cache), &[])?;
        cache.advance(seq);
        Ok(states)
    }

    /// The final norm's output for new tokens of several sequences, which continue what their caches hold and extend them:
    /// (tokens in all, hidden_size) f32, one sequence after the other. All projections are multiplied with all tokens at once.
    /// The bits of a sequence, and its adapter, are its own, whatever others run beside it.
    ///
    /// # Errors
    /// No tokens, an id outside the vocabulary, more than a context holds, or a cache of more than one sequence. The caches
    /// then hold what they held.
    pub fn next_states(&self, sequences: &mut [Next<'_>]) -> Result<Tensor> {
        let mut adapters = Vec::new();
        let (mut tokens, mut positions) = (Vec::new(), Vec::new());
        for Next { tokens: new, cache } in sequences.iter_mut() {
            if new.is_empty() || cache.batch() != 1 {
                bail!("{} tokens for a cache of {} sequences", new.len(), cache.batch());
            }
            cache.reserve(new.len())?;
            tokens.extend_from_slice(new);
            positions.extend(cache.positions(new.len()));
            adapters.extend(std::iter::repeat_n(cache.adapter(0).cloned(), new.len()));
        }
        if adapters.iter().all(Option::is_none) {
            adapters.clear();
        }
        let rows = tokens.len();
        let tokens = Tensor::from_vec(tokens, (rows, 1), &self.device)?;
        let (mut x, angles) = (self.embed(&tokens)?, self.angles(&positions, rows)?);
        for (index, block) in self.blocks.iter().enumerate() {
            let views = sequences.iter_mut();
            let sequences =
                views.map(|next| (next.cache.layer(index), next.tokens.len())).collect();
            let adapters = RowAdapters::new(&adapters, index);
            x = block.forward(&x, &angles, Context::Sequences { sequences, adapters })?;
        }
        for Next { tokens, cache } in sequences {
            cache.advance(tokens.len());
        }
        self.norm(&x)?.squeeze(1)
    }

    /// The final norm's output for `tokens` (batch, seq) u32, rows of whole documents packed one behind another:
    /// (batch, seq, hidden_size) f32, through which gradients flow.
    ///
    /// `starts[i]` is the position in its row at which the document of token `i` of the flattened (batch, seq) begins:
    /// the token sees nothing before it and its rotary position counts from it, so a document's states have the bits
    /// they have alone. Without starts every row is one document.
    ///
    /// # Errors
    /// Starts that are not one a token, or behind their token.
    pub fn document_states(&self, tokens: &Tensor, starts: &[usize]) -> Result<Tensor> {
        self.states(tokens, &self.document_angles(tokens, starts)?, None, starts)
    }

    /// The rotary angles of `tokens` (batch, seq) in documents that begin at `starts`, as
    /// [`document_states`](Self::document_states) takes them.
    ///
    /// # Errors
    /// As there.
    pub fn document_angles(&self, tokens: &Tensor, starts: &[usize]) -> Result<Angles> {
        let (batch, seq) = tokens.dims2()?;
        match starts {
            [] => self.angles(&Vec::from_iter(0..seq), 1),
            _ => self.angles(&document_positions(starts, batch, seq)?, batch),
        }
    }

    /// All blocks and the final norm; without a cache every token's context begins at its start.
    fn states(
        &self,
        tokens: &Tensor,
        angles: &Angles,
        mut cache: Option<&mut KvCache>,
        starts: &[usize],
    ) -> Result<Tensor> {
        let (batch, seq) = tokens.dims2()?;
        if batch == 0 || seq == 0 {
            bail!("there are no tokens to run: the input is {batch} × {seq}");
        }
        let mut x = self.embed(tokens)?;
        for (index, block) in self.blocks.iter().enumerate() {
            let context = match &mut cache {
                Some(cache) => Context::Cache(cache.layer(index)),
                None => Context::Own { starts, backward: Precision::F32 },
            };
            x = block.forward(&x, angles, context)?;
        }
        self.norm(&x)
    }

    /// The final norm of the last block's output (…, hidden_size).
    pub fn norm(&self, x: &Tensor) -> Result<Tensor> {
        self.norm.forward(x)
    }

    /// The head: hidden states (…, hidden_size) → all logits (…, vocab_size), f32.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        self.vocabulary.lm_head.forward(hidden)
    }

    /// The head for each row of `hidden` (rows, hidden_size), as far as `needs`, one a row, asks for it.
    pub fn needed_logits(&self, hidden: &Tensor, needs: &[Need]) -> Result<Vec<Logits>> {
        self.vocabulary.lm_head.logits(hidden, needs)
    }

    /// Runs `tokens` (batch, seq) and returns the logits of each row's last position,
    /// (batch, vocab_size) f32.
    pub fn forward(&self, tokens: &Tensor, cache: &mut KvCache) -> Result<Tensor> {
        let hidden = self.hidden_states(tokens, Some(cache))?;
        let last = hidden.dim(1)? - 1;
        self.logits(&hidden.i((.., last))?.contiguous()?)
    }
}

/// The position of every token in its document, (batch, seq) row-major.
fn document_positions(starts: &[usize], batch: usize, seq: usize) -> Result<Vec<usize>> {
    if starts.len() != batch * seq {
        bail!("{} starts of documents for {batch} × {seq} tokens", starts.len());
    }
    let positions =
        starts.iter().enumerate().map(|(token, &start)| (token % seq).checked_sub(start));
    match positions.collect::<Option<_>>() {
        Some(positions) => Ok(positions),
        None => bail!("a document starts behind one of its tokens"),
    }
}
