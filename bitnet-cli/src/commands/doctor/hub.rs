//! Where downloads live, and whether there is a way to them.

use std::{
    env,
    path::{Path, PathBuf},
};

use bitnet_model::hub::{Hub, HubSummary};
use serde::Serialize;

/// Variables that say something of the Hub. Whether they are set is told, not to what.
const VARIABLES: [&str; 11] = [
    "HF_HOME",
    "HF_HUB_CACHE",
    "HUGGINGFACE_HUB_CACHE",
    "XDG_CACHE_HOME",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "HF_TOKEN_PATH",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN",
];

/// The Hub as this environment has it.
#[derive(Clone, Debug, Serialize)]
pub struct HubFacts {
    /// The folder of the cache.
    pub cache: PathBuf,
    /// Whether it is there.
    pub exists: bool,
    /// Why nothing can be downloaded into it, if so.
    pub not_writable: Option<String>,
    /// The server, without what is secret in its address.
    pub endpoint: String,
    /// Whether only the cache is used.
    pub offline: bool,
    /// Whether there is an access token.
    pub has_token: bool,
    /// Variables that are set.
    pub variables: Vec<&'static str>,
}

impl HubFacts {
    /// Looks, without a request.
    pub fn examine() -> Self {
        let HubSummary { endpoint, cache_dir, offline, has_token } = Hub::from_env().summary();
        Self {
            exists: cache_dir.is_dir(),
            not_writable: try_to_write(&cache_dir).err(),
            cache: cache_dir,
            endpoint,
            offline,
            has_token,
            variables: VARIABLES.into_iter().filter(|name| env::var_os(name).is_some()).collect(),
        }
    }
}

/// Creates a file without a name in `folder`, or where that would be created.
fn try_to_write(folder: &Path) -> Result<(), String> {
    let Some(there) = folder.ancestors().find(|folder| folder.exists()) else {
        return Err(format!("{}: neither it nor a folder above it exists", folder.display()));
    };
    let created = tempfile::tempfile_in(there).map(drop);
    created.map_err(|error| format!("{}: {error}", there.display()))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_folder_to_come_is_writable_where_it_would_come() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(try_to_write(&folder.path().join("a/b")), Ok(()));
        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();
        let error = try_to_write(&file.join("hub")).unwrap_err();
        assert!(error.starts_with(&file.display().to_string()), "{error}");
        assert!(fs::read_dir(folder.path()).unwrap().count() == 1, "it left something behind");
        assert!(try_to_write(Path::new("")).is_err());
    }
}
