//! `[distillation]`: learning from a teacher.

use serde::{Deserialize, Serialize};

use crate::{Error, Result, distill::balance::Balancing};

/// `[distillation]`: the terms added to the cross-entropy.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Distillation {
    /// The teacher: a folder (relative to the recipe), a `.safetensors` file or a Hub repo id. Its vocabulary must be the
    /// student's.
    pub teacher: String,
    /// What the logits are divided by before they are compared: higher values show more of what is unlikely.
    #[serde(default = "default_temperature")]
    pub temperature: f64,
    /// Weight of the divergence from the teacher's logits; 0 leaves it out.
    #[serde(default = "default_weight")]
    pub logits_weight: f64,
    /// Weight of the attention relations; 0 leaves them out.
    #[serde(default)]
    pub attention_weight: f64,
    /// The student's block whose relations are compared, from 0; the last one if absent. The teacher's is the one as far
    /// up.
    pub attention_layer: Option<usize>,
    /// Parts that queries, keys and values are cut into for the relations; by default the student's key and value heads.
    pub relation_heads: Option<usize>,
    /// Whether weights are relative to the size of the cross-entropy.
    #[serde(default)]
    pub balance: Balancing,
}

fn default_temperature() -> f64 {
    2.
}

fn default_weight() -> f64 {
    1.
}

impl Distillation {
    /// The student's block that is looked at, of `layers`.
    pub fn layer(&self, layers: usize) -> usize {
        self.attention_layer.unwrap_or(layers.saturating_sub(1))
    }

    /// Checks the values for a student of `layers` blocks.
    pub(super) fn validate(&self, layers: usize) -> Result<()> {
        let number = |key, value: f64, is_valid: bool, expected: &str| match is_valid {
            true => Ok(()),
            false => Err(Error::recipe(key, format!("is {value}; must be {expected}"))),
        };
        let (t, logits, attention) = (self.temperature, self.logits_weight, self.attention_weight);
        number("distillation.temperature", t, t.is_finite() && t > 0., "a positive number")?;
        for (key, weight) in
            [("distillation.logits_weight", logits), ("distillation.attention_weight", attention)]
        {
            number(key, weight, weight.is_finite() && weight >= 0., "at least 0")?;
        }
        if logits == 0. && attention == 0. {
            let reason = "and `distillation.attention_weight` are both 0: nothing is learnt from the teacher; \
                          leave [distillation] out";
            return Err(Error::recipe("distillation.logits_weight", reason));
        }
        if let Some(layer) = self.attention_layer.filter(|layer| *layer >= layers) {
            let reason = format!("{layer} is not one of the {layers} blocks, counted from 0");
            return Err(Error::recipe("distillation.attention_layer", reason));
        }
        if self.relation_heads == Some(0) {
            return Err(Error::recipe("distillation.relation_heads", "must be at least 1"));
        }
        Ok(())
    }
}
