//! MATH-500 (arXiv:2103.03874, 2305.20050) with the prompt of Minerva (arXiv:2206.14858): the final answer counts if it is the
//! same text as the right one when both are normalized, or the same formula. For that the harness has sympy; here a formula
//! is computed exactly if it is an ordinary one ([`crate::eval::formula`]). The harness' second metric, of the library math-verify, is not here.

use super::{
    ANSWER_TOKENS, Examples, Task,
    math_answer::{final_answer, last_boxed, normalize},
};
use crate::{
    Result,
    eval::{
        Ask, Document,
        data::TaskData,
        formula::{same_answer, same_value},
        metric::{EXACT_MATCH, Metric},
        records::Record,
    },
};

pub const MATH500: Task = Task {
    name: "minerva_math500",
    version: "3.1",
    data: TaskData::new(
        &["minerva_math500", "math500"],
        "HuggingFaceH4/MATH-500",
        None,
        ("test", None),
    ),
    shots: 4,
    examples: Examples::First,
    metrics: &[Metric { filter: "boxed", ..EXACT_MATCH }, EXACT_MATCH],
    until: &["Problem:"],
    answer_tokens: ANSWER_TOKENS,
    runs_programs: false,
    read,
    pages: None,
    judge,
};

fn text(problem: &str) -> String {
    format!("Problem:\n{problem}\n\nSolution:")
}

/// `problem`, `solution`, whose last `\boxed` is the answer.
fn read(record: &Record<'_>) -> Result<Document> {
    let (problem, solution) = (record.text("problem")?, record.text("solution")?);
    let answer = last_boxed(solution)
        .ok_or_else(|| record.refuse("solution", "has no answer in `\\boxed{…}`"))?;
    Ok(Document {
        text: text(problem),
        answer: solution.into(),
        ask: Ask::Written { target: normalize(answer) },
    })
}

/// The last box, which replies in a conversation have, and what follows `The final answer is`, as the harness looks for it. The
/// first may be a point, an interval or a list as well.
fn judge(answer: &str, target: &str) -> Vec<f64> {
    let boxed = last_boxed(answer).map(normalize).unwrap_or_default();
    let named = normalize(&final_answer(answer));
    let same_text = |found: &str| !found.is_empty() && found == target;
    let is_right = [
        same_text(&boxed) || same_answer(&boxed, target),
        same_text(&named) || same_value(&named, target),
    ];
    is_right.map(|is_right| f64::from(u8::from(is_right))).to_vec()
}
