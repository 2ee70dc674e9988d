//! What came out: the table of the harness, and JSON as it writes it.

use std::path::PathBuf;

use bitnet_train::eval::{Aggregation, Metric, Sample, tasks::Prepared};
use serde_json::{Map, Value, json};

use super::{
    chart::{Chart, Mark},
    page::Page,
    protocol::Protocol,
};
use crate::table::Table;

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

/// The figures, a row each.
pub fn table(results: &[Result]) -> Table {
    let header = ["Tasks", "Version", "Filter", "n-shot", "Metric", "", "Value", "", "Stderr"];
    let mut table = Table::new("Figures with their standard errors", &header, &[1, 3, 6, 8]);
    for result in results {
        let Result { name, version, shots, figures, .. } = result;
        for (index, Figure { metric, value, error }) in figures.iter().enumerate() {
            let once = |text: &str| if index == 0 { text.to_owned() } else { String::new() };
            let arrow = if metric.higher_is_better { "↑" } else { "↓" };
            let error = error.map_or("N/A".into(), |error| format!("{error:.4}"));
            table.rows.push(vec![
                once(name),
                once(version),
                metric.filter.into(),
                shots.to_string(),
                metric.name.into(),
                arrow.into(),
                format!("{value:.4}"),
                "±".into(),
                error,
            ]);
        }
    }
    table
}

/// Whether a figure is a part of 1, and so can be drawn beside others.
pub fn is_drawn(metric: &Metric) -> bool {
    metric.aggregation == Aggregation::Mean
}

/// What a figure is called beside its mark: with its filter only where there is one.
pub fn label(task: &str, metric: &Metric) -> String {
    match metric.filter {
        "none" => format!("{task} {}", metric.name),
        filter => format!("{task} {} {filter}", metric.name),
    }
}

/// What the pictures of reports leave out.
pub const NOT_A_MEAN: &str = "Perplexities and bits per byte have other scales and are in the table only. ↑: more is better, ↓: less is.";

/// The results to be read.
pub fn page(results: &[Result], config: &Value, protocol: Option<Protocol>, seconds: f64) -> Page {
    let mark = |result: &Result, figure: &Figure| {
        let Figure { metric, value, error } = figure;
        // 1.96 standard errors to both sides are 95 % of a normal distribution.
        let interval = error.map(|error| (value - 1.96 * error, value + 1.96 * error));
        let published = protocol.and_then(|protocol| protocol.published(result.name, metric));
        let label = label(result.name, metric);
        Mark { label, value: *value, interval, reference: published }
    };
    let all = results.iter().flat_map(|result| result.figures.iter().map(move |f| (result, f)));
    let drawn = all.filter(|(_, figure)| is_drawn(&figure.metric));
    let marks = Vec::from_iter(drawn.map(|(result, figure)| mark(result, figure)));
    let title = match protocol {
        Some(_) => "Right answers, with 95 % intervals; crosses: published",
        None => "Right answers, with 95 % intervals",
    };
    let axis = "part of the questions".into();
    let chart = Chart { title: title.into(), axis, marks, span: Some((0., 1.)) };
    let mut tables = vec![table(results)];
    tables.extend(protocol.map(|protocol| protocol.table(results)));
    let mut notes = vec![
        "Standard errors are of the drawing of questions: another set of as many would give a figure within two of them, nearly always."
            .to_owned(),
        NOT_A_MEAN.to_owned(),
    ];
    notes.extend(cut(results).lines().map(String::from));
    let text = |value: &Value| value.as_str().map_or(value.to_string(), String::from);
    let mut facts = Vec::from_iter(
        [
            "model",
            "adapters",
            "lm_head",
            "kv_cache",
            "fingerprint",
            "limit",
            "seed",
            "apply_chat_template",
        ]
        .into_iter()
        .filter(|name| !matches!(&config[*name], Value::Null))
        .map(|name| (name, text(&config[name]))),
    );
    facts.push(("program", concat!("bitnet ", env!("CARGO_PKG_VERSION")).into()));
    facts.push(("seconds", format!("{seconds:.1}")));
    Page {
        title: format!("Evaluation of {}", text(&config["model"])),
        facts,
        charts: Vec::from_iter((!chart.marks.is_empty()).then_some(chart)),
        tables,
        notes,
    }
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
