//! From files of text to tokens: `corpus` reads documents, `vocabulary` is trained on them, `tokens` encodes them.

pub mod corpus;
pub mod tokens;
pub mod vocabulary;

pub use corpus::{Documents, Source};
pub use tokens::Tokens;
pub use vocabulary::Vocabulary;
