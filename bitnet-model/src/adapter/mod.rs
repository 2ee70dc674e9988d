//! LoRA adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! An adapter stays beside the ternary base: added to its weights and ternarized again it would be destroyed. [`Adapter`] is
//! what the files hold; [`LowRank`] computes one pair of it; [`Adaptation`] is one adapter or several, ready to be put beside
//! a model or beside single sequences of a batch.

mod adaptation;
mod check;
mod config;
mod files;
mod gguf;
mod json;
mod low_rank;
mod merge;
mod rows;
mod targets;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use candle_core::Tensor;

pub(crate) use self::low_rank::add_pairs;
pub use self::{
    adaptation::{Adaptation, BlockAdaptation},
    check::whole_tensors,
    config::{AdapterConfig, PairSpec},
    files::{CONFIG, WEIGHTS},
    low_rank::LowRank,
    merge::{MergedMatrix, merge},
    rows::RowAdapters,
    targets::{Modules, Pattern},
};
use crate::{Error, Result};

/// The two matrices of one projection, f32.
#[derive(Clone, Debug)]
pub struct Pair {
    /// `A` (rank, in_features).
    pub lora_a: Tensor,
    /// `B` (out_features, rank).
    pub lora_b: Tensor,
}

/// An adapter: its settings and its tensors.
#[derive(Clone, Debug)]
pub struct Adapter {
    /// The settings.
    pub config: AdapterConfig,
    /// The pairs, by the path of their projection: `model.layers.0.self_attn.q_proj`.
    pub pairs: BTreeMap<String, Pair>,
    /// What `modules_to_save` stored whole, f32, by the name of the tensor in the model: `lm_head.weight`.
    pub modules: BTreeMap<String, Tensor>,
    /// What errors name.
    origin: PathBuf,
}

impl Adapter {
    /// An adapter of these pairs, by path, and whole tensors, by name, all f32.
    pub fn new(
        config: AdapterConfig,
        pairs: BTreeMap<String, Pair>,
        modules: BTreeMap<String, Tensor>,
    ) -> Self {
        Self { config, pairs, modules, origin: "adapter".into() }
    }

    /// Where it was read from; `adapter` if it was made.
    pub fn origin(&self) -> &Path {
        &self.origin
    }

    /// Values of all its tensors.
    pub fn parameters(&self) -> usize {
        let pairs = self.pairs.values().flat_map(|pair| [&pair.lora_a, &pair.lora_b]);
        pairs.chain(self.modules.values()).map(Tensor::elem_count).sum()
    }

    /// What it adds to the projection at `path`, times `factor`; `None` if that is nothing.
    ///
    /// # Errors
    /// Tensors that are no pair.
    pub fn low_rank(&self, path: &str, factor: f64) -> Result<Option<LowRank>> {
        let Some(Pair { lora_a, lora_b }) = self.pairs.get(path) else { return Ok(None) };
        let spec = self.spec(path)?.ok_or_else(|| self.not_a_target(path))?;
        let pair = LowRank::new(lora_a.clone(), lora_b.clone(), spec.scale * factor);
        Ok(Some(pair.map_err(|e| self.wrong(&files::key(path, "lora_A"), e.to_string()))?))
    }

    /// The pair of the projection at `path`, as the settings have it.
    fn spec(&self, path: &str) -> Result<Option<PairSpec>> {
        self.config.pair(path).map_err(|reason| Error::Config {
            path: self.origin.join(CONFIG),
            field: "target_modules".into(),
            reason,
        })
    }

    fn not_a_target(&self, path: &str) -> Error {
        let reason = "not one of the target_modules of the adapter's configuration";
        self.wrong(&files::key(path, "lora_A"), reason.into())
    }

    /// An error about the tensor `name` of the file.
    fn wrong(&self, name: &str, reason: String) -> Error {
        Error::Tensor { path: self.origin.join(WEIGHTS), name: name.into(), reason }
    }
}
