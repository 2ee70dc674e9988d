//! What sequences came to, as OpenAI answers it.

use std::{io, ops::ControlFlow};

use bitnet_model::{batch::Sequence, score::TokenLogprobs, session, text::Tokenizer};
use serde_json::{Map, Value, json};

use super::{Asked, Route, tools};
use crate::continuation::{Finish, TextOutput};

/// One choice of an answer, as far as it has come.
pub struct Choice {
    text: TextOutput<io::Sink>,
    pub(super) tokens: Vec<(u32, Option<TokenLogprobs>)>,
    /// Of the tokens of the prompt from the second on.
    pub(super) prompt: Vec<TokenLogprobs>,
    /// Tokens of the prompt that had been run for an earlier sequence.
    reused: usize,
    finish: Option<Finish>,
    /// Where the text ends in spite of what followed.
    cut: Option<usize>,
}

impl Choice {
    /// The choice that `sequence` becomes.
    ///
    /// # Errors
    /// A prompt that cannot be decoded.
    pub fn new(asked: &Asked, sequence: &Sequence, tokenizer: &Tokenizer) -> anyhow::Result<Self> {
        let text = TextOutput::new(tokenizer, asked.stop.clone(), None);
        let text = match asked.route {
            Route::Chat => text,
            Route::Completion => text.after(&sequence.prompt, tokenizer)?,
        };
        let (tokens, prompt, reused, finish, cut) = Default::default();
        Ok(Self { text, tokens, prompt, reused, finish, cut })
    }

    /// Takes how many tokens of the prompt need not be run.
    pub fn join(&mut self, reused: usize) {
        self.reused = reused;
    }

    /// Takes how likely the next token of the prompt was.
    pub fn push_prompt(&mut self, logprobs: TokenLogprobs) {
        self.prompt.push(logprobs);
    }

    /// Takes the next token; a stop string ends the choice.
    pub fn push(
        &mut self,
        id: u32,
        logprobs: Option<TokenLogprobs>,
    ) -> anyhow::Result<ControlFlow<()>> {
        self.tokens.push((id, logprobs));
        let flow = self.text.push(id)?;
        if flow.is_break() {
            self.finish = Some(Finish::Stop);
        }
        Ok(flow)
    }

    /// Takes the end of the sequence.
    pub fn end(&mut self, finish: session::Finish) -> anyhow::Result<()> {
        if self.finish.is_some() {
            return Ok(());
        }
        self.finish = Some(self.text.close(finish.into())?);
        Ok(())
    }

    /// Ends the choice at this byte of its text, for what comes there must not be said.
    pub fn cut(&mut self, at: usize) {
        self.cut = Some(at);
    }

    /// Whether nothing more comes.
    pub fn is_ended(&self) -> bool {
        self.finish.is_some() || self.cut.is_some()
    }

    /// The text, as far as it is sure.
    pub fn text(&self) -> &str {
        let text = self.text.text();
        self.cut.and_then(|cut| text.get(..cut)).unwrap_or(text)
    }

    /// Tokens that were added.
    pub fn new_tokens(&self) -> usize {
        self.tokens.len()
    }

    /// Why it has ended, in OpenAI's words; null if it has not.
    pub fn finish_reason(&self, calls: bool) -> Value {
        let reason = match self.finish {
            _ if self.cut.is_some() => "content_filter",
            Some(Finish::Eos) if calls => "tool_calls",
            Some(Finish::Eos | Finish::Stop) => "stop",
            Some(Finish::Length | Finish::Context) => "length",
            Some(Finish::Interrupted) => "error",
            None => return Value::Null,
        };
        reason.into()
    }
}

/// The answer whose choices have all ended. `id` is a unique part of its id, `created` in seconds since 1970.
///
/// # Errors
/// Tokens that cannot be decoded.
pub fn answer(
    asked: &Asked,
    choices: &[Choice],
    tokenizer: &Tokenizer,
    (id, created): (&str, u64),
) -> anyhow::Result<Value> {
    let object = match asked.route {
        Route::Chat => "chat.completion",
        Route::Completion => "text_completion",
    };
    let each = choices.iter().zip(&asked.sequences).enumerate();
    let each = each.map(|(index, (choice, sequence))| {
        choice_json(asked, choice, sequence, tokenizer, (id, index))
    });
    Ok(json!({
        "id": format!("{}-{id}", asked.route.kind()),
        "object": object,
        "created": created,
        "model": asked.model,
        "choices": each.collect::<anyhow::Result<Vec<_>>>()?,
        "usage": usage(asked, choices),
    }))
}

/// How many tokens an answer took. A prompt counts once, however many choices it has.
pub fn usage(asked: &Asked, choices: &[Choice]) -> Value {
    let prompts = asked.sequences.iter().step_by(asked.n);
    let prompt_tokens: usize = prompts.map(|sequence| sequence.prompt.len()).sum();
    let cached: usize = choices.iter().step_by(asked.n).map(|choice| choice.reused).sum();
    let completion_tokens: usize = choices.iter().map(Choice::new_tokens).sum();
    json!({
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached},
    })
}

fn choice_json(
    asked: &Asked,
    choice: &Choice,
    sequence: &Sequence,
    tokenizer: &Tokenizer,
    (id, index): (&str, usize),
) -> anyhow::Result<Value> {
    let text = choice.text();
    let (content, calls) = if asked.calls { tools::split(text) } else { (text, Vec::new()) };
    let reason = choice.finish_reason(!calls.is_empty());
    let logprobs = match (sequence.logprobs, asked.route) {
        (None, _) => Value::Null,
        (Some(_), Route::Chat) => chat_logprobs(&choice.tokens, tokenizer)?,
        (Some(_), Route::Completion) => {
            let echoed = echoed(asked, sequence, choice);
            let new = choice.tokens.iter().map(|(id, logprobs)| (*id, logprobs.as_ref()));
            text_logprobs(echoed.chain(new), tokenizer, &mut 0)?
        }
    };
    Ok(match asked.route {
        Route::Chat => json!({
            "index": index,
            "message": message(content, &calls, &format!("{id}_{index}")),
            "logprobs": logprobs,
            "finish_reason": reason,
        }),
        Route::Completion => {
            let echo = match asked.echo {
                true => tokenizer.decode(&sequence.prompt, true)?,
                false => String::new(),
            };
            json!({
                "index": index,
                "text": echo + text,
                "logprobs": logprobs,
                "finish_reason": reason,
            })
        }
    })
}

/// The assistant's message. `id` is a unique part of the ids of its calls.
fn message(content: &str, calls: &[tools::Call], id: &str) -> Value {
    if calls.is_empty() {
        return json!({"role": "assistant", "content": content, "refusal": null});
    }
    let content = (!content.is_empty()).then_some(content);
    let calls =
        Vec::from_iter(calls.iter().enumerate().map(|(index, call)| call.to_json(id, index)));
    json!({"role": "assistant", "content": content, "tool_calls": calls, "refusal": null})
}

/// The prompt's tokens that an answer repeats, and how likely they were; the first has nothing before it.
pub(super) fn echoed<'a>(
    asked: &Asked,
    sequence: &'a Sequence,
    choice: &'a Choice,
) -> impl Iterator<Item = (u32, Option<&'a TokenLogprobs>)> {
    let echoed = if asked.echo { &sequence.prompt[..] } else { &[] };
    let first = echoed.first().map(|id| (*id, None));
    let rest = echoed.iter().skip(1).copied().zip(choice.prompt.iter().map(Some));
    first.into_iter().chain(rest)
}

/// A log-probability; JSON has no −∞.
fn finite(logprob: f32) -> f32 {
    logprob.max(-9999.)
}

/// Of the tokens of a message.
pub(super) fn chat_logprobs(
    tokens: &[(u32, Option<TokenLogprobs>)],
    tokenizer: &Tokenizer,
) -> anyhow::Result<Value> {
    let entry = |id: u32, logprob: f32| -> anyhow::Result<Map<String, Value>> {
        let token = tokenizer.decode(&[id], false)?;
        let entry = [
            ("logprob", json!(finite(logprob))),
            ("bytes", json!(token.as_bytes())),
            ("token", json!(token)),
        ];
        Ok(entry.into_iter().map(|(name, value)| (name.to_owned(), value)).collect())
    };
    let found = tokens.iter().filter_map(|(id, logprobs)| Some((*id, logprobs.as_ref()?)));
    let each = found.map(|(id, logprobs)| -> anyhow::Result<Value> {
        let top = logprobs.top.iter().map(|(id, logprob)| entry(*id, *logprob));
        let mut object = entry(id, logprobs.logprob)?;
        object.insert("top_logprobs".into(), json!(top.collect::<anyhow::Result<Vec<_>>>()?));
        Ok(object.into())
    });
    Ok(json!({"content": each.collect::<anyhow::Result<Vec<_>>>()?, "refusal": null}))
}

/// Of the tokens of a text, in order. `offset` is where the first of them begins, in characters, and then where the next does;
/// special tokens are not in the text.
pub(super) fn text_logprobs<'a>(
    tokens: impl Iterator<Item = (u32, Option<&'a TokenLogprobs>)>,
    tokenizer: &Tokenizer,
    offset: &mut usize,
) -> anyhow::Result<Value> {
    let (mut texts, mut logprobs, mut top, mut offsets) = (vec![], vec![], vec![], vec![]);
    for (id, found) in tokens {
        let text = tokenizer.decode(&[id], false)?;
        offsets.push(*offset);
        if !tokenizer.is_special(id) {
            *offset += text.chars().count();
        }
        texts.push(text);
        logprobs.push(found.map(|found| finite(found.logprob)));
        let likeliest = |found: &TokenLogprobs| -> anyhow::Result<Map<String, Value>> {
            let each = found.top.iter();
            each.map(|(id, logprob)| {
                Ok((tokenizer.decode(&[*id], false)?, json!(finite(*logprob))))
            })
            .collect()
        };
        top.push(found.map(likeliest).transpose()?);
    }
    Ok(json!({
        "tokens": texts, "token_logprobs": logprobs, "top_logprobs": top, "text_offset": offsets,
    }))
}
