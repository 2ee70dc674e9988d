//! Puts the questions to the model.

use std::{
    collections::BTreeMap,
    io,
    num::NonZeroUsize,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use anyhow::{Context, bail, ensure};
use bitnet_model::{
    batch::{Batch, Limits, Sequence, SequenceId, Update},
    choices::choice_loglikelihoods,
    config::GenerationConfig,
    kv_cache::KvCache,
    model::Model,
    ops::KvType,
    sampler::{Sampler, SamplingParams},
    score::{LogLikelihood, ScoreRequest},
    session::PREFILL_CHUNK,
    text::{StopStrings, Tokenizer},
};
use bitnet_train::eval::{
    Ask, Request, Response,
    request::{encode_pair, prefix_token, rolling_windows},
    tasks::{Prepared, humaneval},
};
use rayon::prelude::*;
use serde_json::{Map, Value, json};

use crate::{
    continuation::{Finish, TextOutput},
    sandbox::{Outcome, Sandbox},
};

/// The model, and how it is asked.
pub struct Work<'a> {
    /// The network.
    pub model: &'a Arc<Model>,
    /// Its tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// How keys and values are stored.
    pub kv_type: KvType,
    /// Sequences that run together.
    pub batch: NonZeroUsize,
    /// The most tokens of a written answer; what the task says if it is `None`.
    pub max_new_tokens: Option<usize>,
    /// Where written programs run.
    pub sandbox: Option<&'a Sandbox>,
    /// Tokens that end a written answer.
    pub eos_token_ids: Vec<u32>,
    /// Set to stop soon.
    pub interrupt: &'a AtomicBool,
}

/// The responses to a question, and what is to be noted with them.
type Responded = (Vec<Response>, Map<String, Value>);

/// Tokens that end a text, whoever says so.
pub fn eos_token_ids(tokenizer: &Tokenizer, generation: &GenerationConfig) -> Vec<u32> {
    let mut ids = generation.eos_token_ids.clone();
    ids.extend(tokenizer.eos_token_id().filter(|id| !generation.eos_token_ids.contains(id)));
    ids
}

/// What scores come to together.
fn total(scores: &[LogLikelihood]) -> Response {
    let sum = scores.iter().map(LogLikelihood::sum).sum();
    Response::LogLikelihood(sum, scores.iter().all(|score| score.is_greedy))
}

impl Work<'_> {
    /// The responses to these questions of a task; they mean nothing if `interrupt` is set.
    pub fn run(&self, prepared: &Prepared, numbers: &[usize]) -> anyhow::Result<Vec<Responded>> {
        let task = prepared.task;
        let asked =
            Vec::from_iter(numbers.iter().map(|&number| &prepared.items[number].requests[..]));
        let at = |index: usize| move || format!("question {} of {}", numbers[index], task.name);
        let first = asked.first().and_then(|requests| requests.first());
        match first {
            Some(Request::Continuation { .. }) => {
                let questions = asked
                    .iter()
                    .enumerate()
                    .map(|(index, requests)| self.continuations(requests).with_context(at(index)));
                let questions = questions.collect::<anyhow::Result<Vec<_>>>()?;
                let scores = choice_loglikelihoods(self.model, &questions, self.kv_type)?;
                let each = scores.iter().zip(&questions);
                Ok(each
                    .map(|(scores, requests)| {
                        let responses =
                            scores.iter().map(|score| total(std::slice::from_ref(score)));
                        (responses.collect(), self.cut(requests))
                    })
                    .collect())
            }
            Some(Request::Page(_)) => asked
                .iter()
                .enumerate()
                .map(|(index, requests)| self.page(requests).with_context(at(index)))
                .collect(),
            Some(Request::Generate(_)) => {
                let new = self.max_new_tokens.unwrap_or(task.answer_tokens);
                let written = self.generate(&asked, task.until, new)?;
                match task.runs_programs {
                    true => self.run_programs(prepared, numbers, written),
                    false => Ok(written),
                }
            }
            None => bail!("{}: a question asks nothing", task.name),
        }
    }

    fn continuations(&self, requests: &[Request]) -> anyhow::Result<Vec<ScoreRequest>> {
        let pair = |request: &Request| match request {
            Request::Continuation { context, continuation } => {
                let (context, continuation) = encode_pair(self.tokenizer, context, continuation)?;
                Ok(ScoreRequest { context, continuation })
            }
            _ => bail!("is asked in several ways"),
        };
        requests.iter().map(pair).collect()
    }

    /// Notes that a context was cut on the left, as it did not fit.
    fn cut(&self, requests: &[ScoreRequest]) -> Map<String, Value> {
        let most = self.model.config().max_position_embeddings + 1;
        let is_cut = |r: &ScoreRequest| r.context.len() + r.continuation.len() > most;
        notes(requests.iter().any(is_cut))
    }

    /// Scores whole texts, one after the other: they are long.
    fn page(&self, requests: &[Request]) -> anyhow::Result<Responded> {
        let mut responses = Vec::new();
        for request in requests {
            let Request::Page(text) = request else { bail!("is asked in several ways") };
            let tokens = self.tokenizer.encode_prompt(text)?;
            let max_len = self.model.config().max_position_embeddings;
            let windows = rolling_windows(&tokens, prefix_token(self.tokenizer)?, max_len);
            let windows = windows.into_iter();
            let windows =
                windows.map(|(context, continuation)| ScoreRequest { context, continuation });
            let windows = Vec::from_iter(windows.map(|window| vec![window]));
            let mut scores = Vec::new();
            for windows in windows.chunks(self.batch.get()) {
                if self.interrupt.load(Ordering::Relaxed) {
                    break;
                }
                scores.extend(
                    choice_loglikelihoods(self.model, windows, self.kv_type)?.into_iter().flatten(),
                );
            }
            responses.push(total(&scores));
        }
        Ok((responses, Map::new()))
    }

    /// Runs what was written, with the tests behind it.
    fn run_programs(
        &self,
        prepared: &Prepared,
        numbers: &[usize],
        written: Vec<Responded>,
    ) -> anyhow::Result<Vec<Responded>> {
        let sandbox = self.sandbox.context("programs run with --allow-code-execution only")?;
        let run = |(&number, (responses, mut notes)): (&usize, Responded)| {
            let document = &prepared.items[number].document;
            let ([Response::Text(text)], Ask::Program { test }) = (&responses[..], &document.ask)
            else {
                bail!("question {number} of {}: is asked in several ways", prepared.task.name);
            };
            let outcome = sandbox.run(&humaneval::program(&document.text, text, test))?;
            let passed = outcome == Outcome::Passed;
            notes.insert("outcome".into(), json!(outcome.to_string()));
            Ok((vec![Response::Program { text: text.clone(), passed }], notes))
        };
        numbers.par_iter().zip(written).map(run).collect()
    }

    /// Continues prompts greedily by at most `new` tokens, until one of `stops` is written.
    fn generate(
        &self,
        asked: &[&[Request]],
        stops: &[&str],
        new: usize,
    ) -> anyhow::Result<Vec<Responded>> {
        let config = self.model.config();
        let context = config.max_position_embeddings;
        ensure!(
            new < context,
            "the model's context of {context} tokens has no room for an answer of {new} behind a prompt: give a smaller --max-new-tokens"
        );
        let mut answers = Vec::with_capacity(asked.len());
        for requests in asked {
            let [Request::Generate(prompt)] = requests else { bail!("is asked in several ways") };
            let mut tokens = self.tokenizer.encode_prompt(prompt)?;
            let cut = tokens.len().saturating_sub(context - new);
            tokens.drain(..cut);
            let stops = stops.iter().copied().map(String::from).collect();
            let text = TextOutput::new(self.tokenizer, StopStrings::new(stops)?, None);
            answers.push(Answer { tokens, is_cut: cut > 0, text });
        }
        let longest = answers.iter().map(|answer| answer.tokens.len() + new).max().unwrap_or(0);
        // One more for what ended sequences leave to those that begin alike.
        let room = KvCache::reserved_bytes(config, self.kv_type, longest) * (self.batch.get() + 1);
        let limits = Limits {
            sequences: self.batch.get(),
            kv_bytes: room,
            prompt_tokens: PREFILL_CHUNK.get(),
            prompt_tokens_beside: PREFILL_CHUNK.get(),
            kv_type: self.kv_type,
        };
        let mut batch = Batch::new(self.model.clone(), limits);
        let sampler = Sampler::new(SamplingParams::greedy())?;
        let mut running: BTreeMap<SequenceId, usize> = BTreeMap::new();
        let mut waiting = (0..answers.len()).peekable();
        while !(running.is_empty() && waiting.peek().is_none()) {
            if self.interrupt.load(Ordering::Relaxed) {
                break;
            }
            while let Some(&index) = waiting.peek() {
                let sequence = Sequence {
                    prompt: answers[index].tokens.clone(),
                    sampler: sampler.clone(),
                    seed: 0,
                    max_new_tokens: new,
                    eos_token_ids: self.eos_token_ids.clone(),
                    grammar: None,
                    adapter: None,
                    logprobs: None,
                    prompt_logprobs: false,
                    pooled: false,
                };
                let Some((id, _)) = batch.admit(sequence)? else { break };
                running.insert(id, index);
                waiting.next();
            }
            for (id, update) in batch.step()? {
                let Some(&index) = running.get(&id) else { continue };
                let is_over = match update {
                    Update::Token(token, _) => {
                        let is_over = answers[index].text.push(token)?.is_break();
                        if is_over {
                            batch.cancel(id);
                        }
                        is_over
                    }
                    Update::End(_) => true,
                    Update::Failed(reason) => bail!("{reason}"),
                    Update::Prompt(..) | Update::Pooled(_) => false,
                };
                if is_over {
                    running.remove(&id);
                }
            }
        }
        answers.into_iter().map(Answer::end).collect()
    }
}

/// What is noted of a question.
fn notes(is_cut: bool) -> Map<String, Value> {
    let cut = is_cut.then(|| ("cut".to_owned(), json!(true)));
    Map::from_iter(cut)
}

/// An answer that is being written.
struct Answer {
    /// The prompt.
    tokens: Vec<u32>,
    is_cut: bool,
    text: TextOutput<io::Sink>,
}

impl Answer {
    fn end(self) -> anyhow::Result<Responded> {
        let (text, _) = self.text.finish(Finish::Length)?;
        Ok((vec![Response::Text(text)], notes(self.is_cut)))
    }
}
