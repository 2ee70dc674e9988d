//! `bitnet tokenize`: text → token ids, and back.

use std::io::{self, Read, Write};

use anyhow::{Context, bail};
use bitnet_model::text::{Message, Tokenizer};

use crate::{args::Global, model::ModelArgs};

/// Options of `bitnet tokenize`.
#[derive(clap::Args)]
#[command(
    after_long_help = "Without an option for the output, the ids are printed on one line, separated by spaces. The text is \
taken as it is: a line end at the end of stdin is part of it."
)]
pub struct Args {
    /// The text; stdin if absent
    #[arg(value_name = "TEXT", conflicts_with = "decode")]
    text: Option<String>,
    /// The model
    #[command(flatten)]
    model: ModelArgs,
    /// Print the text of these ids, separated by commas
    #[arg(long, value_delimiter = ',', value_name = "IDS")]
    decode: Option<Vec<u32>>,
    /// Add no special tokens such as BOS; with --decode, leave them out
    #[arg(long)]
    no_special: bool,
    /// Take the text for what a user says and put it into the model's chat template
    #[arg(long, conflicts_with = "decode")]
    chat: bool,
    /// Print one token a line: id, tab, token as the vocabulary spells it
    #[arg(long, group = "format")]
    pieces: bool,
    /// Print the number of tokens only
    #[arg(long, group = "format")]
    count: bool,
    /// Print an object with `tokens`, `pieces`, `count`, and `text` where it is the result
    #[arg(long, group = "format")]
    json: bool,
}

/// Prints tokens or text to stdout.
pub fn run(args: Args, global: &Global) -> anyhow::Result<()> {
    let source = args.model.open(global)?;
    let tokenizer = source
        .tokenizer()?
        .with_context(|| format!("{}: has no tokenizer.json, so it reads no text", source.name))?;
    let tokens = match &args.decode {
        Some(tokens) => tokens.clone(),
        None => encode(&args, &tokenizer, &source.name)?,
    };
    let pieces = tokens.iter().map(|&id| {
        tokenizer.id_to_token(id).with_context(|| {
            let size = tokenizer.vocab_size();
            format!("token id {id} is outside the tokenizer's vocabulary of {size}")
        })
    });
    let pieces: Vec<String> = pieces.collect::<anyhow::Result<_>>()?;
    let text = args.decode.is_some().then(|| tokenizer.decode(&tokens, args.no_special));
    let text = text.transpose()?;
    let out = &mut io::stdout().lock();
    if args.json {
        let mut json = serde_json::json!({
            "tokens": tokens, "pieces": pieces, "count": tokens.len(),
        });
        if let Some(text) = text {
            json["text"] = text.into();
        }
        writeln!(out, "{json}")?;
    } else if args.count {
        writeln!(out, "{}", tokens.len())?;
    } else if args.pieces {
        for (id, piece) in tokens.iter().zip(&pieces) {
            writeln!(out, "{id}\t{}", one_line(piece))?;
        }
    } else if let Some(text) = text {
        writeln!(out, "{text}")?;
    } else {
        let ids: Vec<String> = tokens.iter().map(u32::to_string).collect();
        writeln!(out, "{}", ids.join(" "))?;
    }
    Ok(out.flush()?)
}

fn encode(args: &Args, tokenizer: &Tokenizer, model: &str) -> anyhow::Result<Vec<u32>> {
    let text = match &args.text {
        Some(text) => text.clone(),
        None => {
            let mut text = String::new();
            io::stdin().read_to_string(&mut text).context("stdin cannot be read as UTF-8 text")?;
            text
        }
    };
    if !args.chat {
        return Ok(tokenizer.encode(&text, !args.no_special)?);
    }
    let Some(template) = tokenizer.chat_template()? else {
        bail!("{model}: has no chat template: leave out --chat");
    };
    let prompt = template.render(&[Message::new("user", text)], true)?;
    // Some templates write BOS themselves, others leave it to the tokenizer.
    let has_bos = tokenizer.bos_token().is_some_and(|bos| prompt.starts_with(bos));
    Ok(tokenizer.encode(&prompt, !has_bos && !args.no_special)?)
}

/// `piece` with control characters escaped, so that it stays on its line.
fn one_line(piece: &str) -> String {
    let escape = |c: char| match c.is_control() {
        true => c.escape_default().collect(),
        false => c.to_string(),
    };
    piece.chars().map(escape).collect()
}
