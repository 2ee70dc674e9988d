//! Examples as text in which one sees what is trained.

use super::ExampleRef;
use crate::{
    Error, Result,
    dataset::{Content, Vocabulary},
};

/// Consecutive tokens of an example that are all trained, or all not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shown {
    /// Their text, special tokens spelt out.
    pub text: String,
    /// Whether they are trained.
    pub is_trained: bool,
}

/// The first `count` examples of `content`, as text.
///
/// # Errors
/// Content that is no examples but a stream of text.
pub fn preview(
    content: &Content,
    vocabulary: &Vocabulary,
    count: usize,
) -> Result<Vec<Vec<Shown>>> {
    let Content::Examples(examples) = content else {
        let reason = "a stream of text has no examples to show: all of it is trained";
        return Err(Error::recipe("data.format", reason));
    };
    (0..count.min(examples.len())).map(|index| examples.get(index).show(vocabulary)).collect()
}

impl ExampleRef<'_> {
    /// Its text, cut where the trained tokens begin and end.
    pub fn show(&self, vocabulary: &Vocabulary) -> Result<Vec<Shown>> {
        let mut shown = Vec::new();
        let mut at = 0;
        for run in self.trained.chunk_by(|left, right| left == right) {
            let text = vocabulary.decode(&self.ids[at..at + run.len()])?;
            shown.push(Shown { text, is_trained: run[0] });
            at += run.len();
        }
        Ok(shown)
    }
}
