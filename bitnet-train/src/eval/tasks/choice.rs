//! Questions with several answers: ARC, BoolQ, WinoGrande and PIQA. The answer that is most likely counts.

use super::{ACC, ACC_NORM, ANSWER_TOKENS, Examples, Metric, Sample, Task, nothing_written};
use crate::{
    Result,
    eval::{Ask, Document, data::TaskData, records::Record},
};

/// The easier set of ARC (arXiv:1803.05457).
pub const ARC_EASY: Task = Task {
    name: "arc_easy",
    version: "1",
    data: TaskData::new(
        &["arc_easy"],
        "allenai/ai2_arc",
        Some("ARC-Easy"),
        ("test", Some("train")),
    ),
    shots: 0,
    examples: Examples::Drawn { leaves_out: false },
    metrics: &[ACC, ACC_NORM],
    until: &[],
    answer_tokens: ANSWER_TOKENS,
    runs_programs: false,
    read: arc,
    pages: None,
    judge: nothing_written,
};

/// The challenge set of ARC.
pub const ARC_CHALLENGE: Task = Task {
    name: "arc_challenge",
    data: TaskData::new(
        &["arc_challenge"],
        "allenai/ai2_arc",
        Some("ARC-Challenge"),
        ("test", Some("train")),
    ),
    ..ARC_EASY
};

/// Yes or no (arXiv:1905.10044).
pub const BOOLQ: Task = Task {
    name: "boolq",
    version: "2",
    data: TaskData::new(&["boolq"], "aps/super_glue", Some("boolq"), ("validation", Some("train"))),
    examples: Examples::Drawn { leaves_out: true },
    metrics: &[ACC],
    read: boolq,
    ..ARC_EASY
};

/// Whom a pronoun means (arXiv:1907.10641).
pub const WINOGRANDE: Task = Task {
    name: "winogrande",
    version: "1",
    data: TaskData::new(
        &["winogrande"],
        "allenai/winogrande",
        Some("winogrande_xl"),
        ("validation", Some("train")),
    ),
    read: winogrande,
    ..BOOLQ
};

/// How things are done (arXiv:1911.11641).
pub const PIQA: Task = Task {
    name: "piqa",
    data: TaskData::new(&["piqa"], "baber/piqa", None, ("validation", Some("train"))),
    examples: Examples::Drawn { leaves_out: true },
    read: piqa,
    ..ARC_EASY
};

/// The question and its answers.
pub fn choices(text: String, choices: Vec<String>, gold: usize) -> Document {
    Document { text, answer: choices[gold].clone(), ask: Ask::Choices { choices, gold } }
}

/// `question`, `choices`, `gold`; or, as on the Hub, `choices` with `text` and `label`, and `answerKey`.
fn arc(record: &Record<'_>) -> Result<Document> {
    let text = format!("Question: {}\nAnswer:", record.text("question")?);
    let field = record.get("choices")?;
    if field.is_array() {
        let all = record.choices("choices")?;
        let gold = record.index("gold", all.len())?;
        return Ok(choices(text, all, gold));
    }
    let part = |name| {
        let part =
            field.get(name).ok_or_else(|| record.refuse("choices", format!("has no `{name}`")))?;
        record.choices_of("choices", part)
    };
    let (all, labels, key) = (part("text")?, part("label")?, record.text("answerKey")?);
    let gold = labels.iter().position(|label| label == key);
    let gold = gold.filter(|&gold| gold < all.len());
    let gold = gold.ok_or_else(|| record.refuse("answerKey", format!("`{key}` is no label")))?;
    Ok(choices(text, all, gold))
}

/// `passage`, `question`, `label`; or `answer`, true or false.
fn boolq(record: &Record<'_>) -> Result<Document> {
    let (passage, question) = (record.text("passage")?, record.text("question")?);
    let gold = match record.has("answer") {
        true => {
            let answer = record.get("answer")?.as_bool();
            usize::from(answer.ok_or_else(|| record.refuse("answer", "must be true or false"))?)
        }
        false => record.index("label", 2)?,
    };
    let text = format!("{passage}\nQuestion: {question}?\nAnswer:");
    Ok(choices(text, ["no", "yes"].map(String::from).to_vec(), gold))
}

/// `context_options`, `continuation`, `gold`; or `sentence` with `_` for `option1` or `option2`, and `answer`.
fn winogrande(record: &Record<'_>) -> Result<Document> {
    if record.has("context_options") {
        let contexts = record.choices("context_options")?;
        let gold = record.index("gold", contexts.len())?;
        return Ok(ending(contexts, record.text("continuation")?, gold));
    }
    let sentence = record.text("sentence")?;
    let Some((before, after)) = sentence.split_once('_') else {
        return Err(record.refuse("sentence", "has no `_`"));
    };
    let gold = match record.text("answer")? {
        "1" => 0,
        "2" => 1,
        other => return Err(record.refuse("answer", format!("is `{other}`, but must be 1 or 2"))),
    };
    let options = [record.text("option1")?, record.text("option2")?];
    let contexts = options.map(|option| format!("{before}{option}")).to_vec();
    Ok(ending(contexts, after.trim(), gold))
}

fn ending(contexts: Vec<String>, answer: &str, gold: usize) -> Document {
    let text = contexts[gold].clone();
    Document { text, answer: answer.into(), ask: Ask::Contexts { contexts, gold } }
}

/// `query`, `choices`, `gold`; or `goal`, `sol1`, `sol2`, `label`.
fn piqa(record: &Record<'_>) -> Result<Document> {
    let text = |goal: &str| format!("Question: {goal}\nAnswer:");
    if record.has("goal") {
        let all = ["sol1", "sol2"].map(|name| record.text(name).map(String::from));
        let all = all.into_iter().collect::<Result<Vec<_>>>()?;
        return Ok(choices(text(record.text("goal")?), all, record.index("label", 2)?));
    }
    let query = record.text("query")?;
    let goal = query.strip_prefix("Question: ").and_then(|query| query.strip_suffix('\n'));
    let goal = goal.ok_or_else(|| {
        record.refuse("query", "must be `Question: `, the question and a new line")
    })?;
    let all = record.choices("choices")?;
    let gold = record.index("gold", all.len())?;
    Ok(choices(text(goal), all, gold))
}

/// Whether the most likely answer is the right one, and whether it is so by character.
pub fn values(metrics: &[Metric], choices: &[String], gold: usize, sums: &[f64]) -> Vec<Sample> {
    let by_character = Vec::from_iter(
        sums.iter().zip(choices).map(|(sum, text)| sum / text.chars().count() as f64),
    );
    let is_right = |scores: &[f64]| Sample::of(f64::from(u8::from(first_best(scores) == gold)));
    let value = |metric: &Metric| match metric.name == ACC_NORM.name {
        true => is_right(&by_character),
        false => is_right(sums),
    };
    metrics.iter().map(value).collect()
}

/// The place of the largest, the first of equals.
fn first_best(scores: &[f64]) -> usize {
    let better = |best: usize, i: usize| if scores[i] > scores[best] { i } else { best };
    (1..scores.len()).fold(0, better)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_of_the_best_counts() {
        let texts = |texts: &[&str]| Vec::from_iter(texts.iter().map(|text| text.to_string()));
        let judge = |choices: &[&str], gold, sums: &[f64]| {
            let values = values(&[ACC, ACC_NORM], &texts(choices), gold, sums);
            Vec::from_iter(values.iter().map(|sample| sample.value))
        };
        // -4 / 2 < -6 / 4, and `éé` are two characters in four bytes.
        assert_eq!(judge(&["éé", "four"], 0, &[-4., -6.]), [1., 0.]);
        assert_eq!(judge(&["éé", "four"], 1, &[-4., -6.]), [0., 1.]);
        assert_eq!(judge(&["aa", "bb", "cc"], 1, &[-3., -2., -2.]), [1., 1.]);
        assert_eq!(judge(&["aa", "bb", "cc"], 2, &[-3., -2., -2.]), [0., 0.]);
    }
}
