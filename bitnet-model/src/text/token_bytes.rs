//! What each token adds to a text, whatever stands before it.

use tokenizers::{Decoder, DecoderWrapper};

use super::{
    Tokenizer,
    detokenizer::{byte_token, extend_bytes, is_byte_level},
};
use crate::{Error, Result};

impl Tokenizer {
    /// The bytes that tokens add to a text, by id below `vocab_size`: `None` for special tokens and ids without a token.
    /// What a decoder only does to the beginning of a text (it takes a space away) is left out.
    ///
    /// # Errors
    /// A decoder that makes more of tokens than their texts one after the other.
    pub fn token_bytes(&self, vocab_size: usize) -> Result<Vec<Option<Vec<u8>>>> {
        let steps = match self.decoder() {
            Some(DecoderWrapper::Sequence(sequence)) => sequence.get_decoders(),
            Some(decoder) => std::slice::from_ref(decoder),
            None => {
                return Err(Error::Tokenizer(
                    "has no decoder, so its tokens are words and not pieces of a text".into(),
                ));
            }
        };
        let ids = 0..u32::try_from(vocab_size).unwrap_or(u32::MAX);
        let bytes = |id| self.token_text(id, true).map(|token| bytes(steps, token)).transpose();
        ids.map(bytes).collect()
    }
}

/// What a token comes to after these steps of a decoder.
fn bytes(steps: &[DecoderWrapper], mut token: String) -> Result<Vec<u8>> {
    if let [only] = steps
        && is_byte_level(only)
    {
        let mut bytes = Vec::new();
        extend_bytes(&mut bytes, &token);
        return Ok(bytes);
    }
    for step in steps {
        match step {
            DecoderWrapper::Replace(replace) => {
                let replaced = replace.decode_chain(vec![token]);
                token = replaced.map_err(|error| Error::Tokenizer(error.to_string()))?.concat();
            }
            DecoderWrapper::Metaspace(metaspace) => {
                token = token.replace(metaspace.get_replacement(), " ");
            }
            DecoderWrapper::ByteFallback(_) => {
                if let Some(byte) = byte_token(&token) {
                    return Ok(vec![byte]);
                }
            }
            DecoderWrapper::Fuse(_) | DecoderWrapper::Strip(_) => {}
            _ => {
                return Err(Error::Tokenizer(
                    "its decoder makes more of tokens than their texts one after the other".into(),
                ));
            }
        }
    }
    Ok(token.into_bytes())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn bytes_of(vocab: Value, decoder: Value) -> Result<Vec<Option<Vec<u8>>>> {
        let file = json!({
            "version": "1.0", "normalizer": null, "pre_tokenizer": null, "post_processor": null, "decoder": decoder,
            "added_tokens": [{"id": 3, "content": "<s>", "special": true, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false}],
            "model": {"type": "BPE", "vocab": vocab, "merges": []},
        });
        Tokenizer::from_bytes(file.to_string().as_bytes(), None, None)?.token_bytes(5)
    }

    #[test]
    fn a_token_is_bytes() {
        let level = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
        let bytes = bytes_of(json!({"Ġa": 0, "Ã": 1, "<0x0A>": 2}), level).unwrap();
        let expected = [Some(&b" a"[..]), Some(&b"\xc3"[..]), Some(&b"<0x0A>"[..]), None, None];
        assert_eq!(Vec::from_iter(bytes.iter().map(Option::as_deref)), expected);

        let steps = json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]});
        let bytes = bytes_of(json!({"▁a": 0, "é": 1, "<0x0A>": 2}), steps).unwrap();
        let expected = [Some(&b" a"[..]), Some("é".as_bytes()), Some(&b"\n"[..]), None, None];
        assert_eq!(Vec::from_iter(bytes.iter().map(Option::as_deref)), expected);
    }

    #[test]
    fn words_are_no_pieces() {
        let vocab = json!({"a": 0, "b": 1, "c": 2});
        let pieces = json!({"type": "WordPiece", "prefix": "##", "cleanup": true});
        let error = bytes_of(vocab.clone(), pieces).unwrap_err().to_string();
        assert!(error.contains("one after the other"), "{error}");
        let error = bytes_of(vocab, Value::Null).unwrap_err().to_string();
        assert!(error.contains("has no decoder"), "{error}");
    }
}
