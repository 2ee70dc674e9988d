//! The documents of several sources, read one at a time.

use std::{cell::Cell, hash::Hasher, ops::ControlFlow};

use bitnet_model::hub::Hub;

use super::{
    reader,
    source::{InputFile, Source},
};
use crate::{Result, fingerprint::Fnv};

/// Sources and the files they name.
#[derive(Clone, Debug)]
pub(crate) struct Corpus {
    sources: Vec<(Source, Vec<InputFile>)>,
    fingerprint: u64,
}

/// A document on its way.
#[derive(Clone, Debug)]
pub(super) struct Document {
    /// Its number in the corpus.
    pub index: usize,
    /// Never empty.
    pub text: String,
    /// Bytes read from the disk by now, of [`Corpus::bytes`].
    pub read: u64,
}

impl Corpus {
    /// Finds the files, which takes a network if they are in a repository and not in the cache.
    pub fn open(sources: &[Source], hub: &Hub) -> Result<Self> {
        let mut hash = Fnv::default();
        let mut opened = Vec::new();
        for source in sources {
            let files = source.files(hub)?;
            source.mark(&files, &mut hash)?;
            opened.push((source.clone(), files));
        }
        Ok(Self { sources: opened, fingerprint: hash.finish() })
    }

    /// Tells whether these are the files of another time, by their names, sizes and times of change.
    pub fn fingerprint(&self) -> u64 {
        self.fingerprint
    }

    /// The sources with their files, in order.
    pub fn sources(&self) -> &[(Source, Vec<InputFile>)] {
        &self.sources
    }

    /// Bytes of all files on the disk.
    pub fn bytes(&self) -> u64 {
        self.sources.iter().flat_map(|(_, files)| files).map(|file| file.size).sum()
    }

    /// Hands all documents to `sink`, in order, until it breaks off. A source without a document is an error.
    pub(super) fn read(
        &self,
        sink: &mut dyn FnMut(Document) -> Result<ControlFlow<()>>,
    ) -> Result<()> {
        let (done, mut index) = (Cell::new(0), 0);
        for (source, files) in &self.sources {
            let before = index;
            for file in files {
                let mut numbered = |text: String| {
                    if text.trim().is_empty() {
                        return Ok(ControlFlow::Continue(()));
                    }
                    index += 1;
                    sink(Document { index: index - 1, text, read: done.get() })
                };
                if reader::read(file, source, &done, &mut numbered)?.is_break() {
                    return Ok(());
                }
            }
            if index == before {
                let cut = source.documents.as_ref();
                let cut = cut.map(|kind| format!(" (documents = \"{kind}\")")).unwrap_or_default();
                return Err(source.refuse(format!("holds no document{cut}")));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::*;
    use crate::dataset::Documents;

    fn read(sources: &[Source]) -> Result<Vec<String>> {
        let mut texts = Vec::new();
        Corpus::open(sources, &Hub::from_env())?.read(&mut |document| {
            assert_eq!(document.index, texts.len());
            texts.push(document.text);
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(texts)
    }

    #[test]
    fn a_directory_is_read_in_the_order_of_its_paths() {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in [
            ("b.txt", "2"),
            ("a.txt", "1"),
            ("c.md", "3"),
            ("c.jsonl", r#"{"text": "4"}"#),
            ("a/a.json", r#"[{"text": "0"}]"#),
        ] {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let source = Source::text(dir.path(), Documents::File);
        assert_eq!(read(&[source.clone(), source]).unwrap(), ["0", "1", "2", "4"].repeat(2));
    }

    #[test]
    fn errors_name_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.txt");
        let message =
            |path: &Path| read(&[Source::text(path, Documents::Line)]).unwrap_err().to_string();
        assert!(message(&path).contains("x.txt"));
        fs::write(&path, b"ab\nc\xff").unwrap();
        assert!(message(&path).ends_with("x.txt: byte 4 is not UTF-8"));
        fs::write(&path, "\n \n").unwrap();
        assert!(message(&path).ends_with("x.txt: holds no document (documents = \"line\")"));
    }
}
