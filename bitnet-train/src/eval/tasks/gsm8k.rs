//! GSM8K (arXiv:2110.14168): school problems, of whose written solutions the final number counts.

use std::sync::LazyLock;

use regex::{Captures, Regex};

use super::{ANSWER_TOKENS, Examples, Task};
use crate::{
    Result,
    eval::{
        Ask, Document, data::TaskData, metric::EXACT_MATCH, metric::Metric, records::Record,
        request::is_space,
    },
};

pub const GSM8K: Task = Task {
    name: "gsm8k",
    version: "3",
    data: TaskData::new(&["gsm8k"], "openai/gsm8k", Some("main"), ("test", Some("train"))),
    shots: 5,
    examples: Examples::Drawn { leaves_out: false },
    metrics: &[
        Metric { filter: "flexible-extract", ..EXACT_MATCH },
        Metric { filter: "strict-match", ..EXACT_MATCH },
    ],
    until: &["Question:", "</s>", "<|im_end|>"],
    answer_tokens: ANSWER_TOKENS,
    runs_programs: false,
    read,
    pages: None,
    judge,
};

/// `question`, `answer`: the solution, with `#### ` before its number.
fn read(record: &Record<'_>) -> Result<Document> {
    let (question, answer) = (record.text("question")?, record.text("answer")?);
    if !answer.contains("#### ") {
        return Err(record.refuse("answer", "has no `#### ` before its number"));
    }
    Ok(Document {
        text: format!("Question: {question}\nAnswer:"),
        answer: answer.into(),
        ask: Ask::Written { target: answer.into() },
    })
}

/// What stands for an answer without a number.
const NONE: &str = "[invalid]";

/// The last number, wherever it stands, and the first behind `#### `.
fn judge(answer: &str, target: &str) -> Vec<f64> {
    static STRICT: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"#### (-?[0-9.,]+)").expect("a constant pattern"));
    static NUMBER: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"(-?[$0-9.,]{2,})|(-?[0-9]+)").expect("a constant pattern"));
    let strict = STRICT.captures(answer);
    let strict = strict.and_then(|found| found.get(1)).map_or(NONE, |found| found.as_str());
    let flexible = NUMBER.find_iter(answer).last().map_or(NONE, |found| found.as_str());
    let target = normalize(target);
    let is_right = |found: &str| normalize(found.trim_matches(is_space)) == target;
    [flexible, strict].map(|found| f64::from(u8::from(is_right(found)))).to_vec()
}

/// Without thousands' commas, dollars, all before `#### ` and a stop at the end, in lower case.
fn normalize(text: &str) -> String {
    static STOP: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"\.(\n?)\z").expect("a constant pattern"));
    let text = text.replace([',', '$'], "");
    let text = text.rsplit_once("#### ").map_or(&text[..], |(_, number)| number);
    STOP.replace(text, |found: &Captures<'_>| found[1].to_owned()).to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_number_or_the_marked_one_counts() {
        let target = "So 2 * 600 = <<2*600=1200>>1,200.\n#### 1,200";
        for (answer, flexible, strict) in [
            ("He has 1200.\n#### 1200", 1., 1.),
            ("#### $1,200 in all", 1., 0.), // the strict pattern knows no dollar
            ("It is $1,200.00", 0., 0.),
            ("It is 1200.", 1., 0.),
            ("#### 1,200\n\nAnd 5 more", 0., 1.),
            ("#### 7\n#### 1200", 1., 0.),
            ("-1200", 0., 0.),
            ("no number", 0., 0.),
            ("", 0., 0.),
        ] {
            assert_eq!(judge(answer, target), [flexible, strict], "{answer:?}");
        }
    }
}
