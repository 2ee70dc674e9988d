//! Where text comes from: files, directories, patterns and dataset repositories → the files to read.

use std::{
    ffi::OsStr,
    fs,
    hash::Hasher,
    path::{Path, PathBuf},
    time::UNIX_EPOCH,
};

use bitnet_model::hub::Hub;
use glob::{MatchOptions, Pattern};
use serde::{Deserialize, Serialize};

use super::Documents;
use crate::{Error, Result, fingerprint::Fnv};

/// Begins the address of a dataset repository.
const HUB: &str = "hf://";

/// As in a shell: `*` stays within a folder and leaves hidden files out.
const MATCH: MatchOptions = MatchOptions {
    case_sensitive: true,
    require_literal_separator: true,
    require_literal_leading_dot: true,
};

/// Files of text or of records.
///
/// By its name a file holds text, or records: `.jsonl` and `.ndjson` (one JSON object a line), `.json` (an array of
/// objects, or objects one after another) and `.parquet`; text and JSON may be compressed (`.gz`). A file that is named
/// holds text whatever its ending, while of a directory the files with these endings and `.txt` are taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// A file; a directory, which is read with all below it in the order of the paths; a pattern with `*`, `?`, `[…]`
    /// and `**` for any number of folders; or files of a dataset repository, `hf://datasets/OWNER/NAME/PATTERN` or
    /// `hf://datasets/OWNER/NAME@REVISION/PATTERN`.
    pub path: PathBuf,
    /// How text is cut into documents. A record is one document.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub documents: Option<Documents>,
    /// The key or column of a record that holds its text: a string, or null if there is none.
    #[serde(default = "default_field")]
    pub field: String,
}

fn default_field() -> String {
    "text".into()
}

/// How the documents lie in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    Text(Documents),
    JsonLines,
    Json,
    Parquet,
}

/// A file to read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct InputFile {
    pub path: PathBuf,
    pub format: Format,
    pub is_gzip: bool,
    /// Bytes on the disk.
    pub size: u64,
}

/// What a name says about a file.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Named {
    Text,
    JsonLines,
    Json,
    Parquet,
    Other,
}

impl Source {
    /// Text at `path`, cut into `documents`.
    pub fn text(path: impl Into<PathBuf>, documents: Documents) -> Self {
        Self { path: path.into(), documents: Some(documents), field: default_field() }
    }

    /// Makes a relative path start at `dir`.
    pub(crate) fn start_at(&mut self, dir: &Path) {
        if !self.path.starts_with(HUB) {
            self.path = dir.join(&self.path);
        }
    }

    /// The files, in order; those of a repository are downloaded unless the cache has them.
    pub(super) fn files(&self, hub: &Hub) -> Result<Vec<InputFile>> {
        let paths = match self.path.to_str().and_then(|path| path.strip_prefix(HUB)) {
            Some(address) => self.repository_files(address, hub)?,
            None => self.local_files()?,
        };
        if paths.is_empty() {
            let reason = "no file of text or records is there; it takes .txt, .jsonl, .json (each also .gz) and .parquet";
            return Err(self.refuse(reason));
        }
        paths.into_iter().map(|path| self.input(path)).collect()
    }

    /// Mixes in what decides the documents: the files by name, size and time of change, and how they are read.
    pub(super) fn mark(&self, files: &[InputFile], hash: &mut Fnv) -> Result<()> {
        let documents = self.documents.as_ref().map(Documents::to_string).unwrap_or_default();
        for text in [&documents, &self.field] {
            hash.write(text.as_bytes());
            hash.write_u8(0);
        }
        for file in files {
            let metadata = fs::metadata(&file.path).map_err(Error::io(&file.path))?;
            // A system without the time of change leaves name and size.
            let changed = metadata.modified().ok();
            let changed = changed.and_then(|time| time.duration_since(UNIX_EPOCH).ok());
            hash.write(file.path.as_os_str().as_encoded_bytes());
            hash.write_u64(file.size);
            hash.write_u128(changed.map_or(0, |time| time.as_nanos()));
        }
        Ok(())
    }

    fn local_files(&self) -> Result<Vec<PathBuf>> {
        let pattern = self.path.to_string_lossy();
        if self.path.is_dir() {
            let mut files = Vec::new();
            walk(&self.path, &mut files)?;
            files.sort();
            return Ok(files);
        }
        if self.path.exists() {
            return Ok(vec![self.path.clone()]);
        }
        if !pattern.contains(['*', '?', '[']) {
            self.path.try_exists().map_err(Error::io(&self.path))?;
            return Err(self.refuse("is not there; put the texts in that place, or name others"));
        }
        let found = glob::glob_with(&pattern, MATCH)
            .map_err(|error| self.refuse(format!("is no pattern: {error}")))?;
        let mut files = Vec::new();
        for path in found {
            let path = path.map_err(|error| Error::io(error.path().to_owned())(error.into()))?;
            if path.is_file() {
                files.push(path);
            }
        }
        Ok(files)
    }

    fn repository_files(&self, address: &str, hub: &Hub) -> Result<Vec<PathBuf>> {
        let usage = "is no address of dataset files; use hf://datasets/OWNER/NAME/PATTERN or \
                     hf://datasets/OWNER/NAME@REVISION/PATTERN, such as hf://datasets/OWNER/NAME/data/*.parquet";
        let parts: Vec<&str> = address.splitn(4, '/').collect();
        let ["datasets", owner, name, pattern] = parts[..] else { return Err(self.refuse(usage)) };
        let matching = Pattern::new(pattern)
            .map_err(|error| self.refuse(format!("`{pattern}` is no pattern: {error}")))?;
        let (name, hub) = match name.split_once('@') {
            Some((name, revision)) => (name, hub.clone().revision(revision.replace("%2F", "/"))),
            None => (name, hub.clone().revision("main")),
        };
        let is_wanted = |file: &str| matching.matches_with(file, MATCH);
        Ok(hub.download_dataset(&format!("{owner}/{name}"), &is_wanted)?)
    }

    fn input(&self, path: PathBuf) -> Result<InputFile> {
        let (named, is_gzip) = named(&path);
        let format = match named {
            Named::JsonLines => Format::JsonLines,
            Named::Json => Format::Json,
            Named::Parquet if is_gzip => {
                let reason = "a Parquet file is compressed inside; unpack it".into();
                return Err(Error::Corpus { path, reason });
            }
            Named::Parquet => Format::Parquet,
            Named::Text | Named::Other => match &self.documents {
                Some(documents) => Format::Text(documents.clone()),
                None => {
                    let reason = "is text, and its source does not say how it is cut: give `documents` (`file`, `line`, \
                                  `blank-line`, `gutenberg` or `separator:TEXT`)"
                        .into();
                    return Err(Error::Corpus { path, reason });
                }
            },
        };
        let size = fs::metadata(&path).map_err(Error::io(&path))?.len();
        Ok(InputFile { path, format, is_gzip, size })
    }

    pub(crate) fn refuse(&self, reason: impl Into<String>) -> Error {
        Error::Corpus { path: self.path.clone(), reason: reason.into() }
    }
}

/// The files with a known ending in `dir` and below. Links to folders are not followed: they may lead in circles.
fn walk(dir: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(dir).map_err(Error::io(dir))? {
        let entry = entry.map_err(Error::io(dir))?;
        let path = entry.path();
        if entry.file_name().as_encoded_bytes().starts_with(b".") {
            continue;
        }
        if entry.file_type().map_err(Error::io(&path))?.is_dir() {
            walk(&path, files)?;
        } else if named(&path).0 != Named::Other && path.is_file() {
            files.push(path);
        }
    }
    Ok(())
}

fn named(path: &Path) -> (Named, bool) {
    let extension = |path: &Path| path.extension().and_then(OsStr::to_str).map(str::to_lowercase);
    let (inner, is_gzip) = match extension(path).as_deref() {
        Some("gz") => (path.with_extension(""), true),
        _ => (path.to_owned(), false),
    };
    let named = match extension(&inner).as_deref() {
        Some("txt") => Named::Text,
        Some("jsonl" | "ndjson") => Named::JsonLines,
        Some("json") => Named::Json,
        Some("parquet") => Named::Parquet,
        _ => Named::Other,
    };
    (named, is_gzip)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(source: &Source, dir: &Path) -> Vec<String> {
        let files = source.files(&Hub::from_env()).unwrap();
        let name = |file: &InputFile| file.path.strip_prefix(dir).unwrap().display().to_string();
        files.iter().map(name).collect()
    }

    #[test]
    fn directories_and_patterns_have_one_order() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        for name in ["b.txt", "a/z.jsonl", "a/y.txt.gz", "c.md", ".hidden.txt", "a/b/x.parquet"] {
            let path = dir.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "x").unwrap();
        }
        let source = |path: &str| Source::text(dir.join(path), Documents::Line);
        assert_eq!(names(&source(""), dir), ["a/b/x.parquet", "a/y.txt.gz", "a/z.jsonl", "b.txt"]);
        assert_eq!(names(&source("*.txt"), dir), ["b.txt"]);
        assert_eq!(names(&source("**/*.txt*"), dir), ["a/y.txt.gz", "b.txt"]);
        assert_eq!(names(&source("c.md"), dir), ["c.md"]);
        let message = |path: &str| source(path).files(&Hub::from_env()).unwrap_err().to_string();
        assert!(message("*.csv").contains("*.csv: no file"), "{}", message("*.csv"));
        assert!(message("absent.txt").contains("absent.txt"));
        assert!(message("[a").contains("is no pattern"));
    }

    #[test]
    fn text_needs_a_kind_of_documents() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.txt");
        fs::write(&path, "x").unwrap();
        let source = Source { documents: None, ..Source::text(&path, Documents::Line) };
        let message = source.files(&Hub::from_env()).unwrap_err().to_string();
        assert!(message.contains("a.txt") && message.contains("`documents`"), "{message}");
    }

    #[test]
    fn addresses_that_name_no_files_are_refused() {
        for address in ["hf://org/name/x", "hf://datasets/org/name", "hf://datasets/org", "hf://"] {
            let source = Source::text(address, Documents::Line);
            let message = source.files(&Hub::from_env()).unwrap_err().to_string();
            assert!(message.contains("hf://datasets/OWNER/NAME/PATTERN"), "{message}");
        }
    }

    #[test]
    fn a_change_of_a_file_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.txt");
        let mark = |text: &str, documents| {
            fs::write(&path, text).unwrap();
            let source = Source::text(&path, documents);
            let mut hash = Fnv::default();
            source.mark(&source.files(&Hub::from_env()).unwrap(), &mut hash).unwrap();
            hash.finish()
        };
        let first = mark("a", Documents::Line);
        assert_ne!(first, mark("ab", Documents::Line));
        assert_ne!(mark("ab", Documents::Line), mark("ab", Documents::File));
    }
}
