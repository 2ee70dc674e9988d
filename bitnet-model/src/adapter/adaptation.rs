//! Adapters made ready for a model: scaled, summed, and sorted by the place where they act.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};

use super::{Adapter, LowRank};
use crate::{
    Error, Result,
    config::{Config, PROJECTIONS},
};

/// What one or several adapters, each times a factor, do to models of one geometry. It has the adapters' tensors and
/// nothing of a base: it goes with every model that they fit.
///
/// [`Model::adapted`](crate::model::Model::adapted) puts it beside a whole model,
/// [`KvCache::adapt`](crate::kv_cache::KvCache::adapt) beside one sequence of a batch.
#[derive(Clone, Debug, Default)]
pub struct Adaptation {
    blocks: Vec<BlockAdaptation>,
    /// What takes the place of the base's tensors, by their names.
    whole: BTreeMap<String, Tensor>,
}

/// What adapters do to one block.
#[derive(Clone, Debug, Default)]
pub struct BlockAdaptation {
    /// In the order of [`PROJECTIONS`]: what is added to each, in this order.
    pairs: [Vec<LowRank>; PROJECTIONS.len()],
    /// What takes the place of the block's norms, by their names in it.
    norms: BTreeMap<String, Tensor>,
}

impl BlockAdaptation {
    /// What is added to the projection `name`.
    pub fn pairs(&self, name: &str) -> &[LowRank] {
        PROJECTIONS.iter().position(|known| *known == name).map_or(&[], |at| &self.pairs[at])
    }

    /// What takes the place of the first of the norms `names`, which a family has one of.
    pub(crate) fn norm(&self, names: &[&str]) -> Option<&Tensor> {
        names.iter().find_map(|name| self.norms.get(*name))
    }

    /// Those of several projections.
    pub(crate) fn pairs_of<const N: usize>(&self, names: [&str; N]) -> [&[LowRank]; N] {
        names.map(|name| self.pairs(name))
    }
}

impl Adaptation {
    /// The sum of `adapters`, each times its factor, for the model of `config`; on the processor.
    ///
    /// # Errors
    /// An adapter for another model; a factor that is not finite; modules stored whole that have a factor other than 1, or
    /// that two adapters replace.
    pub fn new(config: &Config, adapters: &[(&Adapter, f64)]) -> Result<Self> {
        let blocks = vec![BlockAdaptation::default(); config.num_hidden_layers];
        let mut sum = Self { blocks, ..Self::default() };
        for (adapter, factor) in adapters {
            adapter.check(config)?;
            sum.add(config, adapter, *factor)?;
        }
        Ok(sum)
    }

    fn add(&mut self, config: &Config, adapter: &Adapter, factor: f64) -> Result<()> {
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
                pairs.push(pair);
            }
        }
        for (name, tensor) in &adapter.modules {
            if factor != 1. {
                return refuse(format!(
                    "`{name}` is stored whole and takes the place of the model's: a scale of {factor} cannot be \
                     applied to it, so give none"
                ));
            }
            if self.whole.insert(name.clone(), tensor.clone()).is_some() {
                return refuse(format!("`{name}` is already replaced by another adapter"));
            }
            if let Some((layer, norm)) = name.strip_suffix(".weight").and_then(block_of)
                && let Some(block) = self.blocks.get_mut(layer)
            {
                block.norms.insert(norm.into(), tensor.clone());
            }
        }
        Ok(())
    }

    /// The same on `device`, where the model is that it goes beside.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        let moved = |tensors: &BTreeMap<String, Tensor>| -> Result<_> {
            let each = tensors.iter();
            each.map(|(name, tensor)| Ok((name.clone(), tensor.to_device(device)?))).collect()
        };
        let mut blocks = self.blocks.clone();
        for block in &mut blocks {
            for pair in block.pairs.iter_mut().flatten() {
                *pair = pair.to_device(device)?;
            }
            block.norms = moved(&block.norms)?;
        }
        Ok(Self { blocks, whole: moved(&self.whole)? })
    }

    /// What it does to each block.
    pub fn blocks(&self) -> &[BlockAdaptation] {
        &self.blocks
    }

    /// Names of the base's tensors that it replaces by whole ones.
    pub fn replaced(&self) -> impl Iterator<Item = &str> {
        self.whole.keys().map(String::as_str)
    }

    /// The tensor that takes the place of `name`.
    pub fn whole(&self, name: &str) -> Option<&Tensor> {
        self.whole.get(name)
    }

    /// What is added to the projection at `path`.
    pub(super) fn pairs_at(&self, path: &str) -> &[LowRank] {
        let place = block_of(path).and_then(|(layer, rest)| {
            Some(self.blocks.get(layer)?.pairs(rest.rsplit('.').next()?))
        });
        place.unwrap_or_default()
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
