//! Updates and evaluations of a run on stderr.

use std::{
    io::{self, IsTerminal, Write},
    time::{Duration, Instant},
};

use bitnet_train::{
    dataset::{Progress, Stage},
    metrics::{EvaluationRecord, TrainRecord},
    samples::Sample,
    trainer::Event,
};
use indicatif::ProgressBar;

use crate::{
    args::Global,
    progress::{self, bytes, count, duration},
};

/// The bar of updates.
const TEMPLATE: &str = "{bar:24} {pos}/{len}  {msg}";

/// Without a terminal, time between two lines about updates.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

/// A bar on a terminal, else a line now and then.
pub struct Display {
    bar: ProgressBar,
    is_quiet: bool,
    is_terminal: bool,
    started: Instant,
    last_line: Option<Instant>,
}

impl Display {
    /// Nothing shown yet.
    pub fn new(global: &Global) -> Self {
        Self {
            bar: progress::bar(global, 0, TEMPLATE),
            is_quiet: global.quiet,
            is_terminal: io::stderr().is_terminal(),
            started: Instant::now(),
            last_line: None,
        }
    }

    /// Of the ranks of a job, the first one speaks.
    pub fn be_quiet_unless(&mut self, is_first: bool) {
        self.is_quiet |= !is_first;
    }

    /// Shows an event.
    pub fn show(&mut self, event: Event) {
        if self.is_quiet {
            return;
        }
        match event {
            Event::Data(progress) => self.data(progress),
            Event::Records(report) => self.line(&report.to_string()),
            Event::Update { record, steps, eta } => self.update(record, steps, eta),
            Event::Evaluation { record, is_best } => {
                self.line(&evaluation(record, is_best));
            }
            Event::Samples(samples) => samples.iter().for_each(|Sample { prompt, answer }| {
                self.line(&format!("  {prompt}\n    → {}", answer.replace('\n', "\n      ")));
            }),
            Event::Saved(path) => tracing::info!("checkpoint {}", path.display()),
        }
    }

    fn data(&mut self, Progress { stage, done, total }: Progress) {
        let purpose = match stage {
            Stage::Vocabulary => "reading for the vocabulary",
            Stage::Train => "encoding training text",
            Stage::Validation => "encoding held-out text",
        };
        let text = format!("{purpose}  {} of {}", bytes(done), bytes(total));
        if self.is_terminal {
            self.bar.set_style(progress::style("{bar:24} {percent}%  {msg}"));
            self.bar.set_length(total);
            self.bar.set_position(done);
            self.bar.set_message(text);
            return;
        }
        // A small corpus is not worth a line.
        if self.started.elapsed() >= LOG_INTERVAL
            && self.last_line.is_none_or(|last| last.elapsed() >= LOG_INTERVAL)
        {
            self.last_line = Some(Instant::now());
            self.line(&text);
        }
    }

    fn update(&mut self, record: &TrainRecord, steps: usize, eta: Duration) {
        let TrainRecord { step, loss, lr, tokens_per_second, .. } = record;
        let rate = count(*tokens_per_second as u64);
        let text = format!("loss {loss:.4}  lr {lr:.2e}  {rate} tokens/s  {} left", duration(eta));
        if self.is_terminal {
            self.bar.set_style(progress::style(TEMPLATE));
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
    let EvaluationRecord { step, nats_per_token, nats_per_byte, token_accuracy, .. } = record;
    let accuracy = token_accuracy
        .map_or_else(String::new, |share| format!(", {:.1} % of tokens", 100. * share));
    let best = if is_best { ", the best so far" } else { "" };
    format!(
        "evaluation after {step}: {nats_per_byte:.4} nats/byte, {nats_per_token:.4} nats/token{accuracy}{best}"
    )
}
