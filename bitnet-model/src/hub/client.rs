//! The Hub's protocol: requests, redirects, what failed and whether it is worth repeating.

use std::{io, path::Path, thread, time::Duration};

use hf_hub::{Repo, RepoType, api::RepoInfo};
use ureq::{
    Agent, Body,
    http::{HeaderMap, HeaderValue, Method, Response, StatusCode, Uri, header},
};

use super::{Retry, hub_error, is_plain_name};
use crate::Error;

const MAX_REDIRECTS: usize = 10;
/// A listing has some 100 bytes a file; the largest repositories have 100,000 files.
const MAX_LISTING_BYTES: u64 = 64 << 20;
const MAX_RETRY_AFTER: Duration = Duration::from_secs(60);

/// Why a request did not give what was asked for.
#[derive(Debug)]
pub(super) enum Failure {
    /// There is no connection to the server.
    Unreachable(String),
    /// The connection broke, or the server cannot answer now.
    Transient { reason: String, retry_after: Option<Duration> },
    /// The server's final word.
    Refused { status: StatusCode, code: String, message: String },
    /// The answer is not what the protocol says.
    Malformed(String),
    /// This machine's fault: no permission, no space.
    Local(Error),
}

impl Failure {
    pub fn transient(reason: impl Into<String>) -> Self {
        Self::Transient { reason: reason.into(), retry_after: None }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Local(error)
    }
}

impl From<ureq::Error> for Failure {
    fn from(error: ureq::Error) -> Self {
        use io::ErrorKind::*;
        use ureq::{Error as E, Timeout};
        match error {
            E::Io(error) => match error.kind() {
                ConnectionReset | ConnectionAborted | UnexpectedEof | BrokenPipe | TimedOut
                | NotConnected => Self::transient(error.to_string()),
                _ => Self::Unreachable(error.to_string()),
            },
            E::Timeout(Timeout::Connect | Timeout::Resolve) => {
                Self::Unreachable("the connection timed out".to_string())
            }
            E::Timeout(_) => Self::transient("the server stopped sending"),
            E::Protocol(error) => Self::transient(format!("broken answer: {error}")),
            E::BodyExceedsLimit(limit) => {
                Self::Malformed(format!("the answer is longer than {limit} bytes"))
            }
            other => Self::Unreachable(other.to_string()),
        }
    }
}

/// Counts the tries of one operation and waits between them.
pub(super) struct Backoff {
    retry: Retry,
    failed: u32,
}

impl Backoff {
    /// Starts the count anew, because something was gained.
    pub fn reset(&mut self) {
        self.failed = 0;
    }

    /// Waits before the next try, or gives `failure` back if there should be none.
    pub fn wait(&mut self, failure: Failure) -> Result<(), Failure> {
        let (reason, asked) = match &failure {
            Failure::Unreachable(reason) => (reason, None),
            Failure::Transient { reason, retry_after } => (reason, *retry_after),
            _ => return Err(failure),
        };
        self.failed += 1;
        if self.failed >= self.retry.tries {
            return Err(failure);
        }
        let doubled = self.retry.first_delay.saturating_mul(1 << (self.failed - 1).min(20));
        let delay = doubled.min(self.retry.max_delay).mul_f64(rand::random_range(0.5..=1.0));
        let delay = delay.max(asked.unwrap_or_default().min(MAX_RETRY_AFTER));
        tracing::warn!("{reason}; trying again in {:.1} s", delay.as_secs_f64());
        thread::sleep(delay);
        Ok(())
    }
}

/// What the Hub says about a file before it is fetched.
#[derive(Debug)]
pub(super) struct Metadata {
    /// Names the content: its SHA-256 for large files, a Git hash for others.
    pub etag: String,
    pub size: Option<u64>,
}

pub(super) struct Client {
    kind: RepoType,
    agent: Agent,
    endpoint: Uri,
    authorization: Option<HeaderValue>,
    retry: Retry,
}

impl Client {
    pub fn new(
        endpoint: &str,
        token: Option<&str>,
        timeout: Duration,
        retry: Retry,
    ) -> Result<Self, String> {
        let parsed = endpoint.trim_end_matches('/').parse::<Uri>().ok().filter(|uri| {
            matches!(uri.scheme_str(), Some("http" | "https")) && uri.query().is_none()
        });
        let Some(uri) = parsed else {
            return Err(format!("HF_ENDPOINT `{endpoint}` is not an http or https address"));
        };
        let authorization = token
            .map(|token| {
                let mut value = HeaderValue::try_from(format!("Bearer {token}")).map_err(|_| {
                    "the token (HF_TOKEN or its file) has characters no token has".to_string()
                })?;
                value.set_sensitive(true);
                Ok::<_, String>(value)
            })
            .transpose()?;
        let mut config = Agent::config_builder()
            .max_redirects(0) // followed here, see `get`
            .max_redirects_will_error(false)
            .http_status_as_error(false)
            .accept_encoding("identity") // sizes and ranges are those of the file
            .user_agent(concat!("bitnet-model/", env!("CARGO_PKG_VERSION"), "; rust"))
            .timeout_resolve(Some(timeout))
            .timeout_connect(Some(timeout))
            .timeout_per_read(Some(timeout))
            .timeout_per_write(Some(timeout));
        if matches!(uri.host(), Some("localhost" | "127.0.0.1" | "[::1]")) {
            config = config.proxy(None); // a proxy's loopback is another machine
        }
        let agent = config.build().new_agent();
        Ok(Self { kind: RepoType::Model, agent, endpoint: uri, authorization, retry })
    }

    /// The client for repositories of another kind than models.
    pub fn of(self, kind: RepoType) -> Self {
        Self { kind, ..self }
    }

    fn repo(&self, repo_id: &str, revision: &str) -> Repo {
        Repo::with_revision(repo_id.to_string(), self.kind, revision.to_string())
    }

    pub fn backoff(&self) -> Backoff {
        Backoff { retry: self.retry, failed: 0 }
    }

    /// The commit a revision stands at, and the names of its files. An unreachable server is not asked twice: the caller has
    /// a cache.
    pub fn listing(&self, repo_id: &str, revision: &str) -> Result<RepoInfo, Failure> {
        // `Repo` escapes nothing in a revision but slashes.
        let repo = self.repo(repo_id, &percent_encode(revision, ""));
        let url = self.url(&format!("api/{}", repo.api_url()));
        let mut backoff = self.backoff();
        let json = loop {
            let answer = self.get(&url, 0).and_then(|mut response| {
                let body = response.body_mut().with_config().limit(MAX_LISTING_BYTES);
                Ok(body.read_to_vec()?)
            });
            match answer {
                Ok(json) => break json,
                Err(failure @ Failure::Unreachable(_)) => return Err(failure),
                Err(failure) => backoff.wait(failure)?,
            }
        };
        let listing: RepoInfo = serde_json::from_slice(&json)
            .map_err(|error| Failure::Malformed(format!("the listing at {url}: {error}")))?;
        if !is_plain_name(&listing.sha) {
            return Err(Failure::Malformed(format!("the commit at {url} is {:?}", listing.sha)));
        }
        Ok(listing)
    }

    /// Where a file of a commit is.
    pub fn file_url(&self, repo_id: &str, commit: &str, file: &str) -> String {
        let file = percent_encode(file, "/");
        self.url(&format!("{}/resolve/{commit}/{file}", self.repo(repo_id, commit).url()))
    }

    /// Etag and size of the file at `url`. The endpoint itself says so, before it redirects to where the content is stored.
    pub fn metadata(&self, url: &str) -> Result<Metadata, Failure> {
        let mut uri = parse(url)?;
        let mut etag = None;
        let mut size = None;
        for _ in 0..=MAX_REDIRECTS {
            let response = self.exchange(&Method::HEAD, &uri, 0)?;
            let headers = response.headers();
            etag = etag.or_else(|| text(headers, "x-linked-etag"));
            size = size.or_else(|| text(headers, "x-linked-size")?.parse().ok());
            match redirect(&uri, &response)? {
                Some(next) if same_origin(&next, &self.endpoint) => {
                    uri = next;
                    continue;
                }
                Some(_) => {} // the length of a redirect is not that of the file
                None => size = size.or_else(|| text(headers, "content-length")?.parse().ok()),
            }
            let etag = etag.or_else(|| text(headers, "etag"));
            let etag = etag.as_deref().map(|etag| etag.trim_start_matches("W/").trim_matches('"'));
            return match etag {
                Some(etag) if is_plain_name(etag) => Ok(Metadata { etag: etag.to_string(), size }),
                etag => Err(Failure::Malformed(format!("the etag at {url} is {etag:?}"))),
            };
        }
        Err(Failure::Malformed(format!("{url} redirects more than {MAX_REDIRECTS} times")))
    }

    /// The content at `url` from byte `start` on, wherever it is redirected to.
    pub fn get(&self, url: &str, start: u64) -> Result<Response<Body>, Failure> {
        let mut uri = parse(url)?;
        for _ in 0..=MAX_REDIRECTS {
            let response = self.exchange(&Method::GET, &uri, start)?;
            match redirect(&uri, &response)? {
                Some(next) => uri = next,
                None => return Ok(response),
            }
        }
        Err(Failure::Malformed(format!("{url} redirects more than {MAX_REDIRECTS} times")))
    }

    /// One request and its answer. The token goes to the endpoint's origin and nowhere else.
    fn exchange(&self, method: &Method, uri: &Uri, start: u64) -> Result<Response<Body>, Failure> {
        let mut request = match *method {
            Method::HEAD => self.agent.head(uri),
            _ => self.agent.get(uri),
        };
        if let Some(authorization) = &self.authorization
            && same_origin(uri, &self.endpoint)
        {
            request = request.header(header::AUTHORIZATION, authorization);
        }
        if start > 0 {
            request = request.header(header::RANGE, format!("bytes={start}-"));
        }
        let response = request.call()?;
        let status = response.status();
        if status.is_success() || is_redirect(status) {
            return Ok(response);
        }
        let headers = response.headers();
        let message = text(headers, "x-error-message").unwrap_or_default();
        let message: String = message.chars().take(300).collect();
        if matches!(status.as_u16(), 408 | 425 | 429 | 500..=599) {
            let retry_after = text(headers, "retry-after").and_then(|value| value.parse().ok());
            let host = uri.host().unwrap_or_default();
            return Err(Failure::Transient {
                reason: [format!("{host} answered {status}"), message]
                    .join(" ")
                    .trim_end()
                    .to_string(),
                retry_after: retry_after.map(Duration::from_secs),
            });
        }
        let code = text(headers, "x-error-code").unwrap_or_default();
        Err(Failure::Refused { status, code, message })
    }

    fn url(&self, path: &str) -> String {
        format!("{}/{path}", self.endpoint.to_string().trim_end_matches('/'))
    }

    /// The error for a request about a repository, or about one `file` in it.
    pub fn explain(
        &self,
        failure: Failure,
        repo_id: &str,
        revision: &str,
        file: Option<&str>,
    ) -> Error {
        let endpoint = self.url("");
        let endpoint = endpoint.trim_end_matches('/');
        let of = file.map(|file| format!("`{file}`: ")).unwrap_or_default();
        let tries = self.retry.tries.max(1);
        // Whoever mistypes `folder/model` should not be told about repositories alone.
        let may_be_path = matches!(self.kind, RepoType::Model) && !Path::new(repo_id).exists();
        let no_path = if may_be_path { "; no such path exists here either" } else { "" };
        let reason = match failure {
            Failure::Local(error) => return error,
            Failure::Unreachable(reason) => format!(
                "{of}cannot reach {endpoint}: {reason}; check the network, the proxy settings and HF_ENDPOINT{no_path}"
            ),
            Failure::Transient { reason, .. } => {
                format!(
                    "{of}{endpoint} failed {tries} time(s) in a row, the last time with: {reason}"
                )
            }
            Failure::Malformed(reason) => {
                format!("{of}{endpoint} does not answer like a Hub: {reason}")
            }
            Failure::Refused { status, code, message } => {
                let said = if message.is_empty() { String::new() } else { format!(" ({message})") };
                let page = self.url(&self.repo(repo_id, revision).url());
                match (status.as_u16(), code.as_str(), file) {
                    (401 | 403, _, _) if self.authorization.is_some() => format!(
                        "{of}{endpoint} answered {status}{said}: the token is invalid or may not read this repository; \
                         check HF_TOKEN, and accept the licence at {page} if it is gated"
                    ),
                    (401 | 403, _, _) => format!(
                        "{of}{endpoint} answered {status}{said}: the repository does not exist, or is gated or private; \
                         check the name, or accept the licence at {page} and set HF_TOKEN{no_path}"
                    ),
                    (404, "RepoNotFound", _) => {
                        format!("there is no such repository at {endpoint}{no_path}")
                    }
                    (404, "RevisionNotFound", _) => {
                        format!("the repository has no revision `{revision}`")
                    }
                    (404, _, Some(file)) => format!("revision `{revision}` has no file `{file}`"),
                    (404, _, None) => format!(
                        "{endpoint} has no such repository, or the repository has no revision `{revision}`{no_path}"
                    ),
                    _ => format!("{of}{endpoint} answered {status}{said}"),
                }
            }
        };
        hub_error(repo_id, reason)
    }
}

fn is_redirect(status: StatusCode) -> bool {
    matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308)
}

/// The address a response redirects to. One that leaves TLS is refused.
fn redirect(from: &Uri, response: &Response<Body>) -> Result<Option<Uri>, Failure> {
    if !is_redirect(response.status()) {
        return Ok(None);
    }
    let location = text(response.headers(), "location").unwrap_or_default();
    let malformed = || Failure::Malformed(format!("{from} redirects to {location:?}"));
    let next = if location.starts_with('/') && !location.starts_with("//") {
        let authority = from.authority().map(|authority| authority.as_str()).unwrap_or_default();
        format!("{}://{authority}{location}", from.scheme_str().unwrap_or_default())
    } else {
        location.clone()
    };
    let next: Uri = next.parse().map_err(|_| malformed())?;
    match (from.scheme_str(), next.scheme_str()) {
        (_, Some("https")) | (Some("http"), Some("http")) => Ok(Some(next)),
        _ => Err(malformed()),
    }
}

/// Same scheme, host and port.
fn same_origin(a: &Uri, b: &Uri) -> bool {
    let port = |uri: &Uri| {
        uri.port_u16().unwrap_or(if uri.scheme_str() == Some("https") { 443 } else { 80 })
    };
    let host = |uri: &Uri| uri.host().map(str::to_ascii_lowercase);
    a.scheme() == b.scheme() && host(a) == host(b) && port(a) == port(b)
}

fn parse(url: &str) -> Result<Uri, Failure> {
    url.parse().map_err(|error| Failure::Malformed(format!("{url}: {error}")))
}

/// A header of visible ASCII, hence fit for a terminal.
pub(super) fn text(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name)?.to_str().ok().map(str::to_string)
}

/// RFC 3986: everything but the unreserved characters, and those in `keep`, becomes `%XX`.
fn percent_encode(text: &str, keep: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        match char::from(byte) {
            c if c.is_ascii_alphanumeric() || "-_.~".contains(c) || keep.contains(c) => {
                encoded.push(c)
            }
            _ => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins() {
        let same = |a: &str, b: &str| same_origin(&a.parse().unwrap(), &b.parse().unwrap());
        assert!(same("https://huggingface.co/a", "https://HuggingFace.co:443/b"));
        assert!(!same("https://huggingface.co", "http://huggingface.co"));
        assert!(!same("https://huggingface.co", "https://cdn.huggingface.co"));
        assert!(!same("http://127.0.0.1:1", "http://127.0.0.1:2"));
        assert!(!same("https://huggingface.co", "https://huggingface.co.evil.org"));
    }

    #[test]
    fn addresses_are_encoded() {
        assert_eq!(percent_encode("refs/pr/1", ""), "refs%2Fpr%2F1");
        assert_eq!(percent_encode("a b/ü?#%.json", "/"), "a%20b/%C3%BC%3F%23%25.json");
    }

    #[test]
    fn endpoints_and_tokens_are_checked() {
        let client = |endpoint, token| {
            Client::new(endpoint, token, Duration::from_secs(1), Retry::default()).map(drop)
        };
        for good in ["https://huggingface.co", "http://localhost:8080/mirror/"] {
            assert_eq!(client(good, Some("hf_x")), Ok(()));
        }
        for bad in ["", "huggingface.co", "ftp://a", "https://a?b", "http://"] {
            assert!(client(bad, None).unwrap_err().contains("HF_ENDPOINT"), "{bad}");
        }
        let secret = client("https://a", Some("hf_s\necret")).unwrap_err();
        assert!(!secret.contains("ecret"), "{secret}");
    }

    #[test]
    fn redirects_resolve_and_never_leave_tls() {
        let next = |from: &str, location: &str| {
            let response = Response::builder()
                .status(302)
                .header("location", location)
                .body(Body::builder().data(Vec::new()))
                .unwrap();
            redirect(&from.parse().unwrap(), &response).map(|uri| uri.unwrap().to_string())
        };
        assert_eq!(next("https://a:1/b/c?d", "/e?f").unwrap(), "https://a:1/e?f");
        assert_eq!(next("https://a/b", "https://c/d").unwrap(), "https://c/d");
        assert_eq!(next("http://a/b", "https://c/d").unwrap(), "https://c/d");
        for refused in ["http://c/d", "file:///etc/passwd", "//c/d", "d", ""] {
            assert!(
                matches!(next("https://a/b", refused), Err(Failure::Malformed(_))),
                "{refused}"
            );
        }
    }
}
