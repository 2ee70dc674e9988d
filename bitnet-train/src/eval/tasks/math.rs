//! MATH-500 (arXiv:2103.03874, 2305.20050) with the prompt of Minerva (arXiv:2206.14858): the final answer counts if it is the
//! same text as the right one when both are normalized. The harness also lets sympy compare the two as formulas, and
//! has a second metric that a library named math-verify computes; neither is here.

use super::{
    Examples, Task,
    math_answer::{final_answer, last_boxed, normalize},
};
use crate::{
    Result,
    eval::{Ask, Document, metric::EXACT_MATCH, metric::Metric, records::Record},
};

pub const MATH500: Task = Task {
    name: "minerva_math500",
    version: "3.1",
    files: &["minerva_math500", "math500"],
    shots: 4,
    examples: Examples::First,
    metrics: &[Metric { filter: "boxed", ..EXACT_MATCH }, EXACT_MATCH],
    until: &["Problem:"],
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

/// The last box, which replies in a conversation have, and what follows `The final answer is`, as the harness looks for it.
fn judge(answer: &str, target: &str) -> Vec<f64> {
    let is_right = |found: &str| f64::from(u8::from(!found.is_empty() && found == target));
    let boxed = last_boxed(answer).map(normalize).unwrap_or_default();
    vec![is_right(&boxed), is_right(&normalize(&final_answer(answer)))]
}
