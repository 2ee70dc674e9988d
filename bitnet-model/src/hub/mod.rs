//! Repo id, directory or single file → [`ModelFiles`].
//!
//! The cache is the one Python's `huggingface_hub` keeps, so both find each other's downloads:
//! ```text
//! $HF_HUB_CACHE/models--org--name/refs/main                     the commit `main` stood at
//!                                /snapshots/<commit>/config.json -> ../../blobs/<etag>
//!                                /blobs/<etag>                   whole files only
//!                                /blobs/<etag>.incomplete        what an interrupted download has so far
//! $HF_HUB_CACHE/datasets--org--name/…                           the same for a repository of data
//! $HF_HUB_CACHE/.locks/models--org--name/<etag>.lock             one downloader a blob, across processes
//! ```
//! `hf-hub` gives this layout its names ([`hf_hub::Repo`], [`hf_hub::CacheRepo`]) and the repository listing its type. Its
//! downloader is not used: version 0.5 sends the token on to the host a redirect names, appends a whole body to a partial
//! file when a server ignores `Range`, fails on empty files, has no timeout, retries neither metadata nor a wait the server
//! asked for, gives up on a held lock after five seconds and never compares a file with its checksum. `client` and
//! `transfer` do these things on `ureq`, the HTTP client `hf-hub` already brings.
//!
//! A download asks for the listing of one revision, pins the commit it names, fetches the files a model needs and nothing
//! else, and points `refs/<revision>` at the commit last: what a reference names is complete.

mod cache;
mod client;
mod env;
mod files;
mod summary;
mod transfer;
mod wanted;

use std::{fmt, path::PathBuf, time::Duration};

use hf_hub::RepoType;

use self::{
    cache::RepoCache,
    client::{Client, Failure},
    files::OPTIONAL_FILES,
};
pub use self::{files::ModelFiles, summary::HubSummary};
use crate::{Error, Result};

/// How often a failing request is repeated, and how long after.
#[derive(Clone, Copy, Debug)]
pub struct Retry {
    /// Tries in a row that bring nothing new before giving up; at least one is made.
    pub tries: u32,
    /// Wait before the second try; it doubles from try to try. The real wait is 50 % to 100 % of it.
    pub first_delay: Duration,
    /// Upper bound of the doubling. A wait that the server asks for is honoured up to a minute.
    pub max_delay: Duration,
}

impl Default for Retry {
    /// Six tries over some 15 seconds.
    fn default() -> Self {
        Self {
            tries: 6,
            first_delay: Duration::from_millis(500),
            max_delay: Duration::from_secs(10),
        }
    }
}

/// A Hugging Face Hub (or a mirror of its protocol) with a local cache.
///
/// ```no_run
/// use bitnet_model::hub::Hub;
///
/// let files = Hub::from_env().revision("main").resolve("microsoft/bitnet-b1.58-2B-4T")?;
/// println!("{} in {} file(s)", files.root.display(), files.weights.len());
/// # Ok::<(), bitnet_model::Error>(())
/// ```
#[derive(Clone)]
pub struct Hub {
    endpoint: String,
    cache_dir: PathBuf,
    revision: String,
    token: Option<String>,
    offline: bool,
    progress: bool,
    retry: Retry,
    timeout: Duration,
}

impl fmt::Debug for Hub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hub")
            .field("endpoint", &self.endpoint)
            .field("cache_dir", &self.cache_dir)
            .field("revision", &self.revision)
            .field("token", &self.token.as_ref().map(|_| "(hidden)"))
            .field("offline", &self.offline)
            .field("progress", &self.progress)
            .field("retry", &self.retry)
            .field("timeout", &self.timeout)
            .finish()
    }
}

impl Hub {
    /// The Hub as the process environment describes it, with the variables, defaults and precedence of Python's
    /// `huggingface_hub`: `HF_HUB_CACHE` (or `HUGGINGFACE_HUB_CACHE`), `HF_HOME`, `XDG_CACHE_HOME`; `HF_TOKEN` (or
    /// `HUGGING_FACE_HUB_TOKEN`), `HF_TOKEN_PATH`, `$HF_HOME/token`, `HF_HUB_DISABLE_IMPLICIT_TOKEN`; `HF_ENDPOINT`;
    /// `HF_HUB_OFFLINE` (or `TRANSFORMERS_OFFLINE`); `HF_HUB_DISABLE_PROGRESS_BARS`; `HF_HUB_DOWNLOAD_TIMEOUT`.
    pub fn from_env() -> Self {
        Self::from_vars(|name| std::env::var(name).ok())
    }

    /// The branch, tag or commit to take; `main` unless set.
    pub fn revision(mut self, revision: impl Into<String>) -> Self {
        self.revision = revision.into();
        self
    }

    /// Whether to use the cache only and make no request.
    pub fn offline(mut self, offline: bool) -> Self {
        self.offline = offline;
        self
    }

    /// The cache folder: what `HF_HUB_CACHE` names.
    pub fn cache_dir(mut self, cache_dir: impl Into<PathBuf>) -> Self {
        self.cache_dir = cache_dir.into();
        self
    }

    /// The access token, sent to the endpoint and to no other host.
    pub fn token(mut self, token: Option<String>) -> Self {
        self.token = token;
        self
    }

    /// The server: `https://huggingface.co` or a mirror.
    pub fn endpoint(mut self, endpoint: impl Into<String>) -> Self {
        self.endpoint = endpoint.into();
        self
    }

    /// Whether downloads draw progress bars on stderr, if that is a terminal.
    pub fn progress(mut self, progress: bool) -> Self {
        self.progress = progress;
        self
    }

    /// How failing requests are repeated.
    pub fn retry(mut self, retry: Retry) -> Self {
        self.retry = retry;
        self
    }

    /// How long a connection may take to open, and then stay silent.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// The files of the model that `source` names: a folder, a `.safetensors` or a `.gguf` file if such a path exists, else
    /// a repository, or one GGUF file of a repository (`org/name/file.gguf`), which is downloaded unless the cache has it.
    pub fn resolve(&self, source: &str) -> Result<ModelFiles> {
        let path = PathBuf::from(source);
        if path.exists() {
            return ModelFiles::from_path(&path);
        }
        if is_repo_id(source) {
            return self.download(source);
        }
        if let Some((repo_id, file)) = gguf_in_repo(source) {
            let found = self.download_wanted(RepoType::Model, repo_id, &|name| name == file)?;
            return found.first().map_or_else(
                || Err(hub_error(source, "there is no such file in the repository")),
                |path| Ok(ModelFiles::of_gguf(source, path)),
            );
        }
        Err(hub_error(
            source,
            "there is no such file or folder, and it is no repository id of the form `org/name`",
        ))
    }

    /// The files of the repository `repo_id` (`org/name`) at this Hub's revision. What the cache lacks is downloaded;
    /// without a network, what it has is used, with a warning.
    pub fn download(&self, repo_id: &str) -> Result<ModelFiles> {
        self.check(repo_id)?;
        let cache = RepoCache::new(&self.cache_dir, RepoType::Model, repo_id, &self.revision);
        if self.offline {
            return self.cached(&cache, repo_id).map_err(|missing| {
                let reason = format!(
                    "{missing}, and HF_HUB_OFFLINE is set: unset it or run `bitnet download` first"
                );
                hub_error(repo_id, reason)
            });
        }
        let client = Client::new(&self.endpoint, self.token.as_deref(), self.timeout, self.retry)
            .map_err(|reason| hub_error(repo_id, reason))?;
        match client.listing(repo_id, &self.revision) {
            Ok(listing) => self.fetch(&client, &cache, repo_id, &listing),
            Err(failure @ (Failure::Unreachable(_) | Failure::Transient { .. })) => {
                let error = client.explain(failure, repo_id, &self.revision, None);
                let Ok(files) = self.cached(&cache, repo_id) else { return Err(error) };
                tracing::warn!("{error}; using the cached {}", files.root.display());
                Ok(files)
            }
            Err(failure) => Err(client.explain(failure, repo_id, &self.revision, None)),
        }
    }

    /// Refuses what cannot name a repository and a revision.
    fn check(&self, repo_id: &str) -> Result<()> {
        if !is_repo_id(repo_id) {
            let reason = "this is no repository id of the form `org/name`";
            return Err(hub_error(repo_id, reason));
        }
        if !is_revision(&self.revision) {
            let reason = format!("`{}` is no branch, tag or commit", self.revision);
            return Err(hub_error(repo_id, reason));
        }
        Ok(())
    }

    /// The model as the cache has it, or what is missing.
    fn cached(&self, cache: &RepoCache, repo_id: &str) -> Result<ModelFiles, String> {
        let at = self.cache_dir.display();
        let Some(snapshot) = cache.snapshot() else {
            return Err(format!("revision `{}` is not in the cache at {at}", self.revision));
        };
        ModelFiles::from_snapshot(&snapshot, repo_id).map_err(|error| match error {
            Error::Hub { reason, .. } => {
                format!(
                    "revision `{}` is not complete in the cache at {at} ({reason})",
                    self.revision
                )
            }
            other => other.to_string(),
        })
    }

    /// Brings the snapshot of one commit up to what a model needs, weights last, and then names it.
    fn fetch(
        &self,
        client: &Client,
        cache: &RepoCache,
        repo_id: &str,
        listing: &hf_hub::api::RepoInfo,
    ) -> Result<ModelFiles> {
        let commit = listing.sha.as_str();
        let names: Vec<&str> =
            listing.siblings.iter().map(|file| file.rfilename.as_str()).collect();
        let required = files::required(&names).map_err(|reason| hub_error(repo_id, reason))?;
        let fetch = |file: &str| -> Result<PathBuf> {
            let pointer = cache.pointer(commit, file);
            if !pointer.exists() {
                transfer::fetch(client, cache, commit, file, self.progress).map_err(|failure| {
                    client.explain(failure, repo_id, &self.revision, Some(file))
                })?;
            }
            Ok(pointer)
        };
        if !files::is_gguf(required) {
            fetch(files::CONFIG)?;
            for file in OPTIONAL_FILES.iter().filter(|file| names.contains(file)) {
                fetch(file)?;
            }
        }
        let weights = fetch(required)?;
        if required == files::INDEX {
            for shard in files::read_index(&weights)? {
                fetch(&shard)?;
            }
        }
        cache.set_ref(commit)?;
        ModelFiles::from_snapshot(&cache.snapshot_of(commit), repo_id)
    }
}

fn hub_error(source: &str, reason: impl Into<String>) -> Error {
    Error::Hub { source_name: source.to_string(), reason: reason.into() }
}

/// `org/name` by the Hub's rules: letters, digits, `-`, `_`, `.`; no part starts or ends with `-` or `.`; no `--` or `..`.
fn is_repo_id(id: &str) -> bool {
    let part = |part: &str| {
        !part.is_empty()
            && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
            && !part.starts_with(['-', '.'])
            && !part.ends_with(['-', '.'])
    };
    id.len() <= 96
        && id.split_once('/').is_some_and(|(org, name)| part(org) && part(name))
        && !["--", ".."].iter().any(|bad| id.contains(bad))
        && !id.ends_with(".git")
}

/// Repository and path of `org/name/file.gguf`.
fn gguf_in_repo(source: &str) -> Option<(&str, &str)> {
    let (at, _) = source.match_indices('/').nth(1)?;
    let (repo_id, file) = (&source[..at], &source[at + 1..]);
    (is_repo_id(repo_id) && files::is_gguf(file) && files::is_below(file))
        .then_some((repo_id, file))
}

/// A branch, tag or commit that is also safe as a path below `refs/`.
fn is_revision(revision: &str) -> bool {
    revision.len() <= 255
        && revision.split('/').all(|part| !matches!(part, "" | "." | ".."))
        && !revision.chars().any(|c| c.is_control() || c.is_whitespace() || "\\:~^?*[".contains(c))
}

/// One plain component of a path: what may become a file name when a server sends it.
fn is_plain_name(name: &str) -> bool {
    (1..=255).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.+=".contains(&b))
        && !name.starts_with('.')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repo_ids() {
        for good in ["microsoft/bitnet-b1.58-2B-4T", "1bitLLM/bitnet_b1_58-large", "a/b"] {
            assert!(is_repo_id(good), "{good}");
        }
        for bad in [
            "gpt2", "a/b/c", "/a", "a/", "./a", "../a", "a/..", "a--b/c", "a/b.git", "a/b c",
            "~/a", "a/ü", "",
        ] {
            assert!(!is_repo_id(bad), "{bad}");
        }
        assert!(!is_repo_id(&format!("a/{}", "b".repeat(96))));
    }

    #[test]
    fn files_of_repositories() {
        assert_eq!(gguf_in_repo("org/name/a.gguf"), Some(("org/name", "a.gguf")));
        assert_eq!(gguf_in_repo("org/name/part/a.GGUF"), Some(("org/name", "part/a.GGUF")));
        for bad in ["org/a.gguf", "org/name/a.bin", "org/name/../a.gguf", "/org/name/a.gguf"] {
            assert_eq!(gguf_in_repo(bad), None, "{bad}");
        }
    }

    #[test]
    fn revisions() {
        for good in ["main", "refs/pr/1", "v1.0", "feature/ü+x"] {
            assert!(is_revision(good), "{good}");
        }
        for bad in ["", "..", "a/../b", "/a", "a//b", "a b", "a\\b", "a:b", "a\n"] {
            assert!(!is_revision(bad), "{bad}");
        }
    }
}
