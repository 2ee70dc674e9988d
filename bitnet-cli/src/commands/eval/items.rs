//! The results of the questions, and the file that keeps them.

use std::{
    fs::{File, OpenOptions},
    io::{ErrorKind, Read, Seek, SeekFrom, Write},
    num::NonZeroUsize,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail, ensure};
use bitnet_model::fingerprint::fingerprint;
use bitnet_train::eval::{Metric, Request, Response, Sample, tasks::Prepared};
use serde_json::{Map, Value, json};

use super::identity::Identity;

/// The values of all questions, as far as they are known.
pub struct Items<'a> {
    prepared: &'a [Prepared],
    /// By task and question, one a metric.
    values: Vec<Vec<Option<Vec<Sample>>>>,
    file: Option<(PathBuf, File)>,
    found: usize,
    /// Questions that did not fit the model, by task.
    cut: Vec<usize>,
}

impl<'a> Items<'a> {
    /// Those in the file at `path`, to which the others will be added. A last line that was cut short is written again.
    pub fn open(
        path: Option<&Path>,
        identity: &Identity,
        prepared: &'a [Prepared],
    ) -> anyhow::Result<Self> {
        let values = prepared.iter().map(|prepared| vec![None; prepared.items.len()]).collect();
        let cut = vec![0; prepared.len()];
        let mut items = Self { prepared, values, file: None, found: 0, cut };
        let Some(path) = path else { return Ok(items) };
        let name = || path.display().to_string();
        let mut options = OpenOptions::new();
        let mut file = match options.read(true).write(true).open(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                options.create_new(true).open(path).with_context(name)?
            }
            opened => opened.with_context(name)?,
        };
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).with_context(name)?;
        let whole = bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
        let text = str::from_utf8(&bytes[..whole]).with_context(name)?;
        let header = format!("{}\n", identity.header());
        let mut lines = text.lines().enumerate();
        match lines.next() {
            Some((_, first)) => check_header(first, &identity.header()).with_context(name)?,
            None => ensure!(
                header.as_bytes().starts_with(&bytes),
                "{}: is no file of results; choose another --output",
                name()
            ),
        }
        for (number, line) in lines {
            let at = || format!("{}:{}", path.display(), number + 1);
            items.read(line).with_context(at)?;
        }
        file.set_len(whole as u64).with_context(name)?;
        file.seek(SeekFrom::End(0)).with_context(name)?;
        if whole == 0 {
            file.write_all(header.as_bytes()).with_context(name)?;
        }
        items.file = Some((path.into(), file));
        Ok(items)
    }

    /// Takes a line of an earlier run. Tasks and questions that are not asked now are passed over.
    fn read(&mut self, line: &str) -> anyhow::Result<()> {
        let no_result = "is no result of a question; choose another --output";
        let value: Value = serde_json::from_str(line).context(no_result)?;
        let name = value["task"].as_str().context(no_result)?;
        let number = value["item"].as_u64().context(no_result)? as usize;
        let Some(task) = self.prepared.iter().position(|prepared| prepared.task.name == name)
        else {
            return Ok(());
        };
        let Some(item) = self.prepared[task].items.get(number) else { return Ok(()) };
        if value["asked"] != digest(&item.requests) {
            bail!(
                "question {number} of {name} was another one then: data, examples or template have changed; choose another --output"
            );
        }
        let metrics = self.prepared[task].task.metrics.iter();
        let values: Option<Vec<_>> = metrics.map(|metric| sample(&value, metric)).collect();
        let slot = &mut self.values[task][number];
        self.found += usize::from(slot.is_none());
        self.cut[task] += usize::from(slot.is_none() && is_cut(&value["cut"]));
        *slot = Some(values.context(no_result)?);
        Ok(())
    }

    /// Results that were there already.
    pub fn found(&self) -> usize {
        self.found
    }

    /// Questions of a task whose prompts were cut on the left, as they did not fit the model.
    pub fn cut(&self, task: usize) -> usize {
        self.cut[task]
    }

    /// The next questions of a task that have no result; `None` if all have.
    pub fn next(&self, task: usize, count: NonZeroUsize) -> Option<Vec<usize>> {
        let open = self.values[task].iter().enumerate().filter(|(_, values)| values.is_none());
        let open = Vec::from_iter(open.map(|(item, _)| item).take(count.get()));
        (!open.is_empty()).then_some(open)
    }

    /// Takes the responses to a question, with what else is to be kept of them.
    pub fn take(
        &mut self,
        task: usize,
        number: usize,
        responses: &[Response],
        notes: Map<String, Value>,
    ) -> anyhow::Result<()> {
        let Prepared { task: definition, items, .. } = &self.prepared[task];
        let item = &items[number];
        let values = definition.values(&item.document, responses)?;
        self.cut[task] += usize::from(notes.get("cut").is_some_and(is_cut));
        if let Some((path, file)) = &mut self.file {
            let pairs = definition
                .metrics
                .iter()
                .zip(&values)
                .map(|(metric, sample)| (metric.key(), json!([sample.value, sample.weight])));
            let mut line = json!({
                "task": definition.name, "item": number, "asked": digest(&item.requests),
                "values": Map::from_iter(pairs),
                "responses": Vec::from_iter(responses.iter().map(response)),
            });
            line.as_object_mut().into_iter().for_each(|line| line.extend(notes.clone()));
            // In one piece: whoever reads meanwhile sees whole lines.
            let line = format!("{line}\n");
            file.write_all(line.as_bytes()).with_context(|| path.display().to_string())?;
        }
        self.values[task][number] = Some(values);
        Ok(())
    }

    /// The values of a task's questions, in their order.
    pub fn values(&self, task: usize) -> Vec<&[Sample]> {
        self.values[task].iter().flatten().map(Vec::as_slice).collect()
    }
}

/// The value of a metric in a line about a question.
pub fn sample(line: &Value, metric: &Metric) -> Option<Sample> {
    let value = &line["values"][metric.key()];
    Some(Sample { value: value[0].as_f64()?, weight: value[1].as_f64()? })
}

fn is_cut(note: &Value) -> bool {
    note.as_bool().unwrap_or_default()
}

fn response(response: &Response) -> Value {
    match response {
        Response::LogLikelihood(sum, is_greedy) => json!([sum, is_greedy]),
        Response::Text(text) | Response::Program { text, .. } => json!(text),
    }
}

/// What tells questions apart.
fn digest(requests: &[Request]) -> String {
    fingerprint(format!("{requests:?}"))
}

/// Refuses a file of another model or of other settings.
fn check_header(line: &str, expected: &Value) -> anyhow::Result<()> {
    let found: Value = serde_json::from_str(line).unwrap_or_default();
    ensure!(
        found["bitnet_eval"] == expected["bitnet_eval"],
        "is no file of results; choose another --output"
    );
    for (name, value) in expected.as_object().into_iter().flatten() {
        ensure!(
            found[name] == *value,
            "its results are of another run: `{name}` was {} and is {value}; choose another --output",
            found[name]
        );
    }
    Ok(())
}
