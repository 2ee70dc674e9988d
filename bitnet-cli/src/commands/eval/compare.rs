//! `--compare A B`: two finished runs on the same questions.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context, bail, ensure};
use bitnet_train::eval::{Metric, Paired, Sample, Task};
use serde_json::{Map, Value, json};

use super::{
    Args,
    chart::{Chart, Mark},
    items::sample,
    page::{Files, Page},
    report::{NOT_A_MEAN, is_drawn, label},
};
use crate::table::Table;

/// The fewest draws: of fewer, an interval of 95 % is uncertain in its second digit.
const LEAST_DRAWS: usize = 10_000;

/// A file of results, as `--output` writes it.
struct Kept {
    path: PathBuf,
    header: Value,
    /// By task and question.
    items: BTreeMap<(String, u64), Value>,
}

/// The figures of a task, compared.
struct Row {
    task: &'static Task,
    questions: usize,
    metrics: Vec<(Metric, Paired)>,
}

/// Compares, and prints.
pub fn run(files: &[PathBuf], reports: &Files, args: &Args) -> anyhow::Result<()> {
    let [a, b] = files else { bail!("--compare takes two runs") };
    let draws = args.bootstrap.unwrap_or(LEAST_DRAWS);
    ensure!(draws >= LEAST_DRAWS, "--bootstrap {draws}: give {LEAST_DRAWS} or more to compare");
    let (mut a, mut b) = (Kept::read(a)?, Kept::read(b)?);
    for kept in [&mut a, &mut b] {
        kept.keep(&args.tasks)?;
    }
    check_same(&a, &b)?;
    let rows = rows(&a, &b, draws, args.seed)?;
    let json = to_json((&a, &b), &rows, draws, args.seed);
    reports.write(&json, || page((&a, &b), &rows, draws, args.seed))?;
    let mut out = io::stdout().lock();
    match args.json {
        true => writeln!(out, "{json}")?,
        false => write!(out, "{}\n{}", settings(&a, &b).markdown(), table(&rows).markdown())?,
    }
    Ok(())
}

impl Kept {
    /// A file, or the only one in a folder.
    fn read(path: &Path) -> anyhow::Result<Self> {
        let path = if path.is_dir() { only_file(path)? } else { path.to_owned() };
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let Some(text) = text.strip_suffix('\n') else {
            bail!("{}: its last line is cut short: let that run finish first", path.display());
        };
        let mut lines = text.lines().enumerate().map(|(index, line)| {
            let value = serde_json::from_str::<Value>(line);
            anyhow::Ok((
                index + 1,
                value.with_context(|| format!("{}:{}", path.display(), index + 1))?,
            ))
        });
        let header = lines.next().transpose()?.filter(|(_, value)| is_header(value));
        let Some((_, header)) = header else {
            bail!("{}: is no file of results, as `bitnet eval --output` writes it", path.display());
        };
        let mut items = BTreeMap::new();
        for line in lines {
            let (number, value) = line?;
            let key = || Some((value["task"].as_str()?.to_owned(), value["item"].as_u64()?));
            let key = key().with_context(|| {
                format!("{}:{number}: is no result of a question", path.display())
            })?;
            items.insert(key, value);
        }
        Ok(Self { path, header, items })
    }

    /// Keeps the tasks that are asked for; all if none is named.
    fn keep(&mut self, tasks: &[String]) -> anyhow::Result<()> {
        for task in tasks {
            let has = self.items.keys().any(|(name, _)| name == task);
            ensure!(has, "{}: has no results of `{task}`", self.path.display());
        }
        self.items.retain(|(name, _), _| tasks.is_empty() || tasks.contains(name));
        ensure!(!self.items.is_empty(), "{}: holds no results", self.path.display());
        Ok(())
    }

    /// The values of a metric for all questions of a task, in order.
    fn samples(&self, task: &Task, metric: &Metric) -> anyhow::Result<Vec<Sample>> {
        let of = |((_, item), line): (&(String, u64), &Value)| {
            sample(line, metric).with_context(|| {
                let (path, name, key) = (self.path.display(), task.name, metric.key());
                format!("{path}: question {item} of {name} has no value of `{key}`")
            })
        };
        self.items.iter().filter(|((name, _), _)| name == task.name).map(of).collect()
    }
}

fn is_header(value: &Value) -> bool {
    value["bitnet_eval"] == 1
}

/// The file of results in a folder.
fn only_file(folder: &Path) -> anyhow::Result<PathBuf> {
    let name = || folder.display().to_string();
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).with_context(name)? {
        let path = entry.with_context(name)?.path();
        if path.extension().is_none_or(|extension| extension != "jsonl") {
            continue;
        }
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let first = text.lines().next().and_then(|line| serde_json::from_str(line).ok());
        found.extend(first.is_some_and(|value| is_header(&value)).then_some(path));
    }
    match &found[..] {
        [path] => Ok(path.clone()),
        [] => bail!("{}: holds no file of results, as `bitnet eval --output` writes it", name()),
        [one, other, ..] => bail!(
            "{}: holds several files of results, {} and {}: name one",
            name(),
            one.display(),
            other.display()
        ),
    }
}

/// Refuses runs that were not asked the same, and says in what they differ.
fn check_same(a: &Kept, b: &Kept) -> anyhow::Result<()> {
    for (one, other) in [(a, b), (b, a)] {
        let missing = one.items.keys().filter(|key| !other.items.contains_key(key));
        let missing = Vec::from_iter(missing);
        let Some((task, item)) = missing.first() else { continue };
        bail!(
            "question {item} of {task} and {} others are in {} but not in {}: finish that run, or name --tasks that both have",
            missing.len() - 1,
            one.path.display(),
            other.path.display()
        );
    }
    let is_other = |key: &&(String, u64)| a.items[*key]["asked"] != b.items[*key]["asked"];
    let others = Vec::from_iter(a.items.keys().filter(is_other));
    if let Some((task, item)) = others.first() {
        bail!(
            "question {item} of {task} and {} others were asked in other words in {} and {}: data, examples, seed or template \
             differ",
            others.len() - 1,
            a.path.display(),
            b.path.display()
        );
    }
    Ok(())
}

/// All figures of both, task by task.
fn rows(a: &Kept, b: &Kept, draws: usize, seed: u64) -> anyhow::Result<Vec<Row>> {
    let mut names = Vec::from_iter(a.items.keys().map(|(name, _)| name));
    names.dedup();
    let row = |name: &String| {
        let task = Task::by_name(name)?;
        let mut questions = 0;
        let metrics = task.metrics.iter().map(|metric| {
            let (a, b) = (a.samples(task, metric)?, b.samples(task, metric)?);
            questions = a.len();
            let paired = Paired::new(metric, &a, &b, draws, seed);
            Ok((*metric, paired.context("there are no questions")?))
        });
        let metrics = metrics.collect::<anyhow::Result<_>>()?;
        Ok(Row { task, questions, metrics })
    };
    names.into_iter().map(row).collect()
}

/// What is not the same in the two runs.
fn settings(a: &Kept, b: &Kept) -> Table {
    let mut table = Table::new("The runs", &["", "A", "B"], &[]);
    let paths = [&a.path, &b.path].map(|path| path.display().to_string());
    let mut row = |name: &str, [a, b]: [String; 2]| table.rows.push(vec![name.into(), a, b]);
    row("file", paths);
    for (name, value) in a.header.as_object().into_iter().flatten() {
        let other = &b.header[name];
        if value != other || name == "model" {
            let text = |value: &Value| value.as_str().map_or(value.to_string(), String::from);
            row(name, [text(value), text(other)]);
        }
    }
    table
}

fn table(rows: &[Row]) -> Table {
    let header =
        ["Tasks", "Questions", "Filter", "Metric", "", "A", "B", "B − A", "95 %", "p", "McNemar p"];
    let mut table = Table::new("B less A, question by question", &header, &[1, 5, 6, 7, 8, 9, 10]);
    for Row { task, questions, metrics } in rows {
        for (index, (metric, paired)) in metrics.iter().enumerate() {
            let once = |text: String| if index == 0 { text } else { String::new() };
            let (low, high) = paired.interval;
            let mcnemar = paired.discordant.map_or("N/A".into(), |found| p_value(found.p()));
            table.rows.push(vec![
                once(task.name.into()),
                once(questions.to_string()),
                metric.filter.into(),
                metric.name.into(),
                if metric.higher_is_better { "↑" } else { "↓" }.into(),
                format!("{:.4}", paired.a),
                format!("{:.4}", paired.b),
                format!("{:+.4}", paired.difference),
                format!("{low:+.4} … {high:+.4}"),
                p_value(paired.p),
                mcnemar,
            ]);
        }
    }
    table
}

fn p_value(p: f64) -> String {
    if p < 1e-4 { format!("{p:.0e}") } else { format!("{p:.4}") }
}

fn page((a, b): (&Kept, &Kept), rows: &[Row], draws: usize, seed: u64) -> Page {
    let all = rows.iter().flat_map(|row| row.metrics.iter().map(move |figure| (row.task, figure)));
    let drawn = all.filter(|(_, (metric, _))| is_drawn(metric));
    let marks = drawn.map(|(task, (metric, paired))| Mark {
        label: label(task.name, metric),
        value: paired.difference,
        interval: Some(paired.interval),
        reference: None,
    });
    let chart = Chart {
        title: "B less A, with 95 % intervals".into(),
        axis: "difference: right of 0, B has more".into(),
        marks: marks.collect(),
        span: Some((0., 0.)),
    };
    let charts = Vec::from_iter((!chart.marks.is_empty()).then_some(chart));
    let notes = vec![
        format!(
            "Intervals and p come of {draws} draws of the questions with what both models made of them (a paired bootstrap, seed \
             {seed}). McNemar's p is exact and looks at the questions that only one of the two has right. With many figures some are \
             small by chance: divide the limit by the number of figures."
        ),
        NOT_A_MEAN.into(),
    ];
    Page {
        title: "Two models on the same questions".into(),
        facts: Vec::new(),
        charts,
        tables: vec![settings(a, b), table(rows)],
        notes,
    }
}

fn to_json((a, b): (&Kept, &Kept), rows: &[Row], draws: usize, seed: u64) -> Value {
    let run = |kept: &Kept| json!({"file": kept.path, "config": kept.header});
    let figures = |row: &Row| {
        let figure = |(metric, paired): &(Metric, Paired)| {
            let discordant = paired.discordant.map(
                |found| json!({"only_a": found.only_a, "only_b": found.only_b, "p": found.p()}),
            );
            let value = json!({
                "a": paired.a, "b": paired.b, "difference": paired.difference, "stderr": paired.error,
                "interval": [paired.interval.0, paired.interval.1], "p": paired.p, "mcnemar": discordant,
            });
            (metric.key(), value)
        };
        (row.task.name.to_owned(), Value::Object(row.metrics.iter().map(figure).collect()))
    };
    let count = |row: &Row| (row.task.name.to_owned(), json!(row.questions));
    json!({
        "compare": {"a": run(a), "b": run(b)},
        "results": Map::from_iter(rows.iter().map(figures)),
        "n-samples": Map::from_iter(rows.iter().map(count)),
        "bootstrap": draws, "seed": seed,
    })
}
