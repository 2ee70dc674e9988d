//! Metadata → `config.json`, so that one reader validates both.

use serde_json::{Map, Value, json};

use super::{header::Header, names};
use crate::{
    checkpoint::source::Source,
    config::{Activation, Config, Family},
    error::{Error, Result},
};

pub(super) const ARCHITECTURE: &str = "general.architecture";

/// The token that ends a turn or a text, where the metadata name only one of them.
const END_TOKENS: [&str; 6] =
    ["<|eot_id|>", "<|end_of_text|>", "<|im_end|>", "<|endoftext|>", "<|end|>", "<end_of_turn>"];

/// The kinds of model that can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Architecture {
    /// 1bitLLM's: sub-norms, SiLU.
    Bitnet,
    /// 2B-4T's and its forerunner's, by two names: sub-norms, relu².
    Bitnet158,
    /// Without sub-norms; rows of queries and keys are interleaved.
    Llama,
}

/// Fields of `config.json` and the keys that say the same, behind the name of the architecture.
const KEYS: [(&str, &str); 8] = [
    ("hidden_size", "embedding_length"),
    ("intermediate_size", "feed_forward_length"),
    ("num_hidden_layers", "block_count"),
    ("num_attention_heads", "attention.head_count"),
    ("num_key_value_heads", "attention.head_count_kv"),
    ("head_dim", "attention.key_length"),
    ("rms_norm_eps", "attention.layer_norm_rms_epsilon"),
    ("rope_theta", "rope.freq_base"),
];
const CONTEXT: (&str, &str) = ("max_position_embeddings", "context_length");

impl Architecture {
    pub fn of(header: &Header) -> Result<Self> {
        let metadata = &header.metadata;
        if let Some(kind @ 2..) = metadata.integer("split.count")? {
            let reason = format!(
                "{kind}: the model is split; join its files with `llama-gguf-split --merge`"
            );
            return Err(metadata.error("split.count", reason));
        }
        if let Some(kind) = metadata.string("general.type")?.filter(|kind| *kind != "model") {
            return Err(metadata.error("general.type", format!("{kind:?}; supported: \"model\"")));
        }
        match metadata.string(ARCHITECTURE)? {
            Some("bitnet") => Ok(Self::Bitnet),
            Some("bitnet-b1.58" | "bitnet-25") => Ok(Self::Bitnet158),
            Some("llama") => Ok(Self::Llama),
            other => {
                let found = other.map_or("missing".into(), |name| format!("{name:?}"));
                let supported = r#""bitnet-b1.58", "bitnet-25", "bitnet", "llama""#;
                Err(metadata.error(ARCHITECTURE, format!("{found}; supported: {supported}")))
            }
        }
    }
}

/// The name of the architecture of a model.
pub(super) fn prefix_of(config: &Config) -> &'static str {
    match (config.family, config.hidden_act) {
        (Family::Llama, _) => "llama",
        (Family::BitNet | Family::OneBitLlm, Activation::Relu2) => "bitnet-b1.58",
        (Family::BitNet | Family::OneBitLlm, Activation::Silu) => "bitnet",
    }
}

/// The `config.json`; `is_ternary` tells whether the projections are codes.
pub(super) fn config(
    header: &Header,
    architecture: Architecture,
    is_ternary: bool,
) -> Result<Value> {
    let metadata = &header.metadata;
    let prefix = metadata.string(ARCHITECTURE)?.unwrap_or_default();
    refuse_unsupported(header, prefix)?;
    let (model_type, class, hidden_act) = match architecture {
        Architecture::Bitnet => ("bitnet", "BitNetForCausalLM", "silu"),
        Architecture::Bitnet158 => ("bitnet", "BitNetForCausalLM", "relu2"),
        Architecture::Llama => ("llama", "LlamaForCausalLM", "silu"),
    };
    let vocab_size = header.tensors.get(names::EMBEDDING).map(|embedding| embedding.shape.0);
    let mut config = Map::new();
    config.insert("architectures".into(), json!([class]));
    config.insert("model_type".into(), json!(model_type));
    config.insert("hidden_act".into(), json!(hidden_act));
    config.insert("vocab_size".into(), json!(vocab_size));
    config
        .insert("tie_word_embeddings".into(), json!(!header.tensors.contains_key("output.weight")));
    for (field, key) in KEYS.into_iter().chain([CONTEXT]) {
        let key = format!("{prefix}.{key}");
        let value = match field {
            "rms_norm_eps" | "rope_theta" => json!(metadata.number(&key)?),
            _ => json!(metadata.integer(&key)?),
        };
        if field == "rms_norm_eps" && value.is_null() {
            return Err(metadata.error(&key, "missing"));
        }
        config.insert(field.into(), value);
    }
    if config["rope_theta"].is_null() {
        config["rope_theta"] = json!(10_000.); // llama.cpp's default
    }
    for (field, key) in [("bos_token_id", "bos"), ("eos_token_id", "eos")] {
        let id = metadata.integer(&format!("tokenizer.ggml.{key}_token_id"))?;
        config.insert(field.into(), json!(id));
    }
    if is_ternary {
        let quantization = json!({
            "quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline",
        });
        config.insert("quantization_config".into(), quantization);
    }
    Ok(Value::Object(config))
}

/// An error about a field of `config.json` as one about the key it came from.
pub(super) fn name_key(header: &Header, error: Error) -> Error {
    let Error::Config { path, field, reason } = error else { return error };
    let prefix = header.metadata.string(ARCHITECTURE).ok().flatten().unwrap_or_default();
    let key = KEYS.into_iter().chain([CONTEXT]).find(|(name, _)| *name == field);
    let field = match (key, &*field) {
        (Some((_, key)), _) => format!("{prefix}.{key}"),
        (None, "bos_token_id" | "eos_token_id") => format!("tokenizer.ggml.{field}"),
        (None, _) => field,
    };
    Error::Config { path, field, reason }
}

/// Refuses what would change the numbers and is not implemented.
fn refuse_unsupported(header: &Header, prefix: &str) -> Result<()> {
    let metadata = &header.metadata;
    let scaling = format!("{prefix}.rope.scaling.type");
    if let Some(kind) = metadata.string(&scaling)?.filter(|kind| *kind != "none") {
        return Err(metadata.error(&scaling, format!("{kind:?}; supported: \"none\"")));
    }
    for key in ["rope.scaling.factor", "rope.scale_linear"] {
        let key = format!("{prefix}.{key}");
        if let Some(factor) = metadata.number(&key)?.filter(|factor| *factor != 1. && *factor != 0.)
        {
            return Err(metadata.error(&key, format!("{factor}; supported: 1")));
        }
    }
    let experts = format!("{prefix}.expert_count");
    if let Some(count @ 1..) = metadata.integer(&experts)? {
        return Err(metadata.error(&experts, format!("{count}; supported: 0")));
    }
    Ok(())
}

/// Refuses heads whose width is told in several ways.
pub(super) fn check_head_dim(header: &Header, head_dim: usize) -> Result<()> {
    let metadata = &header.metadata;
    let prefix = metadata.string(ARCHITECTURE)?.unwrap_or_default();
    for (key, supported) in [
        ("attention.value_length", "values as wide as keys"),
        ("rope.dimension_count", "rotation of whole heads"),
    ] {
        let key = format!("{prefix}.{key}");
        if let Some(size) = metadata.integer(&key)?.filter(|size| *size != head_dim as u64) {
            let reason = format!("{size}, and a head has {head_dim}; supported: {supported}");
            return Err(metadata.error(&key, reason));
        }
    }
    Ok(())
}

/// The ids that end a text: those the metadata name, and those whose token is known to end one.
pub(super) fn end_tokens(header: &Header, source: &Source) -> Result<Vec<u32>> {
    let mut ids = Vec::new();
    for key in ["eos", "eot", "eom"] {
        let key = format!("tokenizer.ggml.{key}_token_id");
        if let Some(id) = header.metadata.integer(&key)? {
            ids.push(u32::try_from(id).map_err(|_| header.metadata.error(&key, id.to_string()))?);
        }
    }
    let tokens = header.metadata.strings(source, super::tokenizer::TOKENS)?.unwrap_or_default();
    let ends = tokens.iter().enumerate().filter(|(_, token)| END_TOKENS.contains(&token.as_str()));
    ids.extend(ends.map(|(id, _)| id as u32));
    let mut seen = std::collections::HashSet::new();
    ids.retain(|id| seen.insert(*id));
    Ok(ids)
}
