//! Models of published geometries with random weights, made in memory: for measuring speed and memory
//! without a download. What they generate is noise.
//!
//! Gains and scales have the magnitudes of the real checkpoints, so that activations stay finite: a
//! BitNet's masters are of order 1 and small input gains undo them, a Llama's are of order 1/50. The
//! weights are the same in every run.

use std::path::Path;

use crate::{
    Error, Result,
    checkpoint::{Checkpoint, Content, GeneratedTensor},
    config::{Config, Family, Quantization, ScaleConvention, WeightForm},
};

/// What names of synthetic models begin with, where a model is named.
pub const PREFIX: &str = "synthetic:";

/// Name and `config.json`.
const MODELS: [(&str, &str); 3] = [
    // microsoft/bitnet-b1.58-2B-4T
    (
        "2b-4t",
        r#"{"architectures": ["BitNetForCausalLM"], "model_type": "bitnet", "vocab_size": 128256,
        "hidden_size": 2560, "intermediate_size": 6912, "num_hidden_layers": 30,
        "num_attention_heads": 20, "num_key_value_heads": 5, "hidden_act": "relu2",
        "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 4096,
        "tie_word_embeddings": true, "bos_token_id": 128000, "eos_token_id": 128001,
        "quantization_config": {"quant_method": "bitnet", "linear_class": "autobitlinear",
        "quantization_mode": "offline"}}"#,
    ),
    // HF1BitLLM/Llama3-8B-1.58-100B-tokens
    (
        "llama3-8b",
        r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256,
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_act": "silu",
        "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 8192,
        "tie_word_embeddings": false, "bos_token_id": 128000, "eos_token_id": 128001,
        "quantization_config": {"quant_method": "bitnet", "modules_to_not_convert": ["lm_head"]}}"#,
    ),
    // tiiuae/Falcon3-10B-Instruct-1.58bit
    (
        "falcon3-10b",
        r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 131072,
        "hidden_size": 3072, "intermediate_size": 23040, "num_hidden_layers": 40,
        "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 256, "hidden_act": "silu",
        "rms_norm_eps": 1e-6, "rope_theta": 1000042.0, "max_position_embeddings": 32768,
        "tie_word_embeddings": false, "bos_token_id": 11, "eos_token_id": 11,
        "quantization_config": {"quant_method": "bitnet", "modules_to_not_convert": ["lm_head"]}}"#,
    ),
];

/// The names of all synthetic models, without [`PREFIX`].
pub fn names() -> impl Iterator<Item = &'static str> {
    MODELS.iter().map(|(name, _)| *name)
}

/// The configuration and the weights of `source`: [`PREFIX`] and one of [`names`].
///
/// # Errors
/// A name that is none of them.
pub fn open(source: &str) -> Result<(Config, Checkpoint)> {
    let name = source.strip_prefix(PREFIX).unwrap_or(source);
    let Some((_, json)) = MODELS.iter().find(|model| model.0 == name) else {
        let known: Vec<String> = names().map(|name| format!("{PREFIX}{name}")).collect();
        let reason = format!("there is no such synthetic model: choose {}", known.join(", "));
        return Err(Error::Hub { source_name: source.into(), reason });
    };
    let config = Config::from_json(&Path::new(source).join("config.json"), json)?;
    let checkpoint = Checkpoint::generated(source, &tensors(&config))?;
    Ok((config, checkpoint))
}

/// Mean gains of the norms and mean absolute value of the latent weights.
struct Magnitudes {
    input_layernorm: f32,
    post_attention_layernorm: f32,
    attn_sub_norm: f32,
    ffn_sub_norm: f32,
    norm: f32,
    absmean: f32,
}

impl Magnitudes {
    fn of(family: Family) -> Self {
        match family {
            Family::BitNet | Family::OneBitLlm => Self {
                input_layernorm: 0.018,
                post_attention_layernorm: 1.3,
                attn_sub_norm: 0.1,
                ffn_sub_norm: 0.5,
                norm: 0.1,
                absmean: 1.5,
            },
            Family::Llama => Self {
                input_layernorm: 1.,
                post_attention_layernorm: 1.,
                attn_sub_norm: 1.,
                ffn_sub_norm: 1.,
                norm: 0.1,
                absmean: 0.02,
            },
        }
    }
}

/// Every tensor of a packed model.
fn tensors(config: &Config) -> Vec<GeneratedTensor> {
    let magnitudes = Magnitudes::of(config.family);
    let mut tensors = Vec::new();
    let mut add = |name: String, shape: &[usize], content| {
        tensors.push(GeneratedTensor { name, shape: shape.into(), content });
    };
    let embedding = [config.vocab_size, config.hidden_size];
    add("model.embed_tokens.weight".into(), &embedding, Content::Embedding);
    for layer in 0..config.num_hidden_layers {
        let layer = format!("model.layers.{layer}");
        let hidden = [config.hidden_size];
        let mut norms = vec![
            ("input_layernorm".to_owned(), hidden, magnitudes.input_layernorm),
            ("post_attention_layernorm".to_owned(), hidden, magnitudes.post_attention_layernorm),
        ];
        if let Some((attn, ffn)) = config.sub_norm_names() {
            norms.push((format!("self_attn.{attn}"), hidden, magnitudes.attn_sub_norm));
            let intermediate = [config.intermediate_size];
            norms.push((format!("mlp.{ffn}"), intermediate, magnitudes.ffn_sub_norm));
        }
        for (norm, shape, gain) in norms {
            add(format!("{layer}.{norm}.weight"), &shape, Content::Around(gain));
        }
    }
    let divides = matches!(
        config.quantization,
        Some(Quantization { weights: WeightForm::Packed(ScaleConvention::Divide), .. })
    );
    let scale = if divides { 1. / magnitudes.absmean } else { magnitudes.absmean };
    for (name, (out_features, in_features)) in config.projections() {
        add(format!("{name}_scale"), &[1], Content::Around(scale));
        add(name, &[out_features / 4, in_features], Content::Codes);
    }
    add("model.norm.weight".into(), &[config.hidden_size], Content::Around(magnitudes.norm));
    if !config.tie_word_embeddings {
        add("lm_head.weight".into(), &embedding, Content::Embedding);
    }
    tensors
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn geometries_are_those_of_the_published_models() {
        // Parameters and bytes of tensors of 2B-4T as on the Hub.
        let cases = [
            ("2b-4t", 2_412_820_480, Some(1_178_562_980)),
            ("llama3-8b", 8_030_261_248, None),
            ("falcon3-10b", 10_305_653_760, None),
        ];
        for (name, parameters, bytes) in cases {
            let (config, checkpoint) = open(&format!("{PREFIX}{name}")).unwrap();
            config.check_tensors(&checkpoint).unwrap();
            assert_eq!(config.parameters(), parameters, "{name}");
            if let Some(bytes) = bytes {
                let sizes = checkpoint.names().map(|tensor| checkpoint.get(tensor).unwrap().bytes);
                assert_eq!(sizes.sum::<usize>(), bytes);
            }
        }
        let error = open("synthetic:7b").err().unwrap().to_string();
        assert!(
            error.starts_with("synthetic:7b: ") && error.contains("synthetic:2b-4t"),
            "{error}"
        );
    }
}
