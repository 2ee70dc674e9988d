//! What chat templates expect of Python where minijinja has Rust's ways: the `str` methods, `json.dumps`
//! and `strftime`. Templates are untrusted, so everything that can grow pays with fuel.

use std::fmt::Write;

use chrono::{
    DateTime, Local,
    format::{Item, StrftimeItems},
};
use minijinja::{
    Error, ErrorKind, State, Value,
    value::{Kwargs, StringInput, Tuple, ValueKind, from_args},
};
use minijinja_contrib::pycompat;

/// Lists and objects in `tojson` nest at most this deep, as the writer recurses.
const MAX_JSON_DEPTH: usize = 128;

/// Methods of Python's types, for `Environment::set_unknown_method_callback`.
pub(super) fn method(
    state: &mut State,
    value: &Value,
    name: &str,
    args: &[Value],
) -> Result<Value, Error> {
    let Some(text) = value.as_str() else {
        return pycompat::unknown_method_callback(state, value, name, args);
    };
    match name {
        "strip" | "lstrip" | "rstrip" => {
            let (chars,): (Option<&str>,) = from_args(args)?;
            let strips = |c: char| chars.map_or_else(|| is_space(c), |chars| chars.contains(c));
            let text = if name == "rstrip" { text } else { text.trim_start_matches(strips) };
            let text = if name == "lstrip" { text } else { text.trim_end_matches(strips) };
            Ok(text.into())
        }
        "split" | "rsplit" => {
            let (separator, limit, kwargs): (Option<&str>, Option<i64>, Kwargs) = from_args(args)?;
            let separator = separator.map_or_else(|| kwargs.get("sep"), |sep| Ok(Some(sep)))?;
            let limit = limit.map_or_else(|| kwargs.get("maxsplit"), |n| Ok(Some(n)))?;
            kwargs.assert_all_used()?;
            let limit = limit.and_then(|n| usize::try_from(n).ok()).unwrap_or(usize::MAX);
            if separator == Some("") {
                return Err(invalid("empty separator"));
            }
            list(state, split(text, separator, limit, name == "rsplit"))
        }
        "splitlines" => {
            let (keep_ends, kwargs): (Option<bool>, Kwargs) = from_args(args)?;
            let keep_ends = keep_ends.map_or_else(|| kwargs.get("keepends"), |k| Ok(Some(k)))?;
            kwargs.assert_all_used()?;
            list(state, split_lines(text, keep_ends.unwrap_or(false)))
        }
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            let parts = if name == "partition" {
                text.split_once(separator).map(|(a, b)| [a, separator, b]).unwrap_or([text, "", ""])
            } else {
                text.rsplit_once(separator).map(|(a, b)| [a, separator, b]).unwrap_or(["", "", text])
            };
            Ok(Tuple::from(parts.map(Value::from)).into())
        }
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Ok(text.strip_prefix(prefix).unwrap_or(text).into())
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Ok(text.strip_suffix(suffix).unwrap_or(text).into())
        }
        "isspace" => {
            let () = from_args(args)?;
            Ok((!text.is_empty() && text.chars().all(is_space)).into())
        }
        "title" => {
            let () = from_args(args)?;
            Ok(title(text).into())
        }
        // The filters of these names do the same and pay for their output before they make it.
        "replace" => {
            let args: Vec<Value> = std::iter::once(value).chain(args).cloned().collect();
            state.apply_filter("replace", &args)
        }
        "join" => {
            let (items,): (Value,) = from_args(args)?;
            state.apply_filter("join", &[items, value.clone()])
        }
        _ => pycompat::unknown_method_callback(state, value, name, args),
    }
}

/// `str.strip` as a filter, which is Jinja2's `trim`.
pub(super) fn trim(text: StringInput<'_>, chars: Option<&str>) -> String {
    let strips = |c: char| chars.map_or_else(|| is_space(c), |chars| chars.contains(c));
    text.as_str().trim_matches(strips).to_owned()
}

/// `str.isspace`: Unicode's white space and the four ASCII separators.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

fn invalid(message: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}

/// A list of strings, one fuel for each.
fn list<'a>(state: &State, items: impl Iterator<Item = &'a str>) -> Result<Value, Error> {
    let mut values = Vec::new();
    for item in items {
        state.consume_fuel(1)?;
        values.push(Value::from(item));
    }
    Ok(values.into())
}

/// `str.split` and, `from_end`, `str.rsplit` with at most `limit` cuts. No separator is any run of space,
/// and no empty first or last part.
fn split<'a>(
    text: &'a str,
    separator: Option<&'a str>,
    limit: usize,
    from_end: bool,
) -> Box<dyn Iterator<Item = &'a str> + 'a> {
    let parts = limit.saturating_add(1);
    match (separator, from_end) {
        (Some(separator), false) => Box::new(text.splitn(parts, separator)),
        (Some(separator), true) => {
            let mut parts: Vec<&str> = text.rsplitn(parts, separator).collect();
            parts.reverse();
            Box::new(parts.into_iter())
        }
        (None, false) => {
            let mut rest = text.trim_start_matches(is_space);
            let mut left = limit;
            Box::new(std::iter::from_fn(move || {
                let end = if left == 0 { None } else { rest.find(is_space) };
                let word = &rest[..end.unwrap_or(rest.len())];
                rest = rest[word.len()..].trim_start_matches(is_space);
                left = left.saturating_sub(1);
                (!word.is_empty()).then_some(word)
            }))
        }
        (None, true) => {
            let mut rest = text.trim_end_matches(is_space);
            let mut words = Vec::new();
            while !rest.is_empty() {
                let cut = if words.len() == limit { None } else { rest.rfind(is_space) };
                let start = cut.map_or(0, |i| rest.ceil_char_boundary(i + 1));
                words.push(&rest[start..]);
                rest = rest[..start].trim_end_matches(is_space);
            }
            words.reverse();
            Box::new(words.into_iter())
        }
    }
}

/// `str.splitlines`: the ends are Unicode's line boundaries, `\r\n` is one.
fn split_lines(text: &str, keep_ends: bool) -> impl Iterator<Item = &str> {
    let is_end = |c: char| {
        matches!(c, '\n'..='\r' | '\x1c'..='\x1e' | '\u{85}' | '\u{2028}' | '\u{2029}')
    };
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let line = rest.find(is_end).unwrap_or(rest.len());
        let tail = &rest[line..];
        let end = if tail.starts_with("\r\n") { 2 } else { tail.chars().next().map_or(0, char::len_utf8) };
        let (taken, after) = rest.split_at(line + end);
        rest = after;
        Some(if keep_ends { taken } else { &taken[..line] })
    })
}

/// `str.title`: a letter after anything but a letter is upper case, so `don't` becomes `Don'T`.
fn title(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut in_word = false;
    for c in text.chars() {
        if in_word {
            out.extend(c.to_lowercase());
        } else {
            out.extend(c.to_uppercase());
        }
        in_word = c.is_alphabetic();
    }
    out
}

/// `json.dumps(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`, the filter that
/// transformers puts in place of Jinja2's: nothing is escaped for HTML.
pub(super) fn tojson(
    state: &State,
    value: &Value,
    ensure_ascii: Option<Value>,
    indent: Option<Value>,
    kwargs: Kwargs,
) -> Result<String, Error> {
    let argument = |positional: Option<Value>, name| {
        positional.map_or_else(|| kwargs.get::<Option<Value>>(name), |v| Ok(Some(v)))
    };
    let ensure_ascii = argument(ensure_ascii, "ensure_ascii")?.is_some_and(|v| v.is_true());
    let indent = match argument(indent, "indent")? {
        Some(v) if !v.is_none() => Some(match v.as_str() {
            Some(text) => text.to_owned(),
            // Wider than any page; a hostile width must not multiply.
            None => " ".repeat(usize::try_from(v)?.min(64)),
        }),
        _ => None,
    };
    let separators: Option<Value> = kwargs.get("separators")?;
    let sort_keys: Option<bool> = kwargs.get("sort_keys")?;
    kwargs.assert_all_used()?;
    let separators = match separators {
        Some(v) if !v.is_none() => {
            let (item, key) = (v.get_item_by_index(0)?, v.get_item_by_index(1)?);
            (item.to_string(), key.to_string())
        }
        _ => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
    };
    let sort_keys = sort_keys.unwrap_or(false);
    let mut json = Json { state, ensure_ascii, indent, separators, sort_keys, out: String::new() };
    json.value(value, 0)?;
    Ok(json.out)
}

struct Json<'a> {
    state: &'a State<'a, 'a>,
    ensure_ascii: bool,
    indent: Option<String>,
    /// Between items, and between a key and its value.
    separators: (String, String),
    sort_keys: bool,
    out: String,
}

impl Json<'_> {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        // Values can share parts, so the text may be exponentially longer than what is in memory.
        self.state.consume_fuel(1)?;
        if depth > MAX_JSON_DEPTH {
            return Err(invalid("tojson: nested too deeply"));
        }
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.number(value),
            ValueKind::String => self.string(value.as_str().unwrap_or_default())?,
            ValueKind::Seq => {
                self.out.push('[');
                let mut empty = true;
                for item in value.try_iter()? {
                    self.next_item(empty, depth + 1)?;
                    self.value(&item, depth + 1)?;
                    empty = false;
                }
                self.close(']', empty, depth)?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort();
                }
                self.out.push('{');
                for (n, key) in keys.iter().enumerate() {
                    self.next_item(n == 0, depth + 1)?;
                    self.key(key)?;
                    self.out.push_str(&self.separators.1);
                    self.value(&value.get_item(key)?, depth + 1)?;
                }
                self.close('}', keys.is_empty(), depth)?;
            }
            kind => return Err(invalid(format!("tojson: a value of type {kind} is not JSON"))),
        }
        Ok(())
    }

    fn next_item(&mut self, first: bool, depth: usize) -> Result<(), Error> {
        if !first {
            self.out.push_str(&self.separators.0);
        }
        self.line(depth)
    }

    fn close(&mut self, bracket: char, empty: bool, depth: usize) -> Result<(), Error> {
        if !empty {
            self.line(depth)?;
        }
        self.out.push(bracket);
        Ok(())
    }

    fn line(&mut self, depth: usize) -> Result<(), Error> {
        let Some(indent) = &self.indent else { return Ok(()) };
        self.state.consume_fuel((indent.len() * depth / 64) as u64)?;
        self.out.push('\n');
        self.out.extend(std::iter::repeat_n(indent.as_str(), depth));
        Ok(())
    }

    /// Python turns the keys that are not strings into strings.
    fn key(&mut self, key: &Value) -> Result<(), Error> {
        match key.kind() {
            ValueKind::String => self.string(key.as_str().unwrap_or_default()),
            ValueKind::None | ValueKind::Bool | ValueKind::Number => {
                self.out.push('"');
                self.value(key, 0)?;
                self.out.push('"');
                Ok(())
            }
            kind => Err(invalid(format!("tojson: a key of type {kind} is not JSON"))),
        }
    }

    fn number(&mut self, value: &Value) {
        match f64::try_from(value.clone()) {
            Ok(number) if number.is_nan() => self.out.push_str("NaN"),
            Ok(number) if number.is_infinite() && number > 0. => self.out.push_str("Infinity"),
            Ok(number) if number.is_infinite() => self.out.push_str("-Infinity"),
            _ => self.out.push_str(&value.to_string()),
        }
    }

    fn string(&mut self, text: &str) -> Result<(), Error> {
        self.state.consume_fuel(text.len() as u64 / 64)?;
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\x08' => self.out.push_str("\\b"),
                '\x0c' => self.out.push_str("\\f"),
                c if c < ' ' || (self.ensure_ascii && !(' '..='~').contains(&c)) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        let _ = write!(self.out, "\\u{unit:04x}"); // writing to a String cannot fail
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
        Ok(())
    }
}

/// `datetime.now().strftime(format)` in the C locale. As there, the time has no zone, so `%z` and `%Z` are
/// empty; unknown directives stay as they are.
pub(super) fn strftime(format: &str, time: DateTime<Local>) -> String {
    let mut out = String::new();
    let mut rest = format;
    while let Some(at) = rest.find('%') {
        out.push_str(&rest[..at]);
        let tail = &rest[at + 1..];
        let flags = tail.len() - tail.trim_start_matches(['-', '_', '0', '^', '#']).len();
        let letter = tail[flags..].chars().next().map_or(0, char::len_utf8);
        let directive = &rest[at..at + 1 + flags + letter];
        rest = &tail[flags + letter..];
        match &directive[1 + flags..] {
            "f" => {
                let _ = write!(out, "{:06}", time.timestamp_subsec_micros()); // cannot fail
            }
            "z" | "Z" => {}
            _ => {
                let items: Vec<Item> = StrftimeItems::new(directive).collect();
                if items.contains(&Item::Error) {
                    out.push_str(directive);
                } else {
                    let _ = write!(out, "{}", time.format_with_items(items.iter())); // no error item
                }
            }
        }
    }
    out + rest
}
