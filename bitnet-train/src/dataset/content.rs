//! What batches are made of.

use super::Tokens;
use crate::sft::Examples;

/// Tokens that are trained or evaluated on. A copy shares them.
#[derive(Clone, Debug)]
pub enum Content {
    /// Text, cut into windows.
    Stream(Tokens),
    /// Examples that stay whole.
    Examples(Examples),
}

impl Content {
    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        match self {
            Self::Stream(tokens) => tokens.len(),
            Self::Examples(examples) => examples.tokens(),
        }
    }

    /// Number of documents or examples.
    pub fn documents(&self) -> usize {
        match self {
            Self::Stream(tokens) => tokens.documents(),
            Self::Examples(examples) => examples.len(),
        }
    }

    /// UTF-8 bytes of what is predicted: the denominator of nats per byte.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Stream(tokens) => tokens.bytes(),
            Self::Examples(examples) => examples.bytes(),
        }
    }

    /// A hash that tells one content from another when a run resumes.
    pub fn fingerprint(&self) -> u64 {
        match self {
            Self::Stream(tokens) => tokens.fingerprint(),
            Self::Examples(examples) => examples.fingerprint(),
        }
    }
}

impl From<Tokens> for Content {
    fn from(tokens: Tokens) -> Self {
        Self::Stream(tokens)
    }
}

impl From<Examples> for Content {
    fn from(examples: Examples) -> Self {
        Self::Examples(examples)
    }
}
