//! The file of requests and the file of answers.

use std::{
    collections::HashSet,
    fs::{File, OpenOptions},
    io::{self, BufRead, BufReader, ErrorKind, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use serde_json::{Value, json};

use crate::openai::{Refusal, Route};

/// Which lines are this job's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    index: usize,
    count: usize,
}

impl Shard {
    /// Reads `I/N`.
    pub fn parse(text: &str) -> Result<Self, String> {
        let numbers = text.split_once('/').and_then(|(index, count)| {
            Some(Self { index: index.parse().ok()?, count: count.parse().ok()? })
        });
        match numbers {
            Some(shard) if shard.index < shard.count => Ok(shard),
            Some(Self { index, count }) => {
                Err(format!("there is no part {index} of {count}: they are counted from 0"))
            }
            None => Err("expected I/N, such as 0/4".into()),
        }
    }
}

/// A request as it stands in the file.
pub struct Request {
    /// By which its answer is found.
    pub custom_id: String,
    /// Where it goes.
    pub route: Route,
    /// What it asks.
    pub body: Value,
}

/// The requests that are to be answered, read line by line.
pub struct Input<'a> {
    path: PathBuf,
    lines: std::iter::Enumerate<std::io::Lines<BufReader<File>>>,
    shard: Shard,
    answered: &'a HashSet<String>,
    passed: usize,
    left: usize,
    /// Requests met so far.
    met: usize,
}

impl<'a> Input<'a> {
    /// Checks the whole file, so that a mistake at its end is told before hours of work.
    ///
    /// # Errors
    /// The first line that is no request, or has the `custom_id` of an earlier one.
    pub fn open(path: &Path, shard: Shard, answered: &'a HashSet<String>) -> anyhow::Result<Self> {
        let open = || -> anyhow::Result<_> {
            let file = File::open(path).with_context(|| path.display().to_string())?;
            Ok(BufReader::new(file).lines().enumerate())
        };
        let (mut ids, mut requests) = (HashSet::new(), 0);
        let (mut passed, mut left) = (0, 0);
        for (number, line) in open()? {
            let at = || format!("{}:{}", path.display(), number + 1);
            let Some(request) = read(&line.with_context(at)?).with_context(at)? else { continue };
            let is_ours = requests % shard.count == shard.index;
            requests += 1;
            match is_ours && answered.contains(&request.custom_id) {
                true => passed += 1,
                false => left += usize::from(is_ours),
            }
            if let Some(id) = ids.replace(request.custom_id) {
                bail!("{}: `custom_id` is `{id}`, as of an earlier request", at());
            }
        }
        Ok(Self { path: path.into(), lines: open()?, shard, answered, passed, left, met: 0 })
    }

    /// Requests of this job that have an answer already.
    pub fn passed(&self) -> usize {
        self.passed
    }

    /// Requests of this job that are to be answered.
    pub fn left(&self) -> usize {
        self.left
    }
}

impl Iterator for Input<'_> {
    type Item = anyhow::Result<Request>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let (number, line) = self.lines.next()?;
            let at = || format!("{}:{}", self.path.display(), number + 1);
            let request = match line.with_context(at).and_then(|line| read(&line).with_context(at))
            {
                Ok(Some(request)) => request,
                Ok(None) => continue,
                Err(error) => return Some(Err(error)),
            };
            self.met += 1;
            let is_ours = (self.met - 1) % self.shard.count == self.shard.index;
            if is_ours && !self.answered.contains(&request.custom_id) {
                return Some(Ok(request));
            }
        }
    }
}

/// The request of a line; `None` of a blank one.
fn read(line: &str) -> anyhow::Result<Option<Request>> {
    if line.trim().is_empty() {
        return Ok(None);
    }
    let mut value: Value = serde_json::from_str(line).context("is no JSON")?;
    let text = |name: &str| {
        let text = value.get(name).and_then(Value::as_str).map(String::from);
        text.with_context(|| format!("`{name}` must be a string"))
    };
    let (custom_id, method, url) = (text("custom_id")?, text("method")?, text("url")?);
    if method != "POST" {
        bail!("`method` is `{method}`, but must be POST");
    }
    let Some(route) = Route::of(&url) else {
        bail!("`url` is `{url}`, but must be /v1/chat/completions or /v1/completions");
    };
    let body = value.get_mut("body").map(Value::take).context("there is no `body`")?;
    Ok(Some(Request { custom_id, route, body }))
}

/// How every answer begins.
const BEGINNING: &[u8] = b"{\"id\":\"batch_req_";

/// The answers that an earlier job left.
#[derive(Default)]
pub struct Answered {
    /// Of the requests that have one.
    pub custom_ids: HashSet<String>,
    /// Bytes of whole lines. What is behind them was cut short when the job ended.
    bytes: u64,
}

impl Answered {
    /// Those in the file at `path`, none if it is not there.
    ///
    /// # Errors
    /// A file that cannot be read, or that holds something else.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let mut answered = Self::default();
        let mut reader = match File::open(path) {
            Ok(file) => BufReader::new(file),
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(answered),
            Err(error) => return Err(error).with_context(|| path.display().to_string()),
        };
        let mut line = Vec::new();
        for number in 1.. {
            line.clear();
            let read = reader.read_until(b'\n', &mut line);
            let read = read.with_context(|| path.display().to_string())?;
            let no_answer =
                || format!("{}:{number}: is no answer; choose another output", path.display());
            if line.last() != Some(&b'\n') {
                let is_cut = line.starts_with(BEGINNING) || BEGINNING.starts_with(&line);
                anyhow::ensure!(is_cut, no_answer());
                break;
            }
            let value: Option<Value> = serde_json::from_slice(&line).ok();
            let answer = value.as_ref().filter(|value| value.get("response").is_some());
            let id = answer.and_then(|answer| answer.get("custom_id")?.as_str());
            let id = id.with_context(no_answer)?;
            answered.custom_ids.insert(id.to_owned());
            answered.bytes += read as u64;
        }
        Ok(answered)
    }
}

/// The file of answers, to which lines are added.
pub struct Output {
    path: PathBuf,
    file: File,
    written: u64,
    refused: u64,
}

impl Output {
    /// Opens the file behind what was `answered`, or creates it.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn open(path: &Path, answered: &Answered) -> anyhow::Result<Self> {
        let open = || -> io::Result<File> {
            let mut options = OpenOptions::new();
            let mut file = options.write(true).create(true).truncate(false).open(path)?;
            file.set_len(answered.bytes)?;
            file.seek(SeekFrom::End(0))?;
            Ok(file)
        };
        let file = open().with_context(|| path.display().to_string())?;
        Ok(Self { path: path.into(), file, written: 0, refused: 0 })
    }

    /// Answers written since then.
    pub fn written(&self) -> u64 {
        self.written
    }

    /// Of these, refusals.
    pub fn refused(&self) -> u64 {
        self.refused
    }

    /// Writes an answer, or why there is none.
    pub fn write(
        &mut self,
        custom_id: &str,
        id: &str,
        answer: Result<Value, Refusal>,
    ) -> anyhow::Result<()> {
        let (status, body) = match answer {
            Ok(answer) => (200, answer),
            Err(refusal) => {
                self.refused += 1;
                (400, refusal.to_json())
            }
        };
        let line = json!({
            "id": format!("batch_req_{id}"),
            "custom_id": custom_id,
            "response": {"status_code": status, "request_id": id, "body": body},
            "error": null,
        });
        // In one piece: whoever reads meanwhile sees whole lines.
        let line = format!("{line}\n");
        self.file.write_all(line.as_bytes()).with_context(|| self.path.display().to_string())?;
        self.written += 1;
        Ok(())
    }

    /// Waits until all of it is on the disk.
    pub fn sync(&self) -> anyhow::Result<()> {
        self.file.sync_all().with_context(|| self.path.display().to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_are_counted_from_0() {
        assert_eq!(Shard::parse("3/4"), Ok(Shard { index: 3, count: 4 }));
        assert!(Shard::parse("4/4").unwrap_err().contains("counted from 0"));
        assert!(Shard::parse("0/0").is_err() && Shard::parse("1").is_err());
    }
}
