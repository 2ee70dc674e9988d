//! Lines from a terminal or a pipe, put together to messages.

use std::{
    fs,
    io::{self, BufRead},
    path::PathBuf,
};

use anyhow::{Context, bail};
use rustyline::{DefaultEditor, error::ReadlineError};

/// Opens and closes a block of several lines.
const BLOCK: &str = "\"\"\"";

/// What was entered.
#[derive(Debug, PartialEq, Eq)]
pub enum Line {
    /// Something for the model.
    Message(String),
    /// Something for the program: a line with a slash in front.
    Command(String),
}

/// Where messages and commands come from.
pub struct Input {
    source: Source,
    unfinished: Unfinished,
}

enum Source {
    Terminal { editor: Box<DefaultEditor>, history: Option<PathBuf> },
    Pipe { lines: usize },
}

impl Input {
    /// A line editor on the terminal, with the lines of earlier conversations if `history`.
    pub fn terminal(history: bool) -> anyhow::Result<Self> {
        let mut editor = Box::new(DefaultEditor::new().context("cannot use the terminal")?);
        let history = history.then(history_file).flatten();
        if let Some(path) = &history {
            match editor.load_history(path) {
                Err(ReadlineError::Io(error)) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => tracing::warn!("history {}: {error}", path.display()),
                Ok(()) => {}
            }
        }
        let source = Source::Terminal { editor, history };
        Ok(Self { source, unfinished: Unfinished::default() })
    }

    /// Standard input, each line a message or a command.
    pub fn pipe() -> Self {
        Self { source: Source::Pipe { lines: 0 }, unfinished: Unfinished::default() }
    }

    /// The next message or command that is not empty; `None` at the end.
    pub fn next(&mut self) -> anyhow::Result<Option<Line>> {
        loop {
            let prompt = if self.unfinished.is_empty() { "> " } else { "… " };
            let line = match self.source.read(prompt)? {
                Read::Line(line) => self.unfinished.push(&line),
                Read::Cancelled => {
                    self.unfinished = Unfinished::default();
                    continue;
                }
                Read::End => match self.unfinished.finish() {
                    None => return Ok(None),
                    line => line,
                },
            };
            if let Some(line) = line {
                return Ok(Some(line));
            }
        }
    }
}

enum Read {
    Line(String),
    /// Ctrl-C.
    Cancelled,
    /// Ctrl-D, or the end of the pipe.
    End,
}

impl Source {
    fn read(&mut self, prompt: &str) -> anyhow::Result<Read> {
        match self {
            Self::Terminal { editor, history } => match editor.readline(prompt) {
                Ok(line) => {
                    remember(editor, history, &line);
                    Ok(Read::Line(line))
                }
                Err(ReadlineError::Interrupted) => Ok(Read::Cancelled),
                Err(ReadlineError::Eof) => Ok(Read::End),
                Err(ReadlineError::Io(error)) => Err(error).context("cannot read the terminal"),
                Err(error) => bail!("cannot read the terminal: {error}"),
            },
            Self::Pipe { lines } => {
                let mut bytes = Vec::new();
                let read = io::stdin().lock().read_until(b'\n', &mut bytes);
                if read.context("cannot read stdin")? == 0 {
                    return Ok(Read::End);
                }
                *lines += 1;
                match String::from_utf8(bytes) {
                    Ok(line) => Ok(Read::Line(line.trim_end_matches(['\r', '\n']).to_owned())),
                    Err(_) => bail!("line {lines} of stdin is not UTF-8"),
                }
            }
        }
    }
}

/// Adds a line to the history; failing that is worth a warning, once.
fn remember(editor: &mut DefaultEditor, history: &mut Option<PathBuf>, line: &str) {
    let Some(path) = history else { return };
    if line.trim().is_empty() {
        return;
    }
    let write = |editor: &mut DefaultEditor| -> Result<(), ReadlineError> {
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        editor.add_history_entry(line)?;
        editor.append_history(path)
    };
    if let Err(error) = write(editor) {
        tracing::warn!("history {}: {error}", path.display());
        *history = None;
    }
}

/// `bitnet/chat_history` among the files of state: $XDG_STATE_HOME (only absolute paths count, says
/// the XDG specification), else ~/.local/state.
fn history_file() -> Option<PathBuf> {
    let state = std::env::var_os("XDG_STATE_HOME").map(PathBuf::from).filter(|p| p.is_absolute());
    let state = state.or_else(|| Some(std::env::home_dir()?.join(".local/state")))?;
    Some(state.join("bitnet").join("chat_history"))
}

/// The lines of a message that goes on.
#[derive(Debug, Default)]
struct Unfinished {
    text: Option<String>,
    in_block: bool,
}

impl Unfinished {
    fn is_empty(&self) -> bool {
        self.text.is_none()
    }

    /// Takes a line; returns what it completes.
    fn push(&mut self, line: &str) -> Option<Line> {
        let Some(mut text) = self.text.take() else { return self.begin(line) };
        if self.in_block {
            match line.trim_end().strip_suffix(BLOCK) {
                Some(last) => {
                    text.push_str(last);
                    self.in_block = false;
                    return message(text.strip_suffix('\n').unwrap_or(&text));
                }
                None => {
                    text.push_str(line);
                    text.push('\n');
                }
            }
        } else {
            match line.strip_suffix('\\') {
                None => {
                    text.push_str(line);
                    return message(&text);
                }
                Some(line) => {
                    text.push_str(line);
                    text.push('\n');
                }
            }
        }
        self.text = Some(text);
        None
    }

    fn begin(&mut self, line: &str) -> Option<Line> {
        if let Some(rest) = line.trim_start().strip_prefix(BLOCK) {
            if let Some(whole) = rest.trim_end().strip_suffix(BLOCK) {
                return message(whole);
            }
            self.in_block = true;
            self.text =
                Some(if rest.trim().is_empty() { String::new() } else { format!("{rest}\n") });
            return None;
        }
        if line.trim_start().starts_with('/') {
            return Some(Line::Command(line.to_owned()));
        }
        match line.strip_suffix('\\') {
            Some(line) => {
                self.text = Some(format!("{line}\n"));
                None
            }
            None => message(line),
        }
    }

    /// What there is at the end of the input.
    fn finish(&mut self) -> Option<Line> {
        self.in_block = false;
        message(self.text.take()?.trim_end_matches('\n'))
    }
}

/// A message, unless it is blank.
fn message(text: &str) -> Option<Line> {
    (!text.trim().is_empty()).then(|| Line::Message(text.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All that lines give, the end of input included.
    fn entered(lines: &[&str]) -> Vec<Line> {
        let mut unfinished = Unfinished::default();
        let mut entered: Vec<Line> = lines.iter().filter_map(|l| unfinished.push(l)).collect();
        entered.extend(unfinished.finish());
        entered
    }

    fn messages(texts: &[&str]) -> Vec<Line> {
        texts.iter().map(|text| Line::Message((*text).to_owned())).collect()
    }

    #[test]
    fn lines_are_messages_or_commands() {
        assert_eq!(entered(&["hi", "", "  ", "there"]), messages(&["hi", "there"]));
        assert_eq!(entered(&["/help", " /save x"]).len(), 2);
        assert_eq!(entered(&["/help"]), [Line::Command("/help".into())]);
    }

    #[test]
    fn a_backslash_continues_a_line() {
        assert_eq!(
            entered(&["one\\", "/two\\", "three", "four"]),
            messages(&["one\n/two\nthree", "four"])
        );
        assert_eq!(entered(&["cut\\"]), messages(&["cut"]));
    }

    #[test]
    fn blocks_hold_anything() {
        assert_eq!(
            entered(&["\"\"\"", "a", "", "/b\\", "\"\"\"", "c"]),
            messages(&["a\n\n/b\\", "c"])
        );
        assert_eq!(entered(&["\"\"\"a", "b\"\"\""]), messages(&["a\nb"]));
        assert_eq!(entered(&["\"\"\"/not a command\"\"\""]), messages(&["/not a command"]));
        assert_eq!(entered(&["\"\"\"", "\"\"\""]), []);
        assert_eq!(entered(&["\"\"\"", "never closed"]), messages(&["never closed"]));
    }
}
