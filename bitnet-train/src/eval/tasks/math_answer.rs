//! Final answers in LaTeX: where they stand in a solution, and their normal form as in the appendix of the paper on Minerva
//! (arXiv:2206.14858), with the corrections of the harness.

use std::sync::LazyLock;

use regex::{Captures, Regex};

use crate::eval::request::is_space;

/// What stands for an answer that is not there.
const NONE: &str = "[invalidanswer]";

/// What is replaced, in order.
const REPLACED: [(&str, &str); 10] = [
    ("an ", ""),
    ("a ", ""),
    (".$", "$"),
    ("\\$", ""),
    ("\\ ", ""),
    (" ", ""),
    ("mbox", "text"),
    (",\\text{and}", ","),
    ("\\text{and}", ","),
    ("\\text{m}", "\\text{}"),
];

/// Words that say nothing, mostly units, and LaTeX that only spaces, in the order in which they go.
const REMOVED: [&str; 42] = [
    "square",
    "ways",
    "integers",
    "dollars",
    "mph",
    "inches",
    "ft",
    "hours",
    "km",
    "units",
    "\\ldots",
    "sue",
    "points",
    "feet",
    "minutes",
    "digits",
    "cents",
    "degrees",
    "cm",
    "gm",
    "pounds",
    "meters",
    "meals",
    "edges",
    "students",
    "childrentickets",
    "multiples",
    "\\text{s}",
    "\\text{.}",
    "\\text{\ns}",
    "\\text{}^2",
    "\\text{}^3",
    "\\text{\n}",
    "\\text{}",
    "\\mathrm{th}",
    "^\\circ",
    "^{\\circ}",
    "\\;",
    ",\\!",
    "{,}",
    "\"",
    "\\dots",
];

/// The patterns, compiled once.
struct Patterns {
    /// What stands between `The final answer is` and the last sentence of the examples.
    final_answer: Regex,
    /// The words of [`REMOVED`], alone.
    words: Vec<Regex>,
    command: Regex,
    /// With what takes their place.
    rewritten: [(Regex, &'static str); 8],
    thousands: Regex,
}

static PATTERNS: LazyLock<Patterns> = LazyLock::new(|| {
    let regex = |pattern: &str| Regex::new(pattern).expect("a constant pattern");
    Patterns {
        final_answer: regex("Final Answer: The final answer is(.*?). I hope it is correct."),
        words: REMOVED
            .iter()
            .filter(|word| is_word(word))
            .map(|word| regex(&format!(r"\b{word}\b")))
            .collect(),
        command: regex(r"\\[a-zA-Z]+"),
        rewritten: [
            (r".*?\$(.*?)\$.*", "$$${1}$$"),
            (r"\\text\{(.*?)\}", "${1}"),
            (r"\\textbf\{(.*?)\}", "${1}"),
            (r"\\overline\{(.*?)\}", "${1}"),
            (r"\\boxed\{(.*)\}", "${1}"),
            // \frac12 is \frac{1}{2}.
            (r"frac([^{])(.)", "frac{${1}}{${2}}"),
            // \sqrt[3]8 is \sqrt[3]{8}, and \sqrt2 is \sqrt{2}.
            (r"sqrt(\[[^\]]*\])(\w)", "sqrt${1}{${2}}"),
            (r"sqrt([^\[{])", "sqrt{${1}}"),
        ]
        .map(|(pattern, by)| (regex(pattern), by)),
        thousands: regex(r"^-?\d{1,3}(,\d{3})+$"),
    }
});

fn is_word(text: &str) -> bool {
    text.chars().all(char::is_alphabetic)
}

/// What a solution names as its final answer in the words of the examples.
pub fn final_answer(text: &str) -> String {
    let text = format!("{text}I hope it is correct.");
    let found = PATTERNS.final_answer.captures(&text).and_then(|found| found.get(1));
    found.map_or(NONE, |found| found.as_str().trim_matches(is_space)).into()
}

/// What is in the last `\boxed{…}`, or behind the last `\boxed ` up to a dollar.
pub fn last_boxed(text: &str) -> Option<&str> {
    if let Some((_, answer)) = text.rsplit_once("\\boxed ") {
        return answer.split('$').next();
    }
    let (_, answer) = text.rsplit_once("\\boxed")?;
    let answer = answer.strip_prefix('{')?;
    let mut open = 1;
    for (index, c) in answer.char_indices() {
        match c {
            '{' => open += 1,
            '}' => open -= 1,
            _ => {}
        }
        if open == 0 {
            return Some(&answer[..index]);
        }
    }
    None
}

/// The normal form of an answer; equal answers often have the same.
pub fn normalize(answer: &str) -> String {
    let mut text = answer.rsplit('=').next().unwrap_or_default().to_owned();
    // Words go while spaces still part them: later `ft` would be taken out of `\left`.
    for word in &PATTERNS.words {
        let whole = text.clone();
        let replace = |found: &Captures<'_>| {
            let start = found.get(0).map_or(0, |found| found.start());
            if whole[..start].ends_with('\\') { found[0].to_owned() } else { String::new() }
        };
        text = word.replace_all(&whole, replace).into_owned();
    }
    for (from, to) in REPLACED {
        text = text.replace(from, to);
    }
    for removed in REMOVED {
        text = match is_word(removed) {
            true => outside_commands(&text, removed),
            false => text.replace(removed, ""),
        };
    }
    for (pattern, by) in &PATTERNS.rewritten {
        text = pattern.replace_all(&text, *by).into_owned();
    }
    text = text.replace('$', "");
    match PATTERNS.thousands.is_match(&text) {
        true => text.replace(',', ""),
        false => text,
    }
}

/// Takes `word` out of everything but the names of commands.
fn outside_commands(text: &str, word: &str) -> String {
    let (mut out, mut end) = (String::new(), 0);
    for command in PATTERNS.command.find_iter(text) {
        out += &text[end..command.start()].replace(word, "");
        out += command.as_str();
        end = command.end();
    }
    out + &text[end..].replace(word, "")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_box_is_found() {
        assert_eq!(last_boxed(r"so \boxed{1} and \boxed{\frac{1}{2}}."), Some(r"\frac{1}{2}"));
        assert_eq!(last_boxed(r"it is $\boxed 7$ then"), Some("7"));
        assert_eq!(last_boxed(r"\boxed{1"), None);
        assert_eq!(last_boxed("none"), None);
    }

    #[test]
    fn the_final_answer_is_found() {
        let of =
            |text: &str| final_answer(&format!("x.\nFinal Answer: The final answer is {text}"));
        assert_eq!(of("$5$. I hope it is correct."), "$5$");
        assert_eq!(of("$5$. "), "$5$"); // the sentence is put behind an answer that was cut
        assert_eq!(of("$5$"), NONE);
        assert_eq!(final_answer("5"), NONE);
    }

    /// By `normalize_final_answer` of the harness.
    #[test]
    fn normal_forms() {
        for (answer, normal) in [
            ("x = 5", "5"),
            (r"2\pi cm", r"2\pi"),
            (r"\left( 3, \frac{\pi}{2} \right)", r"\left(3,\frac{\pi}{2}\right)"),
            (r"\frac12", r"\frac{1}{2}"),
            (r"\sqrt2+\sqrt[3]8", r"\sqrt{2}+\sqrt[3]{8}"),
            ("$10,080$ ways", "10080"),
            ("0,1", "0,1"),
            (r"\text{Evelyn}", "Evelyn"),
            (r"90^\circ", "90"),
            (r"\$36", "36"),
            (r"12\text{ inches}", "12"),
        ] {
            assert_eq!(normalize(answer), normal, "{answer}");
        }
    }
}
