//! Reads a byte-pair model straight from JSON.
//!
//! tokenizers' own reader goes through a tree of the whole file and then through copies of its lists of merges: three times
//! the time and memory that the model takes. What this one reads equals what that one reads; whatever it does not expect
//! is an error here and left to the other.

use std::{borrow::Cow, collections::HashMap, fmt, path::Path, path::PathBuf};

use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use tokenizers::{
    DecoderWrapper, Model, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper, Result,
    Token, TokenizerImpl,
    models::{
        ModelWrapper,
        bpe::{BPE, BpeTrainer, Merges, Vocab},
    },
};

/// A tokenizer whose model is read here.
pub(super) type BpeTokenizer = TokenizerImpl<
    BpeModel,
    NormalizerWrapper,
    PreTokenizerWrapper,
    PostProcessorWrapper,
    DecoderWrapper,
>;

/// A [`BPE`] with another reader.
pub(super) struct BpeModel(BPE);

impl From<BpeModel> for ModelWrapper {
    fn from(model: BpeModel) -> Self {
        Self::BPE(model.0)
    }
}

impl<'de> Deserialize<'de> for BpeModel {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_map(ModelVisitor)
    }
}

struct ModelVisitor;

impl<'de> Visitor<'de> for ModelVisitor {
    type Value = BpeModel;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a byte-pair model")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<BpeModel, A::Error> {
        /// Sets an option unless the value is null.
        macro_rules! option {
            ($builder:ident, $name:ident) => {
                if let Some(value) = map.next_value()? {
                    $builder = $builder.$name(value);
                }
            };
        }
        let (mut builder, mut vocab, mut merges) = (BPE::builder(), None, None);
        while let Some(key) = map.next_key::<Cow<str>>()? {
            match &*key {
                "type" if map.next_value::<Cow<str>>()? == "BPE" => {}
                "dropout" => option!(builder, dropout),
                "unk_token" => option!(builder, unk_token),
                "continuing_subword_prefix" => option!(builder, continuing_subword_prefix),
                "end_of_word_suffix" => option!(builder, end_of_word_suffix),
                "fuse_unk" => option!(builder, fuse_unk),
                "byte_fallback" => option!(builder, byte_fallback),
                "ignore_merges" => option!(builder, ignore_merges),
                "vocab" => vocab = Some(map.next_value::<Vocab>()?),
                "merges" => merges = Some(map.next_value::<MergeList>()?),
                other => return Err(A::Error::custom(format_args!("unexpected `{other}`"))),
            }
        }
        let vocab = vocab.ok_or_else(|| A::Error::missing_field("vocab"))?;
        let merges = merges.ok_or_else(|| A::Error::missing_field("merges"))?;
        builder.vocab_and_merges(vocab, merges.0).build().map(BpeModel).map_err(A::Error::custom)
    }
}

/// All merges as pairs, or all as two parts with a space between them.
struct MergeList(Merges);

#[derive(serde::Deserialize)]
#[serde(untagged)]
enum Merge<'a> {
    Joined(#[serde(borrow)] Cow<'a, str>),
    Pair(String, String),
}

impl<'de> Deserialize<'de> for MergeList {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct ListVisitor;
        impl<'de> Visitor<'de> for ListVisitor {
            type Value = MergeList;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a list of merges")
            }

            fn visit_seq<A: SeqAccess<'de>>(
                self,
                mut list: A,
            ) -> std::result::Result<MergeList, A::Error> {
                let (mut merges, mut joined) = (Merges::new(), None);
                while let Some(merge) = list.next_element()? {
                    let is_joined = matches!(merge, Merge::Joined(_));
                    if *joined.get_or_insert(is_joined) != is_joined {
                        return Err(A::Error::custom("merges of two kinds"));
                    }
                    merges.push(match merge {
                        Merge::Pair(a, b) => (a, b),
                        Merge::Joined(line) if line.starts_with("#version") => continue,
                        Merge::Joined(line) => match line.split_once(' ') {
                            Some((a, b)) if !b.contains(' ') => (a.to_owned(), b.to_owned()),
                            _ => {
                                return Err(A::Error::custom(format_args!(
                                    "`{line}` is no merge of two parts"
                                )));
                            }
                        },
                    });
                }
                Ok(MergeList(merges))
            }
        }
        deserializer.deserialize_seq(ListVisitor)
    }
}

impl Model for BpeModel {
    type Trainer = BpeTrainer;

    fn tokenize(&self, sequence: &str) -> Result<Vec<Token>> {
        self.0.tokenize(sequence)
    }

    fn token_to_id(&self, token: &str) -> Option<u32> {
        self.0.token_to_id(token)
    }

    fn id_to_token(&self, id: u32) -> Option<String> {
        self.0.id_to_token(id)
    }

    fn get_vocab(&self) -> HashMap<String, u32> {
        self.0.get_vocab()
    }

    fn get_vocab_size(&self) -> usize {
        self.0.get_vocab_size()
    }

    fn save(&self, folder: &Path, prefix: Option<&str>) -> Result<Vec<PathBuf>> {
        self.0.save(folder, prefix)
    }

    fn get_trainer(&self) -> BpeTrainer {
        self.0.get_trainer()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn file(merges: Value) -> Value {
        json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "post_processor": null, "decoder": null,
            "added_tokens": [
                {"id": 7, "content": "<s>", "special": true, "single_word": false,
                    "lstrip": false, "rstrip": false, "normalized": false},
                {"id": 2, "content": "é\"", "special": false, "single_word": false,
                    "lstrip": false, "rstrip": false, "normalized": true},
            ],
            "model": {"type": "BPE", "dropout": null, "unk_token": "a", "fuse_unk": true, "ignore_merges": true,
                "vocab": {"a": 0, "b": 1, "é\"": 2, "ab": 3, "abb": 4, "Ġ": 5}, "merges": merges},
        })
    }

    fn both(file: &Value) -> (Option<tokenizers::Tokenizer>, Option<tokenizers::Tokenizer>) {
        let json = file.to_string();
        let ours = serde_json::from_str::<BpeTokenizer>(&json).ok().map(Into::into);
        (ours, json.parse().ok())
    }

    #[test]
    fn reads_what_tokenizers_reads() {
        for merges in
            [json!([["a", "b"], ["ab", "b"]]), json!(["#version: 0.2", "a b", "ab b"]), json!([])]
        {
            let (ours, theirs) = both(&file(merges));
            let (ours, theirs) = (ours.unwrap(), theirs.unwrap());
            assert_eq!(ours.to_string(true).unwrap(), theirs.to_string(true).unwrap());
            let text = "abb ab<s> é\" c";
            let ids = |tokenizer: &tokenizers::Tokenizer| {
                tokenizer.encode(text, true).unwrap().get_ids().to_vec()
            };
            assert_eq!(ids(&ours), ids(&theirs));
            assert_eq!(ours.token_to_id("<s>"), Some(6));
        }
    }

    #[test]
    fn leaves_the_unexpected_to_tokenizers() {
        let good = json!([["a", "b"]]);
        assert!(both(&file(json!([["a", "b"], "ab b"]))).0.is_none(), "merges of two kinds");
        assert!(both(&file(json!(["a  b"]))).0.is_none(), "three parts");
        assert!(both(&file(json!([["a", "x"]]))).0.is_none(), "no such token");
        let changed = |change: &dyn Fn(&mut Value)| {
            let mut file = file(good.clone());
            change(&mut file["model"]);
            both(&file)
        };
        assert!(changed(&|model| model["type"] = json!("Unigram")).0.is_none());
        assert!(changed(&|model| model["vocab"] = json!(null)).0.is_none());
        let (ours, theirs) = changed(&|model| model["comment"] = json!("?"));
        assert!(ours.is_none() && theirs.is_some());
    }
}
