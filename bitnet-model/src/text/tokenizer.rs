//! `tokenizer.json` with the files around it: special tokens and chat template, as transformers
//! reads them.

use std::{collections::BTreeMap, fs::File, io::Read, path::Path, sync::Arc};

use serde_json::{Map, Value};
use tokenizers::DecoderWrapper;

use super::{ChatTemplate, TokenStream, bpe::BpeTokenizer};
use crate::{Error, Result};

/// Larger files are refused. The largest public vocabularies (262 144 tokens) take 35 MB.
const MAX_FILE_BYTES: u64 = 256 << 20;

/// The named special tokens of transformers, which are also the chat template's variables.
const SPECIAL_TOKENS: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// Text to token ids and back. Clones share the vocabulary.
#[derive(Clone)]
pub struct Tokenizer {
    core: Arc<tokenizers::Tokenizer>,
    special_tokens: Arc<BTreeMap<String, String>>,
    /// A template that does not compile is an error only for who asks for it.
    chat_template: Option<Result<Arc<ChatTemplate>, String>>,
}

impl Tokenizer {
    /// Reads the files of a Hub repository; only `tokenizer.json` is required.
    ///
    /// A `chat_template.jinja` beats the template inside `tokenizer_config.json`. The special
    /// tokens of `special_tokens_map.json` count only if `tokenizer_config.json` has no
    /// `added_tokens_decoder` (transformers' rule).
    pub fn from_files(
        tokenizer_json: &Path,
        tokenizer_config: Option<&Path>,
        special_tokens_map: Option<&Path>,
        chat_template: Option<&Path>,
    ) -> Result<Self> {
        let at = |path: &Path| {
            let path = path.display().to_string();
            move |error: String| Error::Tokenizer(format!("{path}: {error}"))
        };
        let object = |path: Option<&Path>| match path {
            None => Ok(Map::new()),
            Some(path) => parse_object(&read(path)?).map_err(at(path)),
        };
        let core = parse_core(&read(tokenizer_json)?).map_err(at(tokenizer_json))?;
        let config = object(tokenizer_config)?;
        let legacy = object(special_tokens_map)?;
        let template = match chat_template {
            None => None,
            Some(path) => {
                Some(String::from_utf8(read(path)?).map_err(|e| at(path)(e.to_string()))?)
            }
        };
        Self::assemble(core, &config, &legacy, template).map_err(|error| match tokenizer_config {
            Some(path) => at(path)(error),
            None => Error::Tokenizer(error),
        })
    }

    /// As [`from_files`](Self::from_files), from the contents of `tokenizer.json`,
    /// `tokenizer_config.json` and `chat_template.jinja`.
    pub fn from_bytes(
        tokenizer_json: &[u8],
        tokenizer_config: Option<&[u8]>,
        chat_template: Option<&str>,
    ) -> Result<Self> {
        let named = |file: &'static str| move |e: String| Error::Tokenizer(format!("{file}: {e}"));
        let core = parse_core(tokenizer_json).map_err(named("tokenizer.json"))?;
        let config = tokenizer_config.map_or(Ok(Map::new()), parse_object);
        let config = config.map_err(named("tokenizer_config.json"))?;
        Self::assemble(core, &config, &Map::new(), chat_template.map(str::to_owned))
            .map_err(named("tokenizer_config.json"))
    }

    fn assemble(
        core: tokenizers::Tokenizer,
        config: &Map<String, Value>,
        special_tokens_map: &Map<String, Value>,
        chat_template: Option<String>,
    ) -> Result<Self, String> {
        let mut special_tokens = special_tokens_of(config)?;
        if !config.contains_key("added_tokens_decoder") {
            special_tokens.extend(special_tokens_of(special_tokens_map)?);
        }
        let source = match chat_template {
            Some(source) => Some(Ok(source)),
            None => configured_template(config)?,
        };
        let chat_template = source.map(|source| {
            let template = ChatTemplate::new(&source?, &special_tokens);
            template.map(Arc::new).map_err(|error| match error {
                Error::Tokenizer(reason) => reason,
                other => other.to_string(),
            })
        });
        Ok(Self { core: Arc::new(core), special_tokens: Arc::new(special_tokens), chat_template })
    }

    /// The same tokenizer with another chat template (Jinja source).
    pub fn with_chat_template(&self, source: &str) -> Result<Self> {
        let template = ChatTemplate::new(source, &self.special_tokens)?;
        Ok(Self { chat_template: Some(Ok(Arc::new(template))), ..self.clone() })
    }

    /// The chat template, if the model has one.
    ///
    /// # Errors
    /// If it has one that cannot be compiled or several of which none is the default.
    pub fn chat_template(&self) -> Result<Option<&ChatTemplate>> {
        match &self.chat_template {
            None => Ok(None),
            Some(Ok(template)) => Ok(Some(template)),
            Some(Err(reason)) => Err(Error::Tokenizer(reason.clone())),
        }
    }

    /// The ids of `text`. With `add_special_tokens` the tokenizer's post-processor adds what it
    /// always adds, usually the begin-of-text token; special tokens spelled out in `text` become
    /// their ids either way.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        let encoding = self.core.encode_fast(text, add_special_tokens);
        Ok(encoding.map_err(|e| Error::Tokenizer(e.to_string()))?.get_ids().to_vec())
    }

    /// The ids of `text` with what the post-processor adds, and how many bytes of `text` each stands for: from where the one
    /// before it ended to its own end. Of a character in several tokens the first has all bytes; what was added has none.
    pub fn encode_with_bytes(&self, text: &str) -> Result<Vec<(u32, usize)>> {
        let encoding = self.core.encode(text, true);
        let encoding = encoding.map_err(|e| Error::Tokenizer(e.to_string()))?;
        let mut covered = 0;
        let ends = encoding.get_offsets().iter().map(|&(_, end)| end);
        let tokens = encoding.get_ids().iter().zip(ends).map(|(&id, end)| {
            let bytes = end.saturating_sub(covered);
            covered = covered.max(end);
            (id, bytes)
        });
        Ok(tokens.collect())
    }

    /// The ids of a prompt: those of `text` with what the post-processor adds. A begin-of-text token that `text`, as some
    /// chat templates have it, begins with already is not doubled.
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = self.encode(text, true)?;
        if let (Some(bos), Some(id)) = (self.bos_token(), self.bos_token_id())
            && text.starts_with(bos)
            && ids.starts_with(&[id, id])
        {
            ids.remove(0);
        }
        Ok(ids)
    }

    /// Whether `id` is a special token, which is no text.
    pub fn is_special(&self, id: u32) -> bool {
        let token = self.core.id_to_token(id);
        token.is_some_and(|token| self.core.get_added_vocabulary().is_special_token(&token))
    }

    /// The text of `ids`; bytes that are not UTF-8 become U+FFFD, ids outside the vocabulary
    /// nothing.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        let tokens = ids.iter().filter_map(|&id| self.token_text(id, skip_special_tokens));
        self.join(tokens.collect())
    }

    /// A streaming decoder that prints what [`decode`](Self::decode) would, piece by piece.
    pub fn stream(&self, skip_special_tokens: bool) -> TokenStream {
        TokenStream::new(self.clone(), skip_special_tokens)
    }

    /// The number of tokens, added ones included.
    pub fn vocab_size(&self) -> usize {
        self.core.get_vocab_size(true)
    }

    /// The id of a token, spelled as in the vocabulary.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.core.token_to_id(token)
    }

    /// The token of an id, spelled as in the vocabulary (byte-level vocabularies write a space as
    /// `Ġ`).
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.core.id_to_token(id)
    }

    /// A special token by its name in `tokenizer_config.json`, such as `bos_token`.
    pub fn special_token(&self, name: &str) -> Option<&str> {
        self.special_tokens.get(name).map(String::as_str)
    }

    /// The begin-of-text token.
    pub fn bos_token(&self) -> Option<&str> {
        self.special_token("bos_token")
    }

    /// The end token. A chat model may end its turns with another one, which
    /// `generation_config.json` names.
    pub fn eos_token(&self) -> Option<&str> {
        self.special_token("eos_token")
    }

    /// The padding token.
    pub fn pad_token(&self) -> Option<&str> {
        self.special_token("pad_token")
    }

    /// The id of [`bos_token`](Self::bos_token).
    pub fn bos_token_id(&self) -> Option<u32> {
        self.token_to_id(self.bos_token()?)
    }

    /// The id of [`eos_token`](Self::eos_token).
    pub fn eos_token_id(&self) -> Option<u32> {
        self.token_to_id(self.eos_token()?)
    }

    /// The id of [`pad_token`](Self::pad_token).
    pub fn pad_token_id(&self) -> Option<u32> {
        self.token_to_id(self.pad_token()?)
    }

    /// The vocabulary's spelling of `id`, unless it is unknown or a special token to skip.
    pub(super) fn token_text(&self, id: u32, skip_special_tokens: bool) -> Option<String> {
        let token = self.core.id_to_token(id)?;
        let skip = skip_special_tokens && self.core.get_added_vocabulary().is_special_token(&token);
        (!skip).then_some(token)
    }

    /// The text of tokens in the vocabulary's spelling.
    pub(super) fn join(&self, tokens: Vec<String>) -> Result<String> {
        // tokenizers' `BPEDecoder` counts on at least one token.
        if tokens.is_empty() {
            return Ok(String::new());
        }
        match self.core.get_decoder() {
            None => Ok(tokens.join(" ")),
            Some(decoder) => {
                use tokenizers::Decoder;
                decoder.decode(tokens).map_err(|e| Error::Tokenizer(e.to_string()))
            }
        }
    }

    pub(super) fn decoder(&self) -> Option<&DecoderWrapper> {
        self.core.get_decoder()
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size())
            .field("special_tokens", &self.special_tokens)
            .finish_non_exhaustive()
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let file = File::open(path).map_err(Error::io(path))?;
    let len = file.metadata().map_err(Error::io(path))?.len();
    let mut bytes = Vec::with_capacity(len.min(MAX_FILE_BYTES) as usize + 1);
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(Error::io(path))?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        let limit = MAX_FILE_BYTES >> 20;
        return Err(Error::Tokenizer(format!("{}: larger than {limit} MiB", path.display())));
    }
    Ok(bytes)
}

fn parse_core(json: &[u8]) -> Result<tokenizers::Tokenizer, String> {
    // tokenizers panics on some malformed files, if not while reading then at the first text.
    let read = || {
        let core: tokenizers::Tokenizer = match serde_json::from_slice::<BpeTokenizer>(json) {
            Ok(core) => core.into(),
            Err(_) => {
                serde_json::from_slice::<serde::de::IgnoredAny>(json)?; // says where the JSON is wrong
                tokenizers::Tokenizer::from_bytes(json)?
            }
        };
        core.encode_fast("", true)?;
        Ok(core)
    };
    let core = std::panic::catch_unwind(read).unwrap_or_else(|_| Err("is malformed".into()));
    let mut core = core.map_err(|e: tokenizers::Error| e.to_string())?;
    if core.get_decoder().is_some_and(strips_ends) {
        return Err("decoder: `Strip` with a `stop` above 0 is not supported".into());
    }
    // A prompt is encoded whole and as it is, whatever the file was last used for.
    core.with_truncation(None).map_err(|e| e.to_string())?;
    core.with_padding(None);
    Ok(core)
}

/// Whether the decoder cuts tokens at their end, where tokenizers' `Strip` fails on short tokens.
fn strips_ends(decoder: &DecoderWrapper) -> bool {
    match decoder {
        DecoderWrapper::Strip(strip) => strip.stop > 0,
        DecoderWrapper::Sequence(sequence) => sequence.get_decoders().iter().any(strips_ends),
        _ => false,
    }
}

fn parse_object(json: &[u8]) -> Result<Map<String, Value>, String> {
    serde_json::from_slice(json).map_err(|e| e.to_string())
}

/// The named special tokens of a configuration: strings, or `AddedToken` objects with a `content`.
fn special_tokens_of(config: &Map<String, Value>) -> Result<BTreeMap<String, String>, String> {
    let mut tokens = BTreeMap::new();
    for name in SPECIAL_TOKENS {
        let token = match config.get(name) {
            None | Some(Value::Null) => continue,
            Some(Value::Object(added)) => added.get("content").and_then(Value::as_str),
            Some(value) => value.as_str(),
        };
        let token = token.ok_or_else(|| {
            format!("`{name}`: expected a string or an object with a string `content`")
        })?;
        tokens.insert(name.to_owned(), token.to_owned());
    }
    Ok(tokens)
}

/// The `chat_template` of a configuration: a string, or a list of `{name, template}` with one named
/// `default`. The inner error is kept for who asks for the template.
fn configured_template(
    config: &Map<String, Value>,
) -> Result<Option<Result<String, String>>, String> {
    let list = match config.get("chat_template") {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::String(source)) => return Ok(Some(Ok(source.clone()))),
        Some(Value::Array(list)) => list,
        Some(_) => {
            return Err("`chat_template`: expected a string or a list of `{name, template}`".into());
        }
    };
    let mut names = Vec::new();
    for entry in list {
        let text = |field: &str| entry.get(field).and_then(Value::as_str);
        let (Some(name), Some(source)) = (text("name"), text("template")) else {
            return Err("`chat_template`: an entry of the list lacks `name` or `template`".into());
        };
        if name == "default" {
            return Ok(Some(Ok(source.to_owned())));
        }
        names.push(name);
    }
    let names = names.join("`, `");
    Ok(Some(Err(format!("`chat_template`: has `{names}` but no `default`; pass a template"))))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn file(decoder: Value) -> Value {
        json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "post_processor": null, "decoder": decoder,
            "added_tokens": [{"id": 4, "content": "<s>", "special": true, "single_word": false,
                "lstrip": false, "rstrip": false, "normalized": false}],
            "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "Ġ": 2, "ab": 3}, "merges": ["a b"]},
        })
    }

    fn load(file: &Value, config: &Value, template: Option<&str>) -> Result<Tokenizer> {
        let bytes = |value: &Value| value.to_string().into_bytes();
        Tokenizer::from_bytes(&bytes(file), Some(&bytes(config)), template)
    }

    fn byte_level() -> Value {
        file(
            json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true}),
        )
    }

    #[test]
    fn text_to_ids_and_back() {
        let tokenizer = load(&byte_level(), &json!({}), None).unwrap();
        assert_eq!(tokenizer.encode("ab b<s>a", true).unwrap(), [3, 2, 1, 4, 0]);
        assert_eq!(tokenizer.decode(&[3, 2, 1, 4, 0, 99], false).unwrap(), "ab b<s>a");
        assert_eq!(tokenizer.decode(&[3, 2, 1, 4, 0, 99], true).unwrap(), "ab ba");
        assert_eq!(tokenizer.decode(&[4, 99], true).unwrap(), "");
        assert_eq!(tokenizer.vocab_size(), 5);
        assert_eq!(tokenizer.id_to_token(2).as_deref(), Some("Ġ"));
        assert_eq!(tokenizer.token_to_id("<s>"), Some(4));
        assert!(tokenizer.chat_template().unwrap().is_none());
    }

    #[test]
    fn truncation_and_padding_of_the_file_are_ignored() {
        let mut file = byte_level();
        file["truncation"] =
            json!({"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0});
        file["padding"] = json!({"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": null,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "a"});
        let tokenizer = load(&file, &json!({}), None).unwrap();
        assert_eq!(tokenizer.encode("a b", true).unwrap(), [0, 2, 1]);
    }

    #[test]
    fn special_tokens_come_from_the_right_file() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, value: &Value| {
            let path = folder.path().join(name);
            std::fs::write(&path, value.to_string()).unwrap();
            path
        };
        let core = write("tokenizer.json", &byte_level());
        let map = write(
            "special_tokens_map.json",
            &json!({"eos_token": {"content": "b"}, "pad_token": "<s>"}),
        );
        let plain = json!({"bos_token": {"content": "<s>", "special": true}, "eos_token": "a", "pad_token": null});
        let load = |config: &Value| {
            let config = write("tokenizer_config.json", config);
            Tokenizer::from_files(&core, Some(&config), Some(&map), None).unwrap()
        };
        let tokenizer = load(&plain);
        assert_eq!((tokenizer.bos_token(), tokenizer.bos_token_id()), (Some("<s>"), Some(4)));
        assert_eq!((tokenizer.eos_token_id(), tokenizer.pad_token_id()), (Some(1), Some(4)));
        let mut modern = plain;
        modern["added_tokens_decoder"] = json!({});
        let tokenizer = load(&modern);
        assert_eq!((tokenizer.eos_token_id(), tokenizer.pad_token()), (Some(0), None));
    }

    #[test]
    fn chat_template_of_the_config_or_the_file() {
        let render = |tokenizer: &Tokenizer| {
            tokenizer.chat_template().unwrap().unwrap().render(&[], false).unwrap()
        };
        let core = byte_level();
        let one = json!({"chat_template": "one{{ bos_token }}", "bos_token": "<s>"});
        assert_eq!(render(&load(&core, &one, None).unwrap()), "one<s>");
        assert_eq!(render(&load(&core, &one, Some("file{{ bos_token }}")).unwrap()), "file<s>");
        let list = json!({"chat_template": [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]});
        let tokenizer = load(&core, &list, None).unwrap();
        assert_eq!(render(&tokenizer), "d");
        assert_eq!(render(&tokenizer.with_chat_template("new").unwrap()), "new");
        assert!(tokenizer.with_chat_template("{% if %}").is_err());

        for (template, reason) in [
            (
                json!("\n{% endif %}"),
                "chat template, line 2: syntax error: unknown statement endif",
            ),
            (json!([{"name": "rag", "template": "r"}]), "has `rag` but no `default`"),
        ] {
            let tokenizer = load(&core, &json!({"chat_template": template}), None).unwrap();
            let error = tokenizer.chat_template().unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
    }

    #[test]
    fn malformed_files_are_refused_by_name() {
        let core = byte_level();
        let whole = core.to_string();
        let strip = file(
            json!({"type": "Sequence", "decoders": [{"type": "Strip", "content": " ", "start": 0, "stop": 1}]}),
        );
        let mut unknown_special = core.clone();
        unknown_special["post_processor"] = json!({"type": "TemplateProcessing", "special_tokens": {}, "pair": [],
            "single": [{"SpecialToken": {"id": "<nope>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]});
        for file in [
            &whole[..whole.len() / 2],
            "[]",
            "{}",
            &strip.to_string(),
            &unknown_special.to_string(),
        ] {
            let error = Tokenizer::from_bytes(file.as_bytes(), None, None).unwrap_err().to_string();
            assert!(error.starts_with("tokenizer: tokenizer.json: "), "{error}");
        }
        for (config, field) in [
            (json!({"bos_token": 3}), "`bos_token`"),
            (json!({"eos_token": {"special": true}}), "`eos_token`"),
            (json!({"chat_template": 1}), "`chat_template`"),
            (json!({"chat_template": [{"name": "default"}]}), "`chat_template`"),
            (json!([]), "expected a map"),
        ] {
            let error = load(&core, &config, None).unwrap_err().to_string();
            assert!(error.starts_with("tokenizer: tokenizer_config.json: "), "{error}");
            assert!(error.contains(field), "{error}");
        }
        let missing = Tokenizer::from_files(Path::new("no/such.json"), None, None, None);
        assert!(missing.unwrap_err().to_string().starts_with("no/such.json: "));
    }
}
