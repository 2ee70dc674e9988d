//! [`Config`] → `config.json`.

use serde_json::{Value, json};

use super::{Activation, Config, Family, Quantization, ScaleConvention, WeightForm, scheme};
use crate::quant::{Rounding, Scheme};

pub(super) fn config(config: &Config) -> Value {
    let packed =
        matches!(config.quantization, Some(Quantization { weights: WeightForm::Packed(_), .. }));
    let family = match config.family {
        Family::OneBitLlm if packed => Family::BitNet,
        family => family,
    };
    let (model_type, architecture) = match family {
        Family::BitNet => ("bitnet", "BitNetForCausalLM"),
        Family::Llama => ("llama", "LlamaForCausalLM"),
        Family::OneBitLlm => ("llama", "BitnetForCausalLM"),
    };
    let hidden_act = match config.hidden_act {
        Activation::Relu2 => "relu2",
        Activation::Silu => "silu",
    };
    let eos_token_id = match config.eos_token_ids.as_slice() {
        [] => Value::Null,
        [one] => json!(one),
        several => json!(several),
    };
    let mut json = json!({
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": hidden_act,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": config.attention_bias,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos_token_id,
        "initializer_range": 0.02,
        "use_cache": true,
    });
    if packed {
        // The Hub's packed layout: BF16 scales, norms and embeddings. Elsewhere transformers takes
        // the type from the tensors.
        json["torch_dtype"] = json!("bfloat16");
    }
    match (family, config.quantization) {
        (_, None) => {}
        (Family::OneBitLlm, Some(_)) => {
            json["weight_bits"] = json!(1);
            json["input_bits"] = json!(8);
        }
        (_, Some(quantization)) if is_plain(quantization) => {}
        (_, Some(quantization)) => json["quantization_config"] = quantization_config(quantization),
    }
    json
}

/// Masters of onebitllms, published under a plain configuration.
fn is_plain(quantization: Quantization) -> bool {
    let Quantization { weights, rounding, scheme, .. } = quantization;
    (weights, rounding, scheme) == (WeightForm::Latent, Rounding::HalfUp, Scheme::default())
}

fn quantization_config(quantization: Quantization) -> Value {
    let (linear_class, mode) = match quantization.weights {
        WeightForm::Packed(ScaleConvention::Multiply) => ("autobitlinear", "offline"),
        WeightForm::Packed(ScaleConvention::Divide) => ("bitlinear", "offline"),
        WeightForm::Latent => ("autobitlinear", "online"),
    };
    let mut json = json!({
        "quant_method": "bitnet",
        "linear_class": linear_class,
        "quantization_mode": mode,
        "modules_to_not_convert": ["lm_head"],
    });
    if let Some(eps) = quantization.input_norm_eps {
        json["use_rms_norm"] = json!(true);
        json["rms_norm_eps"] = json!(eps);
    }
    scheme::write(quantization.scheme, &mut json);
    json
}
