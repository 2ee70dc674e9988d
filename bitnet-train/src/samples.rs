//! What a model answers to prompts while it is trained.

use std::sync::Arc;

use bitnet_model::{
    config::Config,
    model::Model,
    sampler::{Sampler, SamplingParams},
    session::{GenerateOptions, Session},
    text::{Message, Tokenizer},
};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::{Error, Result, recipe::Recipe, sft};

/// A prompt and what the model made of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sample {
    /// As in the recipe.
    pub prompt: String,
    /// The most probable token each time, without special tokens.
    pub answer: String,
}

/// The prompts of a recipe, encoded.
pub struct Prompts {
    tokenizer: Tokenizer,
    prompts: Vec<(String, Vec<u32>)>,
    options: GenerateOptions,
}

impl Prompts {
    /// Those of `[samples]`, if there are any, for a model of `config`: with `data.format` as what a user says if there is a
    /// chat template, else as beginnings of texts.
    ///
    /// # Errors
    /// A model without a tokenizer; a template that cannot be used.
    pub fn open(recipe: &Recipe, config: &Config) -> Result<Option<Self>> {
        let Some(samples) = &recipe.samples else { return Ok(None) };
        let Some(path) = &recipe.data.tokenizer else {
            let reason = "need the tokenizer of a model; name it in `data.tokenizer`, or leave [samples] out";
            return Err(Error::recipe("samples.prompts", reason));
        };
        let tokenizer = sft::tokenizer(path)?;
        let template = match recipe.data.format {
            Some(_) => sft::template(&recipe.data, &tokenizer)?,
            None => None,
        };
        let encode = |prompt: &String| {
            let tokens = match &template {
                Some(template) => {
                    let message = Message::new("user", prompt.clone());
                    tokenizer.encode_prompt(&template.render(&[message], true)?)?
                }
                None => tokenizer.encode(prompt, true)?,
            };
            Ok((prompt.clone(), tokens))
        };
        let prompts = samples.prompts.iter().map(encode).collect::<Result<_>>()?;
        let mut eos_token_ids = config.eos_token_ids.clone();
        eos_token_ids.extend(tokenizer.eos_token_id());
        eos_token_ids.extend(tokenizer.token_to_id(crate::dataset::vocabulary::EOT));
        let options = GenerateOptions {
            sampler: Sampler::new(SamplingParams::greedy())?,
            max_new_tokens: samples.max_new_tokens,
            eos_token_ids,
            interrupt: Arc::default(),
        };
        Ok(Some(Self { tokenizer, prompts, options }))
    }

    /// The answers of `model`.
    pub fn answers(&self, model: &Arc<Model>) -> Result<Vec<Sample>> {
        let answer = |(prompt, tokens): &(String, Vec<u32>)| {
            // Greedy: the generator is not asked.
            let rng = &mut ChaCha8Rng::seed_from_u64(0);
            let go_on = |_| std::ops::ControlFlow::Continue(());
            let mut session = Session::new(model.clone());
            let generation = session.generate(tokens, &self.options, rng, go_on)?;
            let answer = self.tokenizer.decode(&generation.tokens, true)?;
            Ok(Sample { prompt: prompt.clone(), answer: answer.trim().to_owned() })
        };
        self.prompts.iter().map(answer).collect()
    }
}
