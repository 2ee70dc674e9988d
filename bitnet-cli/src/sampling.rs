//! How to continue a text: the flags that commands share, resolved against what the model's publisher
//! recommends in `generation_config.json`.

use std::num::NonZeroUsize;

use anyhow::bail;
use bitnet_model::{
    config::{Config, GenerationConfig},
    sampler::{Sampler, SamplingParams},
    session::GenerateOptions,
    text::StopStrings,
};
use clap::Args;

/// Options of sampling and of where to stop.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingArgs {
    /// Divides the logits: at least 0; 0 always takes the most likely token (greedy), above 0 samples
    /// [default: the model's generation_config.json; without do_sample there, 0]
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    pub temperature: Option<f32>,
    /// Sample among the K most likely tokens; 0 takes all [default: generation_config.json, else 0]
    #[arg(long, value_name = "K")]
    pub top_k: Option<usize>,
    /// Sample among the most likely tokens that make up this probability: above 0 to 1; 1 takes all
    /// [default: generation_config.json, else 1]
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub top_p: Option<f32>,
    /// Sample among tokens at least this probable relative to the most likely one: 0 to 1; 0 takes all
    /// [default: generation_config.json, else 0]
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub min_p: Option<f32>,
    /// Divides positive and multiplies negative logits of tokens already in the text: above 0; 1 is off
    /// [default: generation_config.json, else 1]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub repetition_penalty: Option<f32>,
    /// Subtracted from a token's logit for each time it was generated: -2 to 2
    #[arg(long, value_name = "X", default_value_t = 0., allow_negative_numbers = true)]
    pub frequency_penalty: f32,
    /// Subtracted once from the logit of every token that was generated: -2 to 2
    #[arg(long, value_name = "X", default_value_t = 0., allow_negative_numbers = true)]
    pub presence_penalty: f32,
    /// Added to the logit of token ID; `-inf` forbids it. Repeatable
    #[arg(long, value_name = "ID=BIAS", value_parser = parse_logit_bias)]
    pub logit_bias: Vec<(u32, f32)>,
    /// Seed of the random numbers; the same seed gives the same text [default: a random one, which the
    /// statistics show]
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// The text that ends the output when it comes up; it is not printed. Repeatable
    #[arg(long, value_name = "STRING")]
    pub stop: Vec<String>,
}

/// A validated way to continue a text.
#[derive(Clone, Debug)]
pub struct Plan {
    /// For the session; no eos ids if they are to be ignored.
    pub options: GenerateOptions,
    /// Where the text ends besides.
    pub stop: StopStrings,
    /// What to seed the generator with.
    pub seed: u64,
}

impl Plan {
    /// Whether random numbers matter.
    pub fn is_greedy(&self) -> bool {
        self.options.sampler.params().temperature == 0.
    }
}

impl SamplingArgs {
    /// The plan for a model: flags, else its `generation_config.json`, else neutral values.
    ///
    /// # Errors
    /// Values out of range, biased tokens outside the vocabulary, an empty stop string.
    pub fn resolve(
        &self,
        config: &Config,
        generation: &GenerationConfig,
        max_new_tokens: MaxNewTokens,
    ) -> anyhow::Result<Plan> {
        let vocab_size = config.vocab_size;
        if let Some((id, _)) = self.logit_bias.iter().find(|(id, _)| *id as usize >= vocab_size) {
            bail!(
                "--logit-bias names token {id}, but the model's vocabulary has {vocab_size} tokens"
            );
        }
        Ok(Plan {
            options: GenerateOptions {
                sampler: Sampler::new(self.params(generation))?,
                max_new_tokens: max_new_tokens.resolve(generation),
                eos_token_ids: generation.eos_token_ids.clone(),
                interrupt: Default::default(),
            },
            stop: StopStrings::new(self.stop.clone())?,
            // 32 bits are short enough to be typed again and exact in every JSON reader.
            seed: self.seed.unwrap_or_else(|| u64::from(rand::random::<u32>())),
        })
    }

    fn params(&self, generation: &GenerationConfig) -> SamplingParams {
        // A filter without --temperature asks for sampling too: greedy decoding would ignore it.
        let filters = self.top_k.is_some() || self.top_p.is_some() || self.min_p.is_some();
        let samples = match self.temperature {
            Some(temperature) => temperature != 0.,
            None => generation.do_sample == Some(true) || filters,
        };
        let number = |flag: Option<f32>, configured: Option<f64>, neutral| {
            flag.or(configured.map(|value| value as f32)).unwrap_or(neutral)
        };
        SamplingParams {
            temperature: match samples {
                true => number(self.temperature, generation.temperature, 1.),
                false => 0.,
            },
            top_k: self.top_k.or(generation.top_k).filter(|k| *k > 0),
            top_p: number(self.top_p, generation.top_p, 1.),
            min_p: number(self.min_p, generation.min_p, 0.),
            repetition_penalty: number(self.repetition_penalty, generation.repetition_penalty, 1.),
            frequency_penalty: self.frequency_penalty,
            presence_penalty: self.presence_penalty,
            logit_bias: self.logit_bias.clone(),
        }
    }
}

/// The most tokens to add: what the user says, else the model's publisher, else the command.
#[derive(Clone, Copy, Debug)]
pub struct MaxNewTokens {
    /// The flag.
    pub flag: Option<NonZeroUsize>,
    /// The command's own.
    pub default: usize,
}

impl MaxNewTokens {
    fn resolve(self, generation: &GenerationConfig) -> usize {
        self.flag.map(NonZeroUsize::get).or(generation.max_new_tokens).unwrap_or(self.default)
    }
}

fn parse_logit_bias(text: &str) -> Result<(u32, f32), String> {
    let (id, bias) = text.split_once('=').ok_or("expected ID=BIAS, such as 42=-1.5")?;
    let id = id.parse().map_err(|_| format!("`{id}` is no token id"))?;
    let bias = bias.parse().map_err(|_| format!("`{bias}` is no number"))?;
    Ok((id, bias))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampled() -> GenerationConfig {
        GenerationConfig {
            do_sample: Some(true),
            temperature: Some(0.5),
            top_k: Some(20),
            top_p: Some(0.75),
            repetition_penalty: Some(1.25),
            ..Default::default()
        }
    }

    #[test]
    fn without_flags_the_publisher_decides() {
        let none = SamplingArgs::default();
        let params = none.params(&sampled());
        assert_eq!((params.temperature, params.top_k, params.top_p), (0.5, Some(20), 0.75));
        assert_eq!(params.repetition_penalty, 1.25);
        let greedy = GenerationConfig { do_sample: Some(false), ..sampled() };
        assert_eq!(none.params(&greedy).temperature, 0.);
        assert_eq!(none.params(&GenerationConfig::default()), SamplingParams::greedy());
        let sampling = GenerationConfig { do_sample: Some(true), ..Default::default() };
        assert_eq!(none.params(&sampling), SamplingParams::default());
    }

    #[test]
    fn flags_override_single_values() {
        let flags = |args: SamplingArgs| args.params(&sampled());
        let greedy = flags(SamplingArgs { temperature: Some(0.), ..Default::default() });
        assert_eq!((greedy.temperature, greedy.repetition_penalty), (0., 1.25));
        let all = flags(SamplingArgs { top_k: Some(0), top_p: Some(1.), ..Default::default() });
        assert_eq!((all.temperature, all.top_k, all.top_p), (0.5, None, 1.));
    }

    #[test]
    fn temperature_or_a_filter_turns_sampling_on() {
        let greedy = GenerationConfig { do_sample: Some(false), ..sampled() };
        let warm = SamplingArgs { temperature: Some(0.9), ..Default::default() };
        assert_eq!(warm.params(&greedy).temperature, 0.9);
        let filtered = SamplingArgs { min_p: Some(0.1), ..Default::default() };
        assert_eq!(filtered.params(&greedy).temperature, 0.5);
        assert_eq!(filtered.params(&GenerationConfig::default()).temperature, 1.);
        let off = SamplingArgs { temperature: Some(0.), ..filtered };
        assert_eq!(off.params(&greedy).temperature, 0.);
    }

    #[test]
    fn the_most_new_tokens_come_from_flag_then_publisher_then_command() {
        let stated = GenerationConfig { max_new_tokens: Some(9), ..Default::default() };
        let bound = |flag: usize| MaxNewTokens { flag: NonZeroUsize::new(flag), default: 256 };
        assert_eq!(bound(3).resolve(&stated), 3);
        assert_eq!(bound(0).resolve(&stated), 9);
        assert_eq!(bound(0).resolve(&GenerationConfig::default()), 256);
    }

    #[test]
    fn logit_biases() {
        assert_eq!(parse_logit_bias("42=-1.5"), Ok((42, -1.5)));
        assert_eq!(parse_logit_bias("7=-inf"), Ok((7, f32::NEG_INFINITY)));
        assert_eq!(parse_logit_bias("7").unwrap_err(), "expected ID=BIAS, such as 42=-1.5");
        assert_eq!(parse_logit_bias("x=1").unwrap_err(), "`x` is no token id");
        assert_eq!(parse_logit_bias("1=y").unwrap_err(), "`y` is no number");
    }
}
