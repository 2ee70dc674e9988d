//! Token ids to text while they are being generated.

use tokenizers::DecoderWrapper;

use super::Tokenizer;
use crate::Result;

/// Tokens without text of their own pile up at most this high in a [`Window`].
const MAX_WINDOW: usize = 32;

/// An unfinished character holds back at most this many tokens in a [`Window`].
const MAX_HELD: usize = 8;

/// Turns ids into text as they come, never half a character. The pieces and
/// [`finish`](Self::finish) together are what [`Tokenizer::decode`] returns for all ids at once,
/// U+FFFD for broken UTF-8 included.
///
/// The work per token does not grow with the length of the text. Byte tokens of a vocabulary with
/// byte fallback come out together when their run ends, as one bad byte spoils the run.
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

    /// Ends the text: what was held back, with U+FFFD for an unfinished character. The stream is
    /// then new.
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
/// (Metaspace, Strip), the others gain one (WordPiece), a run of byte tokens is valid or not as a
/// whole (ByteFallback). New text is what the held tokens add to the text of a few tokens before
/// them.
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
        let in_run = self.byte_fallback && byte_token(&token).is_some();
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

pub(super) fn is_byte_level(decoder: &DecoderWrapper) -> bool {
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

/// The byte of `<0x00>` to `<0xFF>`, as tokenizers' `ByteFallback` reads it.
pub(super) fn byte_token(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    digits.filter(|_| token.len() == 6).and_then(|digits| u8::from_str_radix(digits, 16).ok())
}

/// Appends a byte-level token's bytes: one per character, or its UTF-8 if it has a character
/// outside the byte alphabet, as added tokens may.
pub(super) fn extend_bytes(bytes: &mut Vec<u8>, token: &str) {
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

/// GPT-2's alphabet: printable Latin-1 stands for itself, the other 68 bytes in order for U+0100 to
/// U+0143.
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

/// Takes the complete characters out of `bytes`, U+FFFD for what can never become one; an
/// unfinished character, at most 3 bytes, stays.
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

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn tokenizer(vocabulary: &[String], model: Value, decoder: Value) -> Tokenizer {
        let vocab: serde_json::Map<String, Value> = vocabulary
            .iter()
            .zip(0..)
            .map(|(token, id)| (token.clone(), Value::from(id)))
            .collect();
        let mut model = model;
        model["vocab"] = vocab.into();
        let added = |id: usize, content: &str, special: bool| {
            json!({"id": id, "content": content, "special": special, "single_word": false,
                "lstrip": false, "rstrip": false, "normalized": false})
        };
        let next = vocabulary.len();
        let file = json!({
            "version": "1.0", "normalizer": null, "pre_tokenizer": null, "post_processor": null,
            "added_tokens": [added(next, "<eot>", true), added(next + 1, "日本 ▁x", false)],
            "model": model, "decoder": decoder,
        });
        Tokenizer::from_bytes(file.to_string().as_bytes(), None, None).unwrap()
    }

    fn strings(tokens: &[&str]) -> Vec<String> {
        tokens.iter().map(|&token| token.to_owned()).collect()
    }

    /// One of each kind of decoder, with tokens that make it go wrong if it can.
    fn tokenizers() -> Vec<(&'static str, Tokenizer)> {
        let bpe = || json!({"type": "BPE", "merges": [], "unk_token": null});
        let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
            "use_regex": true});
        let mut bytes: Vec<String> =
            ('\0'..'\u{200}').filter(|&c| byte_of(c).is_some()).map(String::from).collect();
        bytes.extend(strings(&["Ġthe", "ðŁ", "ĻĤâ", "ĢįðŁ", "é", "æĹ¥", "\u{200d}"]));
        let mut fallback: Vec<String> = (0..=255).map(|byte| format!("<0x{byte:02X}>")).collect();
        fallback.extend(strings(&["▁", "▁▁", "▁the", "a", "", "é", "▁🙂", "\u{fffd}"]));
        let llama = json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]});
        let pieces =
            strings(&["▁", "▁▁", "▁the", "a", "b▁c", "##x", "n't", "'s", ".", "w</w>", ""]);
        let metaspace = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always",
            "split": true});
        let word_piece = json!({"type": "WordPiece", "prefix": "##", "cleanup": true});
        let nested = json!({"type": "Sequence", "decoders": [byte_level]});
        vec![
            ("byte level", tokenizer(&bytes, bpe(), byte_level)),
            ("nested byte level", tokenizer(&bytes, bpe(), nested)),
            ("byte fallback", tokenizer(&fallback, bpe(), llama)),
            ("metaspace", tokenizer(&pieces, bpe(), metaspace)),
            ("word piece", tokenizer(&pieces, bpe(), word_piece)),
            ("suffix", tokenizer(&pieces, bpe(), json!({"type": "BPEDecoder", "suffix": "</w>"}))),
            ("none", tokenizer(&pieces, bpe(), Value::Null)),
        ]
    }

    fn streamed(tokenizer: &Tokenizer, ids: &[u32], skip: bool) -> Vec<String> {
        let mut stream = tokenizer.stream(skip);
        let mut pieces: Vec<String> =
            ids.iter().filter_map(|&id| stream.push(id).unwrap()).collect();
        pieces.extend(stream.finish().unwrap());
        if let State::Window(window) = &stream.state {
            assert!(window.tokens.is_empty());
        }
        assert_eq!(stream.finish().unwrap(), None);
        pieces
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        #[test]
        fn pieces_of_any_ids_add_up_to_decode(
            picks in proptest::collection::vec(any::<u32>(), 0..40),
            skip in any::<bool>(),
        ) {
            for (name, tokenizer) in tokenizers() {
                let size = tokenizer.vocab_size() as u32 + 2; // unknown ids too
                // Half of the picks near the end, where the longer tokens are.
                let ids: Vec<u32> = picks
                    .iter()
                    .map(|pick| if pick % 2 == 0 { pick / 2 % size } else { size - 1 - pick / 2 % 13 })
                    .collect();
                let pieces = streamed(&tokenizer, &ids, skip);
                prop_assert_eq!(pieces.concat(), tokenizer.decode(&ids, skip).unwrap(), "{}", name);
            }
        }

        #[test]
        fn text_comes_back_without_broken_characters(
            text in proptest::collection::vec(
                proptest::sample::select(vec!["👩‍👩‍👧‍👦", "🏳️‍🌈", "é", "日本", " the", "\n"]),
                0..12,
            ),
            any_text in "\\PC{0,12}",
        ) {
            let text = text.concat() + &any_text;
            let (_, tokenizer) = tokenizers().swap_remove(0);
            // Byte by byte, as a vocabulary without merges encodes.
            let ids: Vec<u32> = text
                .bytes()
                .map(|byte| {
                    let c = ('\0'..'\u{200}').find(|&c| byte_of(c) == Some(byte)).unwrap();
                    tokenizer.token_to_id(&c.to_string()).unwrap()
                })
                .collect();
            let pieces = streamed(&tokenizer, &ids, true);
            prop_assert_eq!(pieces.len(), text.chars().count());
            prop_assert_eq!(pieces.concat(), text);
        }
    }

    #[test]
    fn byte_alphabet_is_complete() {
        let bytes: HashSet<u8> = ('\0'..=char::MAX).filter_map(byte_of).collect();
        assert_eq!(bytes.len(), 256);
        let alphabet = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet();
        assert!(alphabet.iter().all(|&c| byte_of(c).is_some()));
        assert_eq!(byte_of('Ġ'), Some(b' '));
    }

    #[test]
    fn text_comes_as_soon_as_it_is_certain() {
        let (_, byte_level) = tokenizers().swap_remove(0);
        let id = |token: &str| byte_level.token_to_id(token).unwrap();
        let mut stream = byte_level.stream(true);
        assert_eq!(stream.push(id("Ġthe")).unwrap().as_deref(), Some(" the"));
        assert_eq!(stream.push(id("ðŁ")).unwrap(), None); // F0 9F
        assert_eq!(stream.push(id("ĻĤâ")).unwrap().as_deref(), Some("🙂")); // 99 82, E2 is held
        assert_eq!(stream.push(id("Ġthe")).unwrap().as_deref(), Some("\u{fffd} the"));
        assert_eq!(stream.push(id("ðŁ")).unwrap(), None);
        assert_eq!(stream.finish().unwrap().as_deref(), Some("\u{fffd}"));

        let (_, fallback) = tokenizers().swap_remove(2);
        let id = |token: &str| fallback.token_to_id(token).unwrap();
        let mut stream = fallback.stream(true);
        assert_eq!(stream.push(id("▁the")).unwrap().as_deref(), Some("the"));
        assert_eq!(stream.push(id("▁the")).unwrap().as_deref(), Some(" the"));
        assert_eq!(stream.push(id("<0xC3>")).unwrap(), None);
        assert_eq!(stream.push(id("<0xA9>")).unwrap(), None);
        assert_eq!(stream.push(id("a")).unwrap().as_deref(), Some("éa"));
    }

    #[test]
    fn windows_stay_small() {
        for (name, tokenizer) in tokenizers() {
            for token in ["▁", "", "a", "\u{fffd}", "<eot>"] {
                let Some(id) = tokenizer.token_to_id(token) else { continue };
                let mut stream = tokenizer.stream(false);
                for _ in 0..200 {
                    stream.push(id).unwrap();
                }
                if let State::Window(window) = stream.state {
                    let len = window.tokens.len();
                    assert!(len <= MAX_WINDOW + MAX_HELD, "{name}: {len} tokens of {token:?}");
                }
            }
        }
    }
}
