//! Whether an adapter fits a model.

use std::collections::{BTreeMap, BTreeSet};

use candle_core::Tensor;

use super::{Adapter, Modules, files};
use crate::{
    Error, Result,
    config::{Config, PROJECTIONS},
};

impl Adapter {
    /// Checks that the adapter fits the model of `config`: every target has its pair, every tensor has its place and its
    /// shape there.
    ///
    /// # Errors
    /// The first that does not, with what was expected: the adapter was trained on another model.
    pub fn check(&self, config: &Config) -> Result<()> {
        self.check_target_names(config)?;
        let mut unknown: BTreeSet<&String> = self.pairs.keys().collect();
        for (name, (out_features, in_features)) in config.projections() {
            let path = name.trim_end_matches(".weight");
            let (a, b) = (files::key(path, "lora_A"), files::key(path, "lora_B"));
            let Some(spec) = self.spec(path)? else { continue };
            let Some(pair) = self.pairs.get(path) else {
                let reason =
                    "not in the file, although its projection is one of the target_modules";
                return Err(self.wrong(&a, reason.into()));
            };
            unknown.remove(&path.to_owned());
            self.expect(&a, &pair.lora_a, &[spec.rank, in_features])?;
            self.expect(&b, &pair.lora_b, &[out_features, spec.rank])?;
        }
        if let Some(path) = unknown.first() {
            let layers = config.num_hidden_layers;
            let reason = format!(
                "this is an adapter for another model: the model has no such projection (it has {layers} layers)"
            );
            return Err(self.wrong(&files::key(path, "lora_A"), reason));
        }
        self.check_modules(config)
    }

    /// A name that fits no projection of the model is a misspelling or means another architecture.
    fn check_target_names(&self, config: &Config) -> Result<()> {
        let Modules::Names(names) = &self.config.target_modules else { return Ok(()) };
        let paths = Vec::from_iter(config.projections().map(|(name, _)| name));
        for name in names {
            let weight = format!("{name}.weight");
            if !paths.iter().any(|path| super::targets::ends_in(path, &weight)) {
                return Err(Error::Config {
                    path: self.origin.join(super::CONFIG),
                    field: "target_modules".into(),
                    reason: format!(
                        "`{name}` is no projection of this model; it has {}",
                        PROJECTIONS.join(", ")
                    ),
                });
            }
        }
        Ok(())
    }

    fn check_modules(&self, config: &Config) -> Result<()> {
        let shapes = whole_tensors(config);
        for (name, tensor) in &self.modules {
            let key = files::module_key(name);
            match shapes.get(name) {
                Some(shape) if shape.len() == 2 && tensor.dims() != shape => {
                    let reason = format!(
                        "this is an adapter for another vocabulary: expected {shape:?}, found {:?}",
                        tensor.dims()
                    );
                    return Err(self.wrong(&key, reason));
                }
                Some(shape) => self.expect(&key, tensor, shape)?,
                None if config.projections().any(|(projection, _)| projection == *name) => {
                    let reason = "a whole projection is not supported, as the base's are ternary: \
                                  train it by target_modules, or save embed_tokens, lm_head or norms";
                    return Err(self.wrong(&key, reason.into()));
                }
                None => {
                    let reason =
                        "this is an adapter for another model: the model has no such tensor";
                    return Err(self.wrong(&key, reason.into()));
                }
            }
        }
        for name in &self.config.modules_to_save {
            let is_saved = |tensor: &String| tensor.trim_end_matches(".weight").ends_with(name);
            if !self.modules.keys().any(is_saved) {
                return Err(Error::Config {
                    path: self.origin.join(super::CONFIG),
                    field: "modules_to_save".into(),
                    reason: format!("{} has no tensor of `{name}`", super::WEIGHTS),
                });
            }
        }
        Ok(())
    }

    fn expect(&self, key: &str, tensor: &Tensor, expected: &[usize]) -> Result<()> {
        if tensor.dims() == expected {
            return Ok(());
        }
        let found = tensor.dims();
        Err(self.wrong(
            key,
            format!("this is an adapter for another model: expected {expected:?}, found {found:?}"),
        ))
    }
}

/// The tensors of a model of `config` that an adapter may replace, with their shapes: embedding, head and norms.
pub fn whole_tensors(config: &Config) -> BTreeMap<String, Vec<usize>> {
    let &Config { vocab_size, hidden_size, intermediate_size, .. } = config;
    let mut shapes = BTreeMap::from([
        ("model.embed_tokens.weight".to_owned(), vec![vocab_size, hidden_size]),
        ("lm_head.weight".to_owned(), vec![vocab_size, hidden_size]),
        ("model.norm.weight".to_owned(), vec![hidden_size]),
    ]);
    for layer in 0..config.num_hidden_layers {
        let mut norm = |name: &str, size| {
            shapes.insert(format!("model.layers.{layer}.{name}.weight"), vec![size]);
        };
        norm("input_layernorm", hidden_size);
        norm("post_attention_layernorm", hidden_size);
        if let Some((attn, ffn)) = config.sub_norm_names() {
            norm(&format!("self_attn.{attn}"), config.num_attention_heads * config.head_dim);
            norm(&format!("mlp.{ffn}"), intermediate_size);
        }
    }
    shapes
}
