//! A session: one sequence, its cache, and the loop that continues it.

use std::{
    num::NonZeroUsize,
    ops::ControlFlow,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use candle_core::{IndexOp, Tensor};
use rand::Rng;

use crate::{
    Error, Result,
    kv_cache::KvCache,
    model::Model,
    nn::{Need, Rescored},
    ops::KvType,
    sampler::{Sampler, SamplingParams},
    speculative::NgramDrafter,
};

/// Prompt tokens run at once, unless the session says otherwise: bounds the memory of the activations.
pub const PREFILL_CHUNK: NonZeroUsize = NonZeroUsize::new(512).unwrap();

/// One sequence of tokens and what the model remembers of it.
pub struct Session {
    model: Arc<Model>,
    cache: KvCache,
    /// The tokens the cache holds.
    tokens: Vec<u32>,
    drafter: Option<NgramDrafter>,
    prefill_chunk: NonZeroUsize,
}

/// How to continue a prompt.
#[derive(Clone, Debug)]
pub struct GenerateOptions {
    /// Chooses each token.
    pub sampler: Sampler,
    /// The most tokens to add.
    pub max_new_tokens: usize,
    /// Tokens that end the text; the one met is not part of the result.
    pub eos_token_ids: Vec<u32>,
    /// Set from elsewhere to stop before the next token or chunk of the prompt.
    pub interrupt: Arc<AtomicBool>,
}

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model ended its text.
    Eos,
    /// `max_new_tokens` were added.
    Length,
    /// The model's context is full.
    Context,
    /// The caller stopped it.
    Stopped,
}

/// The result of [`Session::generate`].
#[derive(Clone, Debug)]
pub struct Generation {
    /// The new tokens.
    pub tokens: Vec<u32>,
    /// Why they end where they end.
    pub finish: Finish,
    /// Prompt tokens that had to be run, the others were in the cache.
    pub prompt_tokens: usize,
    /// Time to run them.
    pub prompt_time: Duration,
    /// Time from then until the last token.
    pub decode_time: Duration,
    /// Tokens that were drafted, and those of them that the sampler chose as well.
    pub drafted: Drafted,
    /// How many rows of the output head a screening left for the exact product, on average; `None` if there was no
    /// screening.
    pub rescored_rows: Option<f64>,
}

/// How speculation went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Drafted {
    /// Tokens proposed.
    pub tokens: usize,
    /// Tokens of these that became part of the text.
    pub accepted: usize,
}

/// What a continuation came to, beside its tokens.
#[derive(Default)]
struct Tally {
    drafted: Drafted,
    rescored: Rescored,
}

impl Session {
    /// An empty session with the default cache, in half precision.
    pub fn new(model: Arc<Model>) -> Self {
        Self::with_cache(model, KvType::default())
    }

    /// An empty session that remembers keys and values as `kv_type` says.
    pub fn with_cache(model: Arc<Model>, kv_type: KvType) -> Self {
        let cache = model.cache(kv_type, 1);
        Self { model, cache, tokens: Vec::new(), drafter: None, prefill_chunk: PREFILL_CHUNK }
    }

    /// The same session, decoding several tokens at once where the text repeats itself ([`speculative`]): the same
    /// tokens, sooner.
    ///
    /// [`speculative`]: crate::speculative
    pub fn speculating(self) -> Self {
        Self { drafter: Some(NgramDrafter::default()), ..self }
    }

    /// The same session, running a prompt `tokens` at a time: fewer take less memory and more time, and give the same
    /// result. 512 if nothing is said.
    pub fn prompt_pieces(self, tokens: NonZeroUsize) -> Self {
        Self { prefill_chunk: tokens, ..self }
    }

    /// The network.
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// The tokens run so far.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Bytes of the key/value cache.
    pub fn cache_bytes(&self) -> usize {
        self.cache.bytes()
    }

    /// Forgets all tokens from `len` on.
    pub fn truncate(&mut self, len: usize) {
        self.tokens.truncate(len);
        self.cache.truncate(len);
    }

    /// Runs `tokens` behind those already there and returns the logits after the last one.
    ///
    /// # Errors
    /// No tokens, an id outside the vocabulary, or more tokens than the model's context holds.
    pub fn append(&mut self, tokens: &[u32]) -> Result<Vec<f32>> {
        let mut hidden = None;
        for chunk in tokens.chunks(self.prefill_chunk.get()) {
            hidden = Some(self.run(chunk)?);
        }
        match hidden {
            Some(hidden) => Ok(self.model.logits(&last(&hidden)?)?.squeeze(0)?.to_vec1()?),
            None => Err(Error::Input("the prompt has no tokens".into())),
        }
    }

    /// Runs `tokens` in one pass and returns the hidden state after each of them, (tokens, hidden_size).
    fn run(&mut self, tokens: &[u32]) -> Result<Tensor> {
        let input = Tensor::new(tokens, self.model.device())?.unsqueeze(0)?;
        let hidden = self.model.hidden_states(&input, Some(&mut self.cache))?;
        self.tokens.extend_from_slice(tokens);
        Ok(hidden.squeeze(0)?)
    }

    /// Makes the session hold `prompt` and returns the hidden state after it, (1, hidden_size); only what
    /// differs from the tokens already there is run. `None` if interrupted.
    fn prefill(&mut self, prompt: &[u32], interrupt: &AtomicBool) -> Result<Option<Tensor>> {
        let context = self.cache.max_len();
        if prompt.is_empty() {
            return Err(Error::Input("the prompt has no tokens".into()));
        }
        if prompt.len() > context {
            return Err(Error::Input(format!(
                "the prompt has {} tokens, but the model's context holds {context}; shorten it",
                prompt.len()
            )));
        }
        let shared = self.tokens.iter().zip(prompt).take_while(|(a, b)| a == b).count();
        self.truncate(shared.min(prompt.len() - 1)); // the last one runs for its logits
        let mut hidden = None;
        for chunk in prompt[self.tokens.len()..].chunks(self.prefill_chunk.get()) {
            if interrupt.load(Ordering::Relaxed) {
                return Ok(None);
            }
            hidden = Some(self.run(chunk)?);
        }
        Ok(hidden.map(|hidden| last(&hidden)).transpose()?)
    }

    /// Continues `prompt`, the whole text so far: what the session already holds of it is not run
    /// again. `on_token` sees every new token at once and may stop there.
    ///
    /// # Errors
    /// An empty prompt, one longer than the context, an id outside the vocabulary, or logits that
    /// are no numbers.
    pub fn generate(
        &mut self,
        prompt: &[u32],
        options: &GenerateOptions,
        rng: &mut impl Rng,
        mut on_token: impl FnMut(u32) -> ControlFlow<()>,
    ) -> Result<Generation> {
        self.continue_text((prompt, None), options, rng, &mut on_token)
    }

    /// Continues `prompt` with `text` whatever the model says, at the cost of greedy decoding: how fast a model would be that
    /// writes this, and how much of it speculation foresees.
    ///
    /// # Errors
    /// As [`generate`](Self::generate).
    pub fn replay(&mut self, prompt: &[u32], text: &[u32]) -> Result<Generation> {
        let options = GenerateOptions {
            sampler: Sampler::new(SamplingParams::greedy())?,
            max_new_tokens: text.len(),
            eos_token_ids: Vec::new(),
            interrupt: Arc::default(),
        };
        let go_on = &mut |_| ControlFlow::Continue(());
        self.continue_text((prompt, Some(text)), &options, &mut rand::rng(), go_on)
    }

    /// Continues `prompt`, with `forced` if there is such a text of `max_new_tokens`.
    fn continue_text(
        &mut self,
        (prompt, forced): (&[u32], Option<&[u32]>),
        options: &GenerateOptions,
        rng: &mut impl Rng,
        on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
    ) -> Result<Generation> {
        let start = Instant::now();
        let before = self.tokens.iter().zip(prompt).take_while(|(a, b)| a == b).count();
        let prompt_tokens = prompt.len() - before.min(prompt.len().saturating_sub(1));
        let prefilled = self.prefill(prompt, &options.interrupt)?;
        let decode_start = Instant::now();
        let mut generated = Vec::new();
        let mut tally = Tally::default();
        let finish = match prefilled {
            Some(hidden) => {
                let mut text = Text { prompt, generated: &mut generated, forced, options, rng };
                self.decode(&hidden, &mut text, &mut tally, on_token)?
            }
            None => Finish::Stopped,
        };
        Ok(Generation {
            tokens: generated,
            finish,
            prompt_tokens,
            prompt_time: decode_start - start,
            decode_time: decode_start.elapsed(),
            drafted: tally.drafted,
            rescored_rows: tally.rescored.mean(),
        })
    }

    fn decode<R: Rng>(
        &mut self,
        hidden: &Tensor,
        text: &mut Text<'_, R>,
        tally: &mut Tally,
        on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
    ) -> Result<Finish> {
        let (max_new_tokens, context) = (text.options.max_new_tokens, self.cache.max_len());
        if max_new_tokens == 0 {
            return Ok(Finish::Length);
        }
        let mut draft = Vec::new();
        // After the last token, and after each of the draft.
        let mut rows = self.model.needed_logits(hidden, &text.needs(&draft))?;
        loop {
            tally.rescored.count(&rows);
            let before = self.tokens.len() - draft.len(); // tokens known to be right
            let mut accepted = 0;
            let token = loop {
                if text.options.interrupt.load(Ordering::Relaxed) {
                    self.truncate(before + accepted);
                    return Ok(Finish::Stopped);
                }
                let token = text.sample(&rows[accepted].values)?;
                let finish = match text.options.eos_token_ids.contains(&token) {
                    true => Some(Finish::Eos),
                    false => {
                        text.generated.push(token);
                        let stopped = on_token(token).is_break().then_some(Finish::Stopped);
                        let long = text.generated.len() == max_new_tokens;
                        stopped.or(long.then_some(Finish::Length))
                    }
                };
                if let Some(finish) = finish {
                    tally.drafted.accepted += accepted;
                    self.truncate(before + accepted);
                    return Ok(finish);
                }
                match draft.get(accepted) == Some(&token) {
                    true => accepted += 1,
                    false => break token,
                }
            };
            tally.drafted.accepted += accepted;
            self.truncate(before + accepted);
            if self.tokens.len() == context {
                return Ok(Finish::Context);
            }
            let limit = (context - self.tokens.len() - 1)
                .min(max_new_tokens - text.generated.len()) // the last token need not run
                .saturating_sub(1);
            let verified = draft.len();
            draft = match &mut self.drafter {
                Some(drafter) => {
                    drafter.judge(verified, accepted);
                    drafter.draft(&[text.prompt, text.generated].concat(), limit)
                }
                None => Vec::new(),
            };
            tally.drafted.tokens += draft.len();
            let hidden = self.run(&[&[token], &draft[..]].concat())?;
            rows = self.model.needed_logits(&hidden, &text.needs(&draft))?;
        }
    }
}

/// The text so far and how it goes on.
struct Text<'a, R> {
    prompt: &'a [u32],
    generated: &'a mut Vec<u32>,
    forced: Option<&'a [u32]>,
    options: &'a GenerateOptions,
    rng: &'a mut R,
}

impl<R: Rng> Text<'_, R> {
    fn sample(&mut self, logits: &[f32]) -> Result<u32> {
        let token = self.options.sampler.sample(logits, self.prompt, self.generated, self.rng)?;
        Ok(self.forced.map_or(token, |forced| forced[self.generated.len()]))
    }

    /// What sampling will ask of the logits after the text, and after each token of `draft` behind it.
    fn needs(&self, draft: &[u32]) -> Vec<Need> {
        let text = [self.generated, draft].concat();
        let need = |end| self.options.sampler.need(self.prompt, &text[..end]);
        (self.generated.len()..=text.len()).map(need).collect()
    }
}

/// The last row of `hidden` (tokens, hidden_size).
fn last(hidden: &Tensor) -> candle_core::Result<Tensor> {
    hidden.i(hidden.dim(0)? - 1..)?.contiguous()
}
