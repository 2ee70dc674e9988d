//! Token ids to text while they are being generated.

use tokenizers::DecoderWrapper;

use super::Tokenizer;
use crate::Result;

/// Tokens without text of their own pile up at most this high in a [`Window`].
const MAX_WINDOW: usize = 32;

/// An unfinished character holds back at most this many tokens in a [`Window`].
const MAX_HELD: usize = 8;

/// Turns ids into text as they come, never half a character. The pieces and [`finish`](Self::finish)
/// together are what [`Tokenizer::decode`] returns for all ids at once, U+FFFD for broken UTF-8 included.
///
/// The work per token does not grow with the length of the text.
#[derive(Debug)]
pub struct TokenStream {
    tokenizer: Tokenizer,
    skip_special_tokens: bool,
    state: State,
}

#[derive(Debug)]
enum State {
    /// Every token stands for bytes: the ones that do not make a character yet.
    ByteLevel(Vec<u8>),
    /// Any other decoder.
    Window(Window),
}

impl TokenStream {
    pub(super) fn new(tokenizer: Tokenizer, skip_special_tokens: bool) -> Self {
        let decoder = tokenizer.decoder();
        let state = if decoder.is_some_and(is_byte_level) {
            State::ByteLevel(Vec::new())
        } else {
            let byte_fallback = decoder.is_some_and(has_byte_fallback);
            State::Window(Window { byte_fallback, ..Window::default() })
        };
        Self { tokenizer, skip_special_tokens, state }
    }

    /// Takes the next token; returns the text that is complete now, if any.
    pub fn push(&mut self, id: u32) -> Result<Option<String>> {
        let Some(token) = self.tokenizer.token_text(id, self.skip_special_tokens) else {
            return Ok(None);
        };
        let text = match &mut self.state {
            State::ByteLevel(pending) => {
                extend_bytes(pending, &token);
                take_characters(pending)
            }
            State::Window(window) => window.push(&self.tokenizer, token)?,
        };
        Ok(Some(text).filter(|text| !text.is_empty()))
    }

    /// Ends the text: what was held back, with U+FFFD for an unfinished character. The stream is then new.
    pub fn finish(&mut self) -> Result<Option<String>> {
        let text = match &mut self.state {
            State::ByteLevel(pending) => {
                String::from_utf8_lossy(&std::mem::take(pending)).into_owned()
            }
            State::Window(window) => {
                let text = window.flush(&self.tokenizer)?;
                *window = Window { byte_fallback: window.byte_fallback, ..Window::default() };
                text
            }
        };
        Ok(Some(text).filter(|text| !text.is_empty()))
    }
}

/// For decoders whose text depends on the tokens around: the first token loses its leading space
/// (Metaspace, Strip), the others gain one (WordPiece), a run of byte tokens is valid or not as a whole
/// (ByteFallback). New text is what the held tokens add to the text of a few tokens before them.
#[derive(Debug, Default)]
struct Window {
    /// Tokens already printed, then the held ones.
    tokens: Vec<String>,
    /// How many are printed.
    printed: usize,
    /// The text of the printed tokens on their own.
    prefix: String,
    byte_fallback: bool,
}

impl Window {
    fn push(&mut self, tokenizer: &Tokenizer, token: String) -> Result<String> {
        let in_run = self.byte_fallback && is_byte_token(&token);
        self.tokens.push(token);
        if in_run {
            return Ok(String::new());
        }
        let text = tokenizer.join(self.tokens.clone())?;
        let unfinished = text.ends_with(char::REPLACEMENT_CHARACTER);
        if unfinished && self.tokens.len() - self.printed < MAX_HELD {
            return Ok(String::new());
        }
        let new = added(&self.prefix, &text);
        self.printed = self.tokens.len();
        self.prefix = text;
        // The fewest tokens that have text of their own: then nothing that only the start of a text
        // undergoes can reach the tokens after them.
        while self.tokens.len() > 1 {
            let rest = tokenizer.join(self.tokens[1..].to_vec())?;
            if rest.is_empty() && self.tokens.len() <= MAX_WINDOW {
                break;
            }
            self.tokens.remove(0);
            self.printed -= 1;
            self.prefix = rest;
        }
        Ok(new)
    }

    fn flush(&self, tokenizer: &Tokenizer) -> Result<String> {
        if self.printed == self.tokens.len() {
            return Ok(String::new());
        }
        Ok(added(&self.prefix, &tokenizer.join(self.tokens.clone())?))
    }
}

/// What `text` has after the part it shares with `prefix`, normally all of `prefix`.
fn added(prefix: &str, text: &str) -> String {
    let shared = prefix.chars().zip(text.chars()).take_while(|(a, b)| a == b);
    text[shared.map(|(c, _)| c.len_utf8()).sum()..].to_owned()
}

fn is_byte_level(decoder: &DecoderWrapper) -> bool {
    match decoder {
        DecoderWrapper::ByteLevel(_) => true,
        DecoderWrapper::Sequence(sequence) => {
            matches!(sequence.get_decoders(), [only] if is_byte_level(only))
        }
        _ => false,
    }
}

fn has_byte_fallback(decoder: &DecoderWrapper) -> bool {
    match decoder {
        DecoderWrapper::ByteFallback(_) => true,
        DecoderWrapper::Sequence(sequence) => sequence.get_decoders().iter().any(has_byte_fallback),
        _ => false,
    }
}

/// `<0x00>` to `<0xFF>`, as tokenizers' `ByteFallback` tests it.
fn is_byte_token(token: &str) -> bool {
    let digits = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    token.len() == 6 && digits.is_some_and(|digits| u8::from_str_radix(digits, 16).is_ok())
}

/// Appends a byte-level token's bytes: one per character, or its UTF-8 if it has a character outside the
/// byte alphabet, as added tokens may.
fn extend_bytes(bytes: &mut Vec<u8>, token: &str) {
    let start = bytes.len();
    for c in token.chars() {
        match byte_of(c) {
            Some(byte) => bytes.push(byte),
            None => {
                bytes.truncate(start);
                bytes.extend_from_slice(token.as_bytes());
                return;
            }
        }
    }
}

/// GPT-2's alphabet: printable Latin-1 stands for itself, the other 68 bytes in order for U+0100 to U+0143.
fn byte_of(c: char) -> Option<u8> {
    let byte = match u32::from(c) {
        c @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => c,
        c @ 0x100..=0x120 => c - 0x100,
        c @ 0x121..=0x142 => c - 0x121 + 0x7f,
        0x143 => 0xad,
        _ => return None,
    };
    u8::try_from(byte).ok()
}

/// Takes the complete characters out of `bytes`, U+FFFD for what can never become one; an unfinished
/// character, at most 3 bytes, stays.
fn take_characters(bytes: &mut Vec<u8>) -> String {
    let complete: usize = {
        let mut end = 0;
        let mut chunks = bytes.utf8_chunks().peekable();
        while let Some(chunk) = chunks.next() {
            end += chunk.valid().len();
            let unfinished = chunks.peek().is_none()
                && std::str::from_utf8(chunk.invalid()).is_err_and(|e| e.error_len().is_none());
            if !unfinished {
                end += chunk.invalid().len();
            }
        }
        end
    };
    let text = String::from_utf8_lossy(&bytes[..complete]).into_owned();
    bytes.drain(..complete);
    text
}
