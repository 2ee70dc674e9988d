//! What sequences came to, as OpenAI answers it.

use std::ops::ControlFlow;

use bitnet_model::{batch::Sequence, score::TokenLogprobs, session, text::Tokenizer};
use serde_json::{Map, Value, json};

use super::{Asked, Route, tools};
use crate::continuation::{Finish, TextOutput};

/// One choice of an answer, as far as it has come.
pub struct Choice {
    text: TextOutput<'static>,
    tokens: Vec<(u32, Option<TokenLogprobs>)>,
    /// Of the tokens of the prompt from the second on.
    prompt: Vec<TokenLogprobs>,
    finish: Option<Finish>,
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
        Ok(Self { text, tokens: Vec::new(), prompt: Vec::new(), finish: None })
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
    pub fn end(&mut self, finish: session::Finish) {
        self.finish.get_or_insert(match finish {
            session::Finish::Eos => Finish::Eos,
            session::Finish::Length => Finish::Length,
            session::Finish::Context => Finish::Context,
            session::Finish::Stopped => Finish::Interrupted,
        });
    }

    /// Whether nothing more comes.
    pub fn is_ended(&self) -> bool {
        self.finish.is_some()
    }
}

/// The answer whose choices have all ended. `id` is a unique part of its id, `created` in seconds since 1970.
///
/// # Errors
/// Tokens that cannot be decoded.
pub fn answer(
    asked: &Asked,
    choices: Vec<Choice>,
    tokenizer: &Tokenizer,
    (id, created): (&str, u64),
) -> anyhow::Result<Value> {
    let (kind, object) = match asked.route {
        Route::Chat => ("chatcmpl", "chat.completion"),
        Route::Completion => ("cmpl", "text_completion"),
    };
    let prompts = asked.sequences.iter().step_by(asked.n);
    let prompt_tokens: usize = prompts.map(|sequence| sequence.prompt.len()).sum();
    let completion_tokens: usize = choices.iter().map(|choice| choice.tokens.len()).sum();
    let choices = choices.into_iter().zip(&asked.sequences).enumerate();
    let choices = choices.map(|(index, (choice, sequence))| {
        choice_json(asked, choice, sequence, tokenizer, (id, index))
    });
    Ok(json!({
        "id": format!("{kind}-{id}"),
        "object": object,
        "created": created,
        "model": asked.model,
        "choices": choices.collect::<anyhow::Result<Vec<_>>>()?,
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }))
}

fn choice_json(
    asked: &Asked,
    choice: Choice,
    sequence: &Sequence,
    tokenizer: &Tokenizer,
    (id, index): (&str, usize),
) -> anyhow::Result<Value> {
    let Choice { text, tokens, prompt, finish } = choice;
    let (text, finish) = text.finish(finish.unwrap_or(Finish::Interrupted))?;
    let (content, calls) = if asked.calls { tools::split(&text) } else { (&text[..], Vec::new()) };
    let reason = match finish {
        Finish::Eos if !calls.is_empty() => "tool_calls",
        Finish::Eos | Finish::Stop => "stop",
        Finish::Length | Finish::Context => "length",
        Finish::Interrupted => "error",
    };
    let logprobs = match (sequence.logprobs, asked.route) {
        (None, _) => Value::Null,
        (Some(_), Route::Chat) => {
            let content =
                tokens.iter().filter_map(|(id, logprobs)| Some((*id, logprobs.as_ref()?)));
            let content = content.map(|(id, logprobs)| chat_logprobs(id, logprobs, tokenizer));
            json!({"content": content.collect::<anyhow::Result<Vec<_>>>()?, "refusal": null})
        }
        (Some(_), Route::Completion) => {
            let echoed = if asked.echo { &sequence.prompt[..] } else { &[] };
            let first = echoed.first().map(|id| (*id, None));
            let rest = echoed.iter().skip(1).copied().zip(prompt.iter().map(Some));
            let new = tokens.iter().map(|(id, logprobs)| (*id, logprobs.as_ref()));
            text_logprobs(first.into_iter().chain(rest).chain(new), tokenizer)?
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
                "text": echo + &text,
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
    let calls = calls.iter().enumerate().map(|(index, tools::Call { name, arguments })| {
        let function = json!({"name": name, "arguments": arguments});
        json!({"id": format!("call_{id}_{index}"), "type": "function", "function": function})
    });
    let content = (!content.is_empty()).then_some(content);
    let calls = Vec::from_iter(calls);
    json!({"role": "assistant", "content": content, "tool_calls": calls, "refusal": null})
}

/// A log-probability; JSON has no −∞.
fn finite(logprob: f32) -> f32 {
    logprob.max(-9999.)
}

fn chat_logprobs(
    id: u32,
    logprobs: &TokenLogprobs,
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
    let top = logprobs.top.iter().map(|(id, logprob)| entry(*id, *logprob));
    let mut object = entry(id, logprobs.logprob)?;
    object.insert("top_logprobs".into(), json!(top.collect::<anyhow::Result<Vec<_>>>()?));
    Ok(object.into())
}

/// Of the tokens of a text, in order; the first of all has nothing before it.
fn text_logprobs<'a>(
    tokens: impl Iterator<Item = (u32, Option<&'a TokenLogprobs>)>,
    tokenizer: &Tokenizer,
) -> anyhow::Result<Value> {
    let (mut texts, mut logprobs, mut top, mut offsets) = (vec![], vec![], vec![], vec![]);
    let mut offset = 0;
    for (id, found) in tokens {
        let text = tokenizer.decode(&[id], false)?;
        offsets.push(offset);
        offset += text.chars().count();
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
