//! What came out: the table of the harness, and JSON as it writes it.

use std::path::PathBuf;

use bitnet_train::eval::{Metric, Sample, tasks::Prepared};
use serde_json::{Map, Value, json};

use super::protocol::Protocol;

/// The figures of a task.
pub struct Result {
    name: &'static str,
    version: &'static str,
    shots: usize,
    questions: usize,
    /// Of these, those that did not fit the model.
    cut: usize,
    file: PathBuf,
    figures: Vec<Figure>,
}

/// A figure, and its standard error if there is one.
pub struct Figure {
    /// What it is.
    pub metric: Metric,
    /// How much.
    pub value: f64,
    /// How sure.
    pub error: Option<f64>,
}

impl Result {
    /// Of the values of all questions, one a metric.
    pub fn new(prepared: &Prepared, values: Vec<&[Sample]>, cut: usize, bootstrap: usize) -> Self {
        let figure = |(index, metric): (usize, &Metric)| {
            let samples = Vec::from_iter(values.iter().map(|values| values[index]));
            let error = metric.standard_error(&samples, bootstrap);
            Figure { metric: *metric, value: metric.value(&samples), error }
        };
        let Prepared { task, shots, file, .. } = prepared;
        let figures = task.metrics.iter().enumerate().map(figure).collect();
        let questions = values.len();
        let (name, version, shots, file) = (task.name, task.version, *shots, file.clone());
        Self { name, version, shots, questions, cut, file, figures }
    }

    /// The figure of this metric.
    pub fn figure(&self, task: &str, metric: &str, filter: &str) -> Option<&Figure> {
        let is_it =
            |figure: &&Figure| (figure.metric.name, figure.metric.filter) == (metric, filter);
        self.figures.iter().filter(|_| self.name == task).find(is_it)
    }
}

/// Says which figures are of questions that did not fit; nothing if all did.
pub fn cut(results: &[Result]) -> String {
    let cut = results.iter().filter(|result| result.cut > 0);
    let line = |Result { name, questions, cut, .. }: &Result| {
        format!(
            "{name}: {cut} of {questions} questions did not fit the model's context and were cut on the left\n"
        )
    };
    cut.map(line).collect()
}

/// The results in Markdown.
pub fn table(results: &[Result]) -> String {
    let header = ["Tasks", "Version", "Filter", "n-shot", "Metric", "", "Value", "", "Stderr"]
        .map(String::from);
    let mut rows = vec![header];
    for result in results {
        let Result { name, version, shots, figures, .. } = result;
        for (index, Figure { metric, value, error }) in figures.iter().enumerate() {
            let once = |text: &str| if index == 0 { text.to_owned() } else { String::new() };
            let arrow = if metric.higher_is_better { "↑" } else { "↓" };
            let error = error.map_or("N/A".into(), |error| format!("{error:.4}"));
            let (filter, shots) = (metric.filter.into(), shots.to_string());
            let (metric, value) = (metric.name.into(), format!("{value:.4}"));
            let (name, version) = (once(name), once(version));
            rows.push([
                name,
                version,
                filter,
                shots,
                metric,
                arrow.into(),
                value,
                "±".into(),
                error,
            ]);
        }
    }
    markdown(&rows, &[1, 3, 6, 8])
}

/// A table whose first row is the header; the columns `numbers` are flush right.
pub fn markdown<const N: usize>(rows: &[[String; N]], numbers: &[usize]) -> String {
    let width =
        |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; N] = std::array::from_fn(|column| width(column).max(3));
    let mut text = String::new();
    for (number, row) in rows.iter().enumerate() {
        text.push('|');
        for (column, cell) in row.iter().enumerate() {
            let width = widths[column];
            text += &match (number, numbers.contains(&column)) {
                (0, _) => format!("{cell:^width$}|"),
                (_, true) => format!("{cell:>width$}|"),
                (_, false) => format!("{cell:<width$}|"),
            };
        }
        text.push('\n');
        if number == 0 {
            text.push('|');
            for (column, width) in widths.iter().enumerate() {
                let (dashes, right) = (width - 1, numbers.contains(&column));
                text += &format!("{}{}|", "-".repeat(dashes), if right { ":" } else { "-" });
            }
            text.push('\n');
        }
    }
    text
}

/// The object of `--json`.
pub fn json(results: &[Result], config: Value, protocol: Option<Protocol>, seconds: f64) -> Value {
    let by_name = |value: fn(&Result) -> Value| -> Map<String, Value> {
        results.iter().map(|result| (result.name.to_owned(), value(result))).collect()
    };
    let mut object = json!({
        "results": by_name(|result| {
            let mut object = Map::from_iter([("alias".to_owned(), json!(result.name))]);
            for Figure { metric: Metric { name, filter, .. }, value, error } in &result.figures {
                object.insert(format!("{name},{filter}"), json!(value));
                let error = error.map_or(json!("N/A"), |error| json!(error));
                object.insert(format!("{name}_stderr,{filter}"), error);
            }
            Value::Object(object)
        }),
        "versions": by_name(|result| json!(result.version)),
        "n-shot": by_name(|result| json!(result.shots)),
        "n-samples": by_name(|result| json!({"effective": result.questions, "cut": result.cut})),
        "data": by_name(|result| json!(result.file)),
        "config": config,
        "seconds": seconds,
    });
    if let Some(protocol) = protocol {
        object["published"] = protocol.json(results);
    }
    object
}
