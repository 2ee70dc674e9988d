//! What the Hub tests start from: a server with a repository, an empty cache, and a client for both.

use std::{fs, path::PathBuf, time::Duration};

use bitnet_model::hub::{Hub, Retry};
use tempfile::TempDir;

use super::hub_server::{Files, HubServer, etag};

pub const REPO: &str = "org/tiny-b1.58";
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
pub const NEXT: &str = "fedcba9876543210fedcba9876543210fedcba98";
pub const WEIGHTS: &str = "model.safetensors";
pub const ALWAYS: usize = usize::MAX;

/// A server with one complete repository, and an empty cache.
pub struct Fixture {
    pub server: HubServer,
    pub folder: TempDir,
}

impl Fixture {
    pub fn new() -> Self {
        let server = HubServer::start(REPO);
        server.commit("main", COMMIT, repository(1));
        server.take_log();
        Self { server, folder: tempfile::tempdir().unwrap() }
    }

    pub fn hub(&self) -> Hub {
        let hub = hub_with(&[
            ("HF_HUB_CACHE", self.cache().to_str().unwrap()),
            ("HF_HOME", "/nonexistent"),
            ("HF_ENDPOINT", &self.server.endpoint()),
        ]);
        hub.retry(Retry {
            tries: 3,
            first_delay: Duration::from_millis(1),
            max_delay: Duration::from_millis(4),
        })
    }

    /// Makes one try of each request.
    pub fn impatient(&self) -> Hub {
        self.hub().retry(Retry { tries: 1, ..Retry::default() })
    }

    pub fn cache(&self) -> PathBuf {
        self.folder.path().join("hub")
    }

    pub fn repo(&self) -> PathBuf {
        self.cache().join("models--org--tiny-b1.58")
    }

    pub fn snapshot(&self) -> PathBuf {
        self.repo().join("snapshots").join(COMMIT)
    }

    pub fn blob(&self, file: &str) -> PathBuf {
        self.repo().join("blobs").join(etag(file, &repository(1)[file]))
    }

    /// The snapshot holds exactly the repository's files, and the cache no partial ones.
    pub fn assert_whole(&self) {
        for (file, content) in repository(1) {
            if file != "README.md" {
                let found = fs::read(self.snapshot().join(&file)).unwrap();
                assert!(found == content, "{file} differs");
            }
        }
        for entry in fs::read_dir(self.repo().join("blobs")).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            assert!(!name.contains("incomplete"), "{name}");
        }
    }

    /// Neither the weights nor a reference to their commit can be seen.
    pub fn assert_invisible(&self) {
        assert!(self.snapshot().join(WEIGHTS).symlink_metadata().is_err());
        assert!(!self.blob(WEIGHTS).exists());
        assert!(!self.repo().join("refs/main").exists());
    }
}

pub fn hub_with(vars: &[(&str, &str)]) -> Hub {
    Hub::from_vars(|name| vars.iter().find(|(key, _)| *key == name).map(|(_, v)| v.to_string()))
        .progress(false)
}

/// A complete model; `version` tells commits apart. The weights need several reads and writes.
pub fn repository(version: u8) -> Files {
    let weights = (0..300_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8 ^ version);
    Files::from([
        ("README.md".to_string(), b"not for us".to_vec()),
        ("config.json".to_string(), format!("{{\"version\": {version}}}").into_bytes()),
        ("generation_config.json".to_string(), b"{}".to_vec()),
        ("special_tokens_map.json".to_string(), Vec::new()),
        ("tokenizer.json".to_string(), b"{\"version\": \"1.0\"}".to_vec()),
        (WEIGHTS.to_string(), weights.collect()),
    ])
}
