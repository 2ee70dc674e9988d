//! What keeps an untrusted chat template from hanging, exhausting or crashing its caller.
//!
//! minijinja's fuel bounds the instructions and strings of a rendering. It does not count what
//! happens inside nested values: comparing, printing and dropping them recurses, exponentially
//! often if they share parts. Templates can nest values without end only through a namespace, so
//! what is assigned to one is checked. The rest is bounded by the length of the source, a large
//! stack and, at last, a deadline.

use minijinja::{Environment, Error as TemplateError, ErrorKind, State, Value, value::ValueKind};

use crate::{Error, Result};

/// The work one rendering may do, in minijinja's unit: an instruction or 64 bytes. Real templates
/// take about 100 for a message and 1 for 10 bytes of it, so this lasts for megabytes; a hostile
/// one stops within a fraction of a second and about 64 MB.
const FUEL: u64 = 1_000_000;

/// Far above the longest real templates (about 20 KiB). It bounds the compiler's recursion over chains of operators, for
/// which the stack has room.
const MAX_SOURCE_BYTES: usize = 128 << 10;

/// Lists and objects nest at most this deep where they are stored, printed or written as JSON.
pub(super) const MAX_DEPTH: usize = 64;

/// The function that checks what is assigned to a namespace. Not a name that a template would use.
const CONTAINED: &str = "__contained";

/// The function that is called with what a `{% generation %}` block prints.
pub(super) const GENERATION: &str = "__generation";

/// Bounds the renderings of an environment.
pub(super) fn limit(environment: &mut Environment<'static>) {
    environment.set_fuel(Some(FUEL));
    environment.add_function(CONTAINED, |state: &State, value: Value| {
        contain(state, &value, 0, &mut 0).map(|()| value)
    });
    environment.set_formatter(|out, state, value| {
        contain(state, value, 0, &mut 0)?;
        minijinja::escape_formatter(out, state, value)
    });
}

/// Refuses a value that nests too deeply, holds a namespace (which could hold itself) or, its
/// shared parts counted every time, is too large for the fuel.
fn contain(
    state: &State,
    value: &Value,
    depth: usize,
    visited: &mut u64,
) -> Result<(), TemplateError> {
    let refuse = |reason| Err(TemplateError::new(ErrorKind::InvalidOperation, reason));
    *visited += 1;
    if visited.is_multiple_of(16) {
        state.consume_fuel(1)?;
    }
    let items: Box<dyn Iterator<Item = Value>> = match (value.kind(), value.as_object()) {
        (ValueKind::Seq, Some(list)) => Box::new(list.try_iter().into_iter().flatten()),
        (ValueKind::Map, Some(map)) if map.type_name().ends_with("::Namespace") => {
            return refuse("a namespace cannot be stored in another or printed");
        }
        (ValueKind::Map, Some(map)) => {
            Box::new(map.try_iter_pairs().into_iter().flatten().map(|(_, item)| item))
        }
        _ => return Ok(()),
    };
    if depth == MAX_DEPTH {
        return refuse("a value nests too deeply");
    }
    for item in items {
        contain(state, &item, depth + 1, visited)?;
    }
    Ok(())
}

/// The source that is compiled: line ends as Jinja2's lexer normalizes them, assignments to
/// namespaces checked, and `{% generation %}` blocks, which mark the assistant's tokens for
/// training, as calls of [`GENERATION`] (transformers makes calls of them too).
pub(super) fn prepare(source: &str) -> Result<String> {
    if source.len() > MAX_SOURCE_BYTES {
        let limit = MAX_SOURCE_BYTES >> 10;
        return Err(Error::Tokenizer(format!("chat template: longer than {limit} KiB")));
    }
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let mut out = String::with_capacity(source.len());
    let mut rest = source.as_str();
    while let Some(start) = ["{%", "{{", "{#"].iter().filter_map(|open| rest.find(open)).min() {
        let (before, after) = rest.split_at(start + 2);
        out.push_str(before);
        let end = match &before[start..] {
            "{#" => after.find("#}").unwrap_or(after.len()),
            "{{" => tag_end(after, "}}"),
            _ => tag_end(after, "%}"),
        };
        let (tag, after) = after.split_at(end);
        rest = after;
        if before.ends_with('%') {
            push_statement(&mut out, tag);
            if tag.trim_matches(['-', '+']).trim() == "raw" {
                let (text, after) = rest.split_at(raw_end(rest));
                out.push_str(text);
                rest = after;
            }
        } else {
            out.push_str(tag);
        }
    }
    out.push_str(rest);
    Ok(out)
}

/// Writes what is compiled for the inside of a `{% %}`.
fn push_statement(out: &mut String, tag: &str) {
    // `-` and `+` after `{%` and before `%}` control white space.
    let sign = usize::from(tag.starts_with(['-', '+']));
    let body = tag[sign..].trim_end_matches(['-', '+']);
    out.push_str(&tag[..sign]);
    match (body.trim(), namespace_assignment(body.trim())) {
        ("generation", _) => {
            out.push_str(&body.replace("generation", &format!("call {GENERATION}()")));
        }
        ("endgeneration", _) => out.push_str(&body.replace("generation", "call")),
        (_, Some((target, value))) => {
            out.push_str(&format!(" {target}= {CONTAINED}(({value})) "));
        }
        _ => out.push_str(body),
    }
    out.push_str(&tag[sign + body.len()..]);
}

/// Where `close` ends a tag, outside of its strings and braces; the end if it is not closed.
fn tag_end(tag: &str, close: &str) -> usize {
    let (mut quote, mut escaped, mut braces) = (None, false, 0usize);
    for (i, c) in tag.char_indices() {
        match (quote, c) {
            (Some(open), _) => {
                if c == open && !escaped {
                    quote = None;
                }
                escaped = c == '\\' && !escaped;
            }
            (None, _) if braces == 0 && tag[i..].starts_with(close) => return i,
            (None, '"' | '\'') => quote = Some(c),
            (None, '{') => braces += 1,
            (None, '}') => braces = braces.saturating_sub(1),
            _ => {}
        }
    }
    tag.len()
}

/// Where the tag starts that ends a `{% raw %}`; the end if there is none.
fn raw_end(text: &str) -> usize {
    let is_end = |(start, _): &(usize, &str)| {
        let tag = text[start + 2..].trim_start_matches(['-', '+']).trim_start();
        tag.starts_with("endraw")
    };
    text.match_indices("{%").find(is_end).map_or(text.len(), |(start, _)| start)
}

/// `set ns.a ` and the value of `set ns.a = value`.
fn namespace_assignment(statement: &str) -> Option<(&str, &str)> {
    let target_end = statement.find('=').filter(|_| statement.starts_with("set"))?;
    let (target, value) = statement.split_at(target_end);
    (target.contains('.') && !target.contains('|')).then_some((target, &value[1..]))
}

/// Runs the template engine, on a thread of its own.
pub(super) fn isolated<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let failed = |reason| Error::Tokenizer(format!("chat template: {reason}"));
    crate::isolated::isolated("chat template", work).map_err(failed)?
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::{ChatTemplate, Message};

    fn render(template: &str) -> Result<String> {
        ChatTemplate::new(template, &Default::default())?
            .render(&[Message::new("user", "hi")], true)
    }

    #[test]
    fn only_assignments_to_namespaces_and_generation_tags_change() {
        let prepared = |source| prepare(source).unwrap();
        for same in [
            "a{b}% {{ {'a': {'b': '}} {% set x.y = 1 %}'}} }} {# {% set x.y = 'z %} #}",
            "{% set a = b.c %}{% set a = 'x.y=1' %}{% set a | indent(width=1.5) %}{% endset %}",
            "{%- raw -%} {% set x.y = 1 %} {%- endraw -%}",
            "{% if generation %}{% generation(x) %}{% set x.y",
        ] {
            assert_eq!(prepared(same), same);
        }
        assert_eq!(prepared("a\r\nb\rc"), "a\nb\nc");
        assert_eq!(
            prepared("{%- set n.a = '%}' ~ \"\\\"%}\" -%}{# ' #}{%set n.b=1,2%}"),
            "{%- set n.a = __contained(( '%}' ~ \"\\\"%}\")) -%}{# ' #}{% set n.b= __contained((1,2)) %}"
        );
        assert_eq!(
            prepared("{%- generation -%}x{% endgeneration +%}"),
            "{%- call __generation() -%}x{% endcall +%}"
        );
    }

    #[test]
    fn rewritten_templates_mean_the_same() {
        let source = "{% set n = namespace(a=[]) %}{% for m in messages %}{% set n.a = n.a + [m.role] %}\
            {% set n.b, c = 1, 2 %}{% endfor %}{{ n.a }}{{ n.b }}\
            {% generation %}{% set inner = 3 %}{{ inner }}{% endgeneration %}{{ inner is defined }}";
        assert_eq!(render(source).unwrap(), "['user']13False");
    }

    #[test]
    fn hostile_templates_end_with_an_error() {
        let shared = "{% set n = namespace(a=[1]) %}{% for i in range(50) %}{% set n.a = [n.a, n.a] %}{% endfor %}";
        let deep = "{% set n = namespace(a=[]) %}{% for i in range(9999) %}{% set n.a = [n.a] %}{% endfor %}";
        let flat = "{% set a = [1] %}".to_owned() + &"{% set a = [a, a] %}".repeat(50);
        let long = "{% set s = 'x' * 3000000 %}";
        for (template, reason) in [
            (
                "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
                "steps",
            ),
            ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion limit"),
            ("{{ 'x' * 999999999999 }}", "steps"),
            ("{{ '{:999999999999}'.format(1) }}", "too large"),
            (&format!("{long}{{{{ s.replace('x', s) }}}}"), "steps"),
            (&format!("{long}{{{{ s.join(range(99999)) }}}}"), "steps"),
            (&format!("{long}{{{{ (s ~ s).split('x') }}}}"), "steps"),
            (&format!("{long}{{{{ ('{{:9999}}' * 99999).format(1) }}}}"), "steps"),
            (&format!("{shared}{{{{ n.a == n.a }}}}"), "steps"),
            (&format!("{flat}{{{{ a }}}}"), "steps"),
            (&format!("{flat}{{{{ a | tojson }}}}"), "steps"),
            (&format!("{deep}{{{{ n.a | string }}}}"), "too deeply"),
            ("{% set n = namespace() %}{% set n.a = [n] %}", "a namespace cannot be stored"),
            (
                "{# {% ' #}{% set n = namespace() %}{% set n.a = n %}",
                "a namespace cannot be stored",
            ),
            ("{% set n = namespace() %}{{ n }}", "a namespace cannot be stored"),
            ("{{ 'abc'[::-9223372036854775808] }}", "chat template"),
            (&"{{ 1 }}".repeat(20_000), "longer than 128 KiB"),
        ] {
            let error = match render(template) {
                Err(error) => error.to_string(),
                Ok(text) => panic!("{template:.80} gave {text:.80}"),
            };
            assert!(error.contains(reason), "{template:.80}: {error}");
        }
    }

    #[test]
    fn long_chains_fit_the_stack() {
        assert_eq!(render(&format!("{{{{ {}1 }}}}", "-".repeat(100_000))).unwrap(), "1");
        assert_eq!(render(&format!("{{{{ 1{} }}}}", "+1".repeat(50_000))).unwrap(), "50001");
        assert!(render(&format!("{{{{ x{} }}}}", ".a".repeat(50_000))).is_err());
        assert!(render(&format!("{{{{ {} }}}}", "(".repeat(100_000))).is_err());
    }
}
