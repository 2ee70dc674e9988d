//! From files of text to tokens: `corpus` reads documents, `vocabulary` is trained on them, `tokens` encodes them.

pub mod corpus;
pub mod stream;
pub mod tokens;
pub mod vocabulary;

pub use corpus::{Documents, Source};
pub use stream::{Stream, Window};
pub use tokens::Tokens;
pub use vocabulary::Vocabulary;

use crate::{Error, Result, recipe::Recipe};

/// What a recipe trains and evaluates on.
#[derive(Clone, Debug)]
pub struct Dataset {
    /// Trained on the training documents, or read from `data.tokenizer`.
    pub vocabulary: Vocabulary,
    /// Trained on.
    pub train: Tokens,
    /// Held out.
    pub validation: Tokens,
}

impl Dataset {
    /// Reads, trains and encodes what `[data]` says. The same files give the same dataset.
    pub fn open(recipe: &Recipe) -> Result<Self> {
        let train = corpus::read(&recipe.data.train)?;
        let mut validation = corpus::read(&recipe.data.validation)?;
        if let Some(bytes) = recipe.data.validation_bytes {
            truncate(&mut validation, bytes);
        }
        let vocab_size = recipe.model.vocab_size;
        let vocabulary = match &recipe.data.tokenizer {
            Some(path) => Vocabulary::from_file(path)?,
            None => Vocabulary::train(&train, vocab_size)?,
        };
        if vocabulary.size() > vocab_size {
            let reason = format!(
                "{vocab_size} is less than the {} tokens of `data.tokenizer`",
                vocabulary.size()
            );
            return Err(Error::recipe("model.vocab_size", reason));
        }
        let train = Tokens::encode(&train, &vocabulary)?;
        let validation = Tokens::encode(&validation, &vocabulary)?;
        Ok(Self { vocabulary, train, validation })
    }
}

/// Keeps the first documents, up to `bytes` bytes (a few less if that would cut a character).
fn truncate(documents: &mut Vec<String>, bytes: usize) {
    let mut left = bytes;
    documents.retain_mut(|document| {
        let end = (0..=left.min(document.len()))
            .rev()
            .find(|&end| document.is_char_boundary(end))
            .unwrap_or(0);
        left = if end < document.len() { 0 } else { left - end };
        document.truncate(end);
        !document.is_empty()
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn held_out_text_is_cut_between_characters() {
        let cut = |bytes| {
            let mut documents = ["ab", "cédé", "f"].map(str::to_owned).to_vec();
            truncate(&mut documents, bytes);
            documents
        };
        assert_eq!(cut(100), ["ab", "cédé", "f"]);
        assert_eq!(cut(8), ["ab", "cédé"]);
        assert_eq!(cut(7), ["ab", "céd"]);
        assert_eq!(cut(4), ["ab", "c"]);
        assert_eq!(cut(1), ["a"]);
    }
}
