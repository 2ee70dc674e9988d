//! `config.json` → [`Config`].

use std::path::Path;

use super::fields::{Fields, parse_object};
use super::{Activation, Config, Family, Quantization, ScaleConvention, WeightForm, scheme};
use crate::{
    error::Result,
    quant::{Rounding, Scheme, WeightKind},
};

/// Bound on the width of any activation: `127 · 2²⁰ < 2³¹`, so the integer dot product of every row
/// fits an `i32`.
const MAX_WIDTH: usize = 1 << 20;
const MAX_VOCAB: usize = 1 << 24;
const MAX_LAYERS: usize = 1 << 12;
const MAX_POSITIONS: usize = 1 << 28;

/// What `modules_to_not_convert` may name: modules that are never quantized here either.
const FULL_PRECISION_MODULES: [&str; 4] = ["lm_head", "embed_tokens", "norm", "rotary_emb"];

pub(super) fn config(path: &Path, json: &str) -> Result<Config> {
    let object = parse_object(path, json)?;
    let fields = Fields::new(path, &object);
    let family = family(&fields)?;
    let quantization = quantization(&fields, family)?;

    let hidden_size = size(&fields, "hidden_size", MAX_WIDTH)?;
    let intermediate_size = size(&fields, "intermediate_size", MAX_WIDTH)?;
    let num_attention_heads = size(&fields, "num_attention_heads", MAX_WIDTH)?;
    let num_key_value_heads =
        optional_size(&fields, "num_key_value_heads", MAX_WIDTH)?.unwrap_or(num_attention_heads);
    if !num_attention_heads.is_multiple_of(num_key_value_heads) {
        let reason = format!(
            "{num_key_value_heads} does not divide num_attention_heads {num_attention_heads}"
        );
        return Err(fields.error("num_key_value_heads", reason));
    }
    let head_dim = match optional_size(&fields, "head_dim", MAX_WIDTH)? {
        Some(head_dim) => head_dim,
        None if hidden_size.is_multiple_of(num_attention_heads) => {
            hidden_size / num_attention_heads
        }
        None => {
            let reason = format!("{num_attention_heads} does not divide hidden_size {hidden_size}");
            return Err(fields.error("num_attention_heads", reason));
        }
    };
    if head_dim % 2 != 0 {
        let reason = format!("{head_dim} is odd: rotary embeddings need pairs");
        return Err(fields.error("head_dim", reason));
    }
    // Both are at most 2²⁰, so the product is representable wherever usize has 64 bits; on 32 bits
    // it may not be.
    let attention_width = num_attention_heads.saturating_mul(head_dim);
    if attention_width > MAX_WIDTH {
        let reason =
            format!("{num_attention_heads} heads of {head_dim} are wider than {MAX_WIDTH}");
        return Err(fields.error("head_dim", reason));
    }

    let (default_act, default_eps, default_theta) = match family {
        Family::BitNet => (Activation::Relu2, 1e-5, 500_000.),
        Family::Llama | Family::OneBitLlm => (Activation::Silu, 1e-6, 10_000.),
    };
    let hidden_act = match fields.string("hidden_act")? {
        None => default_act,
        Some("relu2") => Activation::Relu2,
        Some("silu") => Activation::Silu,
        Some(_) => return Err(fields.unsupported("hidden_act", "\"relu2\", \"silu\"")),
    };
    let vocab_size = size(&fields, "vocab_size", MAX_VOCAB)?;
    let config = Config {
        family,
        vocab_size,
        hidden_size,
        intermediate_size,
        num_hidden_layers: size(&fields, "num_hidden_layers", MAX_LAYERS)?,
        num_attention_heads,
        num_key_value_heads,
        head_dim,
        hidden_act,
        rms_norm_eps: positive(&fields, "rms_norm_eps")?.unwrap_or(default_eps),
        rope_theta: rope_theta(&fields)?.unwrap_or(default_theta),
        max_position_embeddings: optional_size(&fields, "max_position_embeddings", MAX_POSITIONS)?
            .unwrap_or(2048),
        tie_word_embeddings: fields.boolean("tie_word_embeddings")?.unwrap_or(false),
        attention_bias: fields.boolean("attention_bias")?.unwrap_or(false),
        bos_token_id: fields.token_id("bos_token_id")?,
        eos_token_ids: fields.token_ids("eos_token_id")?,
        quantization,
    };
    check(&config, &fields)?;
    Ok(config)
}

/// Contradictions between fields that are each valid.
fn check(config: &Config, fields: &Fields) -> Result<()> {
    let &Config { hidden_size, intermediate_size, num_attention_heads, head_dim, .. } = config;
    if config.sub_norm_names().is_some() && num_attention_heads * head_dim != hidden_size {
        let reason = format!(
            "{num_attention_heads} heads of {head_dim} must make hidden_size {hidden_size}, \
             the width of the attention sub-norm"
        );
        return Err(fields.error("head_dim", reason));
    }
    if config.attention_bias && config.quantization.is_some() {
        return Err(fields.error("attention_bias", "true: no quantized BitNet family has biases"));
    }
    if fields.boolean("mlp_bias")? == Some(true) {
        return Err(fields.error("mlp_bias", "true is not supported; supported: false"));
    }
    if let Some(Quantization { weights: WeightForm::Packed(_), .. }) = config.quantization {
        let outputs = [
            ("hidden_size", hidden_size),
            ("intermediate_size", intermediate_size),
            ("head_dim", num_attention_heads * head_dim),
            ("num_key_value_heads", config.num_key_value_heads * head_dim),
        ];
        for (field, out_features) in outputs {
            if out_features % 4 != 0 {
                let reason = format!(
                    "makes {out_features} output features, which packing four to a byte cannot divide"
                );
                return Err(fields.error(field, reason));
            }
        }
    }
    let eos = config.eos_token_ids.iter().map(|&id| ("eos_token_id", id));
    let bos = config.bos_token_id.map(|id| ("bos_token_id", id));
    for (field, id) in eos.chain(bos) {
        if id as usize >= config.vocab_size {
            let reason = format!("{id} is outside of the vocabulary of {}", config.vocab_size);
            return Err(fields.error(field, reason));
        }
    }
    Ok(())
}

fn family(fields: &Fields) -> Result<Family> {
    for (field, supported) in [("weight_bits", 1), ("input_bits", 8)] {
        if fields.integer(field)?.is_some_and(|bits| bits != supported) {
            return Err(fields.unsupported(field, &supported.to_string()));
        }
    }
    let architecture = match fields.strings("architectures")?.as_slice() {
        [] => None,
        [one] => Some(*one),
        _ => return Err(fields.unsupported("architectures", "one architecture")),
    };
    // 1bitLLM's own code (`BitnetConfig`) calls its model type llama and marks it by the bits.
    let bits = fields.has("weight_bits");
    match (fields.string("model_type")?, architecture) {
        (Some("bitnet" | "llama"), Some("BitnetForCausalLM")) => Ok(Family::OneBitLlm),
        (Some("bitnet"), None | Some("BitNetForCausalLM")) => Ok(Family::BitNet),
        (Some("llama"), None | Some("LlamaForCausalLM")) if bits => Ok(Family::OneBitLlm),
        (Some("llama"), None | Some("LlamaForCausalLM")) => Ok(Family::Llama),
        (Some("bitnet"), _) => {
            Err(fields.unsupported("architectures", "BitNetForCausalLM, BitnetForCausalLM"))
        }
        (Some("llama"), _) => {
            Err(fields.unsupported("architectures", "LlamaForCausalLM, BitnetForCausalLM"))
        }
        _ => Err(fields.unsupported("model_type", "\"bitnet\", \"llama\"")),
    }
}

fn quantization(fields: &Fields, family: Family) -> Result<Option<Quantization>> {
    const PREFIX: &str = "quantization_config.";
    let Some(q) = fields.object("quantization_config", PREFIX)? else {
        let latent = Quantization {
            weights: WeightForm::Latent,
            rounding: Rounding::HalfEven,
            scheme: Scheme::default(),
            input_norm_eps: None,
        };
        return Ok((family == Family::OneBitLlm).then_some(latent));
    };
    if family == Family::OneBitLlm {
        let reason =
            "contradicts architectures BitnetForCausalLM or weight_bits, whose weights are latent";
        return Err(fields.error("quantization_config", reason));
    }
    if q.string("quant_method")? != Some("bitnet") {
        return Err(q.unsupported("quant_method", "\"bitnet\""));
    }
    let online = match q.string("quantization_mode")? {
        None | Some("offline") => false,
        Some("online") => true,
        Some(_) => return Err(q.unsupported("quantization_mode", "\"offline\", \"online\"")),
    };
    let weights = match q.string("linear_class")? {
        Some("autobitlinear") if online => WeightForm::Latent,
        Some("autobitlinear") => WeightForm::Packed(ScaleConvention::Multiply),
        // transformers' BitLinear holds packed codes whatever the mode says.
        None | Some("bitlinear") => WeightForm::Packed(ScaleConvention::Divide),
        Some(_) => return Err(q.unsupported("linear_class", "\"autobitlinear\", \"bitlinear\"")),
    };
    for module in q.strings("modules_to_not_convert")? {
        let last = module.rsplit('.').next().unwrap_or(module);
        if !FULL_PRECISION_MODULES.contains(&last) {
            let reason = format!(
                "`{module}` would stay unquantized, which is not supported; supported: {}",
                FULL_PRECISION_MODULES.join(", ")
            );
            return Err(q.error("modules_to_not_convert", reason));
        }
    }
    let eps = positive(&q, "rms_norm_eps")?.unwrap_or(1e-6);
    let input_norm_eps = q.boolean("use_rms_norm")?.unwrap_or(false).then_some(eps);
    let scheme = scheme::parse(&q)?;
    if scheme.weights == WeightKind::Full && weights != WeightForm::Latent {
        let reason = "\"none\" contradicts packed weights, which are codes";
        return Err(q.error("weight_quantizer", reason));
    }
    let rounding = Rounding::HalfEven;
    Ok(Some(Quantization { weights, rounding, scheme, input_norm_eps }))
}

/// The base of the rotary embedding, from where transformers 5 writes it or where its predecessors
/// did.
fn rope_theta(fields: &Fields) -> Result<Option<f64>> {
    let mut theta = positive(fields, "rope_theta")?;
    let parameters = fields.object("rope_parameters", "rope_parameters.")?;
    let scaling = fields.object("rope_scaling", "rope_scaling.")?;
    for rope in [Some(*fields), parameters, scaling].into_iter().flatten() {
        if rope.number("partial_rotary_factor")?.is_some_and(|factor| factor != 1.) {
            return Err(rope.unsupported("partial_rotary_factor", "1"));
        }
    }
    for rope in [parameters, scaling].into_iter().flatten() {
        for kind in ["rope_type", "type"] {
            if rope.string(kind)?.is_some_and(|kind| kind != "default") {
                return Err(rope.unsupported(kind, "\"default\""));
            }
        }
        if rope.number("factor")?.is_some_and(|factor| factor != 1.) {
            return Err(rope.unsupported("factor", "1 (no scaling of positions)"));
        }
        let nested = positive(&rope, "rope_theta")?;
        if let (Some(outer), Some(inner)) = (theta, nested)
            && outer != inner
        {
            return Err(rope.error("rope_theta", format!("{inner} contradicts rope_theta {outer}")));
        }
        theta = theta.or(nested);
    }
    Ok(theta)
}

fn size(fields: &Fields, name: &str, max: usize) -> Result<usize> {
    optional_size(fields, name, max)?
        .ok_or_else(|| fields.error(name, "missing: the geometry of a model must be stated"))
}

fn optional_size(fields: &Fields, name: &str, max: usize) -> Result<Option<usize>> {
    let Some(value) = fields.integer(name)? else { return Ok(None) };
    match usize::try_from(value) {
        Ok(size) if (1..=max).contains(&size) => Ok(Some(size)),
        _ => Err(fields.unsupported(name, &format!("1 to {max}"))),
    }
}

fn positive(fields: &Fields, name: &str) -> Result<Option<f64>> {
    let value = fields.number(name)?;
    match value {
        Some(x) if !(x.is_finite() && x > 0.) => Err(fields.unsupported(name, "a positive number")),
        _ => Ok(value),
    }
}
