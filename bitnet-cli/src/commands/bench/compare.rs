//! `--compare`: this run beside an earlier one.

use std::{fs, path::Path};

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};

use super::report::{FORMAT, Report, VERSION};

/// What matters of an earlier report.
#[derive(Debug, Deserialize)]
pub struct Old {
    format: String,
    version: u32,
    model: OldModel,
    kernel: String,
    lm_head: String,
    kv_cache: String,
    results: Vec<OldRow>,
}

#[derive(Debug, Deserialize)]
struct OldModel {
    name: String,
}

#[derive(Debug, Deserialize)]
struct OldRow {
    test: String,
    threads: usize,
    batch: usize,
    tokens_per_second: f64,
}

/// This run beside an earlier one.
#[derive(Debug, Serialize)]
pub struct Comparison {
    /// Settings that differ, in words.
    pub differences: Vec<String>,
    /// Tests of both.
    pub ratios: Vec<Ratio>,
    /// Tests of this run alone.
    pub only_new: Vec<String>,
    /// Tests of the earlier run alone.
    pub only_old: Vec<String>,
}

/// A test of both runs.
#[derive(Debug, Serialize)]
pub struct Ratio {
    /// As in the results.
    pub test: String,
    /// Threads.
    pub threads: usize,
    /// Sequences at once.
    pub batch: usize,
    /// Tokens a second of the earlier run.
    pub old: f64,
    /// Tokens a second of this run.
    pub new: f64,
    /// `new / old`.
    pub ratio: f64,
}

/// Reads a report.
///
/// # Errors
/// Another file.
pub fn read(path: &Path) -> anyhow::Result<Old> {
    let name = path.display();
    let text = fs::read_to_string(path).with_context(|| format!("--compare {name}"))?;
    let value: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
    if value["format"] != FORMAT {
        bail!("--compare {name}: is no report of `bitnet bench --json`");
    }
    let old: Old = serde_json::from_value(value)
        .with_context(|| format!("--compare {name}: is a damaged report"))?;
    if (old.format.as_str(), old.version) != (FORMAT, VERSION) {
        let version = old.version;
        bail!(
            "--compare {name}: is a report of version {version}, not {VERSION}: measure it again"
        );
    }
    Ok(old)
}

impl Comparison {
    /// Of tests with the same name, threads and batch.
    pub fn new(report: &Report, old: &Old) -> Self {
        let settings = [
            ("model", &*old.model.name, &*report.model.name),
            ("kernel", &*old.kernel, report.kernel),
            ("head", &*old.lm_head, report.lm_head),
            ("keys and values", &*old.kv_cache, report.kv_cache),
        ];
        let differences = settings.into_iter().filter(|(_, old, new)| old != new);
        let differences = differences.map(|(what, old, new)| format!("{what} {old}, now {new}"));
        let mut ratios = Vec::new();
        let mut only_new = Vec::new();
        for row in &report.results {
            let key = (&row.test, row.threads, row.batch);
            match old.results.iter().find(|old| (&old.test, old.threads, old.batch) == key) {
                Some(old) => ratios.push(Ratio {
                    test: row.test.clone(),
                    threads: row.threads,
                    batch: row.batch,
                    old: old.tokens_per_second,
                    new: row.tokens_per_second,
                    ratio: row.tokens_per_second / old.tokens_per_second,
                }),
                None => only_new.push(in_words(&row.test, row.threads, row.batch)),
            }
        }
        let is_new = |old: &&OldRow| {
            let key = (&old.test, old.threads, old.batch);
            report.results.iter().any(|row| (&row.test, row.threads, row.batch) == key)
        };
        let only_old = old.results.iter().filter(|old| !is_new(old));
        Self {
            differences: differences.collect(),
            ratios,
            only_new,
            only_old: only_old.map(|old| in_words(&old.test, old.threads, old.batch)).collect(),
        }
    }
}

fn in_words(test: &str, threads: usize, batch: usize) -> String {
    format!("{test} ({threads} threads, batch {batch})")
}
