//! What the whole-product tests share: the fixtures of the reference stack, and a naive oracle.

#![allow(clippy::unwrap_used, missing_docs)] // test code

pub mod fixture;
pub mod oracle;
