//! What speculation gains on given texts: `cargo run --release -p bitnet-model --example replay [MODEL [FILE …]]`; without a
//! model random weights of the 2B-4T geometry.
//!
//! The model's own choices are dropped and the text beside this file is written instead, once plainly and once with drafts
//! from its repetitions, so that a model with random weights says how fast a trained one would be that writes this: a
//! summary behind its article, an edited program behind the original, and a text that repeats nothing. More arguments name
//! other files: a prompt, a line `====`, and what is to be written.

use std::{env, error::Error, fs, sync::Arc};

use bitnet_model::{
    pretrained::{DEFAULT, Pretrained},
    session::{Generation, Session},
};

/// Names and contents of the texts.
const TEXTS: [(&str, &str); 3] = [
    ("summary", include_str!("summary.txt")),
    ("edit", include_str!("edit.txt")),
    ("unrelated", include_str!("unrelated.txt")),
];

/// Each text is written plainly, with drafts twice, and plainly again, as often as this.
const ROUNDS: usize = 2;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = env::args().skip(1);
    let bitnet = Pretrained::open(&args.next().unwrap_or_else(|| "synthetic:2b-4t".into()))?;
    // Where there is none, that of the embedded model cuts the texts: what counts is what repeats.
    let tokenizer = match bitnet.tokenizer {
        Some(tokenizer) => tokenizer,
        None => Pretrained::open(DEFAULT)?.tokenizer.ok_or("no tokenizer")?,
    };
    let mut texts: Vec<(String, String)> = Vec::new();
    for file in args {
        texts.push((file.clone(), fs::read_to_string(file)?));
    }
    if texts.is_empty() {
        texts = TEXTS.map(|(name, text)| (name.into(), text.into())).into();
    }
    println!("| text | tokens | drafted | accepted | plain, tokens/s | with drafts | gain |");
    println!("|---|---:|---:|---:|---:|---:|---:|");
    for (name, text) in texts {
        let (prompt, text) = text.split_once("\n====\n").ok_or("a text without a line `====`")?;
        let prompt = tokenizer.encode(prompt, true)?;
        let text = tokenizer.encode(text, false)?;
        let plain = || Session::new(Arc::clone(&bitnet.model));
        let write = |mut session: Session| session.replay(&prompt, &text);
        let (mut without, mut with, mut drafted) = (Vec::new(), Vec::new(), Default::default());
        for _ in 0..ROUNDS {
            without.push(rate(&write(plain())?));
            for _ in 0..2 {
                let generation = write(plain().speculating())?;
                with.push(rate(&generation));
                drafted = generation.drafted;
            }
            without.push(rate(&write(plain())?));
        }
        let (without, with) = (median(without), median(with));
        println!(
            "| {name} | {} | {} | {} | {without:.1} | {with:.1} | {:+.1} % |",
            text.len(),
            drafted.tokens,
            drafted.accepted,
            100. * (with / without - 1.)
        );
    }
    Ok(())
}

/// Tokens a second behind the prompt.
fn rate(generation: &Generation) -> f64 {
    generation.tokens.len() as f64 / generation.decode_time.as_secs_f64()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    (values[(values.len() - 1) / 2] + values[values.len() / 2]) / 2.
}
