//! Updates and evaluations of a run on stderr.

use std::{
    io::{self, IsTerminal, Write},
    time::{Duration, Instant},
};

use bitnet_train::{
    metrics::{EvaluationRecord, TrainRecord},
    trainer::Event,
};
use indicatif::ProgressBar;

use crate::{
    args::Global,
    progress::{self, count, duration},
};

/// Without a terminal, time between two lines about updates.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

/// A bar on a terminal, else a line now and then.
pub struct Display {
    bar: ProgressBar,
    is_quiet: bool,
    is_terminal: bool,
    last_line: Option<Instant>,
}

impl Display {
    /// Nothing shown yet.
    pub fn new(global: &Global) -> Self {
        let template = "{bar:24} {pos}/{len}  {msg}";
        Self {
            bar: progress::bar(global, 0, template),
            is_quiet: global.quiet,
            is_terminal: io::stderr().is_terminal(),
            last_line: None,
        }
    }

    /// Shows an event.
    pub fn show(&mut self, event: Event) {
        if self.is_quiet {
            return;
        }
        match event {
            Event::Update { record, steps, eta } => self.update(record, steps, eta),
            Event::Evaluation { record, is_best } => {
                self.line(&evaluation(record, is_best));
            }
            Event::Saved(path) => tracing::info!("checkpoint {}", path.display()),
        }
    }

    fn update(&mut self, record: &TrainRecord, steps: usize, eta: Duration) {
        let TrainRecord { step, loss, lr, tokens_per_second, .. } = record;
        let rate = count(*tokens_per_second as u64);
        let text = format!("loss {loss:.4}  lr {lr:.2e}  {rate} tokens/s  {} left", duration(eta));
        if self.is_terminal {
            self.bar.set_length(steps as u64);
            self.bar.set_position(*step as u64);
            self.bar.set_message(text);
            return;
        }
        let is_due = self.last_line.is_none_or(|last| last.elapsed() >= LOG_INTERVAL);
        if is_due || *step == steps {
            self.last_line = Some(Instant::now());
            self.line(&format!("update {step}/{steps}  {text}"));
        }
    }

    /// A line above the bar. That stderr is gone is no reason to stop training.
    fn line(&self, text: &str) {
        self.bar.suspend(|| {
            let _ = writeln!(io::stderr(), "{text}");
        });
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

fn evaluation(record: &EvaluationRecord, is_best: bool) -> String {
    let EvaluationRecord { step, nats_per_token, nats_per_byte, .. } = record;
    let best = if is_best { ", the best so far" } else { "" };
    format!(
        "evaluation after {step}: {nats_per_byte:.4} nats/byte, {nats_per_token:.4} nats/token{best}"
    )
}
