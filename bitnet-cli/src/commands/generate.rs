//! `bitnet generate [PROMPT]`.

use std::{
    io::{self, IsTerminal, Read, Write},
    num::NonZeroUsize,
    ops::ControlFlow,
    time::Instant,
};

use anyhow::{Context, bail};
use bitnet_model::{
    pretrained::{Pretrained, Source},
    text::Tokenizer,
};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde_json::json;

use crate::{
    adapter::{self, AdapterArgs},
    args::Global,
    continuation::{self, Finish, TextOutput, check_prompt},
    interrupt,
    model::{ModelArgs, SessionArgs},
    sampling::{MaxNewTokens, SamplingArgs},
};

/// New tokens if neither the user nor the model's publisher says how many.
const MAX_NEW_TOKENS: usize = 256;

/// A longer prompt is refused before it fills the memory; no context holds so much.
const MAX_PROMPT_BYTES: u64 = 64 << 20;

/// Options of `bitnet generate`.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  bitnet generate \"Once upon a time\"
  bitnet generate --temperature 0 --max-new-tokens 64 \"Once upon a time\"
  bitnet generate --model microsoft/bitnet-b1.58-2B-4T --stop $'\\n' < prompt.txt
  bitnet generate --model DIR --tokens 1,306,4658 --json")]
pub struct Args {
    /// The text to continue; `-` or nothing reads it from stdin, without its last line break
    #[arg(value_name = "PROMPT", conflicts_with = "tokens")]
    pub prompt: Option<String>,
    /// Token ids to continue instead of a text, separated by commas; a model without a tokenizer
    /// answers with the new ids
    #[arg(long, value_name = "IDS", value_delimiter = ',')]
    pub tokens: Option<Vec<u32>>,
    /// Encode the prompt as it is, without the special tokens that the tokenizer adds (usually the
    /// begin-of-text token)
    #[arg(long, conflicts_with = "tokens")]
    pub raw: bool,
    /// The most tokens to add, at least 1 [default: the model's generation_config.json, else 256]
    #[arg(long, short = 'n', value_name = "N")]
    pub max_new_tokens: Option<NonZeroUsize>,
    /// Go on after end-of-text tokens
    #[arg(long)]
    pub ignore_eos: bool,
    /// Print the continuation without the prompt before it
    #[arg(long)]
    pub no_echo: bool,
    /// Print one JSON object: `text` and `tokens` of the continuation, `prompt_tokens`, `finish` (eos,
    /// length, context, stop, interrupted), `seed`, `statistics`
    #[arg(long)]
    pub json: bool,
    /// The model.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Adapters.
    #[command(flatten)]
    pub adapters: AdapterArgs,
    /// How to run it.
    #[command(flatten)]
    pub session: SessionArgs,
    /// How to sample.
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

/// What to continue.
enum Prompt {
    Text(String),
    Tokens(Vec<u32>),
}

/// Runs it.
pub fn run(args: Args, global: &Global) -> anyhow::Result<()> {
    let start = Instant::now();
    let source = args.model.open(global)?;
    let bound = MaxNewTokens { flag: args.max_new_tokens, default: MAX_NEW_TOKENS };
    let mut plan = args.sampling.resolve(&source.config, &source.generation, bound)?;
    if args.ignore_eos {
        plan.options.eos_token_ids.clear();
    }
    let adaptation = args.adapters.read(&source, global)?;
    let open_time = start.elapsed();
    let prompt = args.prompt(&source)?;

    let start = Instant::now(); // waiting for stdin is not loading
    let mut model = source.into_pretrained(&global.device()?)?;
    model.model = adapter::beside(model.model, adaptation.as_ref())?;
    let (prompt, echo) = args.encode(prompt, &model)?;
    check_prompt(&prompt, model.model.config())?;
    let load_time = open_time + start.elapsed();

    plan.options.interrupt = interrupt::flag()?;
    let mut stdout = io::stdout().lock();
    if !args.json {
        stdout.write_all(echo.as_bytes())?;
        stdout.flush()?;
    }
    let mut session = args.session.session(&model.model, &args.model);
    let mut rng = ChaCha8Rng::seed_from_u64(plan.seed);
    let sampling = (&plan.options, &mut rng);
    let (continuation, text) = match &model.tokenizer {
        Some(tokenizer) => {
            let out = (!args.json).then_some(&mut stdout as &mut dyn Write);
            let mut text = TextOutput::new(tokenizer, plan.stop.clone(), out);
            text = text.after(&prompt, tokenizer)?;
            let mut on_token = |id| text.push(id);
            let mut continuation =
                continuation::run(&mut session, &prompt, sampling, load_time, &mut on_token)?;
            let (text, finish) = text.finish(continuation.finish)?;
            continuation.finish = finish;
            (continuation, Some(text))
        }
        None => {
            let mut separator = "";
            let mut on_token = |id| {
                if !args.json {
                    write!(stdout, "{separator}{id}")?;
                    stdout.flush()?;
                    separator = ",";
                }
                Ok(ControlFlow::Continue(()))
            };
            (continuation::run(&mut session, &prompt, sampling, load_time, &mut on_token)?, None)
        }
    };
    if args.json {
        let object = json!({
            "text": text,
            "tokens": continuation.tokens,
            "prompt_tokens": prompt.len(),
            "finish": continuation.finish,
            "seed": plan.seed,
            "statistics": continuation.statistics,
        });
        writeln!(stdout, "{object}")?;
    } else if !text.as_ref().or(Some(&echo)).is_some_and(|text| text.ends_with('\n')) {
        writeln!(stdout)?;
    }
    stdout.flush()?;
    if !global.quiet {
        let seed = if plan.is_greedy() { "greedy".into() } else { format!("seed {}", plan.seed) };
        // Statistics are an extra: a closed stderr is no reason to fail.
        let _ = writeln!(io::stderr(), "{}, {seed}", continuation.statistics);
    }
    match continuation.finish {
        Finish::Interrupted => interrupt::exit(),
        _ => Ok(()),
    }
}

impl Args {
    /// What the user wants continued, as far as can be told without the tokenizer.
    fn prompt(&self, source: &Source) -> anyhow::Result<Prompt> {
        if let Some(tokens) = &self.tokens {
            check_prompt(tokens, &source.config)?;
            return Ok(Prompt::Tokens(tokens.clone()));
        }
        if !source.has_tokenizer() {
            bail!("{}: has no tokenizer: give the prompt as token ids with --tokens", source.name);
        }
        Ok(Prompt::Text(match self.prompt.as_deref() {
            Some("-") => read_prompt(io::stdin().lock())?,
            Some(text) => text.to_owned(),
            None if io::stdin().is_terminal() => {
                bail!("there is no prompt: give it as an argument or on stdin")
            }
            None => read_prompt(io::stdin().lock())?,
        }))
    }

    /// The prompt's tokens, and its text if that is to be printed.
    fn encode(&self, prompt: Prompt, model: &Pretrained) -> anyhow::Result<(Vec<u32>, String)> {
        let echo = |text: &dyn Fn() -> bitnet_model::Result<String>| match self.no_echo {
            true => Ok(String::new()),
            false => text(),
        };
        match (prompt, &model.tokenizer) {
            (Prompt::Tokens(tokens), None) => Ok((tokens, String::new())),
            (Prompt::Tokens(tokens), Some(tokenizer)) => {
                let text = echo(&|| tokenizer.decode(&tokens, true))?;
                Ok((tokens, text))
            }
            (Prompt::Text(_), None) => bail!("{}: has no tokenizer", model.name),
            (Prompt::Text(text), Some(tokenizer)) => {
                let tokens = encode(tokenizer, &text, !self.raw)?;
                Ok((tokens, echo(&|| Ok(text.clone()))?))
            }
        }
    }
}

fn encode(tokenizer: &Tokenizer, text: &str, special_tokens: bool) -> anyhow::Result<Vec<u32>> {
    let tokens = tokenizer.encode(text, special_tokens)?;
    if tokens.is_empty() {
        bail!("the prompt is empty and there is no begin-of-text token to start from: give a text");
    }
    Ok(tokens)
}

/// All of `input` but the line break that a shell or an editor puts at its end.
fn read_prompt(input: impl Read) -> anyhow::Result<String> {
    let mut bytes = Vec::new();
    input.take(MAX_PROMPT_BYTES + 1).read_to_end(&mut bytes).context("cannot read the prompt")?;
    if bytes.len() as u64 > MAX_PROMPT_BYTES {
        bail!("the prompt on stdin is longer than {} MiB", MAX_PROMPT_BYTES >> 20);
    }
    let mut text = String::from_utf8(bytes).map_err(|error| {
        let offset = error.utf8_error().valid_up_to();
        anyhow::anyhow!("the prompt on stdin is not UTF-8: byte {offset} begins no character")
    })?;
    if text.ends_with('\n') {
        text.pop();
        if text.ends_with('\r') {
            text.pop();
        }
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompt_loses_one_line_break() {
        for (input, prompt) in
            [("a", "a"), ("a\n", "a"), ("a\r\n", "a"), ("a\n\n", "a\n"), ("", "")]
        {
            assert_eq!(read_prompt(input.as_bytes()).unwrap(), prompt);
        }
        let error = read_prompt(&b"ab\xff"[..]).unwrap_err().to_string();
        assert_eq!(error, "the prompt on stdin is not UTF-8: byte 2 begins no character");
    }
}
