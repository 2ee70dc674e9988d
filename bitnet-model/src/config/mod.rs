//! `config.json` and `generation_config.json` of the Hub, validated once.
//!
//! - [`Family::BitNet`]: `model_type` bitnet (microsoft/bitnet-b1.58-2B-4T and -bf16); sub-norms,
//!   relu², packed or latent weights.
//! - [`Family::Llama`]: `model_type` llama (HF1BitLLM, Falcon3-1.58bit, Falcon-E, plain Llama); packed,
//!   latent or full-precision weights.
//! - [`Family::OneBitLlm`]: `architectures` BitnetForCausalLM (1bitLLM/bitnet_b1_58-\*); sub-norms under
//!   their own names, latent weights.
//!
//! Defaults of absent fields are those of transformers' `BitNetConfig` and `LlamaConfig`, except
//! for the geometry, which must be stated. What would change the numbers and is not implemented is
//! an error, never ignored.

pub(crate) mod fields;
mod generation;
mod json;
mod parse;
mod scheme;
mod tensors;
#[cfg(test)]
mod tests;

use std::path::Path;

pub use self::generation::GenerationConfig;
use crate::{
    checkpoint::Checkpoint,
    error::{Error, Result},
    quant::{Rounding, Scheme},
};

/// The projections of a block, by the last part of their names.
pub const PROJECTIONS: [&str; 7] =
    ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

/// The nonlinearity of the gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `max(x, 0)²`
    Relu2,
    /// `x · sigmoid(x)`
    Silu,
}

/// The architecture, as the checkpoint's tensor names have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// transformers' `BitNetForCausalLM`: sub-norms before `o_proj` and `down_proj`.
    BitNet,
    /// transformers' `LlamaForCausalLM`.
    Llama,
    /// 1bitLLM/bitnet_b1_58-large, -xl and -3B: BitNet's architecture with older names.
    OneBitLlm,
}

/// How a file's `weight_scale` enters the product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScaleConvention {
    /// `weight = code · weight_scale` (`linear_class` autobitlinear).
    Multiply,
    /// `weight = code / weight_scale` (`linear_class` bitlinear or absent).
    Divide,
}

/// How quantized weights lie in the checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightForm {
    /// Four 2-bit codes a byte and a `weight_scale`.
    Packed(ScaleConvention),
    /// Float master weights, made ternary at load or in every training step.
    Latent,
}

/// The arithmetic of the quantized linear layers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Quantization {
    /// Codes or master weights.
    pub weights: WeightForm,
    /// Of activations, and of latent weights.
    pub rounding: Rounding,
    /// Which quantizers; anything but b1.58's is told by keys of this project's own, which transformers ignores.
    pub scheme: Scheme,
    /// `use_rms_norm`: every quantized linear layer first applies an RMSNorm of its own, with this
    /// epsilon.
    pub input_norm_eps: Option<f64>,
}

/// A model's architecture, from its `config.json`. Every value is within bounds that make the sizes
/// of all tensors representable; [`check_tensors`](Self::check_tensors) compares them with a
/// checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Which tensor names and sub-norms.
    pub family: Family,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward layer.
    pub intermediate_size: usize,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    /// Number of query heads.
    pub num_attention_heads: usize,
    /// Number of key and value heads; divides `num_attention_heads`.
    pub num_key_value_heads: usize,
    /// Width of a head; even.
    pub head_dim: usize,
    /// Nonlinearity of the gate.
    pub hidden_act: Activation,
    /// Epsilon of every RMSNorm but those of [`Quantization::input_norm_eps`].
    pub rms_norm_eps: f64,
    /// Base of the rotary embedding.
    pub rope_theta: f64,
    /// The longest sequence the model was made for.
    pub max_position_embeddings: usize,
    /// Logits use the embedding; the checkpoint has no `lm_head`.
    pub tie_word_embeddings: bool,
    /// The attention projections have biases (full precision only).
    pub attention_bias: bool,
    /// First token of a text.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a text; [`GenerationConfig`] may name more.
    pub eos_token_ids: Vec<u32>,
    /// `None`: full precision.
    pub quantization: Option<Quantization>,
}

/// Angles of neighbouring positions, `theta^(-2i/head_dim)` for the pairs i of a head. Exponents and frequencies are f32, as
/// in the reference.
pub(crate) fn inverse_frequencies(head_dim: usize, theta: f64) -> Vec<f32> {
    let frequency = |i: usize| {
        let exponent = (2 * i) as f32 / head_dim as f32;
        1. / theta.powf(f64::from(exponent)) as f32
    };
    (0..head_dim / 2).map(frequency).collect()
}

impl Config {
    /// Reads and validates a `config.json`.
    pub fn from_file(path: &Path) -> Result<Self> {
        Self::from_json(path, &fields::read_text(path)?)
    }

    /// Validates the text of a `config.json`; errors name `path`.
    pub fn from_json(path: &Path, json: &str) -> Result<Self> {
        parse::config(path, json)
    }

    /// The same model with its float weights taken for latent ones.
    ///
    /// For checkpoints trained with quantization in the loop but published under a plain
    /// configuration (Falcon-E's `prequantized` revisions). A Llama gets the arithmetic of
    /// onebitllms, which trained it and rounds halves up. Errors name `path`, the configuration
    /// file.
    pub fn ternarize(mut self, path: &Path) -> Result<Self> {
        let refuse = |field: &str, reason: &str| {
            Err(Error::Config { path: path.into(), field: field.into(), reason: reason.into() })
        };
        if self.quantization.is_some() {
            return refuse(
                "quantization_config",
                "the model is quantized as it is: ternarizing is for full-precision configurations",
            );
        }
        if self.attention_bias {
            return refuse("attention_bias", "true is not supported in a quantized model");
        }
        let rounding = match self.family {
            Family::Llama => Rounding::HalfUp,
            Family::BitNet | Family::OneBitLlm => Rounding::HalfEven,
        };
        self.quantization = Some(Quantization {
            weights: WeightForm::Latent,
            rounding,
            scheme: Scheme::default(),
            input_norm_eps: None,
        });
        Ok(self)
    }

    /// Names of the norms inside `self_attn` (before `o_proj`) and inside `mlp` (before
    /// `down_proj`), if the family has them.
    pub fn sub_norm_names(&self) -> Option<(&'static str, &'static str)> {
        match self.family {
            Family::BitNet => Some(("attn_sub_norm", "ffn_sub_norm")),
            Family::OneBitLlm => Some(("inner_attn_ln", "ffn_layernorm")),
            Family::Llama => None,
        }
    }

    /// Tensor name and shape (out_features, in_features) of every projection: the ternary matrices of
    /// a quantized model.
    pub fn projections(&self) -> impl Iterator<Item = (String, (usize, usize))> {
        let projections = tensors::projections(self);
        (0..self.num_hidden_layers).flat_map(move |layer| {
            projections.map(|(name, out_features, in_features)| {
                (format!("model.layers.{layer}.{name}.weight"), (out_features, in_features))
            })
        })
    }

    /// Values of all norms, and of biases.
    pub fn norm_parameters(&self) -> u64 {
        let sub_norms = match self.sub_norm_names() {
            Some(_) => self.hidden_size + self.intermediate_size,
            None => 0,
        };
        let layer = 2 * self.hidden_size + sub_norms;
        let has_input_norms = self.quantization.is_some_and(|q| q.input_norm_eps.is_some());
        let of_projections = |(name, (out_features, in_features)): (String, (usize, usize))| {
            let has_bias = self.attention_bias && name.contains(".self_attn.");
            u64::from(has_input_norms) * in_features as u64
                + u64::from(has_bias) * out_features as u64
        };
        (self.num_hidden_layers * layer + self.hidden_size) as u64
            + self.projections().map(of_projections).sum::<u64>()
    }

    /// Values of all tensors.
    pub fn parameters(&self) -> u64 {
        let embeddings = if self.tie_word_embeddings { 1 } else { 2 };
        let projections = self.projections().map(|(_, (rows, cols))| (rows * cols) as u64);
        embeddings * (self.vocab_size * self.hidden_size) as u64
            + projections.sum::<u64>()
            + self.norm_parameters()
    }

    /// Checks that every tensor of the model is there, with the shape and element type this
    /// configuration implies. Tensors it does not know are ignored, as transformers does.
    pub fn check_tensors(&self, checkpoint: &Checkpoint) -> Result<()> {
        tensors::check(self, checkpoint)
    }

    /// The `config.json` that describes this model to transformers; [`from_json`](Self::from_json)
    /// reads it back.
    ///
    /// Two things have no place in that format. A latent Llama that rounds halves up becomes the
    /// plain configuration it came from (see [`ternarize`](Self::ternarize)). A packed 1bitLLM
    /// model is described as [`Family::BitNet`], under whose names its sub-norms must then be
    /// written.
    pub fn to_json(&self) -> serde_json::Value {
        json::config(self)
    }
}
