//! WikiText-2 (arXiv:1609.07843) by article: how well a model foresees a text. Words and bytes are counted before the text is
//! brought back to ordinary spacing.

use std::sync::LazyLock;

use regex::Regex;
use serde_json::{Value, json};

use super::{ANSWER_TOKENS, Examples, Sample, Task, nothing_written};
use crate::{
    Result,
    eval::{
        Ask, Document,
        data::TaskData,
        metric::{BITS_PER_BYTE, BYTE_PERPLEXITY, WORD_PERPLEXITY},
        records::Record,
        request::is_space,
    },
};

pub const WIKITEXT: Task = Task {
    name: "wikitext",
    version: "2",
    data: TaskData::new(
        &["wikitext", "wikitext2"],
        "EleutherAI/wikitext_document_level",
        Some("wikitext-2-raw-v1"),
        ("test", None),
    ),
    shots: 0,
    examples: Examples::None,
    metrics: &[BITS_PER_BYTE, BYTE_PERPLEXITY, WORD_PERPLEXITY],
    until: &[],
    answer_tokens: ANSWER_TOKENS,
    runs_programs: false,
    read,
    pages: Some(pages),
    judge: nothing_written,
};

/// `page`: an article.
fn read(record: &Record<'_>) -> Result<Document> {
    let page = record.text("page")?;
    // As many as there are pieces between stretches of white space, empty ones at both ends included.
    let (mut words, mut was_space) = (1, false);
    for c in page.chars() {
        words += usize::from(is_space(c) && !was_space);
        was_space = is_space(c);
    }
    let ask = Ask::Page { words, bytes: page.len() };
    Ok(Document { text: String::new(), answer: detokenize(page), ask })
}

pub fn values(sum: f64, words: usize, bytes: usize) -> Vec<Sample> {
    let by = |weight: usize| Sample { value: sum, weight: weight as f64 };
    vec![by(bytes), by(bytes), by(words)]
}

/// The articles of the file as it is distributed: a heading of the first order, ` = Title = `, begins one.
fn pages(text: &str) -> Vec<Value> {
    let is_heading = |line: &str| {
        let line = line.replace("= = =", "===").replace("= =", "==");
        let line = line.trim_matches(is_space);
        line.starts_with("= ") && line.ends_with(" =")
    };
    let (mut pages, mut page) = (Vec::new(), Vec::new());
    for line in text.split('\n') {
        if is_heading(line) {
            pages.push(std::mem::take(&mut page).join("\n"));
        }
        page.push(line);
    }
    pages.push(page.join("\n"));
    let pages = pages.into_iter().filter(|page| !page.chars().all(is_space));
    pages.map(|page| json!({ "page": page })).collect()
}

/// Undoes the spacing of the corpus, in the harness' order.
fn detokenize(page: &str) -> String {
    static ENCLOSED: LazyLock<[(Regex, &str); 5]> = LazyLock::new(|| {
        [
            (r"\(\s*([^)]*?)\s*\)", "(${1})"),
            (r"\[\s*([^\]]*?)\s*\]", "[${1}]"),
            (r"\{\s*([^}]*?)\s*\}", "{${1}}"),
            (r#""\s*([^"]*?)\s*""#, "\"${1}\""),
            (r"'\s*([^']*?)\s*'", "'${1}'"),
        ]
        .map(|(pattern, by)| (Regex::new(pattern).expect("a constant pattern"), by))
    });
    // Between slashes, and so without effect on ordinary text; the harness has it.
    static SLASHES: LazyLock<Regex> =
        LazyLock::new(|| Regex::new("/' [0-9]/").expect("a constant pattern"));
    let text = page.replace("s '", "s'");
    let mut text = SLASHES.replace_all(&text, "/'[0-9]/").into_owned();
    for (from, to) in [
        (" @-@ ", "-"),
        (" @,@ ", ","),
        (" @.@ ", "."),
        (" : ", ": "),
        (" ; ", "; "),
        (" . ", ". "),
        (" ! ", "! "),
        (" ? ", "? "),
        (" , ", ", "),
    ] {
        text = text.replace(from, to);
    }
    for (pattern, by) in &*ENCLOSED {
        text = pattern.replace_all(&text, *by).into_owned();
    }
    for (from, to) in [
        ("= = = =", "===="),
        ("= = =", "==="),
        ("= =", "=="),
        (" ° ", "°"),
        (" \n", "\n"),
        ("\n ", "\n"),
        (" N ", " 1 "),
        (" 's", "'s"),
    ] {
        text = text.replace(from, to);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn articles_begin_with_their_headings() {
        let text = " \n = One = \n \n a \n = = Part = = \n b = c \n = Two = \n d \n";
        let pages = pages(text);
        let pages = Vec::from_iter(pages.iter().map(|page| page["page"].as_str().unwrap()));
        assert_eq!(pages, [" = One = \n \n a \n = = Part = = \n b = c ", " = Two = \n d \n"]);
    }

    #[test]
    fn spacing_is_undone() {
        let text = " = = Cast = = \n It ( a ' b ' ) was 3 @.@ 5 m , \" so \" 's . He said : no \n";
        assert_eq!(detokenize(text), " == Cast ==\nIt (a 'b') was 3.5 m, \"so\"'s. He said: no\n");
    }
}
