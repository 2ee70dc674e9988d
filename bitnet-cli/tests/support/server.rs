//! A running `bitnet serve`, and a client that speaks plain HTTP/1.1 to it.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    process::{Child, Command, ExitStatus},
    time::{Duration, Instant},
};

use serde_json::Value;

use super::bitnet;

/// Longer than anything in a test takes.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Ends with the test.
pub struct Server {
    child: Child,
    pub address: String,
}

/// What came back.
pub struct Answer {
    pub status: u16,
    /// Lower-case names.
    pub headers: Vec<(String, String)>,
    pub body: String,
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(found, _)| found == name).map(|(_, value)| &value[..])
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|_| panic!("no JSON: {}", self.body))
    }

    /// The data of server-sent events; `[DONE]` as a string.
    pub fn events(&self) -> Vec<Value> {
        let data = self.body.lines().filter_map(|line| line.strip_prefix("data: "));
        data.map(|data| serde_json::from_str(data).unwrap_or_else(|_| data.into())).collect()
    }
}

impl Server {
    /// Starts on a free port and waits until it is ready.
    pub fn start(args: &[&str]) -> Self {
        Self::start_with(args, |command| command)
    }

    /// The same, with a command that is prepared further.
    pub fn start_with(args: &[&str], prepare: impl Fn(&mut Command) -> &mut Command) -> Self {
        let mut command = bitnet(&[&["serve", "--quiet", "--port", "0"], args].concat());
        command.env_remove("BITNET_API_KEYS");
        let mut child = prepare(&mut command).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("listening on http://").map(String::from);
        let Some(address) = address else {
            let output = child.wait_with_output().unwrap();
            panic!("{line}{}", String::from_utf8_lossy(&output.stderr));
        };
        let server = Self { child, address };
        wait_until(|| server.get("/ready").status == 200);
        server
    }

    pub fn get(&self, path: &str) -> Answer {
        self.ask("GET", path, "", "")
    }

    pub fn post(&self, path: &str, body: &Value) -> Answer {
        self.ask("POST", path, "", body.to_string())
    }

    /// With a key.
    pub fn post_as(&self, key: &str, path: &str, body: &Value) -> Answer {
        self.ask("POST", path, &format!("Authorization: Bearer {key}\r\n"), body.to_string())
    }

    /// `headers` are lines of their own.
    pub fn ask(&self, method: &str, path: &str, headers: &str, body: impl AsRef<[u8]>) -> Answer {
        read(self.send(method, path, headers, body.as_ref()))
    }

    /// A connection whose answer has not been read. Sent headers of the same names win over the usual ones.
    pub fn send(&self, method: &str, path: &str, headers: &str, body: &[u8]) -> TcpStream {
        let mut stream = self.connect();
        let mut head = format!("{method} {path} HTTP/1.1\r\nConnection: close\r\n{headers}");
        let has = |name: &str| headers.to_ascii_lowercase().contains(name);
        if !has("host:") {
            head += &format!("Host: {}\r\n", self.address);
        }
        if !has("content-type:") {
            head += "Content-Type: application/json\r\n";
        }
        head += &format!("Content-Length: {}\r\n\r\n", body.len());
        stream.write_all(head.as_bytes()).unwrap();
        let _ = stream.write_all(body); // one that is too long need not be taken
        stream
    }

    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// A number in `/stats`.
    pub fn stat(&self, pointer: &str) -> u64 {
        let stats = self.get("/stats").json();
        stats.pointer(pointer).and_then(Value::as_u64).unwrap_or(0)
    }

    pub fn signal(&self, name: &str) {
        let status = Command::new("kill").args([name, &self.child.id().to_string()]).status();
        assert!(status.unwrap().success());
    }

    /// Waits for its end.
    pub fn end(&mut self) -> ExitStatus {
        self.child.wait().unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill(); // it may have ended
        let _ = self.child.wait();
    }
}

/// Reads an answer to its end.
pub fn read(mut stream: TcpStream) -> Answer {
    let mut bytes = Vec::new();
    // A server that refuses a body before its end may reset the connection behind its answer.
    let _ = stream.read_to_end(&mut bytes);
    let text = String::from_utf8(bytes).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {text}"));
    let mut lines = head.lines();
    let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
    let headers = lines.filter_map(|line| line.split_once(": "));
    let headers =
        Vec::from_iter(headers.map(|(name, value)| (name.to_lowercase(), value.to_owned())));
    let mut answer = Answer { status, headers, body: body.to_owned() };
    if answer.header("transfer-encoding") == Some("chunked") {
        answer.body = unchunked(body);
    }
    answer
}

fn unchunked(mut body: &str) -> String {
    let mut text = String::new();
    while let Some((size, rest)) = body.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).unwrap();
        text += &rest[..size];
        body = rest[size..].trim_start_matches("\r\n");
    }
    text
}

/// Waits for what happens soon.
pub fn wait_until(mut happens: impl FnMut() -> bool) {
    let start = Instant::now();
    while !happens() {
        assert!(start.elapsed() < PATIENCE, "it did not happen");
        std::thread::sleep(Duration::from_millis(10));
    }
}
