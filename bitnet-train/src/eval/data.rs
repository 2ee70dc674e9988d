//! Where the data of a task lies: in folders, or on the Hub.

use std::path::{Path, PathBuf};

use bitnet_model::hub::Hub;

use crate::{Error, Result};

/// A place of data files.
#[derive(Clone, Debug)]
pub enum DataSource {
    /// A folder; what its files may be called, a task says.
    Folder(PathBuf),
    /// The data sets of the Hub, and its cache.
    Hub(Hub),
}

/// A data set on the Hub, which keeps every public one as Parquet, too, in a branch of its own:
/// `CONFIGURATION/SPLIT/0000.parquet`.
#[derive(Clone, Copy, Debug)]
pub struct HubDataset {
    /// `org/name`.
    pub repository: &'static str,
    /// Its part; `None` where there is only one, whatever it is called.
    pub configuration: Option<&'static str>,
    /// What is asked.
    pub split: &'static str,
    /// The split of examples, if there is one.
    pub train_split: Option<&'static str>,
}

/// The branch.
const REVISION: &str = "refs/convert/parquet";
/// What may stand between a task's name and the ending, in the order in which it is looked for.
const TEST: [&str; 7] = ["", "_test", "_validation", "_val", "_valid", "_test_norm", "_val_norm"];
/// The same for a file of examples.
const TRAIN: [&str; 3] = ["_train", "_train_norm", "_train_first64"];
const ENDINGS: [&str; 5] = ["jsonl", "json", "txt", "jsonl.gz", "parquet"];

/// The data of a task.
#[derive(Clone, Copy, Debug)]
pub struct TaskData {
    /// How its files may be called, up to `_test.jsonl` and the like.
    pub files: &'static [&'static str],
    /// Where the Hub has it.
    pub hub: HubDataset,
}

impl TaskData {
    pub(super) const fn new(
        files: &'static [&'static str],
        repository: &'static str,
        configuration: Option<&'static str>,
        (split, train_split): (&'static str, Option<&'static str>),
    ) -> Self {
        Self { files, hub: HubDataset { repository, configuration, split, train_split } }
    }

    /// The file of what is asked, of the first of `sources` that has one.
    ///
    /// # Errors
    /// None of them has one, or it cannot be fetched.
    pub fn test_file(&self, sources: &[DataSource]) -> Result<PathBuf> {
        self.find(sources, &TEST, Some(self.hub.split))
    }

    /// The file of examples.
    ///
    /// # Errors
    /// There is none, or it cannot be fetched.
    pub fn train_file(&self, sources: &[DataSource]) -> Result<PathBuf> {
        self.find(sources, &TRAIN, self.hub.train_split)
    }

    fn find(&self, sources: &[DataSource], parts: &[&str], split: Option<&str>) -> Result<PathBuf> {
        let mut searched = Vec::new();
        for source in sources {
            match (source, split) {
                (DataSource::Hub(hub), Some(split)) => return self.hub.fetch(hub, split),
                (DataSource::Hub(_), None) => searched.push(self.hub.repository.to_owned()),
                (DataSource::Folder(folder), _) => match self.in_folder(folder, parts) {
                    Some(path) => return Ok(path),
                    None => searched.push(folder.display().to_string()),
                },
            }
        }
        let first = self.files.first().copied().unwrap_or_default();
        let parts = Vec::from_iter(parts.iter().map(|part| format!("{first}{part}.jsonl")));
        let fetched = if split.is_some() { "; `hub` fetches it" } else { "" };
        Err(Error::Input(format!(
            "{}: has no file of `{first}`: it may be called {}{fetched}",
            searched.join(", "),
            parts.join(", ")
        )))
    }

    fn in_folder(&self, folder: &Path, parts: &[&str]) -> Option<PathBuf> {
        let stems = self.files.iter().flat_map(|name| parts.iter().map(move |part| (name, part)));
        let names = stems.flat_map(|(name, part)| ENDINGS.map(|end| format!("{name}{part}.{end}")));
        names.map(|name| folder.join(name)).find(|path| path.is_file())
    }
}

impl HubDataset {
    fn fetch(&self, hub: &Hub, split: &str) -> Result<PathBuf> {
        let end = format!("/{split}/0000.parquet");
        let is_wanted = |name: &str| {
            name.strip_suffix(&end).is_some_and(|found| match self.configuration {
                Some(configuration) => found == configuration,
                None => !found.contains('/'),
            })
        };
        let files = hub.clone().revision(REVISION).download_dataset(self.repository, &is_wanted)?;
        match <[PathBuf; 1]>::try_from(files) {
            Ok([file]) => Ok(file),
            Err(files) => Err(Error::Input(format!(
                "{}: has {} files that end in {split}/0000.parquet, not one",
                self.repository,
                files.len()
            ))),
        }
    }
}
