//! `/v1/embeddings`: texts as sequences whose hidden states are pooled.

use bitnet_model::{
    batch::Sequence,
    sampler::{Sampler, SamplingParams},
};
use serde_json::Value;

use super::{Reader, Refusal, fields::Fields};

/// The most texts of a request, as OpenAI has it.
const MOST_TEXTS: usize = 2048;

/// What a request for embeddings asks for.
pub struct Embeddings {
    /// The name of the model in the answer.
    pub model: String,
    /// One a text.
    pub sequences: Vec<Sequence>,
    /// Whether vectors are little-endian f32 in base64 instead of lists.
    pub base64: bool,
}

impl Reader<'_> {
    /// Reads the body of a request for embeddings. Unknown fields are overlooked.
    ///
    /// # Errors
    /// The first field that cannot be answered.
    pub fn read_embeddings(&self, body: &Value) -> Result<Embeddings, Refusal> {
        let fields = Fields::new(body)?;
        let model = fields.text("model")?.unwrap_or(self.model).to_owned();
        let adapter = self.adapter(&model)?.cloned();
        let base64 = match fields.text("encoding_format")? {
            None | Some("float") => false,
            Some("base64") => true,
            Some(_) => {
                let reason = "`encoding_format` must be `float` or `base64`";
                return Err(Refusal::of("encoding_format", reason));
            }
        };
        let size = self.config.hidden_size as u64;
        if fields.count("dimensions")?.is_some_and(|dimensions| dimensions != size) {
            let reason = format!("`dimensions` must be {size}, as the model has it");
            return Err(Refusal::of("dimensions", reason));
        }
        let sampler = Sampler::new(SamplingParams::greedy());
        let sampler = sampler.map_err(|error| Refusal::of("input", error.to_string()))?;
        let mut sequences = Vec::new();
        for prompt in self.prompts(fields, "input", MOST_TEXTS)? {
            self.check("input", &prompt)?;
            sequences.push(Sequence {
                prompt,
                sampler: sampler.clone(),
                seed: 0,
                max_new_tokens: 0,
                eos_token_ids: Vec::new(),
                grammar: None,
                adapter: adapter.clone(),
                logprobs: None,
                prompt_logprobs: false,
                pooled: true,
            });
        }
        Ok(Embeddings { model, sequences, base64 })
    }
}
