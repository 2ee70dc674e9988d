//! Answers of several parts: points, intervals, lists, sets, unions.

/// An answer of several parts.
pub struct Parts<'a> {
    /// The brackets of a point or an interval; `None` where the order of the parts says nothing.
    brackets: Option<(char, char)>,
    parts: Vec<&'a str>,
}

impl<'a> Parts<'a> {
    /// `None` for an answer of one part.
    pub fn of(text: &'a str) -> Option<Self> {
        if text.contains("\\cup") {
            return Some(Self { brackets: None, parts: text.split("\\cup").collect() });
        }
        if let Some(inner) = text.strip_prefix("\\{").and_then(|rest| rest.strip_suffix("\\}")) {
            return Some(Self { brackets: None, parts: split(inner)? });
        }
        let parts = split(text)?;
        if parts.len() > 1 {
            return Some(Self { brackets: None, parts });
        }
        let (open, close) = (text.chars().next()?, text.chars().next_back()?);
        let inner = text.strip_prefix(['(', '['])?.strip_suffix([')', ']'])?;
        let parts = split(inner).filter(|parts| parts.len() > 1)?;
        Some(Self { brackets: Some((open, close)), parts })
    }

    /// Whether both have the same parts: in the same order where there are brackets, otherwise each part as often.
    pub fn same(&self, other: &Self, same: impl Fn(&str, &str) -> bool) -> bool {
        if self.brackets != other.brackets || self.parts.len() != other.parts.len() {
            return false;
        }
        if self.brackets.is_some() {
            return self.parts.iter().zip(&other.parts).all(|(a, b)| same(a, b));
        }
        let mut rest = other.parts.clone();
        self.parts.iter().all(|a| {
            let found = rest.iter().position(|b| same(a, b));
            found.map(|found| rest.swap_remove(found)).is_some()
        })
    }
}

/// Cuts at the commas that are in no brackets. `None` if brackets are not closed; an interval may close with another one.
fn split(text: &str) -> Option<Vec<&str>> {
    let (mut parts, mut begin, mut depth) = (Vec::new(), 0, 0usize);
    for (index, c) in text.char_indices() {
        match c {
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth = depth.checked_sub(1)?,
            ',' if depth == 0 => {
                parts.push(&text[begin..index]);
                begin = index + 1;
            }
            _ => {}
        }
    }
    parts.push(&text[begin..]);
    (depth == 0).then_some(parts)
}
