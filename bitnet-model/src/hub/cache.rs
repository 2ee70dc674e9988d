//! One repository's part of the cache that Python's `huggingface_hub` shares (layout: [`super`]).

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io,
    path::{Path, PathBuf},
};

use hf_hub::{Cache, CacheRepo, Repo, RepoType};

use super::is_plain_name;
use crate::{Error, Result};

pub(super) struct RepoCache {
    repo_id: String,
    layout: CacheRepo,
    folder: PathBuf,
    locks: PathBuf,
    revision: String,
}

impl RepoCache {
    pub fn new(cache_dir: &Path, kind: RepoType, repo_id: &str, revision: &str) -> Self {
        let repo = Repo::with_revision(repo_id.to_string(), kind, revision.to_string());
        Self {
            repo_id: repo_id.to_string(),
            folder: cache_dir.join(repo.folder_name()),
            locks: cache_dir.join(".locks").join(repo.folder_name()),
            layout: Cache::new(cache_dir.to_path_buf()).repo(repo),
            revision: revision.to_string(),
        }
    }

    pub fn repo_id(&self) -> &str {
        &self.repo_id
    }

    /// The folder of the revision, if the cache knows which commit it is.
    pub fn snapshot(&self) -> Option<PathBuf> {
        let named = fs::read_to_string(self.folder.join("refs").join(&self.revision)).ok();
        let commit = named.as_deref().map_or(self.revision.as_str(), str::trim);
        Some(self.snapshot_of(commit)).filter(|path| is_plain_name(commit) && path.is_dir())
    }

    /// The folder of a commit.
    pub fn snapshot_of(&self, commit: &str) -> PathBuf {
        self.layout.pointer_path(commit)
    }

    /// Where `file` of a commit is found once it is whole.
    pub fn pointer(&self, commit: &str, file: &str) -> PathBuf {
        self.snapshot_of(commit).join(file)
    }

    /// Where the content with this etag is stored; `etag` is a plain name.
    pub fn blob(&self, etag: &str) -> PathBuf {
        self.layout.blob_path(etag)
    }

    /// Records that the revision stands at `commit`. A commit needs no name beside its own.
    pub fn set_ref(&self, commit: &str) -> Result<()> {
        let path = self.folder.join("refs").join(&self.revision);
        let current = fs::read_to_string(&path).ok();
        if self.revision == commit || current.as_deref() == Some(commit) {
            return Ok(());
        }
        self.layout.create_ref(commit).map_err(Error::io(path))
    }

    /// The right to write one blob, waited for while another process holds it and kept until dropped. The lock is Python's:
    /// `flock` on the same file. `None` where the file system has no locks.
    pub fn lock(&self, etag: &str) -> Result<Option<File>> {
        let path = self.locks.join(format!("{etag}.lock"));
        create_parent(&path)?;
        loop {
            let lock = OpenOptions::new()
                .create(true)
                .truncate(false)
                .write(true)
                .open(&path)
                .map_err(Error::io(&path))?;
            let locked = match lock.try_lock() {
                Ok(()) => Ok(()),
                Err(TryLockError::WouldBlock) => {
                    tracing::info!("waiting for another download: {} is held", path.display());
                    lock.lock()
                }
                Err(TryLockError::Error(error)) => Err(error),
            };
            match locked {
                Ok(()) if is_linked(&lock) => return Ok(Some(lock)),
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::Unsupported => return Ok(None),
                Err(error) => return Err(Error::io(&path)(error)),
            }
        }
    }

    /// Makes a finished blob visible as `file` of `commit`, in one step: by a relative link as Python does, else by a hard
    /// link, else by moving the blob there.
    pub fn link(&self, commit: &str, file: &str, blob: &Path, etag: &str) -> Result<()> {
        let pointer = self.pointer(commit, file);
        create_parent(&pointer)?;
        if pointer.exists() {
            return Ok(());
        }
        match fs::remove_file(&pointer) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(Error::io(&pointer)(error));
            }
            _ => {} // a link to a blob that is gone, or nothing
        }
        // The pointer lies below `snapshots/<commit>/`, two levels down and one more for each folder in `file`.
        let mut target = PathBuf::from("../..");
        target.extend(file.split('/').skip(1).map(|_| ".."));
        target.extend(["blobs", etag]);
        let linked = symlink(&target, &pointer)
            .or_else(|_| fs::hard_link(blob, &pointer))
            .or_else(|_| fs::rename(blob, &pointer));
        match linked {
            Err(_) if pointer.exists() => Ok(()), // another process was faster
            linked => linked.map_err(Error::io(&pointer)),
        }
    }
}

/// Creates the folder that `path` lies in.
pub(super) fn create_parent(path: &Path) -> Result<()> {
    match path.parent() {
        Some(parent) => fs::create_dir_all(parent).map_err(Error::io(parent)),
        None => Ok(()),
    }
}

/// Whether the lock file still has a name: some versions of Python's `filelock` delete it on release, and a lock on a
/// deleted file excludes nobody.
#[cfg(unix)]
fn is_linked(lock: &File) -> bool {
    use std::os::unix::fs::MetadataExt;
    lock.metadata().is_ok_and(|metadata| metadata.nlink() > 0)
}

#[cfg(not(unix))]
fn is_linked(_lock: &File) -> bool {
    true // an open file cannot be deleted
}

#[cfg(unix)]
fn symlink(target: &Path, link: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(target, link)
}

#[cfg(windows)]
fn symlink(target: &Path, link: &Path) -> io::Result<()> {
    std::os::windows::fs::symlink_file(target, link)
}

#[cfg(not(any(unix, windows)))]
fn symlink(_target: &Path, _link: &Path) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

    #[test]
    fn a_revision_is_a_reference_or_a_commit() {
        let folder = tempfile::tempdir().unwrap();
        let cache = |revision| RepoCache::new(folder.path(), RepoType::Model, "org/name", revision);
        assert_eq!(cache("main").snapshot(), None);
        fs::create_dir_all(cache("main").snapshot_of(COMMIT)).unwrap();
        assert_eq!(cache("main").snapshot(), None);
        cache("refs/pr/1").set_ref(COMMIT).unwrap();
        cache(COMMIT).set_ref(COMMIT).unwrap();
        for revision in ["refs/pr/1", COMMIT] {
            assert_eq!(cache(revision).snapshot(), Some(cache("main").snapshot_of(COMMIT)));
        }
        let refs = folder.path().join("models--org--name/refs");
        assert!(!refs.join(COMMIT).exists());
        for hostile in ["", ".", "..", "../../elsewhere", "/"] {
            fs::write(refs.join("main"), hostile).unwrap();
            assert_eq!(cache("main").snapshot(), None, "{hostile:?}");
        }
    }

    #[test]
    fn links_replace_dangling_ones_and_reach_from_folders() {
        let folder = tempfile::tempdir().unwrap();
        let cache = RepoCache::new(folder.path(), RepoType::Model, "org/name", "main");
        for file in ["a.json", "part/b.json"] {
            cache.link(COMMIT, file, &cache.blob("gone"), "gone").ok();
            let blob = cache.blob("etag");
            create_parent(&blob).unwrap();
            fs::write(&blob, file).unwrap();
            cache.link(COMMIT, file, &blob, "etag").unwrap();
            cache.link(COMMIT, file, &blob, "etag").unwrap();
            assert_eq!(fs::read_to_string(cache.pointer(COMMIT, file)).unwrap(), file);
        }
    }
}
