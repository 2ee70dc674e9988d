//! What the metrics of runs hold, as curves by name.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use bitnet_train::metrics::{self, Record};

/// What the horizontal axis counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum XAxis {
    /// Updates
    Updates,
    /// Tokens trained on
    Tokens,
}

impl XAxis {
    /// Its label.
    pub fn label(self) -> &'static str {
        match self {
            Self::Updates => "updates",
            Self::Tokens => "tokens",
        }
    }
}

/// The curves of one run.
pub struct Run {
    /// For the legend.
    pub name: String,
    /// Points (x, y) by the name of the number, such as `train/loss`.
    pub curves: BTreeMap<String, Vec<(f64, f64)>>,
}

/// Reads runs, each a folder with metrics or a metrics file. Their names are those of the folders; of several alike,
/// the paths as they were given.
///
/// # Errors
/// Files that cannot be read, or hold nothing.
pub fn read(paths: &[PathBuf], x_axis: XAxis) -> anyhow::Result<Vec<Run>> {
    let names: Vec<String> = paths.iter().map(|path| name(path)).collect();
    let are_unique = names.iter().collect::<HashSet<_>>().len() == names.len();
    let run = |(path, name): (&PathBuf, String)| {
        let name = if are_unique { name } else { path.display().to_string() };
        Ok(Run { name, curves: curves(path, x_axis)? })
    };
    paths.iter().zip(names).map(run).collect()
}

/// The last folder of the path.
fn name(path: &Path) -> String {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let folder = if path.is_file() { path.parent().unwrap_or(&path) } else { &path };
    folder.file_name().unwrap_or(folder.as_os_str()).to_string_lossy().into_owned()
}

fn curves(path: &Path, x_axis: XAxis) -> anyhow::Result<BTreeMap<String, Vec<(f64, f64)>>> {
    let file = if path.is_dir() { path.join(metrics::FILE) } else { path.to_owned() };
    let records = metrics::read(&file).with_context(|| {
        let what = if path.is_dir() { "is no folder of a run" } else { "is no metrics file" };
        format!("{} {what}", path.display())
    })?;
    if records.is_empty() {
        bail!("{}: holds no record; the run has not made an update yet", file.display());
    }
    let tokens = records.iter().filter_map(|record| match record {
        Record::Train(record) => Some((record.step, record.tokens as f64)),
        _ => None,
    });
    let tokens: HashMap<usize, f64> = tokens.collect();
    let mut curves = BTreeMap::<_, Vec<_>>::new();
    for record in &records {
        let step = record.step();
        let x = match x_axis {
            XAxis::Updates => Some(step as f64),
            XAxis::Tokens => tokens.get(&step).copied(),
        };
        let Some(x) = x else { continue };
        for (name, y) in record.scalars() {
            curves.entry(name).or_default().push((x, y));
        }
    }
    Ok(curves)
}

/// The mean of `window` points around each; fewer at the ends.
pub fn smooth(points: &[(f64, f64)], window: usize) -> Vec<(f64, f64)> {
    let mut sums = vec![0.; points.len() + 1];
    for (i, (_, y)) in points.iter().enumerate() {
        sums[i + 1] = sums[i] + y;
    }
    let mean = |(i, &(x, _)): (usize, &(f64, f64))| {
        // As far to both sides, so that a slope stays where it is.
        let reach = (window / 2).min(i).min(points.len() - 1 - i);
        let (from, to) = (i - reach, i + reach + 1);
        (x, (sums[to] - sums[from]) / (to - from) as f64)
    };
    points.iter().enumerate().map(mean).collect()
}

/// At most about `most` points: of each stretch the lowest and the highest, in order.
pub fn thin(points: &[(f64, f64)], most: usize) -> Vec<(f64, f64)> {
    if points.len() <= most {
        return points.to_vec();
    }
    let extremes = |stretch: &[(f64, f64)]| -> Vec<(f64, f64)> {
        let by_height = |a: &&(f64, f64), b: &&(f64, f64)| a.1.total_cmp(&b.1);
        let (low, high) = (stretch.iter().min_by(by_height), stretch.iter().max_by(by_height));
        let mut extremes: Vec<(f64, f64)> = low.into_iter().chain(high).copied().collect();
        extremes.sort_by(|a, b| a.0.total_cmp(&b.0));
        extremes.dedup();
        extremes
    };
    points.chunks(points.len().div_ceil(most / 2)).flat_map(extremes).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn smoothing_keeps_slopes_and_length() {
        let slope: Vec<(f64, f64)> = (0..50).map(|i| (f64::from(i), 3. * f64::from(i))).collect();
        for window in [0, 1, 2, 7, 1000] {
            let smoothed = smooth(&slope, window);
            assert_eq!(smoothed.len(), slope.len());
            assert!(smoothed.iter().zip(&slope).all(|(a, b)| (a.1 - b.1).abs() < 1e-9));
        }
        assert_eq!(smooth(&[(0., 0.), (1., 3.), (2., 0.)], 3)[1], (1., 1.));
        assert_eq!(smooth(&[], 3), []);
    }

    #[test]
    fn thinning_keeps_spikes() {
        let mut points: Vec<(f64, f64)> = (0..10_000).map(|i| (f64::from(i), 1.)).collect();
        (points[4321].1, points[9999].1) = (9., -9.);
        let thinned = thin(&points, 100);
        assert!(thinned.len() <= 102, "{}", thinned.len());
        assert!(thinned.contains(&(4321., 9.)) && thinned.contains(&(9999., -9.)));
        assert!(thinned.is_sorted_by(|a, b| a.0 < b.0));
        assert_eq!(thin(&points[..50], 100), points[..50]);
    }
}
