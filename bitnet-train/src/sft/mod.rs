//! Supervised fine-tuning: records of conversations and instructions → examples, of which some tokens are trained.

mod examples;

pub use examples::{Example, ExampleRef, Examples};
