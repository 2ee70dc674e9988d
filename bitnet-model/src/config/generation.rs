//! `generation_config.json`: how the publisher of a model wants it sampled.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::fields::{Fields, parse_object, read_text};
use crate::error::Result;

/// The fields of `generation_config.json` that are honoured; others are ignored. `None`: not
/// stated.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationConfig {
    /// Sample, or take the most likely token.
    pub do_sample: Option<bool>,
    /// Divides the logits; at least 0.
    pub temperature: Option<f64>,
    /// Keep the k most likely tokens; 0 keeps all.
    pub top_k: Option<usize>,
    /// Keep the most likely tokens up to this probability, 0 to 1.
    pub top_p: Option<f64>,
    /// Keep tokens at least this probable relative to the most likely one, 0 to 1.
    pub min_p: Option<f64>,
    /// Penalizes tokens already seen; positive, 1 changes nothing.
    pub repetition_penalty: Option<f64>,
    /// First token of a text.
    pub bos_token_id: Option<u32>,
    /// Filler of shorter rows in a batch.
    pub pad_token_id: Option<u32>,
    /// Tokens that end a text.
    pub eos_token_ids: Vec<u32>,
    /// Bound on prompt and continuation together.
    pub max_length: Option<usize>,
    /// Bound on the continuation.
    pub max_new_tokens: Option<usize>,
}

impl GenerationConfig {
    /// Reads and validates a `generation_config.json`.
    pub fn from_file(path: &Path) -> Result<Self> {
        Self::from_json(path, &read_text(path)?)
    }

    /// Validates the text of a `generation_config.json`; errors name `path`.
    pub fn from_json(path: &Path, json: &str) -> Result<Self> {
        let object = parse_object(path, json)?;
        let fields = Fields::new(path, &object);
        let number = |name: &str, supported: &str, is_valid: fn(f64) -> bool| {
            let value = fields.number(name)?;
            match value {
                Some(x) if !is_valid(x) => Err(fields.unsupported(name, supported)),
                _ => Ok(value),
            }
        };
        let count = |name: &str| match fields.integer(name)?.map(usize::try_from).transpose() {
            Ok(count) => Ok(count),
            Err(_) => Err(fields.unsupported(name, "a length this machine can count")),
        };
        let probability = |x: f64| (0. ..=1.).contains(&x);
        Ok(Self {
            do_sample: fields.boolean("do_sample")?,
            temperature: number("temperature", "a number of at least 0", |x| x >= 0.)?,
            top_k: count("top_k")?,
            top_p: number("top_p", "0 to 1", probability)?,
            min_p: number("min_p", "0 to 1", probability)?,
            repetition_penalty: number("repetition_penalty", "a positive number", |x| x > 0.)?,
            bos_token_id: fields.token_id("bos_token_id")?,
            pad_token_id: fields.token_id("pad_token_id")?,
            eos_token_ids: fields.token_ids("eos_token_id")?,
            max_length: count("max_length")?,
            max_new_tokens: count("max_new_tokens")?,
        })
    }

    /// The `generation_config.json` with what is stated.
    pub fn to_json(&self) -> Value {
        let eos_token_id = match self.eos_token_ids.as_slice() {
            [] => Value::Null,
            [one] => json!(one),
            several => json!(several),
        };
        let fields = [
            ("bos_token_id", json!(self.bos_token_id)),
            ("eos_token_id", eos_token_id),
            ("pad_token_id", json!(self.pad_token_id)),
            ("do_sample", json!(self.do_sample)),
            ("temperature", json!(self.temperature)),
            ("top_k", json!(self.top_k)),
            ("top_p", json!(self.top_p)),
            ("min_p", json!(self.min_p)),
            ("repetition_penalty", json!(self.repetition_penalty)),
            ("max_length", json!(self.max_length)),
            ("max_new_tokens", json!(self.max_new_tokens)),
        ];
        let stated = fields.into_iter().filter(|(_, value)| !value.is_null());
        Value::Object(stated.map(|(name, value)| (name.to_owned(), value)).collect::<Map<_, _>>())
    }
}
