//! `bitnet plot RUN…`: the curves of training runs as a picture.

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use bitnet_model::checkpoint::write_atomic;
use serde_json::{Map, Value, json};

mod curves;
mod draw;
mod panels;

use curves::{Run, XAxis};
use draw::{Format, Picture};

/// Options of `bitnet plot`.
#[derive(clap::Args)]
#[command(
    after_long_help = "WHAT is a name of the list loss, nats-per-byte, nats-per-token, lr, grad-norm, speed, codes, flips, lambda, \
weight-decay, clip, memory, diversity, terms (a panel for each term of the loss), or that of a number as `bitnet plot --json` lists them, \
such as codes/model.layers.0.mlp.up_proj/zero.

EXAMPLES

  One run, everything worth seeing:
    bitnet plot runs/default

  Learning rates side by side, as a drawing for a report:
    bitnet plot runs/lr-* --what loss,nats-per-byte --log-y -o rates.svg

  How one run ended, in numbers:
    bitnet plot runs/default --json"
)]
pub struct Args {
    /// Folders of runs, or metrics files
    #[arg(value_name = "RUN", required = true)]
    runs: Vec<PathBuf>,
    /// The picture, a .png or .svg file [default: curves.png]
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Curves to draw, separated by commas, a panel each [default: what the runs have]
    #[arg(long, value_name = "WHAT", value_delimiter = ',')]
    what: Vec<String>,
    /// Points that are averaged; 1 for none [default: a fiftieth of a noisy curve]
    #[arg(long, value_name = "N")]
    smooth: Option<usize>,
    /// What the horizontal axis counts
    #[arg(long, value_name = "AXIS", value_enum, default_value_t = XAxis::Updates)]
    x: XAxis,
    /// Logarithmic horizontal axes
    #[arg(long)]
    log_x: bool,
    /// Logarithmic vertical axes; values that are not positive are left out
    #[arg(long)]
    log_y: bool,
    /// Panels side by side [default: a square of panels]
    #[arg(long, value_name = "N")]
    columns: Option<usize>,
    /// Print first, last, lowest and highest point of every curve as JSON; draws only with --output
    #[arg(long)]
    json: bool,
}

/// Draws, and says to stdout what.
pub fn run(args: &Args) -> anyhow::Result<()> {
    if args.smooth == Some(0) || args.columns == Some(0) {
        bail!("--smooth and --columns must be at least 1");
    }
    let default = (!args.json).then(|| PathBuf::from("curves.png"));
    let output = args.output.clone().or(default);
    let format = output.as_deref().map(format_of).transpose()?;
    let runs = curves::read(&args.runs, args.x)?;
    let panels = panels::choose(&args.what, &runs)?;
    if let (Some(path), Some(format)) = (&output, format) {
        let picture = Picture {
            runs: &runs,
            panels: &panels,
            x_label: args.x.label(),
            smooth: args.smooth,
            log: (args.log_x, args.log_y),
            columns: args.columns,
        };
        let bytes = picture.draw(format).context("the picture cannot be drawn")?;
        write_atomic(path, &bytes)?;
    }
    let out = &mut io::stdout().lock();
    match (args.json, &output) {
        (true, _) => writeln!(out, "{:#}", summary(&runs))?,
        (false, Some(path)) => writeln!(
            out,
            "{}: {} of {}",
            path.display(),
            plural(panels.len(), "panel"),
            plural(runs.len(), "run")
        )?,
        (false, None) => (),
    }
    Ok(())
}

fn plural(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

fn format_of(path: &Path) -> anyhow::Result<Format> {
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("png") => Ok(Format::Png),
        Some("svg") => Ok(Format::Svg),
        _ => bail!("--output {}: the name must end in .png or .svg", path.display()),
    }
}

/// Every run's curves by name: their number of points and the ends and extremes.
fn summary(runs: &[Run]) -> Value {
    let point = |&(x, y): &(f64, f64)| json!([x, y]);
    let curve = |points: &Vec<(f64, f64)>| {
        let lowest = points.iter().min_by(|a, b| a.1.total_cmp(&b.1));
        let highest = points.iter().max_by(|a, b| a.1.total_cmp(&b.1));
        json!({
            "points": points.len(), "first": points.first().map(point), "last": points.last().map(point),
            "lowest": lowest.map(point), "highest": highest.map(point),
        })
    };
    let run = |run: &Run| {
        let curves: Map<String, Value> =
            run.curves.iter().map(|(name, points)| (name.clone(), curve(points))).collect();
        json!({"name": run.name, "curves": curves})
    };
    json!({"runs": runs.iter().map(run).collect::<Vec<_>>()})
}
