//! Text in and out: the tokenizer, the chat template, the streaming detokenizer and stop strings.
//!
//! Token ids are the engine's language; strings exist only here and at the program's edges.

mod bpe;
mod chat_template;
mod detokenizer;
mod python;
mod sandbox;
mod spans;
mod stop;
mod token_bytes;
mod tokenizer;

pub use chat_template::{ChatTemplate, Message};
pub use detokenizer::TokenStream;
pub use spans::Span;
pub use stop::{StopOutcome, StopStrings};
pub use tokenizer::Tokenizer;
