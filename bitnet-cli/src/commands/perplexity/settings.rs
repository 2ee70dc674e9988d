//! What `--vary` runs.

use std::fmt;

use bitnet_model::ops::KvType;

use super::Args;
use crate::{adapter::AdapterSpec, model::LmHead};

/// The values of `--vary`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Vary {
    /// Output heads: exact, q8, q6, q4
    LmHead,
    /// Types of cache: f32, f16, bf16, int8
    KvCache,
    /// Without adapters, and with each of several alone
    Adapter,
}

/// How a text is run.
#[derive(Clone, Debug, PartialEq)]
pub struct Setting {
    /// The output head.
    pub lm_head: LmHead,
    /// Keys and values.
    pub kv_type: KvType,
    /// Beside the model.
    pub adapters: Vec<AdapterSpec>,
}

impl Setting {
    /// What was asked for, and then what differs from that in one thing.
    pub fn all(args: &Args) -> Vec<Self> {
        let base = Self {
            lm_head: args.model.lm_head(),
            kv_type: args.kv_cache.unwrap_or_else(|| args.model.kv_type()),
            adapters: args.adapters.adapters.clone(),
        };
        let mut all = vec![base.clone()];
        for vary in &args.vary {
            match vary {
                Vary::LmHead => {
                    let heads = [LmHead::Exact, LmHead::Q8, LmHead::Q6, LmHead::Q4];
                    all.extend(heads.map(|lm_head| Self { lm_head, ..base.clone() }));
                }
                Vary::KvCache => {
                    all.extend(KvType::ALL.map(|kv_type| Self { kv_type, ..base.clone() }));
                }
                Vary::Adapter => {
                    all.push(Self { adapters: Vec::new(), ..base.clone() });
                    let alone = base.adapters.iter().map(|adapter| vec![adapter.clone()]);
                    all.extend(alone.map(|adapters| Self { adapters, ..base.clone() }));
                }
            }
        }
        let mut different: Vec<Self> = Vec::new();
        for setting in all {
            if !different.contains(&setting) {
                different.push(setting);
            }
        }
        different
    }

    /// Whether both run the same model.
    pub fn has_model_of(&self, other: &Self) -> bool {
        (self.lm_head, &self.adapters) == (other.lm_head, &other.adapters)
    }

    /// The adapters, for a cell.
    pub fn adapter_names(&self) -> String {
        let names = Vec::from_iter(self.adapters.iter().map(ToString::to_string));
        if names.is_empty() { "none".into() } else { names.join(" + ") }
    }
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "head {}, cache {}", self.lm_head.name(), self.kv_type.name())
    }
}
