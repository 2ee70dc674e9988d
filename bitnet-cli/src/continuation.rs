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

impl From<session::Finish> for Finish {
    /// Whoever has stop strings looks at them first: what else stops is an interrupt.
    fn from(finish: session::Finish) -> Self {
        match finish {
            session::Finish::Eos => Self::Eos,
            session::Finish::Length => Self::Length,
            session::Finish::Context => Self::Context,
            session::Finish::Stopped => Self::Interrupted,
        }
    }
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
        statistics: Statistics::new(
            &generation,
            decoded,
            first_token,
            load_time,
            session.cache_bytes(),
        ),
        tokens: generation.tokens,
        finish: generation.finish.into(),
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
pub struct TextOutput<W> {
    stream: TokenStream,
    stop: StopStrings,
    /// The end of the prompt's text that the stream has not given out yet.
    prompt_tail: String,
    text: String,
    stopped: bool,
    out: Option<W>,
}

impl<W: Write> TextOutput<W> {
    /// Text on its own, such as a reply. `out` takes the pieces if it is there.
    pub fn new(tokenizer: &Tokenizer, stop: StopStrings, out: Option<W>) -> Self {
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

    /// The text as far as it is sure.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Ends the text: returns what a stop string makes of the reason for its end.
    pub fn close(&mut self, finish: Finish) -> anyhow::Result<Finish> {
        if let Some(piece) = self.stream.finish()? {
            self.add(&piece)?;
        }
        let held = self.stop.finish();
        self.write(&held)?;
        Ok(if self.stopped { Finish::Stop } else { finish })
    }

    /// [`close`](Self::close), with the text.
    pub fn finish(mut self, finish: Finish) -> anyhow::Result<(String, Finish)> {
        let finish = self.close(finish)?;
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A vocabulary that marks the starts of words and spells other characters in bytes, as
    /// SentencePiece does.
    fn tokenizer() -> Tokenizer {
        let mut vocab = json!({"<unk>": 0, "▁a": 1, "▁b": 2, "c": 3});
        for (id, byte) in (4..).zip("é".bytes()) {
            vocab[format!("<0x{byte:02X}>")] = json!(id);
        }
        let metaspace = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first"});
        let file = json!({
            "version": "1.0", "added_tokens": [], "normalizer": null, "post_processor": null,
            "pre_tokenizer": metaspace,
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"}, {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ]},
            "model": {"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": true},
        });
        Tokenizer::from_bytes(file.to_string().as_bytes(), None, None).unwrap()
    }

    fn continued(prompt: &[u32], tokens: &[u32], stop: &[&str]) -> (String, Finish) {
        let (tokenizer, mut out) = (tokenizer(), Vec::new());
        let stop = StopStrings::new(stop.iter().map(|s| (*s).to_owned()).collect()).unwrap();
        let text = TextOutput::new(&tokenizer, stop, Some(&mut out));
        let mut text = text.after(prompt, &tokenizer).unwrap();
        for &token in tokens {
            if text.push(token).unwrap().is_break() {
                break;
            }
        }
        let (text, finish) = text.finish(Finish::Length).unwrap();
        assert_eq!(out, text.as_bytes());
        (text, finish)
    }

    #[test]
    fn a_continuation_keeps_its_first_space() {
        assert_eq!(continued(&[1], &[2, 3], &[]), (" bc".into(), Finish::Length));
        assert_eq!(continued(&[], &[2, 3], &[]), ("bc".into(), Finish::Length));
        assert_eq!(continued(&[1, 4, 5], &[2], &[]).0, " b", "a prompt that ends in bytes");
        assert_eq!(continued(&[1, 4, 5], &[4, 5, 3], &[]).0, "éc");
    }

    #[test]
    fn a_stop_string_may_come_with_the_last_held_piece() {
        assert_eq!(continued(&[1], &[2, 4, 5], &["é"]), (" b".into(), Finish::Stop));
        assert_eq!(continued(&[1], &[2, 3, 2], &["cd"]), (" bc b".into(), Finish::Length));
    }
}
