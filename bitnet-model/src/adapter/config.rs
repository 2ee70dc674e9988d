//! What a LoRA adapter is: PEFT's `LoraConfig`, as far as it can be computed here.

use super::targets::{Modules, Pattern};
use crate::config::PROJECTIONS;

/// The settings of an adapter, which `adapter_config.json` holds.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterConfig {
    /// `r`: the rank of pairs that `rank_pattern` does not name; at least 1.
    pub rank: usize,
    /// `lora_alpha`, of pairs that `alpha_pattern` does not name.
    pub alpha: f64,
    /// `lora_dropout`, in training: the part of the inputs that a step leaves out, in [0, 1).
    pub dropout: f64,
    /// The projections that have a pair.
    pub target_modules: Modules,
    /// Projections that have none although they are targets.
    pub exclude_modules: Option<Modules>,
    /// The layers whose projections are targets; empty for all.
    pub layers_to_transform: Vec<usize>,
    /// Names in front of a layer's number, as regular expressions; empty for any.
    pub layers_pattern: Vec<Pattern>,
    /// Ranks of modules whose path ends as an expression says; the first that fits counts.
    pub rank_pattern: Vec<(Pattern, usize)>,
    /// Alphas, likewise.
    pub alpha_pattern: Vec<(Pattern, f64)>,
    /// Whether a pair is scaled by `alpha / √rank` and not by `alpha / rank`.
    pub use_rslora: bool,
    /// Modules that are stored whole, by the end of their path: `lm_head`, `embed_tokens`, `norm` for all norms, `model.norm`
    /// for the last one.
    pub modules_to_save: Vec<String>,
    /// The model that the adapter was trained on, a repo id or a path; for people.
    pub base_model: Option<String>,
    /// `task_type`; `CAUSAL_LM`.
    pub task_type: Option<String>,
}

/// The pair of one projection, as a configuration has it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PairSpec {
    /// Rows of `A` and columns of `B`.
    pub rank: usize,
    /// Multiplies the product of the pair.
    pub scale: f64,
}

impl Default for AdapterConfig {
    /// What is usual for BitNet: rank 32, alpha 64, dropout 0.1, all seven projections.
    fn default() -> Self {
        Self {
            rank: 32,
            alpha: 64.,
            dropout: 0.1,
            target_modules: Modules::Names(PROJECTIONS.map(String::from).into()),
            exclude_modules: None,
            layers_to_transform: Vec::new(),
            layers_pattern: Vec::new(),
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
            use_rslora: false,
            modules_to_save: Vec::new(),
            base_model: None,
            task_type: Some("CAUSAL_LM".into()),
        }
    }
}

impl AdapterConfig {
    /// The pair of the projection at `path` (`model.layers.0.self_attn.q_proj`); `None` if it has none.
    ///
    /// # Errors
    /// An expression that takes too long to match; it is named.
    pub fn pair(&self, path: &str) -> Result<Option<PairSpec>, String> {
        if !self.targets(path)? {
            return Ok(None);
        }
        let rank = first(&self.rank_pattern, path)?.unwrap_or(self.rank);
        let alpha = first(&self.alpha_pattern, path)?.unwrap_or(self.alpha);
        let divisor = match self.use_rslora {
            true => (rank as f64).sqrt(),
            false => rank as f64,
        };
        Ok(Some(PairSpec { rank, scale: alpha / divisor }))
    }

    fn targets(&self, path: &str) -> Result<bool, String> {
        if let Some(excluded) = &self.exclude_modules
            && excluded.contains(path)?
        {
            return Ok(false);
        }
        // As in PEFT, an exact path and a pattern are not bound to layers.
        let is_path = |name: &String| name == path;
        match &self.target_modules {
            Modules::Names(names) if !names.iter().any(is_path) => {
                Ok(self.target_modules.contains(path)? && self.in_layers(path)?)
            }
            modules => modules.contains(path),
        }
    }

    /// Whether `path` lies in a layer that is to be adapted.
    fn in_layers(&self, path: &str) -> Result<bool, String> {
        if self.layers_to_transform.is_empty() {
            return Ok(true);
        }
        for (at, _) in path.match_indices('.') {
            let (list, rest) = (&path[..at], &path[at + 1..]);
            let Some((number, _)) = rest.split_once('.') else { continue };
            let Ok(layer) = number.parse::<usize>() else { continue };
            let is_list = self.layers_pattern.is_empty() || {
                let fits = self.layers_pattern.iter().map(|pattern| pattern.is_suffix(list));
                fits.collect::<Result<Vec<bool>, String>>()?.contains(&true)
            };
            if is_list {
                return Ok(self.layers_to_transform.contains(&layer));
            }
        }
        Ok(false)
    }

    /// Whether the module at `path` is stored whole. As in PEFT, and other than for targets, a name need not begin at a dot:
    /// `norm` means `input_layernorm` too.
    pub fn saves(&self, path: &str) -> bool {
        self.modules_to_save.iter().any(|name| path.ends_with(name))
    }
}

/// The value of the first pattern that fits the end of `path`.
fn first<T: Copy>(patterns: &[(Pattern, T)], path: &str) -> Result<Option<T>, String> {
    for (pattern, value) in patterns {
        if pattern.is_suffix(path)? {
            return Ok(Some(*value));
        }
    }
    Ok(None)
}
