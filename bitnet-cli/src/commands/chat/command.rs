//! What begins with a slash.

use std::path::{Path, PathBuf};

use anyhow::{anyhow, bail};

use crate::adapter::AdapterSpec;

/// The commands and keys, for `/help` and `--help`.
pub const HELP: &str = "In the conversation:
  /reset         Forget the conversation, keep the system message
  /system TEXT   Set the system message; without TEXT, show it
  /save FILE     Write the conversation as JSON messages
  /load FILE     Continue a conversation that was saved
  /adapter DIR   Put this LoRA adapter, DIR:SCALE, or several, beside the model
                 instead of those that are there; none takes them away, nothing
                 shows them. The conversation goes on
  /stats         Show speed, memory and how full the context is
  /help          Show this
  /exit          Leave; so does Ctrl-D

A line that ends in \\ goes on in the next one, and so does everything between
two \"\"\". Ctrl-C stops a reply, or clears the line.";

/// A command with its argument.
#[derive(Debug, PartialEq)]
pub enum Command {
    /// Forget the conversation.
    Reset,
    /// Show the system message.
    ShowSystem,
    /// Set the system message.
    System(String),
    /// Write the conversation to a file.
    Save(PathBuf),
    /// Read the conversation from a file.
    Load(PathBuf),
    /// Say which adapters are beside the model.
    ShowAdapters,
    /// Put these beside the model and no others.
    Adapters(Vec<AdapterSpec>),
    /// Show statistics.
    Stats,
    /// List the commands.
    Help,
    /// Leave.
    Exit,
}

impl Command {
    /// Reads a line that begins with a slash.
    pub fn parse(line: &str) -> anyhow::Result<Self> {
        let line = line.trim();
        let (name, argument) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let argument = argument.trim();
        let file = || match argument {
            "" => bail!("{name} needs a file: {name} FILE"),
            path => Ok(expand_home(path)),
        };
        let command = match name {
            "/system" if argument.is_empty() => return Ok(Self::ShowSystem),
            "/system" => return Ok(Self::System(argument.to_owned())),
            "/save" => return Ok(Self::Save(file()?)),
            "/load" => return Ok(Self::Load(file()?)),
            "/adapter" => return adapters(argument),
            "/reset" => Self::Reset,
            "/stats" => Self::Stats,
            "/help" => Self::Help,
            "/exit" => Self::Exit,
            _ => bail!(
                "there is no command {name}; /help lists them, and a message that begins with a \
                 slash goes between two \"\"\""
            ),
        };
        match argument {
            "" => Ok(command),
            _ => bail!("{name} takes no argument, but was given `{argument}`"),
        }
    }
}

/// What `/adapter` asks for: a path that is there, with a scale or without, is one, whatever spaces it has.
fn adapters(argument: &str) -> anyhow::Result<Command> {
    let parse = |text: &str| -> anyhow::Result<AdapterSpec> {
        let spec = AdapterSpec::parse(&expand_home(text).to_string_lossy());
        spec.map_err(|reason| anyhow!("/adapter {text}: {reason}"))
    };
    Ok(match argument {
        "" => Command::ShowAdapters,
        "none" => Command::Adapters(Vec::new()),
        _ => match parse(argument) {
            Ok(spec) if Path::new(&spec.source).exists() => Command::Adapters(vec![spec]),
            _ => Command::Adapters(
                argument.split_whitespace().map(parse).collect::<anyhow::Result<_>>()?,
            ),
        },
    })
}

/// `~/` as shells have it: no shell sees what is typed here.
fn expand_home(path: &str) -> PathBuf {
    match (path.strip_prefix("~/"), std::env::home_dir()) {
        (Some(rest), Some(home)) => home.join(rest),
        _ => path.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_and_arguments() {
        let parse = |line| Command::parse(line).unwrap();
        assert_eq!(parse("/reset"), Command::Reset);
        assert_eq!(parse("  /exit "), Command::Exit);
        assert_eq!(parse("/system"), Command::ShowSystem);
        assert_eq!(parse("/system  Be brief. "), Command::System("Be brief.".into()));
        assert_eq!(parse("/save my chat.json"), Command::Save("my chat.json".into()));
        let home = std::env::home_dir().unwrap();
        assert_eq!(parse("/load ~/a.json"), Command::Load(home.join("a.json")));
    }

    #[test]
    fn adapters_are_some_or_none() {
        let sources = |line: &str| match Command::parse(line).unwrap() {
            Command::Adapters(specs) => Vec::from_iter(specs.iter().map(ToString::to_string)),
            other => panic!("{other:?}"),
        };
        assert_eq!(Command::parse("/adapter").unwrap(), Command::ShowAdapters);
        assert!(sources("/adapter none").is_empty());
        assert_eq!(sources("/adapter a/b:0.5  c"), ["a/b:0.5", "c"]);
        let folder = tempfile::tempdir().unwrap();
        let spaced = folder.path().join("two words");
        std::fs::create_dir(&spaced).unwrap();
        let spaced = spaced.to_str().unwrap();
        assert_eq!(sources(&format!("/adapter {spaced}")), [spaced]);
        assert_eq!(sources(&format!("/adapter {spaced}:2")), [format!("{spaced}:2")]);
        let error = Command::parse("/adapter a:nan").unwrap_err().to_string();
        assert!(error.contains("/adapter a:nan") && error.contains("no scale"), "{error}");
    }

    #[test]
    fn mistakes_get_a_hint() {
        let error = |line| Command::parse(line).unwrap_err().to_string();
        assert!(error("/quit").starts_with("there is no command /quit; /help lists them"));
        assert_eq!(error("/save"), "/save needs a file: /save FILE");
        assert_eq!(error("/stats now"), "/stats takes no argument, but was given `now`");
    }

    #[test]
    fn the_help_names_every_command() {
        for name in ["/reset", "/system", "/save", "/load", "/adapter", "/stats", "/help", "/exit"]
        {
            assert!(HELP.contains(&format!("\n  {name} ")), "{name}");
        }
    }
}
