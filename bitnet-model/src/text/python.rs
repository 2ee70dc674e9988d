//! What chat templates expect of Python where minijinja has Rust's ways: the `str` methods,
//! `json.dumps` and `strftime`. Templates are untrusted, so everything that can grow pays with
//! fuel.

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

use super::sandbox::MAX_DEPTH;

/// The digits of a number in `str.format`'s format, such as a field's width: minijinja makes fields
/// of any width, so they are paid for at their widest.
const MAX_WIDTH_DIGITS: usize = 4;

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
            if name == "rsplit" {
                let mut parts = list(state, rsplit(text, separator, limit))?;
                parts.reverse();
                Ok(parts.into())
            } else {
                Ok(list(state, split(text, separator, limit))?.into())
            }
        }
        "splitlines" => {
            let (keep_ends, kwargs): (Option<bool>, Kwargs) = from_args(args)?;
            let keep_ends = keep_ends.map_or_else(|| kwargs.get("keepends"), |k| Ok(Some(k)))?;
            kwargs.assert_all_used()?;
            Ok(list(state, split_lines(text, keep_ends.unwrap_or(false)))?.into())
        }
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            let parts = if name == "partition" {
                text.split_once(separator).map(|(a, b)| [a, separator, b]).unwrap_or([text, "", ""])
            } else {
                text.rsplit_once(separator)
                    .map(|(a, b)| [a, separator, b])
                    .unwrap_or(["", "", text])
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
        "format" => {
            if text.split(|c: char| !c.is_numeric()).any(|digits| digits.len() > MAX_WIDTH_DIGITS) {
                return Err(invalid("str.format: a number in the format is too large"));
            }
            let fields = text.matches('{').count() as u64;
            state.consume_fuel(fields.saturating_mul(10u64.pow(MAX_WIDTH_DIGITS as u32) / 64))?;
            pycompat::unknown_method_callback(state, value, name, args)
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

/// The strings as values, one fuel for each.
fn list<'a>(state: &State, items: impl Iterator<Item = &'a str>) -> Result<Vec<Value>, Error> {
    let paid = items.map(|item| state.consume_fuel(1).map(|()| Value::from(item)));
    paid.collect()
}

/// `str.split` with at most `limit` cuts. No separator is any run of space, and no empty parts.
fn split<'a>(
    text: &'a str,
    separator: Option<&'a str>,
    limit: usize,
) -> Box<dyn Iterator<Item = &'a str> + 'a> {
    if let Some(separator) = separator {
        return Box::new(text.splitn(limit.saturating_add(1), separator));
    }
    let (mut rest, mut left) = (text.trim_start_matches(is_space), limit);
    Box::new(std::iter::from_fn(move || {
        let cut = if left == 0 { None } else { rest.split_once(is_space) };
        let (word, after) = cut.unwrap_or((rest, ""));
        rest = after.trim_start_matches(is_space);
        left = left.saturating_sub(1);
        (!word.is_empty()).then_some(word)
    }))
}

/// `str.rsplit`, as [`split`] from the end: the last part comes first.
fn rsplit<'a>(
    text: &'a str,
    separator: Option<&'a str>,
    limit: usize,
) -> Box<dyn Iterator<Item = &'a str> + 'a> {
    if let Some(separator) = separator {
        return Box::new(text.rsplitn(limit.saturating_add(1), separator));
    }
    let (mut rest, mut left) = (text.trim_end_matches(is_space), limit);
    Box::new(std::iter::from_fn(move || {
        let cut = if left == 0 { None } else { rest.rsplit_once(is_space) };
        let (before, word) = cut.unwrap_or(("", rest));
        rest = before.trim_end_matches(is_space);
        left = left.saturating_sub(1);
        (!word.is_empty()).then_some(word)
    }))
}

/// `str.splitlines`: the ends are Unicode's line boundaries, `\r\n` is one.
fn split_lines(text: &str, keep_ends: bool) -> impl Iterator<Item = &str> {
    let is_end =
        |c: char| matches!(c, '\n'..='\r' | '\x1c'..='\x1e' | '\u{85}' | '\u{2028}' | '\u{2029}');
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let line = rest.find(is_end).unwrap_or(rest.len());
        let tail = &rest[line..];
        let end = if tail.starts_with("\r\n") {
            2
        } else {
            tail.chars().next().map_or(0, char::len_utf8)
        };
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

/// `json.dumps(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`, the
/// filter that transformers puts in place of Jinja2's: nothing is escaped for HTML.
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
        if depth > MAX_DEPTH {
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

/// `datetime.now().strftime(format)` in the C locale. As there, the time has no zone, so `%z` and
/// `%Z` are empty; unknown directives stay as they are.
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

#[cfg(test)]
mod tests {
    use chrono::TimeZone;

    use super::*;
    use crate::text::ChatTemplate;

    fn render(expression: &str) -> String {
        let template = ChatTemplate::new(&format!("{{{{ {expression} }}}}"), &Default::default());
        template.and_then(|t| t.render(&[], false)).unwrap_or_else(|error| error.to_string())
    }

    #[test]
    fn expressions_evaluate_as_in_python() {
        for (expression, expected) in [
            (r"'\x1c a\x1f '.strip() ~ '|' ~ ' a '.lstrip() ~ '|' ~ ' a '.rstrip()", "a|a | a"),
            ("'xyaxy'.strip('yx') ~ 'xyaxy'.lstrip('xy') ~ 'xxa'.rstrip('a')", "aaxyxx"),
            ("'xxaxx' | trim('x') ~ 5 | trim", "a5"),
            (r"' a  b\x1dc '.split()", "['a', 'b', 'c']"),
            ("' a b c '.split(none, 1)", "['a', 'b c ']"),
            ("' a b c '.rsplit(none, 1)", "[' a b', 'c']"),
            ("' a b c '.split(maxsplit=0)", "['a b c ']"),
            ("' a b c '.rsplit(maxsplit=0)", "[' a b c']"),
            ("''.split() ~ ' '.rsplit() ~ ''.split(',')", "[][]['']"),
            (
                "'a,b,c'.split(',', 1) ~ 'a,b,c'.rsplit(sep=',', maxsplit=1)",
                "['a', 'b,c']['a,b', 'c']",
            ),
            ("'a,b,c'.split(',', -1)", "['a', 'b', 'c']"),
            (r"'a\r\nb\n\nc\x0bd\n'.splitlines()", "['a', 'b', '', 'c', 'd']"),
            (r"'a\r\nb'.splitlines(keepends=true)", r"['a\r\n', 'b']"),
            (
                "'a-b-c'.partition('-') ~ 'a-b-c'.rpartition('-')",
                "('a', '-', 'b-c')('a-b', '-', 'c')",
            ),
            ("'a'.partition('-') ~ 'a'.rpartition('-')", "('a', '', '')('', '', 'a')"),
            (
                "\"they're here\".title() ~ 'ab'.removeprefix('a') ~ 'ab'.removesuffix('b')",
                "They'Re Hereba",
            ),
            ("'aXbXc'.replace('X', '-') ~ 'aXbXc'.replace('X', '', 1)", "a-b-cabXc"),
            ("', '.join(['a', 'b']) ~ ' \t'.isspace() ~ ''.isspace()", "a, bTrueFalse"),
            ("'{:>4}|{}'.format('a', 1) ~ 'a'.upper() ~ {'a': 1}.get('b', 2)", "   a|1A2"),
            ("{'\"é': '</b>'} | tojson", r#"{"\"é": "</b>"}"#),
            ("'é🙂' | tojson(ensure_ascii=true)", r#""\u00e9\ud83d\ude42""#),
            ("[1, 2.5, none, true, (1,), {}, []] | tojson", "[1, 2.5, null, true, [1], {}, []]"),
            (
                "{2: 'a', none: 'b', true: []} | tojson(indent=1)",
                "{\n \"2\": \"a\",\n \"null\": \"b\",\n \"true\": []\n}",
            ),
            (
                "{'b': [1], 'a': 2} | tojson(sort_keys=true, indent='>', separators=(';', '='))",
                "{\n>\"a\"=2;\n>\"b\"=[\n>>1\n>]\n}",
            ),
            (r"'\x01\x7f\t/\\' | tojson", "\"\\u0001\u{7f}\\t/\\\\\""),
        ] {
            assert_eq!(render(expression), expected, "{expression}");
        }
    }

    #[test]
    fn what_python_refuses_is_refused() {
        for (expression, reason) in [
            ("'a'.split('')", "empty separator"),
            ("nothing | tojson", "a value of type undefined is not JSON"),
            ("[range] | tojson", "is not JSON"),
            ("'a'.nope()", "no method named nope"),
            ("[1].append(2)", "no method named append"),
            ("'a'.split(wrong=1)", "wrong"),
        ] {
            let error = render(expression);
            assert!(error.starts_with("tokenizer: chat template, line 1: "), "{error}");
            assert!(error.contains(reason), "{error}");
        }
    }

    #[test]
    fn strftime_equals_python_in_the_c_locale() {
        let time = Local.with_ymd_and_hms(2024, 2, 9, 3, 4, 5).unwrap();
        let time = time + chrono::TimeDelta::microseconds(678);
        for (format, expected) in [
            ("%Y-%m-%d %H:%M:%S.%f", "2024-02-09 03:04:05.000678"),
            ("%d %b %Y, %A %B %-d %_d", "09 Feb 2024, Friday February 9  9"),
            ("%j %U %W %w %u %G-W%V %I%p", "040 05 06 5 5 2024-W06 03AM"),
            ("%c|%x|%X|%%|%z|%Z|%h", "Fri Feb  9 03:04:05 2024|02/09/24|03:04:05|%|||Feb"),
            ("100%|%!|é%é|%", "100%|%!|é%é|%"),
        ] {
            assert_eq!(strftime(format, time), expected);
        }
    }
}
