//! `bitnet chat`: a conversation through the model's chat template.
//!
//! Replies go to stdout, everything else to stderr, so that a script reads replies alone.

mod command;
mod conversation;
mod input;

use std::{
    fs,
    io::{self, IsTerminal, Write},
    num::NonZeroUsize,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use anyhow::{Context, bail};
use bitnet_model::text::Tokenizer;

use self::{
    command::{Command, HELP},
    conversation::{Conversation, OpenSession},
    input::{Input, Line},
};
use crate::{
    adapter::AdapterArgs,
    args::Global,
    continuation::Finish,
    interrupt,
    model::{ModelArgs, SessionArgs},
    sampling::{MaxNewTokens, SamplingArgs},
};

/// New tokens of a reply if neither the user nor the model's publisher says how many.
const MAX_NEW_TOKENS: usize = 512;

/// Options of `bitnet chat`.
#[derive(clap::Args)]
#[command(after_help = HELP)]
pub struct Args {
    /// Instructions that stand before the conversation
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// Jinja file to write the conversation with [default: the model's own chat template]
    #[arg(long, value_name = "FILE")]
    pub chat_template: Option<PathBuf>,
    /// The most tokens of a reply, at least 1 [default: the model's generation_config.json, else 512]
    #[arg(long, short = 'n', value_name = "N")]
    pub max_new_tokens: Option<NonZeroUsize>,
    /// Neither read nor write the file of lines typed before, `bitnet/chat_history` in
    /// $XDG_STATE_HOME or ~/.local/state
    #[arg(long)]
    pub no_history: bool,
    /// The model.
    #[command(flatten)]
    pub model: ModelArgs,
    /// How to run it.
    #[command(flatten)]
    pub session: SessionArgs,
    /// What is beside it.
    #[command(flatten)]
    pub adapters: AdapterArgs,
    /// How to sample.
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

/// Runs it.
pub fn run(args: Args, global: &Global) -> anyhow::Result<()> {
    let start = Instant::now();
    let source = args.model.open(global)?;
    let bound = MaxNewTokens { flag: args.max_new_tokens, default: MAX_NEW_TOKENS };
    let mut plan = args.sampling.resolve(&source.config, &source.generation, bound)?;
    let template = args.chat_template.as_ref().map(|path| {
        fs::read_to_string(path).with_context(|| format!("--chat-template {}", path.display()))
    });
    let template = template.transpose()?;
    let adaptation = args.adapters.read(&source, global)?;

    let mut model = source.into_pretrained(&global.device()?)?;
    let Some(tokenizer) = model.tokenizer.take() else {
        bail!("{}: has no tokenizer, so there is no text to chat in", model.name);
    };
    let tokenizer = args.with_template(tokenizer, template.as_deref(), &model.name)?;
    let interrupt = interrupt::flag()?;
    plan.options.interrupt = interrupt.clone();
    let is_terminal = io::stdin().is_terminal();
    if is_terminal && !global.quiet {
        say(&format!("Chatting with {}; /help lists the commands, Ctrl-D leaves", model.name));
    }
    let Args { session, model: options, .. } = args;
    let open: OpenSession = Box::new(move |model| session.session(model, &options));
    let mut conversation =
        Conversation::new((model.model, open), tokenizer, plan, args.system, start.elapsed());
    conversation.put_beside(args.adapters.adapters, adaptation.as_ref())?;
    let mut input = match is_terminal {
        true => Input::terminal(!args.no_history)?,
        false => Input::pipe(),
    };
    while let Some(line) = next(&mut input, &interrupt)? {
        match handle(line, &mut conversation, global.quiet) {
            Ok(true) => {}
            Ok(false) => break,
            // Someone can try again; a script cannot.
            Err(error) if is_terminal && !crate::is_broken_pipe(&error) => {
                say(&format!("error: {error:#}"));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

impl Args {
    /// The tokenizer with a chat template that compiles.
    fn with_template(
        &self,
        tokenizer: Tokenizer,
        source: Option<&str>,
        model: &str,
    ) -> anyhow::Result<Tokenizer> {
        if let (Some(path), Some(source)) = (&self.chat_template, source) {
            return tokenizer
                .with_chat_template(source)
                .with_context(|| format!("--chat-template {}", path.display()));
        }
        let advice = "give one with --chat-template FILE";
        match tokenizer.chat_template() {
            Ok(Some(_)) => Ok(tokenizer),
            Ok(None) => bail!("{model}: has no chat template: {advice}"),
            Err(error) => bail!("{model}: {error}: {advice}"),
        }
    }
}

/// The next line. The flag is set meanwhile: nothing runs that could end in good order, so Ctrl-C
/// ends the program at once (at a terminal the line editor takes the key before it is a signal).
fn next(input: &mut Input, interrupt: &Arc<AtomicBool>) -> anyhow::Result<Option<Line>> {
    interrupt.store(true, Ordering::Relaxed);
    let line = input.next();
    interrupt.store(false, Ordering::Relaxed);
    line
}

/// Does what a line asks for; `false` at the end of the conversation.
fn handle(line: Line, conversation: &mut Conversation, quiet: bool) -> anyhow::Result<bool> {
    let command = match line {
        Line::Message(message) => {
            let finish = conversation.reply(message, &mut io::stdout().lock())?;
            if let Some(notice) = notice(finish).filter(|_| !quiet) {
                say(notice);
            }
            return Ok(true);
        }
        Line::Command(command) => Command::parse(&command)?,
    };
    match command {
        Command::Exit => return Ok(false),
        Command::Help => say(HELP),
        Command::Stats => say(&conversation.describe()),
        Command::Reset => conversation.reset(),
        Command::ShowSystem => say(conversation.system().unwrap_or("no system message is set")),
        Command::System(text) => conversation.set_system(text),
        Command::Save(path) => conversation.save(&path)?,
        Command::Load(path) => conversation.load(&path)?,
        Command::ShowAdapters => match conversation.adapters() {
            [] => say("no adapter is beside the model"),
            adapters => say(&Vec::from_iter(adapters.iter().map(ToString::to_string)).join(" ")),
        },
        Command::Adapters(adapters) => conversation.adapt(adapters, !quiet)?,
    }
    Ok(true)
}

/// What there is to say about an end that the model did not choose.
fn notice(finish: Finish) -> Option<&'static str> {
    match finish {
        Finish::Eos | Finish::Stop => None,
        Finish::Length => Some("(cut: --max-new-tokens allows longer replies)"),
        Finish::Context => Some("(cut: the model's context is full; /reset starts anew)"),
        Finish::Interrupted => Some("(stopped)"),
    }
}

/// A line for the person, not for whoever reads the replies; a closed stderr is no reason to fail.
fn say(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}
