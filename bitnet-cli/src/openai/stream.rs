//! An answer in pieces, as it comes.

use bitnet_model::{batch::Sequence, text::Tokenizer};
use serde_json::{Value, json};

use super::{
    Asked, Choice, Route,
    answer::{chat_logprobs, echoed, text_logprobs, usage},
    tools,
};

/// Makes chunks of choices.
pub struct Chunks {
    id: String,
    created: u64,
    sent: Vec<Sent>,
}

/// What of a choice has been sent.
#[derive(Clone, Debug, Default)]
struct Sent {
    has_begun: bool,
    has_ended: bool,
    /// Bytes of the text.
    text: usize,
    /// Tokens whose log-probabilities have been sent.
    tokens: usize,
    /// Characters of these tokens, and of a prompt that is repeated.
    characters: usize,
}

impl Chunks {
    /// Nothing sent yet. `id` is a unique part of the answer's id, `created` in seconds since 1970.
    pub fn new(asked: &Asked, (id, created): (&str, u64)) -> Self {
        let sent = vec![Sent::default(); asked.sequences.len()];
        Self { id: id.to_owned(), created, sent }
    }

    /// What is new of a choice.
    ///
    /// # Errors
    /// Tokens that cannot be decoded.
    pub fn of(
        &mut self,
        asked: &Asked,
        index: usize,
        choice: &Choice,
        tokenizer: &Tokenizer,
    ) -> anyhow::Result<Vec<Value>> {
        let (sent, sequence) = (&mut self.sent[index], &asked.sequences[index]);
        if sent.has_ended {
            return Ok(Vec::new());
        }
        let mut parts = Vec::new();
        let text = choice.text();
        let (sure, calls) = match (asked.calls, choice.is_ended()) {
            (false, _) => (text, Vec::new()),
            (true, false) => (tools::before_calls(text), Vec::new()),
            (true, true) => tools::split(text),
        };
        let piece = sure.get(sent.text..).unwrap_or_default();
        let is_news = !piece.is_empty() || choice.is_ended();
        if !sent.has_begun && (is_news || asked.echo) {
            let role = json!({"role": "assistant", "content": ""});
            parts.extend((asked.route == Route::Chat).then(|| chat(index, role, Value::Null)));
            if asked.echo {
                parts.push(echo(
                    asked,
                    sequence,
                    choice,
                    tokenizer,
                    (index, &mut sent.characters),
                )?);
            }
            sent.has_begun = true;
        }
        if is_news {
            let logprobs = sent.logprobs(asked.route, sequence, choice, tokenizer)?;
            sent.text += piece.len();
            if !piece.is_empty() || !logprobs.is_null() {
                parts.push(match asked.route {
                    Route::Chat => chat(index, json!({"content": piece}), logprobs),
                    Route::Completion => completion(index, piece, logprobs),
                });
            }
        }
        if choice.is_ended() {
            if !calls.is_empty() {
                let id = format!("{}_{index}", self.id);
                let call = |(at, call): (usize, &tools::Call)| {
                    let mut call = call.to_json(&id, at);
                    call["index"] = at.into();
                    call
                };
                let calls = Vec::from_iter(calls.iter().enumerate().map(call));
                parts.push(chat(index, json!({"tool_calls": calls}), Value::Null));
            }
            let mut last = match asked.route {
                Route::Chat => chat(index, json!({}), Value::Null),
                Route::Completion => completion(index, "", Value::Null),
            };
            last["finish_reason"] = choice.finish_reason(!calls.is_empty());
            parts.push(last);
            sent.has_ended = true;
        }
        Ok(parts.into_iter().map(|part| self.chunk(asked, vec![part])).collect())
    }

    /// The last chunk, of how many tokens the answer took, if that was asked.
    pub fn usage(&self, asked: &Asked, choices: &[Choice]) -> Option<Value> {
        asked.stream.as_ref().filter(|stream| stream.usage).map(|_| {
            let mut chunk = self.chunk(asked, Vec::new());
            chunk["usage"] = usage(asked, choices);
            chunk
        })
    }

    fn chunk(&self, asked: &Asked, choices: Vec<Value>) -> Value {
        let object = match asked.route {
            Route::Chat => "chat.completion.chunk",
            Route::Completion => "text_completion",
        };
        let mut chunk = json!({
            "id": format!("{}-{}", asked.route.kind(), self.id),
            "object": object,
            "created": self.created,
            "model": asked.model,
            "choices": choices,
        });
        if asked.stream.as_ref().is_some_and(|stream| stream.usage) {
            chunk["usage"] = Value::Null;
        }
        chunk
    }
}

impl Sent {
    /// Of the tokens that have come since.
    fn logprobs(
        &mut self,
        route: Route,
        sequence: &Sequence,
        choice: &Choice,
        tokenizer: &Tokenizer,
    ) -> anyhow::Result<Value> {
        let new = &choice.tokens[self.tokens..];
        if sequence.logprobs.is_none() || new.is_empty() {
            return Ok(Value::Null);
        }
        self.tokens = choice.tokens.len();
        match route {
            Route::Chat => chat_logprobs(new, tokenizer),
            Route::Completion => {
                let new = new.iter().map(|(id, logprobs)| (*id, logprobs.as_ref()));
                text_logprobs(new, tokenizer, &mut self.characters)
            }
        }
    }
}

/// The prompt, which an answer repeats.
fn echo(
    asked: &Asked,
    sequence: &Sequence,
    choice: &Choice,
    tokenizer: &Tokenizer,
    (index, characters): (usize, &mut usize),
) -> anyhow::Result<Value> {
    let logprobs = match sequence.logprobs {
        Some(_) => text_logprobs(echoed(asked, sequence, choice), tokenizer, characters)?,
        None => Value::Null,
    };
    Ok(completion(index, &tokenizer.decode(&sequence.prompt, true)?, logprobs))
}

fn chat(index: usize, delta: Value, logprobs: Value) -> Value {
    json!({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": null})
}

fn completion(index: usize, text: &str, logprobs: Value) -> Value {
    json!({"index": index, "text": text, "logprobs": logprobs, "finish_reason": null})
}
