//! What must not come in or go out: a deny-list of regular expressions.
//!
//! It finds what is spelt as its patterns say, and nothing else: other words for the same, other languages, spaces between
//! letters and meaning pass. In a stream, what was sent before a pattern was complete stays sent.

use std::path::Path;

use anyhow::{Context, anyhow, bail};
use regex::{RegexSet, RegexSetBuilder};

/// The most memory that the patterns of a list may take compiled.
const SIZE_LIMIT: usize = 64 << 20;

/// A deny-list.
pub struct Filter(RegexSet, Vec<regex::Regex>);

impl Filter {
    /// Reads patterns, one a line; empty lines and those that begin with `#` are passed over. Letters match in both cases.
    ///
    /// # Errors
    /// A file that cannot be read, a line that is no regular expression, no pattern at all.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let name = path.display();
        let text = std::fs::read_to_string(path).with_context(|| format!("{name}"))?;
        let lines = text.lines().enumerate();
        let lines = lines.filter(|(_, line)| !line.trim().is_empty() && !line.starts_with('#'));
        let mut patterns = Vec::new();
        for (index, line) in lines {
            let pattern = regex::RegexBuilder::new(line).case_insensitive(true).build();
            let pattern = pattern.map_err(|error| {
                let reason = error.to_string(); // with a drawing of the place before
                let reason = reason.lines().last().unwrap_or_default().to_owned();
                anyhow!("{name}: line {} is no pattern: {reason}", index + 1)
            })?;
            if pattern.is_match("") {
                bail!("{name}: line {}: `{line}` denies every text", index + 1);
            }
            patterns.push(pattern);
        }
        if patterns.is_empty() {
            bail!("{name}: has no pattern: write one regular expression a line");
        }
        let set = RegexSetBuilder::new(patterns.iter().map(regex::Regex::as_str));
        let set = { set }.case_insensitive(true).size_limit(SIZE_LIMIT).build();
        Ok(Self(set.with_context(|| format!("{name}"))?, patterns))
    }

    /// Where the first of the patterns that the text has begins.
    pub fn find(&self, text: &str) -> Option<usize> {
        let found = self.0.matches(text).into_iter();
        found.filter_map(|index| self.1[index].find(text)).map(|found| found.start()).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_place_is_found() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let read = |text: &str| {
            std::fs::write(file.path(), text).unwrap();
            Filter::read(file.path())
        };
        let filter = read("# no\n\nsecret\\s+plan\nbomb").unwrap();
        assert_eq!(filter.find("The Secret  Plan: a BOMB"), Some(4));
        assert_eq!(filter.find("plan secret"), None);
        let error = |text: &str| read(text).err().unwrap().to_string();
        assert!(error("a\n(").contains("line 2 is no pattern: error: unclosed group"));
        assert!(error("x*").contains("every text"));
        assert!(error("# none").contains("no pattern"));
    }
}
