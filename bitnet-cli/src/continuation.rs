//! Runs a prompt through a session and writes the text as it comes: what `generate` and `chat` share.

use std::{
    io::Write,
    ops::ControlFlow,
    time::{Duration, Instant},
};

use anyhow::bail;
use bitnet_model::{
    config::Config,
    session::{self, GenerateOptions, Session},
    text::{StopStrings, TokenStream, Tokenizer},
};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use crate::statistics::Statistics;

/// Why a text ends where it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Finish {
    /// The model ended it.
    Eos,
    /// As many tokens as allowed.
    Length,
    /// The model's context is full.
    Context,
    /// A stop string.
    Stop,
    /// Ctrl-C.
    Interrupted,
}

/// New tokens, and what they cost.
pub struct Continuation {
    /// The new tokens.
    pub tokens: Vec<u32>,
    /// Why they end. Stops by the consumer of the tokens count as interrupts: who has stop strings
    /// looks at them first.
    pub finish: Finish,
    /// Speed and memory.
    pub statistics: Statistics,
}

/// Continues `prompt` in `session`; `on_token` takes each new token at once and may stop there.
pub fn run(
    session: &mut Session,
    prompt: &[u32],
    (options, rng): (&GenerateOptions, &mut ChaCha8Rng),
    load_time: Duration,
    on_token: &mut dyn FnMut(u32) -> anyhow::Result<ControlFlow<()>>,
) -> anyhow::Result<Continuation> {
    let start = Instant::now();
    let mut first_token = None;
    let mut failure = None;
    let generation = session.generate(prompt, options, rng, |token| {
        first_token.get_or_insert_with(|| start.elapsed());
        on_token(token).unwrap_or_else(|error| {
            failure = Some(error);
            ControlFlow::Break(())
        })
    })?;
    if let Some(error) = failure {
        return Err(error);
    }
    let decoded = session.tokens().len().saturating_sub(prompt.len());
    Ok(Continuation {
        statistics: Statistics::new(&generation, decoded, first_token, load_time),
        tokens: generation.tokens,
        finish: match generation.finish {
            session::Finish::Eos => Finish::Eos,
            session::Finish::Length => Finish::Length,
            session::Finish::Context => Finish::Context,
            session::Finish::Stopped => Finish::Interrupted,
        },
    })
}

/// Refuses token ids that the model lacks and prompts that its context cannot hold, so that nothing
/// is printed before.
pub fn check_prompt(prompt: &[u32], config: &Config) -> anyhow::Result<()> {
    let (vocab_size, context) = (config.vocab_size, config.max_position_embeddings);
    if let Some(id) = prompt.iter().find(|id| **id as usize >= vocab_size) {
        bail!("token id {id} is outside the model's vocabulary of {vocab_size}");
    }
    if prompt.len() > context {
        bail!(
            "the prompt has {} tokens, but the model's context holds {context}: shorten it",
            prompt.len()
        );
    }
    Ok(())
}

/// New tokens as text: written piece by piece, up to a stop string.
pub struct TextOutput<'a> {
    stream: TokenStream,
    stop: StopStrings,
    /// The end of the prompt's text that the stream has not given out yet.
    prompt_tail: String,
    text: String,
    stopped: bool,
    out: Option<&'a mut dyn Write>,
}

impl<'a> TextOutput<'a> {
    /// Text on its own, such as a reply. `out` takes the pieces if it is there.
    pub fn new(tokenizer: &Tokenizer, stop: StopStrings, out: Option<&'a mut dyn Write>) -> Self {
        let (prompt_tail, text) = (String::new(), String::new());
        Self { stream: tokenizer.stream(true), stop, prompt_tail, text, stopped: false, out }
    }

    /// Text behind `prompt`: with vocabularies that mark the starts of words, the first token begins
    /// with a space only if something stands before it.
    pub fn after(mut self, prompt: &[u32], tokenizer: &Tokenizer) -> anyhow::Result<Self> {
        let mut given_out = 0;
        for &id in prompt {
            given_out += self.stream.push(id)?.map_or(0, |piece| piece.len());
        }
        let text = tokenizer.decode(prompt, true)?;
        self.prompt_tail = text.get(given_out..).unwrap_or_default().to_owned();
        Ok(self)
    }

    /// Takes the next token.
    pub fn push(&mut self, id: u32) -> anyhow::Result<ControlFlow<()>> {
        if let Some(piece) = self.stream.push(id)? {
            self.add(&piece)?;
        }
        Ok(if self.stopped { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    }

    /// Ends the text: returns it, with what a stop string makes of the reason for its end.
    pub fn finish(mut self, finish: Finish) -> anyhow::Result<(String, Finish)> {
        if let Some(piece) = self.stream.finish()? {
            self.add(&piece)?;
        }
        let held = self.stop.finish();
        self.write(&held)?;
        let finish = if self.stopped { Finish::Stop } else { finish };
        Ok((self.text, finish))
    }

    fn add(&mut self, piece: &str) -> anyhow::Result<()> {
        let tail = std::mem::take(&mut self.prompt_tail);
        let outcome = self.stop.push(piece.strip_prefix(tail.as_str()).unwrap_or(piece));
        self.stopped = outcome.stopped.is_some();
        self.write(&outcome.text)
    }

    fn write(&mut self, piece: &str) -> anyhow::Result<()> {
        if piece.is_empty() {
            return Ok(());
        }
        self.text.push_str(piece);
        if let Some(out) = &mut self.out {
            out.write_all(piece.as_bytes())?;
            out.flush()?;
        }
        Ok(())
    }
}
