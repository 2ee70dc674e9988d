//! The tasks, one file a family.

mod choice;
mod gsm8k;
mod hellaswag;
pub mod humaneval;
mod lambada;
mod math;
mod math_answer;
mod wikitext;

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{
    Ask, Document, Metric, Request, Response, Sample,
    data::{DataSource, TaskData},
    few_shot::Drawer,
    metric::{ACC, ACC_NORM},
    records::{self, Record},
    request::requests,
};
use crate::{Error, Result};
use bitnet_model::text::ChatTemplate;

/// A benchmark.
pub struct Task {
    /// As the harness calls it.
    pub name: &'static str,
    /// Of its definition there.
    pub version: &'static str,
    /// Where its questions and examples are.
    pub data: TaskData,
    /// Examples before a question, if nothing else is said.
    pub shots: usize,
    /// Where these come from.
    pub examples: Examples,
    /// What is found out.
    pub metrics: &'static [Metric],
    /// Strings that end a written answer.
    pub until: &'static [&'static str],
    /// The most tokens of one, if nothing else is said.
    pub answer_tokens: usize,
    /// Whether programs run that a model has written.
    pub runs_programs: bool,
    /// Makes a document of a record.
    read: fn(&Record<'_>) -> Result<Document>,
    /// Makes records of plain text.
    pages: Option<fn(&str) -> Vec<Value>>,
    /// The values of a written answer, in the order of the metrics.
    judge: fn(answer: &str, target: &str) -> Vec<f64>,
}

/// Where examples come from.
#[derive(Clone, Copy)]
pub enum Examples {
    /// Drawn from a file of training records.
    Drawn {
        /// Whether a document is no example of itself ([`Drawer`]).
        leaves_out: bool,
    },
    /// Drawn from the questions themselves, as the harness does if there is nothing else.
    Own,
    /// The first of a file of training records, always the same.
    First,
    /// There are none.
    None,
}

/// All of them.
pub const TASKS: [&Task; 11] = [
    &choice::ARC_EASY,
    &choice::ARC_CHALLENGE,
    &choice::BOOLQ,
    &choice::WINOGRANDE,
    &choice::PIQA,
    &hellaswag::HELLASWAG,
    &lambada::LAMBADA,
    &wikitext::WIKITEXT,
    &gsm8k::GSM8K,
    &math::MATH500,
    &humaneval::HUMANEVAL_PLUS,
];

/// The harness' limit of an answer, where a task names no other.
const ANSWER_TOKENS: usize = 256;

/// A task with all that is asked for it.
pub struct Prepared {
    /// Which one.
    pub task: &'static Task,
    /// Examples before each question.
    pub shots: usize,
    /// The data.
    pub file: PathBuf,
    /// What is asked, in order.
    pub items: Vec<Item>,
}

/// A document, and the requests that come of it.
pub struct Item {
    /// The question.
    pub document: Document,
    /// What a model is asked.
    pub requests: Vec<Request>,
}

/// How to ask.
#[derive(Clone, Copy, Debug)]
pub struct Asking<'a> {
    /// Where data files are looked for, in this order.
    pub sources: &'a [DataSource],
    /// Examples before a question; what the task says if it is `None`.
    pub shots: Option<usize>,
    /// Of the drawing of examples.
    pub seed: u64,
    /// The most documents.
    pub limit: Option<usize>,
    /// Asks in a conversation.
    pub template: Option<&'a ChatTemplate>,
}

impl Task {
    /// The task of this name.
    ///
    /// # Errors
    /// There is none.
    pub fn by_name(name: &str) -> Result<&'static Self> {
        if let Some(task) = TASKS.into_iter().find(|task| task.name == name) {
            return Ok(task);
        }
        let names = TASKS.map(|task| task.name).join(", ");
        Err(Error::Input(format!("`{name}` is no task; there are {names}")))
    }

    /// Reads the data and makes the requests.
    ///
    /// # Errors
    /// Files that are missing or hold something else, and too few examples.
    pub fn prepare(&'static self, asking: &Asking<'_>) -> Result<Prepared> {
        let shots = asking.shots.unwrap_or(self.shots);
        let file = self.data.test_file(asking.sources)?;
        let mut documents = self.documents(&file)?;
        let (mut pool, mut drawer) = (Vec::new(), None);
        match self.examples {
            _ if shots == 0 => {}
            Examples::Drawn { leaves_out } => {
                pool = self.documents(&self.data.train_file(asking.sources)?)?;
                drawer = Some(Drawer::new(&pool, asking.seed, leaves_out));
            }
            Examples::Own => {
                pool = documents.clone();
                drawer = Some(Drawer::new(&pool, asking.seed, false));
            }
            Examples::First => {
                pool = self.documents(&self.data.train_file(asking.sources)?)?;
            }
            Examples::None => {
                return Err(Error::Input(format!("{} has no examples: ask it alone", self.name)));
            }
        }
        if drawer.is_none() && shots > pool.len() {
            let (name, len) = (self.name, pool.len());
            return Err(Error::Input(format!("{name} has {len} examples, not {shots}")));
        }
        documents.truncate(asking.limit.unwrap_or(usize::MAX));
        let items = documents.into_iter().map(|document| {
            let examples = match &mut drawer {
                Some(drawer) => drawer.draw(shots, &document)?,
                None => Vec::from_iter(&pool[..shots]),
            };
            Ok(Item { requests: requests(&document, &examples, asking.template)?, document })
        });
        let items = items.collect::<Result<_>>()?;
        Ok(Prepared { task: self, shots, file, items })
    }

    fn documents(&self, path: &Path) -> Result<Vec<Document>> {
        records::read(path, self.pages, self.read)
    }

    /// The values of a document, in the order of the metrics.
    ///
    /// # Errors
    /// Responses that do not answer what was asked.
    pub fn values(&self, document: &Document, responses: &[Response]) -> Result<Vec<Sample>> {
        let wrong = || Error::Input(format!("{}: responses to something else", self.name));
        if let Ask::Written { target } = &document.ask {
            let [Response::Text(answer)] = responses else { return Err(wrong()) };
            return Ok((self.judge)(answer, target).into_iter().map(Sample::of).collect());
        }
        if let Ask::Program { .. } = &document.ask {
            let [Response::Program { passed, .. }] = responses else { return Err(wrong()) };
            return Ok(vec![Sample::of(f64::from(u8::from(*passed)))]);
        }
        let scores = responses.iter().map(|response| match response {
            Response::LogLikelihood(sum, is_greedy) => Ok((*sum, *is_greedy)),
            Response::Text(_) | Response::Program { .. } => Err(wrong()),
        });
        let scores = scores.collect::<Result<Vec<_>>>()?;
        let (choices, gold) = match (&document.ask, &scores[..]) {
            (Ask::Choices { choices, gold }, _) => (choices, *gold),
            (Ask::Contexts { contexts, gold }, _) => (contexts, *gold),
            (Ask::Ending, &[(sum, is_greedy)]) => return Ok(lambada::values(sum, is_greedy)),
            (&Ask::Page { words, bytes }, &[(sum, _)]) => {
                return Ok(wikitext::values(sum, words, bytes));
            }
            _ => return Err(wrong()),
        };
        if scores.len() != choices.len() {
            return Err(wrong());
        }
        let sums = Vec::from_iter(scores.iter().map(|(sum, _)| *sum));
        Ok(choice::values(self.metrics, choices, gold, &sums))
    }
}

/// The values of tasks in which nothing is written.
fn nothing_written(_: &str, _: &str) -> Vec<f64> {
    Vec::new()
}
