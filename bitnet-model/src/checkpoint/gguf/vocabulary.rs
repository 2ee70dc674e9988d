//! `tokenizer.json` and `tokenizer_config.json` → metadata: the way back of [`tokenizer`](super::tokenizer), for byte-level
//! vocabularies.

use std::collections::BTreeMap;

use serde_json::Value;

use super::{
    tokenizer::{LLAMA_3, MERGES, MODEL, PRE, QWEN_2, TEMPLATE, TOKENS, TYPES, kind},
    writer::Writer,
};
use crate::config::Config;

/// What goes with a model's weights, as the Hub has it.
#[derive(Clone, Debug)]
pub struct TextFiles {
    /// `tokenizer.json`.
    pub tokenizer: Value,
    /// `tokenizer_config.json`, or null.
    pub config: Value,
    /// `chat_template.jinja`, which beats the template of the configuration.
    pub template: Option<String>,
}

/// Writes the vocabulary of a model.
///
/// # Errors
/// A tokenizer for which the format has no words.
pub(super) fn write(writer: &mut Writer, files: &TextFiles, config: &Config) -> Result<(), String> {
    let model = &files.tokenizer["model"];
    if model["type"] != "BPE" || files.tokenizer["decoder"]["type"] != "ByteLevel" {
        return Err("only byte-level BPE vocabularies are written to GGUF".into());
    }
    let pre = pre(&files.tokenizer)?;
    let (tokens, kinds) = tokens(&files.tokenizer, config.vocab_size)?;
    let merges = model["merges"].as_array().into_iter().flatten().map(merge);
    let merges = merges.collect::<Option<Vec<_>>>().ok_or("a merge is not two strings")?;
    writer.string(MODEL, "gpt2");
    writer.string(PRE, pre);
    writer.strings(TOKENS, &tokens);
    writer.integers(TYPES, &kinds);
    writer.strings(MERGES, &merges);
    let special = |name: &str| {
        let token = &files.config[name];
        token.as_str().or_else(|| token["content"].as_str())
    };
    for (name, purpose, is_told) in [
        ("bos_token", "bos", config.bos_token_id.is_some()),
        ("eos_token", "eos", !config.eos_token_ids.is_empty()),
        ("unk_token", "unknown", false),
        ("pad_token", "padding", false),
    ] {
        let id = special(name).and_then(|name| tokens.iter().position(|token| token == name));
        if let Some(id) = id.filter(|_| !is_told) {
            writer.u32(&format!("tokenizer.ggml.{purpose}_token_id"), id as u32);
        }
    }
    let template = template(&files.tokenizer["post_processor"]);
    let is_at = |at: Option<&Value>, name: &str| {
        let token = at.and_then(|piece| piece["SpecialToken"]["id"].as_str());
        token.is_some() && token == special(name)
    };
    writer.boolean("tokenizer.ggml.add_bos_token", is_at(template.first(), "bos_token"));
    writer.boolean("tokenizer.ggml.add_eos_token", is_at(template.last(), "eos_token"));
    if let Some(template) = files.template.as_deref().or_else(|| chat_template(&files.config)) {
        writer.string(TEMPLATE, template);
    }
    Ok(())
}

/// How words are found, by llama.cpp's name for it.
fn pre(tokenizer: &Value) -> Result<&'static str, String> {
    if !tokenizer["normalizer"].is_null() {
        return Err("its normalizer has no place in a GGUF file".into());
    }
    let pre = &tokenizer["pre_tokenizer"];
    let is_byte_level = |step: &Value, has_pattern: bool| {
        let takes_text_as_it_is = step["add_prefix_space"] == false;
        let has_its_own = step["use_regex"] != false; // the default
        step["type"] == "ByteLevel" && takes_text_as_it_is && has_its_own != has_pattern
    };
    let pattern = match pre["pretokenizers"].as_array().map(Vec::as_slice) {
        Some([split, bytes]) if is_byte_level(bytes, true) && split["behavior"] == "Isolated" => {
            split["pattern"]["Regex"].as_str().filter(|_| split["invert"] != true)
        }
        _ => None,
    };
    let takes_whole_words = tokenizer["model"]["ignore_merges"] == true;
    match (pattern, takes_whole_words) {
        (Some(LLAMA_3), true) => Ok("llama-bpe"),
        (Some(LLAMA_3), false) => Ok("smaug-bpe"),
        (Some(QWEN_2), false) => Ok("qwen2"),
        (None, false) if is_byte_level(pre, false) => Ok("gpt-2"),
        _ => Err(format!(
            "its pre_tokenizer is none that GGUF has a name for: {}",
            pre.to_string().chars().take(200).collect::<String>()
        )),
    }
}

/// All tokens and their kinds; rows without one get a name that no text has.
fn tokens(tokenizer: &Value, rows: usize) -> Result<(Vec<String>, Vec<i32>), String> {
    let mut by_id = BTreeMap::new();
    for (token, id) in tokenizer["model"]["vocab"].as_object().into_iter().flatten() {
        by_id.insert(id.as_u64().ok_or("a token id is no number")?, (token.as_str(), kind::NORMAL));
    }
    for token in tokenizer["added_tokens"].as_array().into_iter().flatten() {
        let (Some(id), Some(content)) = (token["id"].as_u64(), token["content"].as_str()) else {
            return Err("an added token has no id or no content".into());
        };
        let kind = if token["special"] == true { kind::CONTROL } else { kind::USER_DEFINED };
        by_id.insert(id, (content, kind));
    }
    if let Some((last, _)) = by_id.last_key_value().filter(|(last, _)| **last >= rows as u64) {
        return Err(format!("token {last} has no row in an embedding of {rows}"));
    }
    let token = |id: usize| match by_id.get(&(id as u64)) {
        Some((token, kind)) => ((*token).to_owned(), *kind as i32),
        None => (format!("[PAD{id}]"), kind::UNUSED as i32),
    };
    Ok((0..rows).map(token).unzip())
}

fn merge(merge: &Value) -> Option<String> {
    match merge {
        Value::String(merge) => Some(merge.clone()),
        Value::Array(pair) => match &pair[..] {
            [a, b] => Some(format!("{} {}", a.as_str()?, b.as_str()?)),
            _ => None,
        },
        _ => None,
    }
}

/// What the post-processor puts around a single text.
fn template(processor: &Value) -> &[Value] {
    let of =
        |processor: &'_ Value| -> Option<usize> { processor["single"].as_array().map(Vec::len) };
    let steps = processor["processors"].as_array().map_or(std::slice::from_ref(processor), |p| p);
    let step = steps.iter().find(|step| of(step).is_some());
    step.and_then(|step| step["single"].as_array()).map_or(&[], |pieces| pieces)
}

/// The template of the configuration: the only one, or the one named default.
fn chat_template(config: &Value) -> Option<&str> {
    let template = &config["chat_template"];
    let default = || {
        let named = template.as_array()?.iter().find(|template| template["name"] == "default");
        named?["template"].as_str()
    };
    template.as_str().or_else(default)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn ways_to_cut_words_are_named_or_refused() {
        let byte_level = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "use_regex": use_regex});
        let split = |pattern: &str| {
            json!({"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false},
                byte_level(false),
            ]})
        };
        let named = |pre_tokenizer: Value, ignore_merges: bool| {
            pre(&json!({"pre_tokenizer": pre_tokenizer, "model": {"ignore_merges": ignore_merges}}))
        };
        assert_eq!(named(split(LLAMA_3), true), Ok("llama-bpe"));
        assert_eq!(named(split(LLAMA_3), false), Ok("smaug-bpe"));
        assert_eq!(named(split(QWEN_2), false), Ok("qwen2"));
        assert_eq!(named(byte_level(true), false), Ok("gpt-2"));
        for (pre_tokenizer, ignore_merges) in [
            (byte_level(false), false),
            (byte_level(true), true),
            (split("."), false),
            (json!({"type": "ByteLevel", "add_prefix_space": true}), false),
            (json!(null), false),
        ] {
            let error = named(pre_tokenizer, ignore_merges).unwrap_err();
            assert!(error.contains("pre_tokenizer"), "{error}");
        }
        let normalized = json!({"normalizer": {"type": "NFC"}, "pre_tokenizer": byte_level(true)});
        assert!(pre(&normalized).unwrap_err().contains("normalizer"));
    }

    #[test]
    fn rows_without_a_token_get_a_name() {
        let tokenizer = json!({"model": {"vocab": {"a": 0, "b": 2}}, "added_tokens": [
            {"id": 3, "content": "<s>", "special": true}, {"id": 4, "content": "<t>", "special": false},
        ]});
        let (tokens, kinds) = tokens(&tokenizer, 6).unwrap();
        assert_eq!(tokens, ["a", "[PAD1]", "b", "<s>", "<t>", "[PAD5]"]);
        assert_eq!(kinds, [1, 5, 1, 3, 4, 5]);
        assert!(super::tokens(&tokenizer, 4).unwrap_err().contains("token 4 has no row"));
    }
}
