//! Whether two answers in LaTeX mean the same.
//!
//! Both are computed exactly, so that what is said to be equal is equal: π and e are independent of all else, a root of a prime is
//! known by its power, and of other functions only that equal arguments give equal values. Formulas that are not understood, or
//! too large, are equal to nothing but the same text.

mod parse;
mod parts;
mod value;

use parse::{Mixed, parse};
use parts::Parts;

/// Whether two formulas have the same value, as lm-evaluation-harness has sympy find out: no tuples, intervals or lists.
pub fn same_value(a: &str, b: &str) -> bool {
    same(a, b, Mixed::Refused)
}

/// Whether two answers are the same: formulas, with mixed numbers; percentages; points and intervals part by part; lists, sets
/// and unions in any order.
pub fn same_answer(a: &str, b: &str) -> bool {
    let [a, b] = [a, b].map(|text| text.replace("\\left", "").replace("\\right", ""));
    same_part(&a, &b)
}

fn same_part(a: &str, b: &str) -> bool {
    let [a, b] = [a, b].map(|text| text.trim().trim_start_matches('+'));
    if a.is_empty() || b.is_empty() {
        return false;
    }
    let [x, y] = [a, b].map(without_percent);
    if a == b || same(&x, &y, Mixed::Sum) {
        return true;
    }
    match (Parts::of(a), Parts::of(b)) {
        (Some(a), Some(b)) => a.same(&b, same_part),
        _ => false,
    }
}

/// A percentage as what it stands for: `5\%` is `(5)/100`.
fn without_percent(text: &str) -> String {
    match text.strip_suffix("\\%").or(text.strip_suffix('%')) {
        Some(percent) => format!("({percent})/100"),
        None => text.into(),
    }
}

fn same(a: &str, b: &str, mixed: Mixed) -> bool {
    let same = || parse(a, mixed)?.equals(&parse(b, mixed)?);
    same().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As `is_equiv` of the harness, which asks sympy, says of both.
    #[test]
    fn values_as_sympy_compares_them() {
        for (a, b) in [
            ("0.5", r"\frac{1}{2}"),
            (r"\sqrt{8}", r"2\sqrt{2}"),
            (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}"),
            ("x^2-1", "(x-1)(x+1)"),
            ("2^{10}", "1024"),
            ("1/2", ".5"),
            (r"-\frac{2}{3}", r"\frac{-2}{3}"),
            (r"2\cdot3", "6"),
            (r"8^{\frac{1}{3}}", "2"),
            (r"\sqrt[3]{16}", r"2\sqrt[3]{2}"),
            (r"\frac{\pi}{2}", r"0.5\pi"),
            ("2x+3", "3+2x"),
            ("xy", "yx"),
            ("5!", "120"),
            (r"\binom{5}{2}", "10"),
            ("e^2", "e*e"),
            (r"\frac{x^2-1}{x-1}", "x+1"),
            (r"\left(x+1\right)^2", "x^2+2x+1"),
            (r"\sqrt{x+1}", r"\sqrt{1+x}"),
            ("2^{n+1}", "2^{1+n}"),
            (r"3\frac{\sqrt{20}}{2}", r"3\sqrt{5}"),
            (r"1\pm\sqrt{8}", r"1\pm2\sqrt{2}"),
        ] {
            assert!(same_value(a, b) && same_value(b, a), "{a} and {b}");
            assert!(same_answer(a, b), "{a} and {b}");
        }
        for (a, b) in [
            ("0.333", r"\frac{1}{3}"),
            ("3.14159265", r"\pi"),
            (r"\sqrt{x^2}", "x"),
            ("x-y", "y-x"),
            ("(1,2)", "(1,2.0)"),
            ("1,2", "2,1"),
            ("10_8", "8"),
            ("i^2", "-1"),
            (r"1\pm2", "3"),
            ("|x|", "x"),
            ("1 2", "12"),
            ("", "0"),
            (r"\frac{1}{0}", r"\frac{2}{0}"),
            ("2^10", "1024"),
            // Sympy makes a product of the first: both are not taken for numbers.
            (r"3\frac{1}{5}", "3.2"),
            (r"3\frac{1}{5}", r"\frac{3}{5}"),
            ("seat", "east"),
        ] {
            assert!(!same_value(a, b) && !same_value(b, a), "{a} and {b}");
        }
    }

    #[test]
    fn answers_of_parts() {
        for (a, b) in [
            (r"\left(\frac{1}{2},1\right)", "(0.5, 1)"),
            (r"3\frac{1}{5}", r"\frac{16}{5}"),
            (r"[2,\infty)", r"[2.0,+\infty)"),
            ("1,2", "2,1"),
            (r"\{1,2\}", "2,1.0"),
            (r"(-\infty,2)\cup(3,\infty)", r"(3,\infty)\cup(-\infty,2.0)"),
            (r"10\%", "0.1"),
            (r"10\%", r"10.0\%"),
            ("((1,2),3)", "((1,2.0),3)"),
        ] {
            assert!(same_answer(a, b) && same_answer(b, a), "{a} and {b}");
        }
        for (a, b) in [
            ("[2,5)", "[2,5]"),
            ("(1,2)", "(2,1)"),
            ("(1,2)", "1,2"),
            (r"10\%", "10"),
            ("1,1,2", "1,2,2"),
            ("(1,2)", "(1,2,3)"),
            (r"\{\}", "0"),
            ("(1,2", "(1,2)"),
        ] {
            assert!(!same_answer(a, b) && !same_answer(b, a), "{a} and {b}");
        }
    }

    #[test]
    fn nonsense_is_equal_to_nothing() {
        let deep = "(".repeat(5000) + "1" + &")".repeat(5000);
        let wide = "(x+y+z+1)^{60}".repeat(9);
        let signs = "-".repeat(100_000) + "1"; // an even number of them: it is 1
        assert!(same_value(&signs, "1"));
        for text in [
            &deep[..],
            &wide,
            "^",
            r"\frac",
            r"\frac{1}",
            "1+",
            "é",
            r"\",
            "{}",
            "..",
            "9".repeat(60).as_str(),
        ] {
            assert!(!same_value(text, "1"), "{text}");
            assert!(!same_answer(text, "1"), "{text}");
        }
    }
}
