//! Adapters made ready for a model: scaled, summed, and sorted by the place where they act.

use candle_core::{Device, Tensor};

use super::{Adapter, LowRank, PROJECTIONS};
use crate::{Error, Result, config::Config};

/// What one or several adapters, each times a factor, do to models of one geometry. It has the adapters' tensors and
/// nothing of a base: it goes with every model that they fit.
///
/// [`Model::adapted`](crate::model::Model::adapted) puts it beside a whole model,
/// [`KvCache::adapt`](crate::kv_cache::KvCache::adapt) beside one sequence of a batch.
#[derive(Clone, Debug, Default)]
pub struct Adaptation {
    blocks: Vec<BlockAdaptation>,
    pub(crate) embed_tokens: Option<Tensor>,
    pub(crate) lm_head: Option<Tensor>,
    pub(crate) norm: Option<Tensor>,
    /// The names of the tensors that replace the base's.
    replaced: Vec<String>,
}

/// What adapters do to one block.
#[derive(Clone, Debug, Default)]
pub struct BlockAdaptation {
    /// In the order of [`PROJECTIONS`]: what is added to each, in this order.
    pairs: [Vec<LowRank>; PROJECTIONS.len()],
    pub(crate) input_layernorm: Option<Tensor>,
    pub(crate) post_attention_layernorm: Option<Tensor>,
    pub(crate) attn_sub_norm: Option<Tensor>,
    pub(crate) ffn_sub_norm: Option<Tensor>,
}

impl BlockAdaptation {
    /// What is added to the projection `name`.
    pub fn pairs(&self, name: &str) -> &[LowRank] {
        PROJECTIONS.iter().position(|known| *known == name).map_or(&[], |at| &self.pairs[at])
    }

    /// Those of several projections.
    pub(crate) fn pairs_of<const N: usize>(&self, names: [&str; N]) -> [&[LowRank]; N] {
        names.map(|name| self.pairs(name))
    }
}

impl Adaptation {
    /// The sum of `adapters`, each times its factor, for the model of `config` on `device`.
    ///
    /// # Errors
    /// An adapter for another model; a factor that is not finite; modules stored whole that have a factor other than 1, or
    /// that two adapters replace.
    pub fn new(config: &Config, adapters: &[(&Adapter, f64)], device: &Device) -> Result<Self> {
        let blocks = vec![BlockAdaptation::default(); config.num_hidden_layers];
        let mut sum = Self { blocks, ..Self::default() };
        for (adapter, factor) in adapters {
            adapter.check(config)?;
            sum.add(config, adapter, *factor, device)?;
        }
        Ok(sum)
    }

    fn add(
        &mut self,
        config: &Config,
        adapter: &Adapter,
        factor: f64,
        device: &Device,
    ) -> Result<()> {
        let refuse =
            |reason: String| Err(Error::Input(format!("{}: {reason}", adapter.origin().display())));
        if !factor.is_finite() {
            return refuse(format!("a scale of {factor} is no number to multiply by"));
        }
        for (name, _) in config.projections() {
            let path = name.trim_end_matches(".weight");
            let Some(pair) = adapter.low_rank(path, factor)? else { continue };
            let block = block_of(path).and_then(|(layer, rest)| {
                let projection = rest.rsplit('.').next()?;
                let at = PROJECTIONS.iter().position(|known| *known == projection)?;
                self.blocks.get_mut(layer).map(|block| &mut block.pairs[at])
            });
            if let Some(pairs) = block {
                pairs.push(pair.to_device(device)?);
            }
        }
        for (name, tensor) in &adapter.modules {
            if factor != 1. {
                return refuse(format!(
                    "`{name}` is stored whole and takes the place of the model's: a scale of {factor} cannot be \
                     applied to it, so give none"
                ));
            }
            let Some(slot) = self.slot(name) else {
                return refuse(format!("`{name}` cannot be replaced"));
            };
            if slot.is_some() {
                return refuse(format!("`{name}` is already replaced by another adapter"));
            }
            *slot = Some(tensor.to_device(device)?);
            self.replaced.push(name.clone());
        }
        Ok(())
    }

    /// Where the tensor that takes the place of `name` belongs.
    fn slot(&mut self, name: &str) -> Option<&mut Option<Tensor>> {
        let path = name.strip_suffix(".weight")?;
        match path {
            "model.embed_tokens" => return Some(&mut self.embed_tokens),
            "model.norm" => return Some(&mut self.norm),
            "lm_head" => return Some(&mut self.lm_head),
            _ => {}
        }
        let (layer, norm) = block_of(path)?;
        let block = self.blocks.get_mut(layer)?;
        match norm {
            "input_layernorm" => Some(&mut block.input_layernorm),
            "post_attention_layernorm" => Some(&mut block.post_attention_layernorm),
            "self_attn.attn_sub_norm" | "self_attn.inner_attn_ln" => Some(&mut block.attn_sub_norm),
            "mlp.ffn_sub_norm" | "mlp.ffn_layernorm" => Some(&mut block.ffn_sub_norm),
            _ => None,
        }
    }

    /// What it does to each block.
    pub fn blocks(&self) -> &[BlockAdaptation] {
        &self.blocks
    }

    /// Names of the base's tensors that it replaces by whole ones.
    pub fn replaced(&self) -> &[String] {
        &self.replaced
    }

    /// Bytes of the low-rank pairs, all of which every token reads.
    pub fn pair_bytes(&self) -> usize {
        let pairs = self.blocks.iter().flat_map(|block| block.pairs.iter().flatten());
        pairs.map(LowRank::bytes).sum()
    }
}

/// The layer of `model.layers.LAYER.REST`, and the rest.
fn block_of(path: &str) -> Option<(usize, &str)> {
    let (layer, rest) = path.strip_prefix("model.layers.")?.split_once('.')?;
    Some((layer.parse().ok()?, rest))
}
