//! `--requests-only`: what a model would be asked, for comparison with the harness.

use std::{
    fs::File,
    io::{BufWriter, Write},
    path::Path,
};

use anyhow::Context;
use bitnet_model::text::Tokenizer;
use bitnet_train::eval::{
    Ask, Request,
    request::encode_pair,
    tasks::{Item, Prepared},
};
use serde_json::{Value, json};

/// Writes a line for every question, in the harness' order.
pub fn write(path: &Path, prepared: &[Prepared], tokenizer: &Tokenizer) -> anyhow::Result<()> {
    let name = || path.display().to_string();
    let mut file = BufWriter::new(File::create(path).with_context(name)?);
    for Prepared { task, items, .. } in prepared {
        for (number, item) in items.iter().enumerate() {
            let Item { document, requests } = item;
            let at = || format!("question {number} of {}", task.name);
            let requests = requests.iter().map(|request| described(request, tokenizer));
            let requests = requests.collect::<anyhow::Result<Vec<_>>>().with_context(at)?;
            let mut line = json!({"task": task.name, "item": number, "requests": requests});
            match &document.ask {
                Ask::Choices { gold, .. } | Ask::Contexts { gold, .. } => {
                    line["gold"] = json!(gold)
                }
                Ask::Written { target } | Ask::Program { test: target } => {
                    line["until"] = json!(task.until);
                    line["target"] = json!(target);
                }
                Ask::Ending | Ask::Page { .. } => {}
            }
            writeln!(file, "{line}").with_context(name)?;
        }
    }
    file.flush().with_context(name)
}

fn described(request: &Request, tokenizer: &Tokenizer) -> anyhow::Result<Value> {
    Ok(match request {
        Request::Continuation { context, continuation } => {
            let tokens = encode_pair(tokenizer, context, continuation)?;
            json!({"context": context, "continuation": continuation, "tokens": [tokens.0, tokens.1]})
        }
        Request::Page(text) => json!({"text": text, "tokens": tokenizer.encode_prompt(text)?}),
        Request::Generate(prompt) => {
            json!({"prompt": prompt, "tokens": tokenizer.encode_prompt(prompt)?})
        }
    })
}
