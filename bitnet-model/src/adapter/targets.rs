//! Which modules an adapter's configuration means, by PEFT's rules. A module is named by its path in the model, such as
//! `model.layers.0.self_attn.q_proj`.

use std::sync::Arc;

use fancy_regex::Regex;

/// The regular expression of a configuration: Python's syntax, look-around included.
#[derive(Clone, Debug)]
pub struct Pattern {
    text: String,
    regexes: Arc<Regexes>,
}

/// An expression that is to fit a path from its beginning, or what follows one of its dots.
#[derive(Debug)]
struct Regexes {
    whole: Regex,
    suffix: Regex,
}

impl Pattern {
    /// Compiles `text`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn new(text: &str) -> Result<Self, String> {
        let compile = |pattern: String| {
            Regex::new(&pattern).map_err(|e| format!("`{text}` is no regular expression: {e}"))
        };
        let whole = compile(format!(r"\A(?:{text})\z"))?;
        let suffix = compile(format!(r"\A(?:.*\.)?(?:{text})\z"))?;
        Ok(Self { text: text.into(), regexes: Arc::new(Regexes { whole, suffix }) })
    }

    /// The expression as it was given.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Whether the whole path matches.
    fn is_path(&self, path: &str) -> Result<bool, String> {
        self.run(&self.regexes.whole, path)
    }

    /// Whether the path, or what follows one of its dots, matches.
    pub(super) fn is_suffix(&self, path: &str) -> Result<bool, String> {
        self.run(&self.regexes.suffix, path)
    }

    fn run(&self, regex: &Regex, path: &str) -> Result<bool, String> {
        regex.is_match(path).map_err(|e| format!("`{}` cannot be matched: {e}", self.text))
    }
}

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

/// Modules of a model.
#[derive(Clone, Debug, PartialEq)]
pub enum Modules {
    /// Those whose path is one of these or ends in one of them behind a dot.
    Names(Vec<String>),
    /// Those whose whole path matches.
    Pattern(Pattern),
    /// `all-linear`: every projection. The output head is none.
    AllLinear,
}

impl Modules {
    /// Whether the projection at `path` is meant.
    pub(super) fn contains(&self, path: &str) -> Result<bool, String> {
        match self {
            Self::Names(names) => Ok(names.iter().any(|name| ends_in(path, name))),
            Self::Pattern(pattern) => pattern.is_path(path),
            Self::AllLinear => Ok(true),
        }
    }
}

/// Whether `path` is `name`, or ends in it behind a dot.
pub(super) fn ends_in(path: &str, name: &str) -> bool {
    path.strip_suffix(name).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}
