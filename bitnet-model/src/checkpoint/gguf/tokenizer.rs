//! Metadata → `tokenizer.json` and `tokenizer_config.json`, as transformers would have written them for the same model.
//!
//! - `gpt2`: byte-level pairs. `tokenizer.ggml.pre` tells how text is cut into words before.
//! - `llama`: SentencePiece's pairs, with scores instead of a list of merges. The merges are made of the scores as
//!   transformers makes them (`convert_slow_tokenizer.py`): all ways to cut a token into two, best token first.

use std::collections::HashMap;

use serde_json::{Map, Value, json};

use super::metadata::Metadata;
use crate::{
    checkpoint::source::Source,
    error::{Error, Result},
};

pub(super) const TOKENS: &str = "tokenizer.ggml.tokens";
pub(super) const MODEL: &str = "tokenizer.ggml.model";
pub(super) const PRE: &str = "tokenizer.ggml.pre";
pub(super) const MERGES: &str = "tokenizer.ggml.merges";
const SCORES: &str = "tokenizer.ggml.scores";
pub(super) const TYPES: &str = "tokenizer.ggml.token_type";
pub(super) const TEMPLATE: &str = "tokenizer.chat_template";

/// A longer token is no word of any language; all ways to cut it would take long to try.
const MAX_PIECE_CHARS: usize = 1024;

/// What `tokenizer.ggml.token_type` says of a token.
pub(super) mod kind {
    pub const NORMAL: i64 = 1;
    pub const UNKNOWN: i64 = 2;
    pub const CONTROL: i64 = 3;
    pub const USER_DEFINED: i64 = 4;
    pub const UNUSED: i64 = 5;
}

/// How Llama 3 cuts text into words, from its `tokenizer.json`.
pub(super) const LLAMA_3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// The same with every digit by itself, from Qwen 2's.
pub(super) const QWEN_2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The two files.
pub(super) struct Files {
    pub tokenizer: Value,
    pub config: Value,
}

/// The tokenizer's files; `None` without one in the metadata.
pub(super) fn files(metadata: &Metadata, source: &Source) -> Result<Option<Files>> {
    let model = match metadata.string(MODEL)? {
        None | Some("none" | "no_vocab") => return Ok(None),
        Some(model) => model,
    };
    let Some(tokens) = metadata.strings(source, TOKENS)? else {
        return Err(metadata.error(TOKENS, "missing"));
    };
    let types = metadata.integers(source, TYPES)?.unwrap_or_default();
    if !types.is_empty() && types.len() != tokens.len() {
        return Err(metadata.error(TYPES, format!("{} for {} tokens", types.len(), tokens.len())));
    }
    let vocabulary = Vocabulary { metadata, source, tokens, types };
    let tokenizer = match model {
        "gpt2" => vocabulary.byte_level()?,
        "llama" => vocabulary.sentence_piece()?,
        other => {
            let reason = format!("{other:?}; supported: \"gpt2\", \"llama\"");
            return Err(metadata.error(MODEL, reason));
        }
    };
    Ok(Some(Files { tokenizer, config: vocabulary.config()? }))
}

struct Vocabulary<'a> {
    metadata: &'a Metadata,
    source: &'a Source,
    tokens: Vec<String>,
    types: Vec<i64>,
}

/// How words are found, and what comes with that if the metadata are silent.
struct Words {
    pre_tokenizer: Value,
    takes_whole_words: bool,
    adds_bos: bool,
}

impl Vocabulary<'_> {
    fn byte_level(&self) -> Result<Value> {
        let Some(merges) = self.metadata.strings(self.source, MERGES)? else {
            return Err(self.metadata.error(MERGES, "missing"));
        };
        let words = self.words()?;
        let cut = |merge: &String| {
            // A part may begin with a space, if it is one.
            let at = merge.char_indices().skip(1).find(|(_, c)| *c == ' ').map(|(at, _)| at);
            let pair = at.map(|at| (&merge[..at], &merge[at + 1..]));
            pair.map(|(a, b)| json!([a, b])).ok_or_else(|| {
                self.metadata.error(MERGES, format!("{merge:?} is no merge of two parts"))
            })
        };
        let merges = merges.iter().map(cut).collect::<Result<Vec<_>>>()?;
        Ok(json!({
            "version": "1.0", "truncation": null, "padding": null,
            "added_tokens": self.added_tokens(),
            "normalizer": null,
            "pre_tokenizer": words.pre_tokenizer,
            "post_processor": self.post_processor(words.adds_bos)?,
            "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
            "model": {
                "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                "ignore_merges": words.takes_whole_words, "vocab": self.vocab(), "merges": merges,
            },
        }))
    }

    fn words(&self) -> Result<Words> {
        let split = |pattern: &str| {
            json!({"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false},
                {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
            ]})
        };
        let llama_3 =
            || Words { pre_tokenizer: split(LLAMA_3), takes_whole_words: true, adds_bos: true };
        let gpt_2 = || Words {
            pre_tokenizer: json!({
                "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true,
            }),
            takes_whole_words: false,
            adds_bos: false,
        };
        match self.metadata.string(PRE)? {
            // As llama.cpp groups them.
            Some("llama-bpe" | "llama3" | "llama-v3" | "falcon3") => Ok(llama_3()),
            Some("smaug-bpe") => {
                Ok(Words { takes_whole_words: false, adds_bos: false, ..llama_3() })
            }
            Some("gpt-2") => Ok(gpt_2()),
            Some("qwen2" | "deepseek-r1-qwen") => Ok(Words {
                pre_tokenizer: split(QWEN_2),
                takes_whole_words: false,
                adds_bos: false,
            }),
            // Microsoft's 2B-4T says nothing.
            None | Some("default") if self.is_llama_3() => Ok(llama_3()),
            None | Some("default") => Ok(gpt_2()),
            Some(other) => {
                let supported = "\"llama-bpe\", \"falcon3\", \"smaug-bpe\", \"qwen2\", \"gpt-2\"";
                Err(self.metadata.error(PRE, format!("{other:?}; supported: {supported}")))
            }
        }
    }

    /// Whether this is the vocabulary of Llama 3, by where its special tokens begin.
    fn is_llama_3(&self) -> bool {
        self.tokens.get(128_000).is_some_and(|token| token == "<|begin_of_text|>")
    }

    fn sentence_piece(&self) -> Result<Value> {
        let Some(scores) = self.metadata.floats(self.source, SCORES)? else {
            return Err(self.metadata.error(SCORES, "missing"));
        };
        if scores.len() != self.tokens.len() {
            let reason = format!("{} for {} tokens", scores.len(), self.tokens.len());
            return Err(self.metadata.error(SCORES, reason));
        }
        let merges = merges(&self.tokens, &scores).map_err(|e| self.metadata.error(TOKENS, e))?;
        let has_space = self.metadata.boolean("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
        let mut normalizers =
            vec![json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})];
        let mut decoders = vec![
            json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
            json!({"type": "ByteFallback"}),
            json!({"type": "Fuse"}),
        ];
        if has_space {
            normalizers.insert(0, json!({"type": "Prepend", "prepend": "▁"}));
            decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        let unknown = self.token_of("unknown")?.or_else(|| {
            let at = self.types.iter().position(|kind| *kind == kind::UNKNOWN)?;
            self.tokens.get(at).cloned()
        });
        Ok(json!({
            "version": "1.0", "truncation": null, "padding": null,
            "added_tokens": self.added_tokens(),
            "normalizer": {"type": "Sequence", "normalizers": normalizers},
            "pre_tokenizer": null,
            "post_processor": self.post_processor(true)?,
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": {
                "type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
                "vocab": self.vocab(), "merges": merges,
            },
        }))
    }

    /// Every token has its place here, added ones too.
    fn vocab(&self) -> Map<String, Value> {
        self.tokens.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect()
    }

    /// Tokens that are found in a text before anything else.
    fn added_tokens(&self) -> Vec<Value> {
        let tokens = self.tokens.iter().zip(&self.types).enumerate();
        let added = tokens.filter(|(_, (token, kind))| {
            let is_special = matches!(**kind, kind::UNKNOWN | kind::CONTROL | kind::USER_DEFINED);
            is_special && !token.is_empty()
        });
        let entry = |(id, (token, kind)): (usize, (&String, &i64))| {
            json!({
                "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": *kind != kind::USER_DEFINED,
            })
        };
        added.map(entry).collect()
    }

    /// What is put around a text.
    fn post_processor(&self, adds_bos: bool) -> Result<Value> {
        let is_added = |purpose: &str, default| {
            let key = format!("tokenizer.ggml.add_{purpose}_token");
            Ok::<_, Error>(self.metadata.boolean(&key)?.unwrap_or(default))
        };
        let token = |purpose: &str, default| match is_added(purpose, default)? {
            true => self.id_and_token(purpose),
            false => Ok(None),
        };
        let (bos, eos) = (token("bos", adds_bos)?, token("eos", false)?);
        let (mut template, mut special) = (Vec::new(), Map::new());
        let mut add = |template: &mut Vec<Value>, token: Option<(u64, String)>| {
            let Some((id, token)) = token else { return };
            template.push(json!({"SpecialToken": {"id": token, "type_id": 0}}));
            special.insert(token.clone(), json!({"id": token, "ids": [id], "tokens": [token]}));
        };
        add(&mut template, bos);
        template.push(json!({"Sequence": {"id": "A", "type_id": 0}}));
        add(&mut template, eos);
        let mut pair = template.clone();
        pair.push(json!({"Sequence": {"id": "B", "type_id": 1}}));
        Ok(json!({
            "type": "TemplateProcessing", "single": template, "pair": pair, "special_tokens": special,
        }))
    }

    /// The token that the metadata name for a purpose.
    fn id_and_token(&self, purpose: &str) -> Result<Option<(u64, String)>> {
        let key = format!("tokenizer.ggml.{purpose}_token_id");
        let Some(id) = self.metadata.integer(&key)? else { return Ok(None) };
        let token = usize::try_from(id).ok().and_then(|id| self.tokens.get(id));
        match token {
            Some(token) => Ok(Some((id, token.clone()))),
            None => {
                let reason = format!("{id}, and the vocabulary has {} tokens", self.tokens.len());
                Err(self.metadata.error(&key, reason))
            }
        }
    }

    fn token_of(&self, purpose: &str) -> Result<Option<String>> {
        Ok(self.id_and_token(purpose)?.map(|(_, token)| token))
    }

    fn config(&self) -> Result<Value> {
        let mut config = json!({
            // Says that these are all special tokens there are.
            "added_tokens_decoder": {},
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": false,
        });
        for (name, purpose) in [
            ("bos_token", "bos"),
            ("eos_token", "eos"),
            ("unk_token", "unknown"),
            ("pad_token", "padding"),
        ] {
            if let Some(token) = self.token_of(purpose)? {
                config[name] = json!(token);
            }
        }
        if let Some(template) = self.metadata.string(TEMPLATE)? {
            config["chat_template"] = json!(template);
        }
        Ok(config)
    }
}

/// All ways to make a token of two others: tokens of the highest score first, of these the longest first parts.
fn merges(tokens: &[String], scores: &[f32]) -> Result<Vec<Value>, String> {
    let ids: HashMap<&str, usize> =
        tokens.iter().enumerate().map(|(id, token)| (token.as_str(), id)).collect();
    let mut merges = Vec::new();
    for (id, token) in tokens.iter().enumerate() {
        let chars = token.chars().count();
        if chars > MAX_PIECE_CHARS {
            return Err(format!(
                "token {id} has {chars} characters; at most {MAX_PIECE_CHARS} are read"
            ));
        }
        let mut local = Vec::new();
        for (left_chars, (at, _)) in token.char_indices().enumerate().skip(1) {
            let (left, right) = token.split_at(at);
            if let (Some(left_id), Some(right_id)) = (ids.get(left), ids.get(right)) {
                local.push(((left_id, right_id), (left_chars, chars - left_chars), (left, right)));
            }
        }
        local.sort_by_key(|(ids, ..)| *ids);
        merges.extend(local.into_iter().map(|(_, chars, parts)| (scores[id], chars, parts)));
    }
    merges.sort_by(|(a, a_chars, _), (b, b_chars, _)| b.total_cmp(a).then(b_chars.cmp(a_chars)));
    Ok(merges.into_iter().map(|(_, _, (left, right))| json!([left, right])).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merges_come_in_the_order_of_scores() {
        let tokens = ["a", "b", "c", "ab", "bc", "abc"].map(String::from);
        let merges = merges(&tokens, &[0., 0., 0., -1., -2., -3.]).unwrap();
        let expected = json!([["a", "b"], ["b", "c"], ["ab", "c"], ["a", "bc"]]);
        assert_eq!(Value::from(merges), expected);
    }
}
