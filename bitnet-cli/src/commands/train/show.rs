//! `--show-data`: examples as the model sees them, with what it is trained to write marked.

use std::{
    io::{self, IsTerminal, Write},
    ops::ControlFlow,
    sync::atomic::{AtomicBool, Ordering},
};

use bitnet_model::hub::Hub;
use bitnet_train::{
    dataset::Dataset,
    recipe::Recipe,
    sft::{Shown, preview},
    trainer::Event,
};
use serde_json::json;

use super::display::Display;

/// Around what is trained: on a terminal, bold and green, and elsewhere.
const STYLED: [&str; 2] = ["\x1b[1;32m", "\x1b[0m"];
const PLAIN: [&str; 2] = ["⟦", "⟧"];

/// Reads the dataset of `recipe`, showing how far that is.
pub fn open(
    recipe: &Recipe,
    display: &mut Display,
    interrupted: &AtomicBool,
) -> bitnet_train::Result<Dataset> {
    let mut observe = |progress| {
        display.show(Event::Data(progress));
        match interrupted.load(Ordering::Relaxed) {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    };
    let dataset = Dataset::open_with(recipe, &Hub::from_env(), &mut observe)?;
    display.finish();
    if let Some(report) = &dataset.report {
        display.show(Event::Records(report));
    }
    Ok(dataset)
}

/// Prints the first `count` examples that are trained on, as text or as a JSON object a line.
pub fn print(
    recipe: &Recipe,
    count: usize,
    display: &mut Display,
    interrupted: &AtomicBool,
    json: bool,
) -> anyhow::Result<()> {
    let dataset = open(recipe, display, interrupted)?;
    let shown = preview(&dataset.train, &dataset.vocabulary, count)?;
    let (mut out, all) = (io::stdout().lock(), dataset.train.documents());
    let [begin, end] = if out.is_terminal() { STYLED } else { PLAIN };
    for (index, parts) in shown.iter().enumerate() {
        if json {
            let part =
                |Shown { text, is_trained }: &Shown| json!({"text": text, "trained": is_trained});
            writeln!(out, "{}", json!(parts.iter().map(part).collect::<Vec<_>>()))?;
            continue;
        }
        writeln!(out, "── example {} of {all}", index + 1)?;
        for Shown { text, is_trained } in parts {
            match is_trained {
                true => write!(out, "{begin}{text}{end}")?,
                false => write!(out, "{text}")?,
            }
        }
        writeln!(out)?;
    }
    Ok(())
}
