//! Asking as a publication did, with its figures beside. The technical report of BitNet b1.58 2B4T (arXiv:2504.12285, table 1)
//! names shots and metrics; what it does not say (version of the prompts, longest answer) is as in the harness.

use bitnet_train::eval::{Metric, metric::PASS_AT_1};
use clap::ValueEnum;
use serde_json::{Value, json};

use super::report::Result;
use crate::table::Table;

/// Whose way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Protocol {
    /// BitNet b1.58 2B4T Technical Report
    Report,
}

/// A benchmark of the publication.
pub struct Asked {
    label: &'static str,
    /// The task here.
    pub name: &'static str,
    /// Examples before a question.
    pub shots: usize,
    /// Whether in a conversation.
    pub chat: bool,
    metric: &'static str,
    filter: &'static str,
    /// In percent.
    published: f64,
}

const REPORT: [Asked; 6] = [
    ARC_CHALLENGE,
    Asked { label: "BoolQ", name: "boolq", metric: "acc", published: 80.18, ..ARC_CHALLENGE },
    Asked {
        label: "WinoGrande",
        name: "winogrande",
        metric: "acc",
        published: 71.90,
        ..ARC_CHALLENGE
    },
    Asked {
        label: "GSM8K",
        name: "gsm8k",
        shots: 4,
        chat: true,
        metric: "exact_match",
        filter: "flexible-extract",
        published: 58.38,
    },
    Asked {
        label: "MATH-500",
        name: "minerva_math500",
        shots: 0,
        chat: true,
        metric: "exact_match",
        filter: "boxed",
        published: 43.40,
    },
    Asked {
        label: "HumanEval+",
        name: "humaneval_plus",
        metric: "pass@1",
        filter: "create_test",
        published: 38.40,
        ..ARC_CHALLENGE
    },
];
const ARC_CHALLENGE: Asked = Asked {
    label: "ARC-Challenge",
    name: "arc_challenge",
    shots: 0,
    chat: false,
    metric: "acc_norm",
    filter: "none",
    published: 49.91,
};

impl Asked {
    /// Whether programs run that the model writes.
    pub fn runs_programs(&self) -> bool {
        self.metric == PASS_AT_1.name
    }
}

impl Protocol {
    /// What is asked.
    pub fn tasks(self) -> impl Iterator<Item = &'static Asked> {
        match self {
            Self::Report => REPORT.iter(),
        }
    }

    /// What was published of a task, as a part of 1.
    pub fn published(self, task: &str, metric: &Metric) -> Option<f64> {
        let key = (task, metric.name, metric.filter);
        let asked = self.tasks().find(|asked| (asked.name, asked.metric, asked.filter) == key);
        asked.map(|asked| asked.published / 100.)
    }

    /// Ours in percent, where there is one.
    fn ours(results: &[Result], asked: &Asked) -> Option<f64> {
        let figure = |result: &Result| {
            Some(100. * result.figure(asked.name, asked.metric, asked.filter)?.value)
        };
        results.iter().find_map(figure)
    }

    /// Both figures side by side, in percent.
    pub fn table(self, results: &[Result]) -> Table {
        let header = ["Benchmark", "n-shot", "Metric", "Here", "2B4T, published"];
        let mut table = Table::new("Beside the published figures, in percent", &header, &[3, 4]);
        for asked in self.tasks() {
            let ours = Self::ours(results, asked);
            let ours = ours.map_or("not run".into(), |ours| format!("{ours:.2}"));
            let how = if asked.chat { ", chat" } else { "" };
            table.rows.push(vec![
                asked.label.into(),
                format!("{}{how}", asked.shots),
                asked.metric.into(),
                ours,
                format!("{:.2}", asked.published),
            ]);
        }
        table
    }

    /// The same as JSON, in percent.
    pub fn json(self, results: &[Result]) -> Value {
        let figures = self.tasks().map(|asked| {
            let ours = Self::ours(results, asked);
            json!({"benchmark": asked.label, "here": ours, "published": asked.published})
        });
        figures.collect()
    }
}
