//! Where models are looked for and kept, for whoever asks.

use std::path::PathBuf;

use super::Hub;

/// The settings of a [`Hub`], without secrets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubSummary {
    /// The server, without a name and a password that its address may hold.
    pub endpoint: String,
    /// The cache folder.
    pub cache_dir: PathBuf,
    /// Whether no request is made.
    pub offline: bool,
    /// Whether there is an access token.
    pub has_token: bool,
}

impl Hub {
    /// What it was told.
    pub fn summary(&self) -> HubSummary {
        HubSummary {
            endpoint: without_user(&self.endpoint),
            cache_dir: self.cache_dir.clone(),
            offline: self.offline,
            has_token: self.token.is_some(),
        }
    }
}

/// `https://user:password@host/path?query` without all that may be secret.
fn without_user(url: &str) -> String {
    let (scheme, rest) = url.split_once("://").unwrap_or(("", url));
    let rest = rest.split(['?', '#']).next().unwrap_or_default();
    let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let host = authority.rsplit('@').next().unwrap_or_default();
    match scheme {
        "" => format!("{host}{path}"),
        _ => format!("{scheme}://{host}{path}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_secret_is_shown() {
        let hub = Hub::from_vars(|name| match name {
            "HF_ENDPOINT" => Some("https://me:pass@word@mirror.example/hf?key=1".into()),
            "HF_TOKEN" => Some("hf_secret".into()),
            "HF_HUB_CACHE" => Some("/cache".into()),
            _ => None,
        });
        let expected = HubSummary {
            endpoint: "https://mirror.example/hf".into(),
            cache_dir: "/cache".into(),
            offline: false,
            has_token: true,
        };
        assert_eq!(hub.summary(), expected);
        assert_eq!(without_user("mirror.example:8080"), "mirror.example:8080");
    }
}
