//! The environment variables of Python's `huggingface_hub` (its `constants.py`), with the same precedence.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use super::{Hub, Retry};

const ENDPOINT: &str = "https://huggingface.co";
const TIMEOUT: Duration = Duration::from_secs(10);

impl Hub {
    /// [`Hub::from_env`] with the variables taken from `lookup`. An empty variable counts as unset.
    pub fn from_vars(lookup: impl Fn(&str) -> Option<String>) -> Self {
        let var = |name: &str| lookup(name).filter(|value| !value.trim().is_empty());
        let flag = |name: &str| var(name).is_some_and(|value| is_true(&value));
        let user = var("HOME").map(PathBuf::from).or_else(std::env::home_dir);
        let path = |name: &str| var(name).map(|value| expand_user(&value, user.as_deref()));

        let home = path("HF_HOME").unwrap_or_else(|| {
            path("XDG_CACHE_HOME")
                .unwrap_or_else(|| user.clone().unwrap_or_default().join(".cache"))
                .join("huggingface")
        });
        let cache_dir = path("HF_HUB_CACHE")
            .or_else(|| path("HUGGINGFACE_HUB_CACHE"))
            .unwrap_or_else(|| home.join("hub"));
        let token = var("HF_TOKEN").or_else(|| var("HUGGING_FACE_HUB_TOKEN")).or_else(|| {
            let file = path("HF_TOKEN_PATH").unwrap_or_else(|| home.join("token"));
            // Most machines have no token file; a public repository needs none.
            fs::read_to_string(file).ok()
        });
        let seconds = var("HF_HUB_DOWNLOAD_TIMEOUT").and_then(|value| value.trim().parse().ok());
        Self {
            endpoint: var("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.to_string()),
            cache_dir,
            revision: "main".to_string(),
            token: token
                .map(|token| token.trim().to_string())
                .filter(|token| !token.is_empty() && !flag("HF_HUB_DISABLE_IMPLICIT_TOKEN")),
            offline: var("HF_HUB_OFFLINE")
                .or_else(|| var("TRANSFORMERS_OFFLINE"))
                .is_some_and(|value| is_true(&value)),
            progress: !flag("HF_HUB_DISABLE_PROGRESS_BARS"),
            retry: Retry::default(),
            timeout: seconds.filter(|&s| s > 0).map_or(TIMEOUT, Duration::from_secs),
        }
    }
}

fn is_true(value: &str) -> bool {
    matches!(value.trim().to_ascii_lowercase().as_str(), "1" | "on" | "yes" | "true")
}

/// `~` and `~/…`, as `os.path.expanduser` has it.
fn expand_user(value: &str, user: Option<&Path>) -> PathBuf {
    match (value.strip_prefix('~'), user) {
        (Some(""), Some(user)) => user.to_path_buf(),
        (Some(rest), Some(user)) if rest.starts_with('/') => user.join(&rest[1..]),
        _ => PathBuf::from(value),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hub(vars: &[(&str, &str)]) -> Hub {
        Hub::from_vars(|name| {
            vars.iter().find(|(key, _)| *key == name).map(|(_, value)| value.to_string())
        })
    }

    #[test]
    fn cache_folder_precedence() {
        let mut vars = vec![("HOME", "/home/u")];
        for (name, value, expected) in [
            ("", "", "/home/u/.cache/huggingface/hub"),
            ("XDG_CACHE_HOME", "/xdg", "/xdg/huggingface/hub"),
            ("HF_HOME", "~/hf", "/home/u/hf/hub"),
            ("HUGGINGFACE_HUB_CACHE", "/legacy", "/legacy"),
            ("HF_HUB_CACHE", "/cache", "/cache"),
        ] {
            vars.push((name, value));
            assert_eq!(hub(&vars).cache_dir, Path::new(expected), "{name}");
        }
    }

    #[test]
    fn token_precedence() {
        let home = tempfile::tempdir().unwrap();
        let home_path = home.path().to_str().unwrap();
        assert_eq!(hub(&[("HF_HOME", home_path)]).token, None);
        fs::write(home.path().join("token"), "hf_home\n").unwrap();
        fs::write(home.path().join("other"), " hf_other \r\n").unwrap();
        let other = home.path().join("other");

        let mut vars = vec![("HF_HOME", home_path)];
        assert_eq!(hub(&vars).token.as_deref(), Some("hf_home"));
        vars.push(("HF_TOKEN_PATH", other.to_str().unwrap()));
        assert_eq!(hub(&vars).token.as_deref(), Some("hf_other"));
        vars.push(("HF_TOKEN", "hf_var\n"));
        assert_eq!(hub(&vars).token.as_deref(), Some("hf_var"));
        assert!(!format!("{:?}", hub(&vars)).contains("hf_var"));
        vars.push(("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1"));
        assert_eq!(hub(&vars).token, None);
    }

    #[test]
    fn flags_and_defaults() {
        let plain = hub(&[("HOME", "/home/u"), ("HF_ENDPOINT", "")]);
        assert_eq!(plain.endpoint, ENDPOINT);
        assert!(!plain.offline && plain.progress && plain.timeout == TIMEOUT);
        for yes in ["1", "true", "YES", "On"] {
            assert!(hub(&[("HF_HUB_OFFLINE", yes)]).offline, "{yes}");
            assert!(!hub(&[("HF_HUB_DISABLE_PROGRESS_BARS", yes)]).progress, "{yes}");
        }
        for no in ["0", "false", "no", "off", "2"] {
            assert!(!hub(&[("HF_HUB_OFFLINE", no)]).offline, "{no}");
        }
        assert!(hub(&[("TRANSFORMERS_OFFLINE", "1")]).offline);
        assert_eq!(hub(&[("HF_HUB_DOWNLOAD_TIMEOUT", "60")]).timeout, Duration::from_secs(60));
    }
}
