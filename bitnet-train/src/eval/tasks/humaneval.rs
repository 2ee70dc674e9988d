//! HumanEval+ (arXiv:2107.03374, with the tests of arXiv:2305.01210): the beginning of a function in Python is continued, and the
//! tests of the function are run.

use super::{Examples, Task, nothing_written};
use crate::{
    Result,
    eval::{Ask, Document, data::TaskData, metric::PASS_AT_1, records::Record},
};

/// The task.
pub const HUMANEVAL_PLUS: Task = Task {
    name: "humaneval_plus",
    version: "1",
    data: TaskData::new(
        &["humaneval_plus", "humanevalplus", "HumanEvalPlus-OriginFmt"],
        "evalplus/humanevalplus",
        None,
        ("test", None),
    ),
    shots: 0,
    examples: Examples::None,
    metrics: &[PASS_AT_1],
    until: &["\nclass", "\ndef", "\n#", "\nif", "\nprint"],
    answer_tokens: 1024,
    runs_programs: true,
    read,
    pages: None,
    judge: nothing_written,
};

/// `prompt`, `test`, which defines `check`, and `entry_point`, the name of what is checked; `canonical_solution` if there is one.
fn read(record: &Record<'_>) -> Result<Document> {
    let (prompt, test) = (record.text("prompt")?, record.text("test")?);
    let entry_point = record.text("entry_point")?;
    let is_name = |c: char| c.is_alphanumeric() || c == '_';
    if entry_point.is_empty() || !entry_point.chars().all(is_name) {
        return Err(record.refuse("entry_point", "must be the name of a function"));
    }
    let answer = match record.has("canonical_solution") {
        true => record.text("canonical_solution")?,
        false => "",
    };
    let test = format!("{test}\ncheck({entry_point})");
    Ok(Document { text: prompt.into(), answer: answer.into(), ask: Ask::Program { test } })
}

/// What runs for an answer.
pub fn program(prompt: &str, answer: &str, test: &str) -> String {
    format!("{prompt}{answer}\n{test}")
}
