//! A report as text: aligned for a terminal, in Markdown, or as CSV.

use std::fmt::Write;

use super::report::{Report, Row};
use crate::{
    limits::Limits,
    progress::{bytes, count},
    statistics::Bytes,
};

/// What stands for a value that is not known.
const ABSENT: &str = "–";

/// Rows under a heading; the first column is text, the others are numbers.
struct Table {
    heading: Vec<&'static str>,
    rows: Vec<Vec<String>>,
}

impl Table {
    fn plain(&self) -> String {
        let length = |text: &str| text.chars().count();
        let width = |column: usize| {
            let cells = self.rows.iter().map(|row| length(&row[column]));
            cells.max().unwrap_or(0).max(length(self.heading[column]))
        };
        let widths: Vec<usize> = (0..self.heading.len()).map(width).collect();
        let line = |cells: &mut dyn Iterator<Item = &str>| {
            let cells =
                cells.zip(&widths).enumerate().map(|(column, (cell, &width))| match column {
                    0 => format!("{cell:width$}"),
                    _ => format!("{cell:>width$}"),
                });
            cells.collect::<Vec<_>>().join("  ").trim_end().to_owned() + "\n"
        };
        let mut text = line(&mut self.heading.iter().copied());
        for row in &self.rows {
            text += &line(&mut row.iter().map(String::as_str));
        }
        text
    }

    fn markdown(&self) -> String {
        let mut text = format!("| {} |\n|---|", self.heading.join(" | "));
        text += &"---:|".repeat(self.heading.len() - 1);
        text.push('\n');
        for row in &self.rows {
            _ = writeln!(text, "| {} |", row.join(" | "));
        }
        text
    }
}

/// For a terminal.
pub fn plain(report: &Report) -> String {
    let mut text = summary(report).join("\n") + "\n";
    for table in tables(report) {
        text += "\n";
        text += &table.plain();
    }
    text += "\n";
    closing(report).iter().for_each(|line| _ = writeln!(text, "{line}"));
    text
}

/// In Markdown.
pub fn markdown(report: &Report) -> String {
    let mut text = String::new();
    summary(report).iter().for_each(|line| _ = writeln!(text, "- {line}"));
    for table in tables(report) {
        text += "\n";
        text += &table.markdown();
    }
    text += "\n";
    closing(report).iter().for_each(|line| _ = writeln!(text, "- {line}"));
    text
}

fn tables(report: &Report) -> impl Iterator<Item = Table> {
    let limits = (!report.limits.is_empty()).then(|| limits(report));
    limits.into_iter().chain([results(report)]).chain(ratios(report))
}

/// A line for each test; what is not known is empty.
pub fn csv(report: &Report) -> String {
    let mut text = String::from(
        "model,kernel,lm_head,kv_cache,test,threads,batch,tokens_per_second,spread,samples,limit,\
         limit_tokens_per_second,limit_fraction,bytes_per_token,rescored_rows,peak_rss_bytes,\
         kv_cache_bytes,joules_per_token\n",
    );
    for row in &report.results {
        let samples: Vec<String> = row.samples.iter().map(f64::to_string).collect();
        let optional =
            |value: Option<f64>| value.map(|value| value.to_string()).unwrap_or_default();
        let cells = [
            quoted(&report.model.name),
            report.kernel.into(),
            report.lm_head.into(),
            report.kv_cache.into(),
            row.test.clone(),
            row.threads.to_string(),
            row.batch.to_string(),
            row.tokens_per_second.to_string(),
            row.spread.to_string(),
            samples.join(" "),
            row.limit.unwrap_or_default().into(),
            optional(row.limit_tokens_per_second),
            optional(row.limit_fraction),
            optional(row.bytes_per_token),
            optional(row.rescored_rows),
            row.peak_rss_bytes.map(|bytes| bytes.to_string()).unwrap_or_default(),
            row.kv_cache_bytes.to_string(),
            optional(row.joules_per_token),
        ];
        text += &cells.join(",");
        text.push('\n');
    }
    text
}

/// A field of CSV, quoted if it must be (RFC 4180).
fn quoted(field: &str) -> String {
    match field.contains([',', '"', '\n', '\r']) {
        true => format!("\"{}\"", field.replace('"', "\"\"")),
        false => field.to_owned(),
    }
}

/// What was measured.
fn summary(report: &Report) -> Vec<String> {
    let machine = &report.machine;
    let mut lines = vec![format!(
        "bitnet {}, {}: {} parameters; device {}, kernel {}, head {}, keys and values {}",
        report.bitnet,
        report.model.name,
        count(report.model.parameters),
        report.device,
        report.kernel,
        report.lm_head,
        report.kv_cache,
    )];
    let memory = machine.memory_bytes.map(|bytes| format!(", {}", Bytes(bytes)));
    let pages = machine.huge_pages.as_ref().map(|when| format!(", huge pages {when}"));
    let load = machine.load_average.map(|load| format!(", load {load}"));
    lines.push(format!(
        "{}, {} processors{}, {}{}{}",
        machine.processor.as_deref().unwrap_or("unknown processor"),
        machine.processors,
        memory.unwrap_or_default(),
        machine.system,
        pages.unwrap_or_default(),
        load.unwrap_or_default(),
    ));
    lines
}

fn limits(report: &Report) -> Table {
    let giga = |value: f64| format!("{:.1}", value * 1e-9);
    let row = |limits: &Limits| {
        vec![
            limits.threads.to_string(),
            giga(limits.read_large_pages),
            giga(limits.read_small_pages),
            giga(limits.multiply),
            giga(limits.cached_ternary),
            giga(limits.streamed_ternary),
        ]
    };
    Table {
        heading: vec![
            "threads",
            "GB/s, 2 MiB pages",
            "GB/s, 4 KiB pages",
            "G products/s",
            "G weights/s, cached",
            "G weights/s, memory",
        ],
        rows: report.limits.iter().map(row).collect(),
    }
}

fn results(report: &Report) -> Table {
    let mut heading = vec![
        "test",
        "threads",
        "batch",
        "tokens/s",
        "spread",
        "limit",
        "allows",
        "reached",
        "read a token",
        "peak RSS",
    ];
    let with_energy = report.energy_unavailable.is_none();
    heading.extend(with_energy.then_some("J a token"));
    let absent = || ABSENT.to_owned();
    let row = |row: &Row| {
        let mut cells = vec![
            row.test.clone(),
            row.threads.to_string(),
            row.batch.to_string(),
            rate(row.tokens_per_second),
            percent(row.spread),
            row.limit.unwrap_or(ABSENT).to_owned(),
            row.limit_tokens_per_second.map_or_else(absent, rate),
            row.limit_fraction.map_or_else(absent, percent),
            row.bytes_per_token.map_or_else(absent, |size| bytes(size as u64)),
            row.peak_rss_bytes.map_or_else(absent, |size| Bytes(size).to_string()),
        ];
        cells.extend(with_energy.then(|| match row.joules_per_token {
            Some(joules) => format!("{joules:.3}"),
            None => absent(),
        }));
        cells
    };
    Table { heading, rows: report.results.iter().map(row).collect() }
}

fn ratios(report: &Report) -> Option<Table> {
    let comparison = report.comparison.as_ref()?;
    let rows = comparison.ratios.iter().map(|ratio| {
        vec![
            ratio.test.clone(),
            ratio.threads.to_string(),
            ratio.batch.to_string(),
            rate(ratio.old),
            rate(ratio.new),
            format!("{:.3}", ratio.ratio),
        ]
    });
    Some(Table {
        heading: vec!["test", "threads", "batch", "before", "now", "now / before"],
        rows: rows.collect(),
    })
}

/// What is true of the whole run.
fn closing(report: &Report) -> Vec<String> {
    let mut lines = vec![format!(
        "load {:.2} s, first token after {:.2} s",
        report.load_seconds, report.first_token_seconds
    )];
    if let Some(peak) = report.peak_rss_bytes {
        let cache = Bytes(report.kv_cache_bytes as u64);
        let mut line = format!("peak RSS {}, of which keys and values {cache}", Bytes(peak));
        if let Some(limit) = report.memory_limit_bytes {
            let within = if peak <= limit { "within" } else { "above" };
            _ = write!(line, "; {within} the preset's {}", Bytes(limit));
        }
        lines.push(line);
    }
    if let Some(rows) = report.results.iter().filter_map(|row| row.rescored_rows).reduce(f64::max) {
        lines.push(format!("at most {rows:.1} rows of the head multiplied again for a token"));
    }
    lines.push(match &report.energy_unavailable {
        Some(reason) => format!("energy was not measured: {reason}"),
        None => "energy is that of the processor packages, other programs included".into(),
    });
    if let Some(comparison) = &report.comparison {
        for difference in &comparison.differences {
            lines.push(format!("the earlier run differs: {difference}"));
        }
        for (tests, which) in
            [(&comparison.only_new, "this"), (&comparison.only_old, "the earlier")]
        {
            if !tests.is_empty() {
                lines.push(format!("only in {which} run: {}", tests.join(", ")));
            }
        }
    }
    if report.interrupted {
        lines.push("interrupted: some tests or samples are missing".into());
    }
    lines
}

/// Tokens a second.
fn rate(value: f64) -> String {
    match value {
        v if v < 100. => format!("{v:.2}"),
        v if v < 10_000. => format!("{v:.1}"),
        v => format!("{v:.0}"),
    }
}

fn percent(part: f64) -> String {
    format!("{:.1} %", 100. * part)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_aligned() {
        let table = Table {
            heading: vec!["test", "n"],
            rows: vec![vec!["pp512".into(), "2".into()], vec!["tg1".into(), ABSENT.into()]],
        };
        assert_eq!(table.plain(), "test   n\npp512  2\ntg1    –\n");
        assert_eq!(table.markdown(), "| test | n |\n|---|---:|\n| pp512 | 2 |\n| tg1 | – |\n");
    }

    #[test]
    fn fields_of_csv() {
        assert_eq!(quoted("org/name"), "org/name");
        assert_eq!(quoted("a,\"b\""), "\"a,\"\"b\"\"\"");
        assert_eq!((rate(33.456).as_str(), rate(123.44).as_str()), ("33.46", "123.4"));
        assert_eq!(percent(0.0123), "1.2 %");
    }
}
