//! Text files → documents: the units between a beginning-of-text and an end-of-text token.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
    str::FromStr,
};

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

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

impl Documents {
    /// The documents of `text`, in order.
    pub fn split(&self, text: &str) -> Vec<String> {
        let text = text.strip_prefix('\u{feff}').unwrap_or(text).replace("\r\n", "\n");
        let documents: Vec<String> = match self {
            Self::File => vec![text],
            Self::Line => text.lines().map(str::to_owned).collect(),
            Self::BlankLine => split_lines(&text, |line| line.trim().is_empty()),
            Self::Separator(separator) => split_lines(&text, |line| line.trim() == separator),
            Self::Gutenberg => gutenberg(&text),
        };
        documents
            .iter()
            .map(|document| document.trim())
            .filter(|document| !document.is_empty())
            .map(str::to_owned)
            .collect()
    }
}

/// Runs of lines between those that `is_separator`.
fn split_lines(text: &str, is_separator: impl Fn(&str) -> bool) -> Vec<String> {
    let mut documents = vec![String::new()];
    for line in text.lines() {
        if is_separator(line) {
            documents.push(String::new());
        } else if let Some(document) = documents.last_mut() {
            document.push_str(line);
            document.push('\n');
        }
    }
    documents
}

fn gutenberg(text: &str) -> Vec<String> {
    let book = text
        .lines()
        .skip_while(|line| !line.starts_with("*** START OF"))
        .skip(1)
        .take_while(|line| !line.starts_with("*** END OF"));
    let mut documents = vec![String::new()];
    let mut blank_lines = 0;
    for line in book.map(str::trim) {
        if line.is_empty() {
            blank_lines += 1;
            continue;
        }
        if blank_lines >= 3 {
            documents.push(String::new());
        }
        if let Some(document) = documents.last_mut() {
            if !document.is_empty() {
                document.push_str(if blank_lines > 0 { "\n\n" } else { " " });
            }
            document.push_str(line);
        }
        blank_lines = 0;
    }
    documents
}

/// A file of text, or a directory whose `.txt` files are read in the order of their paths.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// The file or directory.
    pub path: PathBuf,
    /// How its text is cut into documents.
    pub documents: Documents,
}

impl Source {
    /// The documents of this source, in order. A source without a document is an error.
    pub fn read(&self) -> Result<Vec<String>> {
        let mut documents = Vec::new();
        for file in text_files(&self.path)? {
            documents.extend(self.documents.split(&read_utf8(&file)?));
        }
        if documents.is_empty() {
            let reason = format!("holds no document (documents = \"{}\")", self.documents);
            return Err(Error::Corpus { path: self.path.clone(), reason });
        }
        Ok(documents)
    }
}

/// The documents of all sources, in order.
pub fn read(sources: &[Source]) -> Result<Vec<String>> {
    let mut documents = Vec::new();
    for source in sources {
        documents.extend(source.read()?);
    }
    Ok(documents)
}

fn text_files(path: &Path) -> Result<Vec<PathBuf>> {
    if !path.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let mut files = Vec::new();
    for entry in fs::read_dir(path).map_err(Error::io(path))? {
        let entry = entry.map_err(Error::io(path))?.path();
        if entry.extension().is_some_and(|extension| extension == "txt") {
            files.push(entry);
        }
    }
    files.sort();
    Ok(files)
}

fn read_utf8(path: &Path) -> Result<String> {
    String::from_utf8(fs::read(path).map_err(Error::io(path))?).map_err(|error| Error::Corpus {
        path: path.to_owned(),
        reason: format!("byte {} is not UTF-8", error.utf8_error().valid_up_to()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_are_split_as_their_name_says() {
        let cases: [(&str, &str, &[&str]); 6] = [
            ("file", "\u{feff}a\r\n\r\nb\r\n", &["a\n\nb"]),
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
            assert_eq!(kind.parse::<Documents>().unwrap().split(text), expected, "{kind}");
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

    #[test]
    fn a_directory_is_read_in_the_order_of_its_paths() {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in [("b.txt", "2"), ("a.txt", "1"), ("c.md", "3")] {
            fs::write(dir.path().join(name), text).unwrap();
        }
        let source = Source { path: dir.path().to_owned(), documents: Documents::File };
        assert_eq!(source.read().unwrap(), ["1", "2"]);
    }

    #[test]
    fn errors_name_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.txt");
        let message = |path: &Path| {
            Source { path: path.to_owned(), documents: Documents::Line }
                .read()
                .unwrap_err()
                .to_string()
        };
        assert!(message(&path).contains("x.txt"));
        fs::write(&path, b"abc\xff").unwrap();
        assert!(message(&path).ends_with("x.txt: byte 3 is not UTF-8"));
        fs::write(&path, "\n \n").unwrap();
        assert!(message(&path).ends_with("x.txt: holds no document (documents = \"line\")"));
    }
}
