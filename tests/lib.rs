//! What the whole-product tests share: the fixtures of the reference stack, a naive oracle, and GGUF files byte by byte.

#![allow(clippy::unwrap_used, missing_docs)] // test code

pub mod fixture;
pub mod gguf_file;
pub mod gguf_model;
pub mod oracle;
