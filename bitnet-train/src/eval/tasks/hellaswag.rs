//! HellaSwag (arXiv:1905.07830): how a scene goes on.

use std::sync::LazyLock;

use regex::Regex;

use super::{Examples, Task, choice};
use crate::{
    Result,
    eval::{Document, data::TaskData, records::Record, request::is_space},
};

pub const HELLASWAG: Task = Task {
    name: "hellaswag",
    data: TaskData::new(&["hellaswag"], "Rowan/hellaswag", None, ("validation", Some("train"))),
    examples: Examples::Drawn { leaves_out: true },
    read,
    ..choice::ARC_EASY
};

/// `activity_label`, `ctx_a`, `ctx_b`, `endings`, `label`, a number or its digits.
fn read(record: &Record<'_>) -> Result<Document> {
    let all = record.choices("endings")?;
    let gold = match record.get("label")?.as_str() {
        Some(digits) => digits.parse().ok().filter(|&gold: &usize| gold < all.len()),
        None => Some(record.index("label", all.len())?),
    };
    let gold = gold.ok_or_else(|| record.refuse("label", "must be the number of an ending"))?;
    let (label, a) = (record.text("activity_label")?, record.text("ctx_a")?);
    let text = clean(&format!("{label}: {a} {}", capitalized(record.text("ctx_b")?)));
    let all = all.iter().map(|ending| clean(ending)).collect();
    Ok(choice::choices(text, all, gold))
}

/// The first letter large, the others small.
fn capitalized(text: &str) -> String {
    let mut chars = text.chars();
    let first = chars.next().map(char::to_uppercase);
    let rest = chars.as_str().to_lowercase();
    first.into_iter().flatten().chain(rest.chars()).collect()
}

/// Without the marks of the pages it was taken from.
fn clean(text: &str) -> String {
    static MARK: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"\[.*?\]").expect("a constant pattern"));
    let text = text.trim_matches(is_space).replace(" [title]", ". ");
    MARK.replace_all(&text, "").replace("  ", " ")
}
