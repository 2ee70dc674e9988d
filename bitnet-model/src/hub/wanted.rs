//! Single files of a repository, of a dataset or of an adapter. Which of them are wanted is the caller's choice; they may be
//! many and large, so nothing else is fetched.

use std::{fs, path::PathBuf};

use hf_hub::RepoType;

use super::{
    Hub,
    cache::RepoCache,
    client::{Client, Failure},
    files::is_below,
    hub_error, is_repo_id, transfer,
};
use crate::{Error, Result};

/// The files of an adapter in PEFT's format.
const ADAPTER_FILES: [&str; 2] = ["adapter_config.json", "adapter_model.safetensors"];

impl Hub {
    /// The folder of the adapter that `source` names: such a path if there is one, else a repository (`org/name`), of which
    /// the adapter's two files are downloaded unless the cache has them.
    ///
    /// # Errors
    /// Neither a path nor a repository id; those of [`download_dataset`](Self::download_dataset).
    pub fn resolve_adapter(&self, source: &str) -> Result<PathBuf> {
        let path = PathBuf::from(source);
        if path.exists() {
            return Ok(path);
        }
        if !is_repo_id(source) {
            let reason =
                "there is no such folder, and it is no repository id of the form `org/name`";
            return Err(hub_error(source, reason));
        }
        let is_wanted = |name: &str| ADAPTER_FILES.contains(&name);
        let files = self.download_wanted(RepoType::Model, source, &is_wanted)?;
        let folder = files.first().and_then(|file| file.parent());
        Ok(folder.unwrap_or(&path).to_owned())
    }

    /// The files of the dataset repository `repo_id` (`org/name`) at this Hub's revision whose paths in it `is_wanted`
    /// takes, in the order of their paths, at least one. What the cache lacks is downloaded; without a network, what it
    /// has of them is used, with a warning.
    ///
    /// # Errors
    /// No such repository or revision; none of its files is wanted; the network fails and the cache has none of them.
    pub fn download_dataset(
        &self,
        repo_id: &str,
        is_wanted: &dyn Fn(&str) -> bool,
    ) -> Result<Vec<PathBuf>> {
        self.download_wanted(RepoType::Dataset, repo_id, is_wanted)
    }

    /// The same for a repository of any type.
    pub(super) fn download_wanted(
        &self,
        repo_type: RepoType,
        repo_id: &str,
        is_wanted: &dyn Fn(&str) -> bool,
    ) -> Result<Vec<PathBuf>> {
        self.check(repo_id)?;
        let cache = RepoCache::new(&self.cache_dir, repo_type, repo_id, &self.revision);
        if self.offline {
            let files = cached(&cache, is_wanted)?;
            if files.is_empty() {
                let at = self.cache_dir.display();
                let reason = format!(
                    "the cache at {at} has none of the wanted files of revision `{}`, and HF_HUB_OFFLINE is set: unset it",
                    self.revision
                );
                return Err(hub_error(repo_id, reason));
            }
            return Ok(files);
        }
        let client = Client::new(&self.endpoint, self.token.as_deref(), self.timeout, self.retry)
            .map_err(|reason| hub_error(repo_id, reason))?
            .of(repo_type);
        let listing = match client.listing(repo_id, &self.revision) {
            Ok(listing) => listing,
            Err(failure @ (Failure::Unreachable(_) | Failure::Transient { .. })) => {
                let error = client.explain(failure, repo_id, &self.revision, None);
                let files = cached(&cache, is_wanted)?;
                if files.is_empty() {
                    return Err(error);
                }
                tracing::warn!("{error}; using {} cached files", files.len());
                return Ok(files);
            }
            Err(failure) => return Err(client.explain(failure, repo_id, &self.revision, None)),
        };
        let names = listing.siblings.iter().map(|file| file.rfilename.as_str());
        let mut wanted: Vec<&str> = names.filter(|name| is_wanted(name)).collect();
        wanted.sort_unstable();
        if let Some(bad) = wanted.iter().find(|name| !is_below(name)) {
            return Err(hub_error(
                repo_id,
                format!("names {bad:?}, which is no path below a folder"),
            ));
        }
        if wanted.is_empty() {
            let reason = format!(
                "none of the {} files of revision `{}` matches",
                listing.siblings.len(),
                self.revision
            );
            return Err(hub_error(repo_id, reason));
        }
        let mut files = Vec::new();
        for name in wanted {
            let pointer = cache.pointer(&listing.sha, name);
            if !pointer.exists() {
                transfer::fetch(&client, &cache, &listing.sha, name, self.progress).map_err(
                    |failure| client.explain(failure, repo_id, &self.revision, Some(name)),
                )?;
            }
            files.push(pointer);
        }
        cache.set_ref(&listing.sha)?;
        Ok(files)
    }
}

/// The wanted files that the cache has, in the order of their paths.
fn cached(cache: &RepoCache, is_wanted: &dyn Fn(&str) -> bool) -> Result<Vec<PathBuf>> {
    let Some(snapshot) = cache.snapshot() else { return Ok(Vec::new()) };
    let (mut names, mut folders) = (Vec::new(), vec![String::new()]);
    while let Some(folder) = folders.pop() {
        let path = snapshot.join(&folder);
        for entry in fs::read_dir(&path).map_err(Error::io(&path))? {
            let entry = entry.map_err(Error::io(&path))?;
            let Ok(name) = entry.file_name().into_string() else { continue };
            let name = if folder.is_empty() { name } else { format!("{folder}/{name}") };
            match entry.file_type().map_err(Error::io(entry.path()))?.is_dir() {
                true => folders.push(name),
                // `is_file` follows links: one whose target is gone is no file.
                false if is_wanted(&name) && entry.path().is_file() => names.push(name),
                false => {}
            }
        }
    }
    names.sort();
    Ok(names.into_iter().map(|name| snapshot.join(name)).collect())
}
