//! `[lora]`: an adapter instead of new weights.

use std::collections::BTreeMap;

use bitnet_model::{
    adapter::{AdapterConfig, Modules, Pattern},
    config::PROJECTIONS,
    kernels::Bf16Panels,
};
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use crate::{Error, Result, lora::Mode};

/// `[lora]`: low-rank pairs that are trained beside the model of `[init]`, which stays as it is.
///
/// ```toml
/// [init]
/// model = "microsoft/bitnet-b1.58-2B-4T"   # packed; a folder, a repo id, or "default"
/// [lora]
/// rank = 32
/// alpha = 64
/// dropout = 0.1
/// target_modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
/// rank_pattern = { "layers\\.0\\..*" = 64 }    # of modules whose path ends so
/// modules_to_save = ["norm"]                  # trained whole: all norms; also model.norm, embed_tokens, lm_head
/// neftune_alpha = 5                           # noise on the embedded tokens of training steps
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Lora {
    /// Beside the projections, or with `qat` inside the quantizer of latent masters.
    pub mode: Mode,
    /// The rank of the pairs.
    pub rank: usize,
    /// The pairs are multiplied by `alpha / rank`.
    pub alpha: f64,
    /// Or by `alpha / √rank`.
    pub rslora: bool,
    /// The part of a pair's inputs that a step leaves out; 0.1 unless the mode is `qat`, which has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dropout: Option<f64>,
    /// The projections that get a pair.
    pub target_modules: Vec<String>,
    /// Ranks of modules whose path ends as an expression says.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub rank_pattern: BTreeMap<String, usize>,
    /// Alphas, likewise.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub alpha_pattern: BTreeMap<String, f64>,
    /// Norms, `embed_tokens` or `lm_head` that are trained whole and stored with the adapter.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub modules_to_save: Vec<String>,
    /// NEFTune: noise within `±alpha/√(sequence length · hidden size)` on the embedded tokens of training steps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub neftune_alpha: Option<f64>,
    /// MiB of memory for products of the forward pass: where they are kept, blocks that are computed again need not multiply
    /// again.
    pub keep_mib: usize,
}

impl Default for Lora {
    /// What is usual for BitNet.
    fn default() -> Self {
        let usual = AdapterConfig::default();
        Self {
            mode: Mode::default(),
            rank: usual.rank,
            alpha: usual.alpha,
            rslora: false,
            dropout: None,
            target_modules: PROJECTIONS.map(String::from).into(),
            rank_pattern: BTreeMap::new(),
            alpha_pattern: BTreeMap::new(),
            modules_to_save: Vec::new(),
            neftune_alpha: None,
            keep_mib: 448,
        }
    }
}

impl Lora {
    /// The settings that the adapter's file will have; `base_model` is for people.
    ///
    /// # Errors
    /// The key whose value cannot be used.
    pub fn adapter_config(&self, base_model: Option<String>) -> Result<AdapterConfig> {
        self.validate()?;
        let usual = AdapterConfig::default();
        let dropout = match self.mode {
            Mode::Adapter => self.dropout.unwrap_or(usual.dropout),
            Mode::Qat => 0.,
        };
        Ok(AdapterConfig {
            rank: self.rank,
            alpha: self.alpha,
            dropout,
            target_modules: Modules::Names(self.target_modules.clone()),
            rank_pattern: patterns("lora.rank_pattern", &self.rank_pattern)?,
            alpha_pattern: patterns("lora.alpha_pattern", &self.alpha_pattern)?,
            use_rslora: self.rslora,
            modules_to_save: self.modules_to_save.clone(),
            base_model,
            ..usual
        })
    }

    /// Says which key has a value that cannot be used.
    pub(super) fn validate(&self) -> Result<()> {
        let refuse = |key, reason: String| Err(Error::recipe(key, reason));
        if self.rank == 0 || self.rank_pattern.values().any(|&rank| rank == 0) {
            let key = if self.rank == 0 { "lora.rank" } else { "lora.rank_pattern" };
            return refuse(key, "must be at least 1".into());
        }
        let alphas = self.alpha_pattern.values().map(|alpha| ("lora.alpha_pattern", *alpha));
        for (key, alpha) in alphas.chain([("lora.alpha", self.alpha)]) {
            if !(alpha.is_finite() && alpha > 0.) {
                return refuse(key, format!("is {alpha}; must be a positive number"));
            }
        }
        match (self.dropout, self.mode) {
            (Some(dropout), _) if !(0. ..1.).contains(&dropout) => {
                let reason = format!("is {dropout}; must be at least 0 and less than 1");
                return refuse("lora.dropout", reason);
            }
            (Some(dropout), Mode::Qat) if dropout > 0. => {
                let reason = "is about the inputs of a pair, and with lora.mode = \"qat\" a pair has none: it is a change of \
                              the weight; leave it out";
                return refuse("lora.dropout", reason.into());
            }
            _ => {}
        }
        if let Some(alpha) = self.neftune_alpha
            && !(alpha.is_finite() && alpha > 0.)
        {
            let reason = format!("is {alpha}; must be a positive number");
            return refuse("lora.neftune_alpha", reason);
        }
        let is_unknown = |name: &&String| !PROJECTIONS.contains(&name.as_str());
        if let Some(name) = self.target_modules.iter().find(is_unknown) {
            let reason = format!("`{name}` is no projection; there are {}", PROJECTIONS.join(", "));
            return refuse("lora.target_modules", reason);
        }
        if self.target_modules.is_empty() {
            let reason = format!("names no projection; there are {}", PROJECTIONS.join(", "));
            return refuse("lora.target_modules", reason);
        }
        patterns("lora.rank_pattern", &self.rank_pattern)?;
        patterns("lora.alpha_pattern", &self.alpha_pattern)?;
        Ok(())
    }
}

fn patterns<T: Copy>(key: &'static str, values: &BTreeMap<String, T>) -> Result<Vec<(Pattern, T)>> {
    let compile = |(pattern, value): (&String, &T)| {
        Ok((Pattern::new(pattern).map_err(|reason| Error::recipe(key, reason))?, *value))
    };
    values.iter().map(compile).collect()
}

/// Fills in what a recipe with `[lora]` leaves open: what is usual for adapters, where training from scratch has another
/// default or none.
pub(super) fn complete(table: &mut Table) {
    if !table.contains_key("lora") {
        return;
    }
    let longest = table
        .get("model")
        .and_then(|model| model.get("max_position_embeddings"))
        .and_then(Value::as_integer)
        .unwrap_or(i64::MAX);
    let mut set = |name: &str, key: &str, value: Value| {
        let section = table.entry(name).or_insert_with(|| Value::Table(Table::new()));
        if let Value::Table(section) = section {
            section.entry(key).or_insert(value);
        }
    };
    set("data", "sequence_length", Value::Integer(longest.min(512)));
    set("train", "batch_size", Value::Integer(1));
    set("train", "gradient_accumulation", Value::Integer(8));
    set("train", "recompute_blocks", Value::Boolean(true));
    // Faster where the processor multiplies it; ternary weights are exact in it.
    let backward = if Bf16Panels::new().is_some() { "bf16" } else { "f32" };
    set("train", "backward", backward.into());
    set("optimizer", "peak_lr", Value::Float(2e-4));
    set("optimizer", "schedule", "cosine".into());
    set("optimizer", "weight_decay", Value::Float(0.));
    set("optimizer", "beta2", Value::Float(0.999));
    if let Some(Value::Table(optimizer)) = table.get_mut("optimizer")
        && !optimizer.contains_key("warmup_steps")
    {
        optimizer.entry("warmup_ratio").or_insert(Value::Float(0.03));
    }
    if let Some(Value::Table(train)) = table.get_mut("train")
        && !train.contains_key("steps")
    {
        train.entry("epochs").or_insert(Value::Float(3.));
    }
    if let Some(Value::Table(data)) = table.get_mut("data") {
        if !data.contains_key("validation") {
            data.entry("validation_split").or_insert(Value::Float(0.1));
        }
        if !data.contains_key("format") {
            data.entry("attend").or_insert("document".into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lora(text: &str) -> Result<AdapterConfig> {
        toml::from_str::<Lora>(text).unwrap().adapter_config(None)
    }

    #[test]
    fn defaults_are_those_of_bitnet() {
        assert_eq!(lora("").unwrap(), AdapterConfig::default());
        assert_eq!(lora("mode = \"qat\"").unwrap().dropout, 0.);
    }

    #[test]
    fn errors_name_key_and_value() {
        for (text, key, reason) in [
            ("rank = 0", "lora.rank", "at least 1"),
            ("rank_pattern = { q_proj = 0 }", "lora.rank_pattern", "at least 1"),
            ("rank_pattern = { \"(\" = 1 }", "lora.rank_pattern", "no regular expression"),
            ("alpha = -1.0", "lora.alpha", "-1"),
            ("dropout = 1.0", "lora.dropout", "less than 1"),
            ("dropout = 0.1\nmode = \"qat\"", "lora.dropout", "leave it out"),
            (
                "target_modules = [\"q\"]",
                "lora.target_modules",
                "`q` is no projection; there are q_proj, k_proj",
            ),
            ("target_modules = []", "lora.target_modules", "down_proj"),
            ("neftune_alpha = 0.0", "lora.neftune_alpha", "positive"),
        ] {
            let message = lora(text).unwrap_err().to_string();
            assert!(message.contains(key) && message.contains(reason), "{text}: {message}");
        }
    }

    fn recipe(settings: &[(&str, &str)]) -> Result<crate::recipe::Recipe> {
        let text = r#"
            init = { model = "default" }
            lora = {}
            data = { train = [{ path = "mine.jsonl" }], format = "auto" }
            output = { dir = "run" }
        "#;
        let owned = |(key, value): &(&str, &str)| (key.to_string(), value.to_string());
        let settings: Vec<_> = settings.iter().map(owned).collect();
        crate::recipe::Recipe::from_text_with(text, "recipe.toml".as_ref(), &settings)
    }

    #[test]
    fn what_a_recipe_leaves_open_is_what_is_usual() {
        let usual = recipe(&[]).unwrap();
        assert_eq!(usual.data.tokenizer.as_deref(), Some("default".as_ref()));
        assert_eq!((usual.data.sequence_length, usual.data.validation_split), (512, Some(0.1)));
        assert_eq!((usual.train.epochs, usual.train.gradient_accumulation), (Some(3.), 8));
        assert!(usual.train.recompute_blocks);
        let schedule = usual.schedule(100);
        assert_eq!((schedule.peak_lr, schedule.weight_decay, schedule.warmup_steps), (2e-4, 0., 3));
        let other = recipe(&[("train.steps", "9"), ("optimizer.warmup_steps", "2")]).unwrap();
        assert_eq!((other.train.steps, other.train.epochs), (Some(9), None));
        assert_eq!(other.schedule(9).warmup_steps, 2);
        // What is written reads back to the same, tokenizer and all.
        let text = usual.to_toml().unwrap();
        let again = crate::recipe::Recipe::from_text_with(&text, "/elsewhere/x".as_ref(), &[]);
        assert_eq!(again.unwrap().to_toml().unwrap(), text);
    }

    #[test]
    fn what_has_no_room_beside_an_adapter_is_refused() {
        for (key, value, reason) in [
            ("distillation.teacher", "default", "`distillation`"),
            ("quantization.activations", "none", "`quantization`"),
            ("init.sub_norms", "true", "`init.sub_norms`"),
            ("model.precision", "full", "`model.precision`"),
            ("optimizer.warmup_ratio", "1.5", "less than 1"),
            ("data.sequence_length", "513", "`data.sequence_length`"),
            ("data.tokenizer", "other.json", "a tokenizer of its own"),
            ("samples.prompts", "[\" \"]", "an empty prompt"),
        ] {
            let message = recipe(&[(key, value)]).unwrap_err().to_string();
            assert!(message.contains(reason), "{key}={value}: {message}");
        }
    }
}
