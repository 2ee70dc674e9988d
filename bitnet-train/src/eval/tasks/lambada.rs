//! LAMBADA (arXiv:1606.06031) in OpenAI's version: the last word of a passage.

use super::{ANSWER_TOKENS, Examples, Sample, Task, nothing_written};
use crate::{
    Result,
    eval::{
        Ask, Document,
        data::TaskData,
        metric::{ACC, PERPLEXITY},
        records::Record,
    },
};

pub const LAMBADA: Task = Task {
    name: "lambada_openai",
    version: "1",
    data: TaskData::new(
        &["lambada_openai"],
        "EleutherAI/lambada_openai",
        Some("default"),
        ("test", None),
    ),
    shots: 0,
    examples: Examples::Own,
    metrics: &[ACC, PERPLEXITY],
    until: &[],
    answer_tokens: ANSWER_TOKENS,
    runs_programs: false,
    read,
    pages: None,
    judge: nothing_written,
};

/// `text`; or `context` and `continuation`, which one space joins.
fn read(record: &Record<'_>) -> Result<Document> {
    let joined;
    let (field, text) = match record.has("text") {
        true => ("text", record.text("text")?),
        false => {
            joined = format!("{} {}", record.text("context")?, record.text("continuation")?);
            ("context", &joined[..])
        }
    };
    let Some((text, word)) = text.rsplit_once(' ') else {
        return Err(record.refuse(field, "has no space before its last word"));
    };
    Ok(Document { text: text.into(), answer: format!(" {word}"), ask: Ask::Ending })
}

pub fn values(sum: f64, is_greedy: bool) -> Vec<Sample> {
    vec![Sample::of(f64::from(u8::from(is_greedy))), Sample::of(sum)]
}
