//! Byte-level BPE vocabulary: trained on the corpus, lossless on any UTF-8.
//!
//! All 256 bytes are tokens, so every text has an encoding and decoding returns it exactly. Special tokens carry the
//! names of Llama 3's (`<|begin_of_text|>`, `<|end_of_text|>`, `<|eot_id|>`), take the first ids, and the post-processor
//! puts the first one before every text, as Llama 3's and BitNet b1.58 2B4T's tokenizers do. The files written are
//! those of the Hub: `transformers`' `PreTrainedTokenizerFast` reads them.

use std::{fs, hash::Hasher, path::Path};

use bitnet_model::pretrained::{DEFAULT, default_files};
use rayon::prelude::*;
use serde_json::{Value, json};
use tokenizers::{
    AddedToken, TokenizerImpl,
    decoders::byte_level::ByteLevel,
    models::bpe::{BPE, BpeTrainer},
    normalizers::NormalizerWrapper,
    processors::template::TemplateProcessing,
};

use crate::{Error, Result, fingerprint::Fnv};

/// Begins every document.
pub const BOS: &str = "<|begin_of_text|>";
/// Ends every document.
pub const EOS: &str = "<|end_of_text|>";
/// Ends every turn of a conversation.
pub const EOT: &str = "<|eot_id|>";

/// The special tokens, in the order of their ids.
pub const SPECIAL_TOKENS: [&str; 3] = [BOS, EOS, EOT];

/// The smallest vocabulary: the special tokens and the 256 bytes.
pub const MIN_SIZE: usize = SPECIAL_TOKENS.len() + 256;

/// BitNet b1.58 2B4T's: `User: hi<|eot_id|>Assistant: `. It has no BOS, which the post-processor adds.
pub const CHAT_TEMPLATE: &str = "{% set loop_messages = messages %}{% for message in loop_messages %}\
    {% set content = message['role'] | capitalize + ': '+ message['content'] | trim + '<|eot_id|>' %}\
    {{ content }}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}";

type ByteLevelBpe = TokenizerImpl<BPE, NormalizerWrapper, ByteLevel, TemplateProcessing, ByteLevel>;

/// A tokenizer for training: text without special tokens in it, and the ids that surround a document.
#[derive(Clone, Debug)]
pub struct Vocabulary {
    tokenizer: tokenizers::Tokenizer,
    /// Names of the tokens that surround a document.
    ends: [String; 2],
    bos: u32,
    eos: u32,
}

impl Vocabulary {
    /// Trains a vocabulary of exactly `size` tokens. The same documents give the same vocabulary.
    pub fn train(documents: &[String], size: usize) -> Result<Self> {
        if size < MIN_SIZE {
            return Err(Error::Tokenizer(format!(
                "a vocabulary of {size} cannot hold {} special tokens and 256 bytes; the least is {MIN_SIZE}",
                SPECIAL_TOKENS.len()
            )));
        }
        let byte_level = ByteLevel::default().add_prefix_space(false);
        let mut tokenizer = ByteLevelBpe::new(BPE::default());
        tokenizer.with_pre_tokenizer(Some(byte_level));
        tokenizer.with_decoder(Some(byte_level));
        let mut trainer = BpeTrainer::builder()
            .vocab_size(size)
            .show_progress(false)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .special_tokens(SPECIAL_TOKENS.map(|token| AddedToken::from(token, true)).to_vec())
            .build();
        tokenizer.train(&mut trainer, documents.iter()).map_err(tokenizer_error)?;
        let found = tokenizer.get_vocab_size(true);
        if found != size {
            return Err(Error::Tokenizer(format!(
                "the corpus yields only {found} of {size} tokens; lower `model.vocab_size` to {found} or add text"
            )));
        }
        let template = TemplateProcessing::builder()
            .try_single(format!("{BOS} $A"))
            .map_err(Error::Tokenizer)?
            .try_pair(format!("{BOS} $A {BOS} $B"))
            .map_err(Error::Tokenizer)?
            .special_tokens(vec![(BOS, 0)])
            .build()
            .map_err(|error| Error::Tokenizer(error.to_string()))?;
        tokenizer.with_post_processor(Some(template));
        let json = tokenizer.to_string(false).map_err(tokenizer_error)?;
        Self::new(json.parse().map_err(tokenizer_error)?, [BOS, EOS].map(str::to_owned))
    }

    /// Reads a `tokenizer.json`. Documents are surrounded by the `bos_token` and `eos_token` of the
    /// `tokenizer_config.json` beside it, without one by [`BOS`] and [`EOS`]; a tokenizer with an `eos_token` alone has it at
    /// both ends.
    pub fn from_file(path: &Path) -> Result<Self> {
        if path.as_os_str() == DEFAULT {
            return Self::embedded();
        }
        let json = fs::read_to_string(path).map_err(Error::io(path))?;
        let ends = ends(&path.with_file_name("tokenizer_config.json"))?;
        json.parse()
            .map_err(tokenizer_error)
            .and_then(|tokenizer| Self::new(tokenizer, ends))
            .map_err(|error| Error::Corpus { path: path.to_owned(), reason: error.to_string() })
    }

    /// That of the model inside the library.
    fn embedded() -> Result<Self> {
        let file = |name: &str| {
            let files = default_files();
            let file = files.into_iter().find(|(file, _)| *file == name);
            file.map(|(_, bytes)| String::from_utf8_lossy(bytes).into_owned())
                .ok_or_else(|| Error::Tokenizer(format!("the embedded model has no {name}")))
        };
        let config = serde_json::from_str(&file("tokenizer_config.json")?)
            .map_err(|error| Error::Tokenizer(error.to_string()))?;
        Self::new(file("tokenizer.json")?.parse().map_err(tokenizer_error)?, ends_of(&config))
    }

    fn new(mut tokenizer: tokenizers::Tokenizer, ends: [String; 2]) -> Result<Self> {
        // A corpus is text: a document that spells `<|eot_id|>` out does not end a turn.
        tokenizer.set_encode_special_tokens(true);
        let id = |token: &str| {
            tokenizer
                .token_to_id(token)
                .ok_or_else(|| Error::Tokenizer(format!("no token `{token}`")))
        };
        let (bos, eos) = (id(&ends[0])?, id(&ends[1])?);
        Ok(Self { tokenizer, ends, bos, eos })
    }

    /// Writes `tokenizer.json` and `tokenizer_config.json` into a directory, each at one stroke.
    pub fn save(&self, dir: &Path) -> Result<()> {
        let write = |name: &str, text: String| {
            let (path, partial) = (dir.join(name), dir.join(format!(".{name}")));
            fs::write(&partial, text + "\n")
                .and_then(|()| fs::rename(&partial, &path))
                .map_err(Error::io(path))
        };
        write("tokenizer.json", self.tokenizer.to_string(true).map_err(tokenizer_error)?)?;
        let [bos, eos] = &self.ends;
        let mut config = json!({
            "bos_token": bos,
            "eos_token": eos,
            "clean_up_tokenization_spaces": false,
            "model_input_names": ["input_ids", "attention_mask"],
            "tokenizer_class": "PreTrainedTokenizerFast",
        });
        if self.eot().is_some() {
            config["chat_template"] = json!(CHAT_TEMPLATE);
        }
        write("tokenizer_config.json", format!("{config:#}"))
    }

    /// The content of `tokenizer.json`, on one line.
    pub fn to_json(&self) -> Result<String> {
        self.tokenizer.to_string(false).map_err(tokenizer_error)
    }

    /// A hash of the whole tokenizer: texts have the same tokens under the same fingerprint.
    pub fn fingerprint(&self) -> Result<u64> {
        let mut hash = Fnv::default();
        hash.write(self.to_json()?.as_bytes());
        Ok(hash.finish())
    }

    /// Number of ids, special tokens included.
    pub fn size(&self) -> usize {
        self.tokenizer.get_vocab_size(true)
    }

    /// The id of the token that begins a document.
    pub fn bos(&self) -> u32 {
        self.bos
    }

    /// The id of the token that ends a document.
    pub fn eos(&self) -> u32 {
        self.eos
    }

    /// The id of [`EOT`], if the vocabulary has it.
    pub fn eot(&self) -> Option<u32> {
        self.tokenizer.token_to_id(EOT)
    }

    /// The tokens of a text, without special tokens.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.tokenizer.encode_fast(text, false).map_err(tokenizer_error)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The tokens of many texts, in parallel.
    pub fn encode_all(&self, texts: &[String]) -> Result<Vec<Vec<u32>>> {
        texts.par_iter().map(|text| self.encode(text)).collect()
    }

    /// The text of `tokens`, special tokens spelt out.
    pub fn decode(&self, tokens: &[u32]) -> Result<String> {
        self.tokenizer.decode(tokens, false).map_err(tokenizer_error)
    }
}

/// The tokens that begin and end a text, from a `tokenizer_config.json` that may be absent.
fn ends(path: &Path) -> Result<[String; 2]> {
    if !path.is_file() {
        return Ok([BOS, EOS].map(str::to_owned));
    }
    let text = fs::read_to_string(path).map_err(Error::io(path))?;
    let config: Value = serde_json::from_str(&text)
        .map_err(|error| Error::Corpus { path: path.into(), reason: error.to_string() })?;
    Ok(ends_of(&config))
}

fn ends_of(config: &Value) -> [String; 2] {
    // A string, or an object that says how the token is matched.
    let name = |key: &str| {
        let token = config.get(key)?;
        Some(token.as_str().or_else(|| token.get("content")?.as_str())?.to_owned())
    };
    let eos = name("eos_token");
    match (name("bos_token").or_else(|| eos.clone()), eos) {
        (Some(bos), Some(eos)) => [bos, eos],
        _ => [BOS, EOS].map(str::to_owned),
    }
}

fn tokenizer_error(error: tokenizers::Error) -> Error {
    Error::Tokenizer(error.to_string())
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use proptest::prelude::*;

    use super::*;

    static DOCUMENTS: LazyLock<Vec<String>> = LazyLock::new(|| {
        let tale =
            "Once upon a time there was a little hen. “Who will help me?” said the little hen.";
        vec![tale.into(), "The cat and the dog played together in the garden.".into()]
    });
    static VOCABULARY: LazyLock<Vocabulary> =
        LazyLock::new(|| Vocabulary::train(&DOCUMENTS, 290).unwrap());

    proptest! {
        #[test]
        fn any_text_survives(text in any::<String>()) {
            prop_assert_eq!(VOCABULARY.decode(&VOCABULARY.encode(&text).unwrap()).unwrap(), text);
        }
    }

    #[test]
    fn special_tokens_in_a_text_are_text() {
        let text = format!("a{EOT} {BOS}{EOS}");
        let tokens = VOCABULARY.encode(&text).unwrap();
        assert!(tokens.iter().all(|&token| token >= 3));
        assert_eq!(VOCABULARY.decode(&tokens).unwrap(), text);
    }

    #[test]
    fn files_are_deterministic_and_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let read = || fs::read(dir.path().join("tokenizer.json")).unwrap();
        VOCABULARY.save(dir.path()).unwrap();
        let first = read();
        Vocabulary::train(&DOCUMENTS, 290).unwrap().save(dir.path()).unwrap();
        assert_eq!(read(), first);

        let path = dir.path().join("tokenizer.json");
        let reread = Vocabulary::from_file(&path).unwrap();
        assert_eq!((reread.bos(), reread.eos(), reread.size()), (0, 1, 290));
        // As a user of the file sees it: special tokens are recognised and the post-processor adds BOS.
        let tokenizer = tokenizers::Tokenizer::from_file(path).unwrap();
        let ids = tokenizer.encode("hen<|eot_id|>", true).unwrap().get_ids().to_vec();
        assert_eq!((ids.first(), ids.last()), (Some(&0), Some(&2)));
        assert_eq!(tokenizer.token_to_id(EOT), Some(2));
    }

    #[test]
    fn impossible_sizes_are_refused() {
        let message = |size| Vocabulary::train(&DOCUMENTS, size).unwrap_err().to_string();
        assert!(message(258).contains("the least is 259"));
        assert!(message(100_000).contains("of 100000 tokens; lower `model.vocab_size`"));
    }

    #[test]
    fn a_foreign_tokenizer_must_have_our_special_tokens() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokenizer.json");
        fs::write(
            &path,
            r#"{"version":"1.0","added_tokens":[],"model":{"type":"BPE","vocab":{},"merges":[]}}"#,
        )
        .unwrap();
        let message = Vocabulary::from_file(&path).unwrap_err().to_string();
        assert!(message.contains("tokenizer.json") && message.contains(BOS), "{message}");
    }
}
