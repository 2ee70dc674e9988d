//! What was found in files of records, and what was left out.

use std::{collections::BTreeMap, fmt};

use super::Format;

/// What became of the records of a dataset, of both its parts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Records of each form.
    pub forms: BTreeMap<Format, usize>,
    /// Whether the forms were detected, not given.
    pub is_detected: bool,
    /// Whether a chat template makes text of them.
    pub has_template: bool,
    /// Records that were too long and cut at their end.
    pub cut: usize,
    /// Tokens of the longest record, before it was cut.
    pub longest: usize,
    /// Tokens that were cut off.
    pub cut_tokens: usize,
    /// Records of which no token that is trained was left.
    pub dropped: usize,
    /// Malformed records that were left out.
    pub bad: usize,
    /// Of the first few of them the file, the place in it and what is wrong.
    pub bad_shown: Vec<String>,
}

impl Report {
    /// Records that became examples or were too long.
    pub fn records(&self) -> usize {
        self.forms.values().sum()
    }

    /// How many records there were, and why some are left out.
    pub(super) fn losses(&self) -> String {
        let (records, dropped, bad) = (self.records() + self.bad, self.dropped, self.bad);
        format!(
            "of {records} records {bad} are malformed and {dropped} too long to leave a token that is trained; see \
             `data.sequence_length`"
        )
    }
}

/// One line for what was found, and one for each reason to leave something out.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let form = |(form, count): (&Format, &usize)| format!("{count} {}", form.name());
        let forms: Vec<String> = self.forms.iter().map(form).collect();
        let found = if self.is_detected { "detected" } else { "read" };
        let prompt = match self.has_template {
            true => "chat template",
            false => "plain prompts (no chat template)",
        };
        write!(f, "records: {found} {}; {prompt}", forms.join(", "))?;
        if self.cut > 0 {
            let Self { cut, cut_tokens, longest, .. } = self;
            write!(
                f,
                "\n  {cut} longer than data.sequence_length: {cut_tokens} tokens cut off (the longest has {longest})"
            )?;
        }
        if self.dropped > 0 {
            write!(f, "\n  {} of them left out: no token that is trained remains", self.dropped)?;
        }
        if self.bad > 0 {
            write!(f, "\n  {} malformed, left out:", self.bad)?;
            for shown in &self.bad_shown {
                write!(f, "\n    {shown}")?;
            }
            if self.bad > self.bad_shown.len() {
                write!(f, "\n    …")?;
            }
        }
        Ok(())
    }
}
