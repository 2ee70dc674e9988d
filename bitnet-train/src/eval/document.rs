//! What a record of a data file comes to: a question, and what is asked about it.

/// A question with its answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Document {
    /// What comes before the answer.
    pub text: String,
    /// The right answer, as an example shows it.
    pub answer: String,
    /// What is asked of a model.
    pub ask: Ask,
}

/// What is asked of a model.
#[derive(Clone, Debug, PartialEq)]
pub enum Ask {
    /// Which of these follows the text.
    Choices {
        /// The answers.
        choices: Vec<String>,
        /// The right one.
        gold: usize,
    },
    /// Behind which of these the answer follows.
    Contexts {
        /// The beginnings.
        contexts: Vec<String>,
        /// The right one.
        gold: usize,
    },
    /// How likely the answer is, and whether the model would write it.
    Ending,
    /// How likely the answer, a whole text without anything before it, is.
    Page {
        /// Words of the text as it is in the file.
        words: usize,
        /// Bytes of the same.
        bytes: usize,
    },
    /// To write a program, which then runs.
    Program {
        /// What comes behind it, and ends without an error if it is right.
        test: String,
    },
    /// To write an answer.
    Written {
        /// What it is compared with.
        target: String,
    },
}
