//! Supervised fine-tuning: records of instructions and conversations → examples, of which some tokens are trained.
//!
//! ```text
//! record → sample → prompt and reply, by the model's chat template → tokens → examples
//! ```
//! `data.format` of a recipe asks for it. A record that is too long is cut at its end; what was found and what was left
//! out is in a [`Report`].

mod encode;
mod examples;
mod load;
mod preview;
mod prompt;
mod record;
mod report;
mod template;

pub use encode::LossOn;
pub use examples::{Example, ExampleRef, Examples};
pub(crate) use load::{open, template, tokenizer};
pub use preview::{Shown, preview};
pub use record::Format;
pub use report::Report;
pub use template::Template;

#[cfg(test)]
mod tests;
