//! Which tensors a [`Config`] expects in its checkpoint.

use std::collections::HashSet;

use super::{Config, Quantization, WeightForm};
use crate::{
    checkpoint::{Checkpoint, Dtype, is_float},
    error::Result,
};

pub(super) fn check(config: &Config, checkpoint: &Checkpoint) -> Result<()> {
    let mut checker = Checker { config, checkpoint, known: HashSet::new() };
    checker.model()?;
    for name in checkpoint.names().filter(|name| !checker.known.contains(*name)) {
        // Among them the lm_head of a tied model, which transformers ignores too.
        tracing::debug!(tensor = name, "not part of the model: ignored");
    }
    Ok(())
}

/// Name, output and input features of the projections of a block, in the order they are used.
pub(super) fn projections(config: &Config) -> [(&'static str, usize, usize); 7] {
    let &Config { hidden_size, intermediate_size, head_dim, .. } = config;
    let query = config.num_attention_heads * head_dim;
    let key_value = config.num_key_value_heads * head_dim;
    [
        ("self_attn.q_proj", query, hidden_size),
        ("self_attn.k_proj", key_value, hidden_size),
        ("self_attn.v_proj", key_value, hidden_size),
        ("self_attn.o_proj", hidden_size, query),
        ("mlp.gate_proj", intermediate_size, hidden_size),
        ("mlp.up_proj", intermediate_size, hidden_size),
        ("mlp.down_proj", hidden_size, intermediate_size),
    ]
}

struct Checker<'a> {
    config: &'a Config,
    checkpoint: &'a Checkpoint,
    known: HashSet<String>,
}

impl Checker<'_> {
    fn model(&mut self) -> Result<()> {
        let &Config { vocab_size, hidden_size, intermediate_size, .. } = self.config;
        self.float("model.embed_tokens.weight".into(), &[vocab_size, hidden_size], "")?;
        for layer in 0..self.config.num_hidden_layers {
            let layer = format!("model.layers.{layer}");
            for norm in ["input_layernorm", "post_attention_layernorm"] {
                self.float(format!("{layer}.{norm}.weight"), &[hidden_size], "")?;
            }
            if let Some((attn, ffn)) = self.config.sub_norm_names() {
                self.float(format!("{layer}.self_attn.{attn}.weight"), &[hidden_size], "")?;
                self.float(format!("{layer}.mlp.{ffn}.weight"), &[intermediate_size], "")?;
            }
            for (projection, out_features, in_features) in projections(self.config) {
                let linear = format!("{layer}.{projection}");
                self.linear(&linear, out_features, in_features)?;
                if self.config.attention_bias && projection.starts_with("self_attn") {
                    self.float(format!("{linear}.bias"), &[out_features], "")?;
                }
            }
        }
        self.float("model.norm.weight".into(), &[hidden_size], "")?;
        if !self.config.tie_word_embeddings {
            let hint = "; a model without it has tie_word_embeddings true in its configuration";
            self.float("lm_head.weight".into(), &[vocab_size, hidden_size], hint)?;
        }
        Ok(())
    }

    fn linear(&mut self, linear: &str, out_features: usize, in_features: usize) -> Result<()> {
        let weight = format!("{linear}.weight");
        let Some(Quantization { weights, input_norm_eps, .. }) = self.config.quantization else {
            let hint = "; packed codes need a quantization_config";
            return self.float(weight, &[out_features, in_features], hint);
        };
        if input_norm_eps.is_some() {
            self.float(format!("{linear}.rms_norm.weight"), &[in_features], "")?;
        }
        match weights {
            WeightForm::Latent => {
                let hint = "; packed codes need quantization_mode offline";
                self.float(weight, &[out_features, in_features], hint)
            }
            WeightForm::Packed(_) => {
                // A multiple of four: `Config` is validated.
                let shape = [out_features / 4, in_features];
                let hint = "; float weights need linear_class autobitlinear with \
                            quantization_mode online, or no quantization_config";
                self.tensor(weight, &[&shape], "U8", |dtype| dtype == Dtype::U8, hint)?;
                let scale = format!("{linear}.weight_scale");
                self.tensor(scale, &[&[1], &[]], FLOAT, is_float, "")
            }
        }
    }

    fn float(&mut self, name: String, shape: &[usize], hint: &str) -> Result<()> {
        self.tensor(name, &[shape], FLOAT, is_float, hint)
    }

    /// Expects `name` with one of `shapes`; the first is the usual one. `hint` follows errors.
    fn tensor(
        &mut self,
        name: String,
        shapes: &[&[usize]],
        dtypes: &str,
        is_dtype: fn(Dtype) -> bool,
        hint: &str,
    ) -> Result<()> {
        let expected = format!("expected {dtypes} {:?}", shapes[0]);
        let found = match self.checkpoint.get(&name) {
            Some(info) if is_dtype(info.dtype) && shapes.contains(&info.shape) => {
                self.known.insert(name);
                return Ok(());
            }
            Some(info) => format!("found {} {:?}", info.dtype, info.shape),
            None => "not in the checkpoint".into(),
        };
        Err(self.checkpoint.wrong(&name, format!("{expected}, {found}{hint}")))
    }
}

const FLOAT: &str = "BF16, F16 or F32";
