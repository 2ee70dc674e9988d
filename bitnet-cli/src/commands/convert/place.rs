//! Files that are written beside one another and appear together: whole under their names, or not at all.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};

use crate::{card, folder};

/// Where the card of a file lies.
pub fn card_path(output: &Path) -> PathBuf {
    output.with_extension("md")
}

/// Refuses an `output` that is there, or of whose files one is, unless `force` is given; a card must be this program's for
/// that.
pub fn check_free(output: &Path, others: &[PathBuf], force: bool) -> anyhow::Result<()> {
    let card = card_path(output);
    for path in [output, &card].into_iter().chain(others.iter().map(PathBuf::as_path)) {
        let (shown, is_ours) = (path.display(), path != card || card::is_card(path));
        match path.symlink_metadata() {
            Err(_) => {}
            Ok(metadata) if !metadata.is_file() => bail!("{shown}: is there and no file"),
            Ok(_) if force && is_ours => {}
            Ok(_) if force => bail!(
                "{shown}: is there, and no card that this program wrote: choose another name, or move it away"
            ),
            Ok(_) => {
                bail!("{shown}: is there: choose another name, or pass --force to replace it")
            }
        }
    }
    Ok(())
}

/// A folder beside a file for it and what belongs to it, until all are complete.
pub struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    /// Makes the folder.
    pub fn new(output: &Path) -> anyhow::Result<Self> {
        let (parent, name) = folder::place(output)?;
        Ok(Self { folder: folder::temporary(&parent, &name)? })
    }

    /// Where the file that is to be `output` is written.
    pub fn of(&self, output: &Path) -> PathBuf {
        self.folder.path().join(output.file_name().unwrap_or_default())
    }

    /// Bytes of such a file.
    pub fn bytes(&self, output: &Path) -> anyhow::Result<u64> {
        let file = self.of(output);
        Ok(fs::metadata(&file).with_context(|| file.display().to_string())?.len())
    }

    /// Brings the files to their places, in this order.
    pub fn publish(self, files: &[&Path]) -> anyhow::Result<()> {
        for output in files {
            fs::rename(self.of(output), output).with_context(|| output.display().to_string())?;
        }
        let path = self.folder.path().display().to_string();
        self.folder.close().with_context(|| path)
    }
}
