//! A Hub on the loopback interface: the parts of the real one's protocol that a download uses, with faults on demand.
//!
//! As on the real Hub, large files (`.safetensors`) are redirected to a second host (here: a second port, `cdn`), small
//! ones to another path of the same host, and the endpoint names commit, etag and size of what it redirects to.

use std::{
    collections::BTreeMap,
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use sha2::{Digest, Sha256};

/// What a request met instead of a faithful answer.
#[derive(Clone)]
pub enum Fault {
    /// This status, these headers, this body.
    Answer(u16, Vec<(&'static str, String)>, &'static str),
    /// The body ends after so many bytes, and the connection with it.
    Truncate(usize),
    /// The first byte of the body is another one.
    Corrupt,
    /// The connection is reset before an answer.
    Reset,
    /// The connection stays silent after half of the body, for as long as this.
    Stall(Duration),
    /// The answer comes late.
    Delay(Duration),
    /// The whole file, whatever the range.
    IgnoreRange,
    /// The body goes on after the end of the file.
    Overrun,
}

/// A request as the server saw it.
#[derive(Clone, Debug)]
pub struct Request {
    pub cdn: bool,
    pub method: String,
    pub path: String,
    headers: BTreeMap<String, String>,
}

impl Request {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }
}

pub type Files = BTreeMap<String, Vec<u8>>;

/// The commits of a repository, and the branches and tags that name them.
#[derive(Default)]
struct Revisions {
    commits: BTreeMap<String, Files>,
    references: BTreeMap<String, String>,
}

impl Revisions {
    fn commit(&mut self, reference: &str, commit: &str, files: Files) {
        self.commits.insert(commit.to_string(), files);
        self.references.insert(reference.to_string(), commit.to_string());
    }
}

#[derive(Default)]
struct State {
    cdn: Option<SocketAddr>,
    models: Revisions,
    datasets: Revisions,
    token: Option<String>,
    faults: Vec<(&'static str, String, Fault, usize)>,
    log: Vec<Request>,
}

/// A running server with one repository; its threads end with the test process.
pub struct HubServer {
    address: SocketAddr,
    state: Arc<Mutex<State>>,
}

impl HubServer {
    pub fn start(repo_id: &'static str) -> Self {
        let state = Arc::new(Mutex::new(State::default()));
        let listen = |cdn: bool| {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let address = listener.local_addr().unwrap();
            let state = state.clone();
            thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    let state = state.clone();
                    // A client that hangs up in the middle is part of the tests.
                    thread::spawn(move || serve(stream, &state, repo_id, cdn).ok());
                }
            });
            address
        };
        let (address, cdn) = (listen(false), listen(true));
        state.lock().unwrap().cdn = Some(cdn);
        Self { address, state }
    }

    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Adds a commit to the repository of a model and points `reference` at it.
    pub fn commit(&self, reference: &str, commit: &str, files: Files) {
        self.state.lock().unwrap().models.commit(reference, commit, files);
    }

    /// The same for the repository of data of the same name.
    pub fn commit_dataset(&self, reference: &str, commit: &str, files: Files) {
        self.state.lock().unwrap().datasets.commit(reference, commit, files);
    }

    /// From now on only requests with this token are answered.
    pub fn require_token(&self, token: &str) {
        self.state.lock().unwrap().token = Some(token.to_string());
    }

    /// The next `times` requests of this method whose path contains `path` meet `fault`.
    pub fn fault(&self, method: &'static str, path: &str, fault: Fault, times: usize) {
        self.state.lock().unwrap().faults.push((method, path.to_string(), fault, times));
    }

    pub fn clear_faults(&self) {
        self.state.lock().unwrap().faults.clear();
    }

    /// The requests since the last call.
    pub fn take_log(&self) -> Vec<Request> {
        std::mem::take(&mut self.state.lock().unwrap().log)
    }
}

/// The etag of a file as the Hub gives it: SHA-256 for large files; Git's SHA-1, here only its length, for others.
pub fn etag(file: &str, content: &[u8]) -> String {
    let hash = format!("{:x}", Sha256::digest(content));
    if is_large(file) { hash } else { hash[..40].to_string() }
}

fn is_large(file: &str) -> bool {
    file.ends_with(".safetensors")
}

fn serve(
    mut stream: TcpStream,
    state: &Mutex<State>,
    repo_id: &str,
    cdn: bool,
) -> std::io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut buffer = vec![0; 64 << 10];
    // Only looked at, so that a reset finds it unread.
    let head = loop {
        let peeked = stream.peek(&mut buffer)?;
        let head = String::from_utf8_lossy(&buffer[..peeked]).into_owned();
        if head.contains("\r\n\r\n") {
            break head;
        }
        if peeked == 0 {
            return Ok(());
        }
    };
    let mut lines = head.lines();
    let mut words = lines.next().unwrap_or_default().split(' ').map(str::to_string);
    let request = Request {
        cdn,
        method: words.next().unwrap_or_default(),
        path: words.next().unwrap_or_default(),
        headers: lines
            .filter_map(|line| line.split_once(": "))
            .map(|(name, value)| (name.to_ascii_lowercase(), value.to_string()))
            .collect(),
    };
    let (fault, answer) = {
        let mut state = state.lock().unwrap();
        state.log.push(request.clone());
        let fault = state.faults.iter_mut().find(|(method, path, _, times)| {
            *times > 0 && request.method == *method && request.path.contains(path.as_str())
        });
        let fault = fault.map(|(_, _, fault, times)| {
            *times -= 1;
            fault.clone()
        });
        (fault, answer(&state, repo_id, &request))
    };
    if let Some(Fault::Reset) = fault {
        return Ok(()); // closing a socket with unread input resets the connection
    }
    stream.read_exact(&mut vec![0; head.len()])?;
    if let Some(Fault::Delay(delay)) = fault {
        thread::sleep(delay);
    }
    match fault {
        Some(Fault::Answer(status, headers, body)) => {
            let answer = Answer { status, headers, body: body.as_bytes().to_vec() };
            answer.write(&mut stream, &request, Some(&Fault::IgnoreRange))
        }
        fault => answer.write(&mut stream, &request, fault.as_ref()),
    }
}

struct Answer {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
}

impl Answer {
    fn new(status: u16) -> Self {
        Self { status, headers: Vec::new(), body: Vec::new() }
    }

    fn with(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    fn write(
        mut self,
        stream: &mut TcpStream,
        request: &Request,
        fault: Option<&Fault>,
    ) -> std::io::Result<()> {
        let range = request.header("range").and_then(|range| {
            range.strip_prefix("bytes=")?.strip_suffix('-')?.parse::<usize>().ok()
        });
        if let (200, Some(start), false) =
            (self.status, range, matches!(fault, Some(Fault::IgnoreRange)))
        {
            let total = self.body.len();
            if start >= total {
                self = Answer::new(416).with("Content-Range", format!("bytes */{total}"));
            } else {
                self.status = 206;
                let span = format!("bytes {start}-{}/{total}", total - 1);
                self = self.with("Content-Range", span);
                self.body.drain(..start);
            }
        }
        let mut length = self.body.len();
        match fault {
            Some(Fault::Corrupt) if length > 0 => self.body[0] ^= 1,
            Some(Fault::Overrun) => {
                self.body.extend(b"more");
                length = usize::MAX; // no Content-Length
            }
            _ => {}
        }
        let mut head = format!("HTTP/1.1 {} X\r\nConnection: close\r\n", self.status);
        if length != usize::MAX {
            head += &format!("Content-Length: {length}\r\n");
        }
        for (name, value) in &self.headers {
            head += &format!("{name}: {value}\r\n");
        }
        stream.write_all(format!("{head}\r\n").as_bytes())?;
        if request.method == "HEAD" {
            return Ok(());
        }
        match fault {
            Some(Fault::Truncate(bytes)) => stream.write_all(&self.body[..length.min(*bytes)]),
            Some(Fault::Stall(time)) => {
                stream.write_all(&self.body[..length / 2])?;
                thread::sleep(*time);
                Ok(())
            }
            _ => stream.write_all(&self.body),
        }
    }
}

fn answer(state: &State, repo_id: &str, request: &Request) -> Answer {
    let path = request.path.replace("%2F", "/").replace("%2f", "/");
    if request.cdn {
        let content = state.models.commits.values().flatten().find(|(file, content)| {
            is_large(file) && path == format!("/lfs/{}", etag(file, content))
        });
        return match content {
            Some((_, content)) => Answer { body: content.clone(), ..Answer::new(200) },
            None => Answer::new(404),
        };
    }
    if let Some(token) = &state.token
        && request.header("authorization") != Some(&format!("Bearer {token}"))
    {
        return Answer::new(401).with("X-Error-Message", "Invalid username or password.");
    }
    let is_dataset = path.starts_with("/datasets/") || path.starts_with("/api/datasets/");
    let revisions = if is_dataset { &state.datasets } else { &state.models };
    let path =
        path.replacen("datasets/", if path.starts_with("/api/") { "models/" } else { "" }, 1);
    let commit = |revision: &str| {
        let commit = revisions.references.get(revision).map_or(revision, String::as_str);
        revisions.commits.get_key_value(commit)
    };
    let repository_missing = || Answer::new(404).with("X-Error-Code", "RepoNotFound");
    let revision_missing = || Answer::new(404).with("X-Error-Code", "RevisionNotFound");

    if let Some(rest) = path.strip_prefix("/api/models/") {
        let Some((repo, revision)) = rest.split_once("/revision/") else {
            return Answer::new(400);
        };
        if repo != repo_id {
            return repository_missing();
        }
        let Some((commit, files)) = commit(revision) else { return revision_missing() };
        let siblings: Vec<_> =
            files.keys().map(|file| serde_json::json!({ "rfilename": file })).collect();
        let listing = serde_json::json!({ "id": repo, "sha": commit, "siblings": siblings });
        return Answer { body: listing.to_string().into_bytes(), ..Answer::new(200) };
    }
    let cached = path.strip_prefix("/api/resolve-cache/");
    let Some((repo, rest)) = cached.unwrap_or(&path[1..]).split_once("/resolve/") else {
        return Answer::new(400);
    };
    if repo != repo_id {
        return repository_missing();
    }
    let Some((revision, file)) = rest.split_once('/') else { return Answer::new(400) };
    let Some((commit, files)) = commit(revision) else { return revision_missing() };
    let Some(content) = files.get(file) else {
        return Answer::new(404).with("X-Error-Code", "EntryNotFound");
    };
    let etag = etag(file, content);
    if is_large(file) {
        let cdn = state.cdn.expect("set at start");
        Answer { body: b"Found. Redirecting".to_vec(), ..Answer::new(302) }
            .with("Location", format!("http://{cdn}/lfs/{etag}"))
            .with("X-Repo-Commit", commit)
            .with("X-Linked-Etag", format!("\"{etag}\""))
            .with("X-Linked-Size", content.len().to_string())
            .with("ETag", "\"of-the-redirect\"")
    } else if cached.is_none() && file == "config.json" {
        Answer { body: b"Temporary Redirect".to_vec(), ..Answer::new(307) }
            .with("Location", format!("/api/resolve-cache/{repo}/resolve/{commit}/{file}"))
            .with("X-Repo-Commit", commit)
    } else {
        Answer { body: content.clone(), ..Answer::new(200) }
            .with("X-Repo-Commit", commit)
            .with("ETag", format!("W/\"{etag}\""))
    }
}
