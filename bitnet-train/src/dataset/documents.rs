//! Text → documents: the units between a beginning-of-text and an end-of-text token.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// How a file is cut into documents. Line ends are `\n` or `\r\n`; documents are trimmed and empty ones dropped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Documents {
    /// `file`: the whole file is one document.
    File,
    /// `line`: one document a line.
    Line,
    /// `blank-line`: documents are separated by blank lines.
    BlankLine,
    /// `separator:TEXT`: documents are separated by lines that read TEXT, such as `<|endoftext|>`.
    Separator(String),
    /// `gutenberg`: a plain-text book of Project Gutenberg. The licence around the book is left out, the lines of
    /// a paragraph are joined, and documents (tales, chapters) are separated by three or more blank lines.
    Gutenberg,
}

impl FromStr for Documents {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "file" => Ok(Self::File),
            "line" => Ok(Self::Line),
            "blank-line" => Ok(Self::BlankLine),
            "gutenberg" => Ok(Self::Gutenberg),
            _ => match text.strip_prefix("separator:").map(str::trim) {
                Some(separator) if !separator.is_empty() => Ok(Self::Separator(separator.into())),
                _ => Err(format!(
                    "unknown kind of documents `{text}`; use `file`, `line`, `blank-line`, `gutenberg` or \
                     `separator:TEXT`"
                )),
            },
        }
    }
}

impl TryFrom<String> for Documents {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Documents> for String {
    fn from(documents: Documents) -> Self {
        documents.to_string()
    }
}

impl fmt::Display for Documents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File => f.write_str("file"),
            Self::Line => f.write_str("line"),
            Self::BlankLine => f.write_str("blank-line"),
            Self::Separator(separator) => write!(f, "separator:{separator}"),
            Self::Gutenberg => f.write_str("gutenberg"),
        }
    }
}

/// Cuts a text that is given line by line, and holds no more of it than the document it is in.
#[derive(Debug)]
pub struct Splitter<'a> {
    documents: &'a Documents,
    document: String,
    /// Of a book: blank lines since the last line that was not.
    blank_lines: usize,
    /// Of a book: between its markers.
    part: Part,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Before,
    Book,
    After,
}

impl<'a> Splitter<'a> {
    /// At the beginning of a text.
    pub fn new(documents: &'a Documents) -> Self {
        Self { documents, document: String::new(), blank_lines: 0, part: Part::Before }
    }

    /// The document that ends with, or before, the next line of the text; the line is given without its end.
    pub fn line(&mut self, line: &str) -> Option<String> {
        let is_separator = match self.documents {
            Documents::File => false,
            Documents::Line => {
                self.document.push_str(line);
                return self.finish();
            }
            Documents::BlankLine => line.trim().is_empty(),
            Documents::Separator(separator) => line.trim() == separator,
            Documents::Gutenberg => return self.book_line(line),
        };
        if is_separator {
            return self.finish();
        }
        self.document.push_str(line);
        self.document.push('\n');
        None
    }

    /// The document that ends with the text, or with the last line.
    pub fn finish(&mut self) -> Option<String> {
        let document = std::mem::take(&mut self.document);
        let trimmed = document.trim();
        match trimmed.len() {
            0 => None,
            len if len == document.len() => Some(document),
            _ => Some(trimmed.to_owned()),
        }
    }

    fn book_line(&mut self, line: &str) -> Option<String> {
        match self.part {
            Part::Book if line.starts_with("*** END OF") => self.part = Part::After,
            Part::Book => return self.paragraph_line(line.trim()),
            Part::Before if line.starts_with("*** START OF") => self.part = Part::Book,
            Part::Before | Part::After => {}
        }
        None
    }

    fn paragraph_line(&mut self, line: &str) -> Option<String> {
        if line.is_empty() {
            self.blank_lines += 1;
            return None;
        }
        let finished = if self.blank_lines >= 3 { self.finish() } else { None };
        if !self.document.is_empty() {
            self.document.push_str(if self.blank_lines > 0 { "\n\n" } else { " " });
        }
        self.document.push_str(line);
        self.blank_lines = 0;
        finished
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(documents: &Documents, text: &str) -> Vec<String> {
        let mut splitter = Splitter::new(documents);
        let mut found: Vec<String> = text.lines().filter_map(|line| splitter.line(line)).collect();
        found.extend(splitter.finish());
        found
    }

    #[test]
    fn documents_are_split_as_their_name_says() {
        let cases: [(&str, &str, &[&str]); 6] = [
            ("file", "a\r\n\r\nb\r\n", &["a\n\nb"]),
            ("line", "a b\n\n c \r\nd", &["a b", "c", "d"]),
            ("blank-line", "a\nb\n \n\nc\n", &["a\nb", "c"]),
            (
                "separator:<|endoftext|>",
                "\na\n\nb\n<|endoftext|>\nc <|endoftext|>\n",
                &["a\n\nb", "c <|endoftext|>"],
            ),
            (
                "gutenberg",
                "licence\r\n*** START OF THIS BOOK ***\r\nTitle\n\n\n\nOnce\nupon\n\na time\n*** END OF IT\nmore",
                &["Title", "Once upon\n\na time"],
            ),
            ("gutenberg", "a text without its markers", &[]),
        ];
        for (kind, text, expected) in cases {
            assert_eq!(split(&kind.parse().unwrap(), text), expected, "{kind}");
        }
    }

    #[test]
    fn a_kind_is_written_as_it_is_read() {
        for kind in ["file", "line", "blank-line", "separator:<|endoftext|>", "gutenberg"] {
            assert_eq!(kind.parse::<Documents>().unwrap().to_string(), kind);
        }
        for kind in ["lines", "separator:", "separator: ", ""] {
            assert!(kind.parse::<Documents>().unwrap_err().contains("blank-line"), "{kind}");
        }
    }
}
