//! What the lines of `metrics.jsonl` say. Keys that older runs did not write are optional.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::samples::Sample;

/// One line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Record {
    /// An update.
    Train(TrainRecord),
    /// An evaluation.
    Evaluation(EvaluationRecord),
    /// A census of the ternary codes.
    Codes(CodesRecord),
    /// Answers to prompts.
    Samples(SamplesRecord),
}

/// What one update did.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TrainRecord {
    /// The update, counted from 1.
    pub step: usize,
    /// Mean loss of its tokens, nats; the weighted sum of the terms.
    pub loss: f64,
    /// The terms of the loss by name, before weighting.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub terms: BTreeMap<String, f64>,
    /// What each term is multiplied by in the loss; 1 where it is not named.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub weights: BTreeMap<String, f64>,
    /// Learning rate.
    pub lr: f64,
    /// Weight decay.
    pub weight_decay: f64,
    /// How much of the quantization is in force, from 0 (none) to 1, while it is warmed up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lambda: Option<f64>,
    /// Norm of all gradients before clipping.
    pub grad_norm: f64,
    /// What clipping multiplied the gradients by, at most 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clip_factor: Option<f64>,
    /// Tokens trained on so far.
    pub tokens: u64,
    /// Speed of this update.
    pub tokens_per_second: f64,
    /// Memory of the process, where the system tells.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<Memory>,
}

/// Memory of a process, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// Resident now.
    pub resident_bytes: u64,
    /// The most that was ever resident.
    pub peak_bytes: u64,
}

/// What one evaluation found.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct EvaluationRecord {
    /// Updates made before it.
    pub step: usize,
    /// Held-out loss a token.
    pub nats_per_token: f64,
    /// Held-out loss a byte of text, which compares across vocabularies.
    pub nats_per_byte: f64,
    /// Tokens predicted.
    pub tokens: usize,
    /// The share of them that was the most probable one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_accuracy: Option<f64>,
    /// How varied the predictions are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub diversity: Option<Diversity>,
    /// How long it took.
    pub seconds: f64,
}

/// How varied a model's most probable tokens are, beside the true ones.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Diversity {
    /// Effective number of tokens predicted: exp of the entropy of the most probable tokens.
    pub predicted_tokens: f64,
    /// Effective number of tokens in the text: exp of the entropy of the labels.
    pub label_tokens: f64,
}

impl Diversity {
    /// Loss of a model that knows no more than the frequency of each token, in nats a token.
    pub fn unigram_nats(&self) -> f64 {
        self.label_tokens.ln()
    }
}

/// What the model answered to the prompts of the recipe.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SamplesRecord {
    /// Updates made before it.
    pub step: usize,
    /// In the order of the recipe.
    pub samples: Vec<Sample>,
}

/// How the codes of the ternary matrices are distributed, and how many have changed.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CodesRecord {
    /// Updates made before it.
    pub step: usize,
    /// By the name of the matrix, without `.weight`.
    pub layers: BTreeMap<String, LayerCodes>,
}

/// The codes of one ternary matrix, as fractions of all.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerCodes {
    /// Number of codes.
    pub count: usize,
    /// −1.
    pub minus: f64,
    /// 0.
    pub zero: f64,
    /// +1.
    pub plus: f64,
    /// Other than at the census before; absent in the first one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flipped: Option<f64>,
}

impl CodesRecord {
    /// All matrices taken together; `None` without one.
    pub fn total(&self) -> Option<LayerCodes> {
        let count = self.layers.values().map(|layer| layer.count).sum::<usize>();
        let mean = |value: fn(&LayerCodes) -> Option<f64>| {
            let weigh = |layer| Some(value(layer)? * layer.count as f64);
            let sum = self.layers.values().map(weigh).sum::<Option<f64>>()?;
            Some(sum / count as f64)
        };
        if count == 0 {
            return None;
        }
        Some(LayerCodes {
            count,
            minus: mean(|layer| Some(layer.minus))?,
            zero: mean(|layer| Some(layer.zero))?,
            plus: mean(|layer| Some(layer.plus))?,
            flipped: mean(|layer| layer.flipped),
        })
    }
}

impl Record {
    /// Updates made when it was written.
    pub fn step(&self) -> usize {
        match self {
            Self::Train(record) => record.step,
            Self::Evaluation(record) => record.step,
            Self::Codes(record) => record.step,
            Self::Samples(record) => record.step,
        }
    }

    /// The same without what depends on the machine and its load: equal in a resumed and an uninterrupted run.
    pub fn untimed(mut self) -> Self {
        match &mut self {
            Self::Train(record) => (record.tokens_per_second, record.memory) = (0., None),
            Self::Evaluation(record) => record.seconds = 0.,
            Self::Codes(_) | Self::Samples(_) => (),
        }
        self
    }

    /// Its numbers by name, `train/loss` and the like, for whoever draws curves. The codes of single layers come
    /// after those of all together.
    pub fn scalars(&self) -> Vec<(String, f64)> {
        match self {
            Self::Train(record) => record.scalars(),
            Self::Evaluation(record) => record.scalars(),
            Self::Codes(record) => record.scalars(),
            Self::Samples(_) => Vec::new(),
        }
    }
}

impl TrainRecord {
    fn scalars(&self) -> Vec<(String, f64)> {
        let bytes = |value: fn(&Memory) -> u64| self.memory.as_ref().map(|m| value(m) as f64);
        let fixed = [
            ("train/loss", Some(self.loss)),
            ("train/lr", Some(self.lr)),
            ("train/weight_decay", Some(self.weight_decay)),
            ("train/lambda", self.lambda),
            ("train/grad_norm", Some(self.grad_norm)),
            ("train/clip_factor", self.clip_factor),
            ("train/tokens", Some(self.tokens as f64)),
            ("speed/tokens_per_second", Some(self.tokens_per_second)),
            ("memory/resident_bytes", bytes(|memory| memory.resident_bytes)),
            ("memory/peak_bytes", bytes(|memory| memory.peak_bytes)),
        ];
        let terms = self.terms.iter().map(|(name, value)| (format!("terms/{name}"), *value));
        let weights = self.weights.iter().map(|(name, value)| (format!("weights/{name}"), *value));
        present(fixed).chain(terms).chain(weights).collect()
    }
}

impl EvaluationRecord {
    fn scalars(&self) -> Vec<(String, f64)> {
        let fixed = [
            ("evaluation/nats_per_token", Some(self.nats_per_token)),
            ("evaluation/nats_per_byte", Some(self.nats_per_byte)),
            ("evaluation/token_accuracy", self.token_accuracy),
            ("evaluation/predicted_tokens", self.diversity.map(|d| d.predicted_tokens)),
            ("evaluation/label_tokens", self.diversity.map(|d| d.label_tokens)),
        ];
        present(fixed).collect()
    }
}

impl CodesRecord {
    fn scalars(&self) -> Vec<(String, f64)> {
        let total = self.total().map(|total| ("codes".to_owned(), total));
        let layers = self.layers.iter().map(|(name, codes)| (format!("codes/{name}"), *codes));
        let of_layer = |(name, codes): (String, LayerCodes)| {
            [
                ("minus", Some(codes.minus)),
                ("zero", Some(codes.zero)),
                ("plus", Some(codes.plus)),
                ("flipped", codes.flipped),
            ]
            .into_iter()
            .filter_map(move |(key, value)| Some((format!("{name}/{key}"), value?)))
        };
        total.into_iter().chain(layers).flat_map(of_layer).collect()
    }
}

fn present<const N: usize>(
    named: [(&'static str, Option<f64>); N],
) -> impl Iterator<Item = (String, f64)> {
    named.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_older_runs_are_read() {
        for line in [
            r#"{"kind":"train","step":3,"loss":5.5,"lr":0.001,"weight_decay":0.1,"grad_norm":0.5,"tokens":64,"tokens_per_second":100.0}"#,
            r#"{"kind":"evaluation","step":3,"nats_per_token":5.5,"nats_per_byte":1.5,"tokens":90,"seconds":0.1}"#,
        ] {
            let record: Record = serde_json::from_str(line).unwrap();
            assert_eq!(record.step(), 3);
            assert_eq!(serde_json::to_string(&record).unwrap(), line);
        }
    }

    #[test]
    fn all_layers_count_by_their_size() {
        let layer = |count, zero: f64, flipped| LayerCodes {
            count,
            minus: (1. - zero) / 2.,
            zero,
            plus: (1. - zero) / 2.,
            flipped,
        };
        let layers = [("a", layer(30, 0.5, Some(0.5))), ("b", layer(10, 0.1, Some(0.1)))];
        let layers: BTreeMap<_, _> = layers.map(|(name, layer)| (name.into(), layer)).into();
        let record = CodesRecord { step: 1, layers };
        let total = record.total().unwrap();
        assert_eq!(total.count, 40);
        assert!((total.zero - 0.4).abs() < 1e-12 && (total.plus - 0.3).abs() < 1e-12);
        assert!((total.flipped.unwrap() - 0.4).abs() < 1e-12);
        let scalars = Record::Codes(record).scalars();
        let names: Vec<&str> = scalars.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(
            names[..5],
            ["codes/minus", "codes/zero", "codes/plus", "codes/flipped", "codes/a/minus"]
        );
        assert_eq!(CodesRecord::default().total(), None);
    }
}
