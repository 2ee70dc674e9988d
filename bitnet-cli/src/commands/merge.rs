//! `bitnet merge -m BASE --adapter DIR -o OUT`: adapters added into the weights of their base, with a report of what that did.

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use bitnet_model::{
    adapter::{Adaptation, MergedMatrix, merge},
    config::PROJECTIONS,
    pretrained::{Origin, Precision, Source},
};
use candle_core::Device;
use serde_json::{Value, json};

use crate::{adapter::AdapterArgs, args::Global, damage::Text, folder, model::ModelArgs, progress};

/// Options of `bitnet merge`.
#[derive(clap::Args)]
#[command(
    after_long_help = "Masters become W + scale · B·A in their own element type; they are ternarized anew whenever the model runs. A \
packed base takes the codes nearest to what its codes stand for and the adapter, and keeps its scales. Both round most of an \
adapter away, and a code that flips changes a weight by far more than the adapter did: the merged model computes another \
function than the adapter beside its base (`--adapter` of `generate`, `chat`, `logits` and `perplexity`), which is exact. The \
report says how many codes flipped and, with --text, the loss of the base, of the adapter beside it and of the merged model.

OUT appears when it is complete. With more flips than --max-flipped allows, nothing is written."
)]
pub struct Args {
    /// The base
    #[command(flatten)]
    model: ModelArgs,
    /// Adapters
    #[command(flatten)]
    adapters: AdapterArgs,
    /// Folder to write
    #[arg(long, short, value_name = "OUT")]
    output: PathBuf,
    /// Text on which to measure the loss of base, adapter and merged model
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// The part of the codes of merged matrices that may flip
    #[arg(long, value_name = "FRACTION", default_value_t = 0.05)]
    max_flipped: f64,
    /// Write the model although more codes flip
    #[arg(long)]
    i_know: bool,
    /// Replace OUT if it is a model's folder
    #[arg(long)]
    force: bool,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
}

/// Losses in nats a token.
struct Losses {
    base: f64,
    adapter: f64,
    merged: f64,
}

/// What the merge did.
struct Report {
    matrices: Vec<MergedMatrix>,
    losses: Option<Losses>,
}

/// Writes the folder.
pub fn run(args: &Args, global: &Global) -> anyhow::Result<()> {
    let (parent, name) = folder::place(&args.output)?;
    folder::check_free(&args.output, args.force)?;
    if args.adapters.adapters.is_empty() {
        bail!("there is nothing to merge: name adapters with --adapter DIR[:SCALE]");
    }
    if !(0. ..=1.).contains(&args.max_flipped) {
        bail!("--max-flipped {} is no fraction: give one from 0 to 1", args.max_flipped);
    }
    let precision = match (args.model.ternarize, args.model.full_precision) {
        (true, _) => Precision::Ternarize,
        (_, true) => Precision::Full,
        _ => Precision::AsFound,
    };
    let source = args.model.open_as(precision, global)?;
    if matches!(source.origin, Origin::Synthetic) {
        bail!("{}: has random weights, which are not written", source.name);
    }
    let adaptation = args.adapters.read(&source, global)?.context("there is no adapter")?;
    let text = args.text.as_ref().map(|path| Text::read(&source, path)).transpose()?;

    let folder = folder::temporary(&parent, &name)?;
    let bar = progress::bar(global, 0, "merging {bar:30} {pos}/{len} {eta}");
    let on_tensor = |position: usize, len: usize| {
        bar.set_length(len as u64);
        bar.set_position(position as u64);
    };
    let weights = folder.path().join("model.safetensors");
    let matrices = merge(&source.config, &source.checkpoint, &adaptation, &weights, on_tensor)?;
    bar.finish_and_clear();
    folder::copy_beside(&source, folder.path())?;
    folder::copy_config(&source, folder.path())?;
    let losses = match &text {
        Some(text) => Some(losses(&source, precision, &adaptation, folder.path(), text)?),
        None => None,
    };
    let report = Report { matrices, losses };
    let flipped = report.flipped();
    let is_refused = flipped.is_some_and(|flipped| flipped > args.max_flipped) && !args.i_know;
    let mut out = io::stdout().lock();
    match args.json {
        true => {
            let written = (!is_refused).then(|| args.output.display().to_string());
            writeln!(out, "{:#}", report.to_json(written))?;
        }
        false => report.print(&mut out)?,
    }
    out.flush()?;
    if is_refused {
        bail!(
            "{:.2} % of the codes flip, more than --max-flipped {} allows: nothing was written. Run the base with --adapter \
             instead, or pass --i-know to write it all the same",
            100. * flipped.unwrap_or_default(),
            args.max_flipped
        );
    }
    folder::publish(folder, &args.output)?;
    if !args.json {
        writeln!(out, "{}: written", args.output.display())?;
    }
    Ok(())
}

/// Measures the three models, one after another.
fn losses(
    source: &Source,
    precision: Precision,
    adaptation: &Adaptation,
    merged: &Path,
    text: &Text,
) -> anyhow::Result<Losses> {
    let (base, adapter) = {
        let model = source.load(&Device::Cpu)?;
        (text.perplexity(&model)?.ln(), text.perplexity(&model.adapted(adaptation)?)?.ln())
    };
    let hub = bitnet_model::hub::Hub::from_env().offline(true);
    let mut merged = Source::open(&merged.display().to_string(), precision, &hub)?;
    (merged.lm_head, merged.tile_format) = (source.lm_head, source.tile_format);
    Ok(Losses { base, adapter, merged: text.perplexity(&merged.load(&Device::Cpu)?)?.ln() })
}

/// The part of the codes of `matrices` that flipped; `None` if they have none.
fn fraction<'a>(matrices: impl Iterator<Item = &'a MergedMatrix>) -> Option<f64> {
    let (flipped, weights) = matrices
        .filter_map(|matrix| Some((matrix.flipped?, matrix.weights)))
        .fold((0, 0), |sum, matrix| (sum.0 + matrix.0, sum.1 + matrix.1));
    (weights > 0).then(|| flipped as f64 / weights as f64)
}

impl Report {
    fn flipped(&self) -> Option<f64> {
        fraction(self.matrices.iter())
    }

    /// The layers that were merged into, each with its matrices in the order of [`PROJECTIONS`].
    fn layers(&self) -> Vec<(&str, [Option<&MergedMatrix>; PROJECTIONS.len()])> {
        let mut layers: Vec<(&str, [Option<&MergedMatrix>; PROJECTIONS.len()])> = Vec::new();
        for matrix in &self.matrices {
            let mut parts = matrix.name.split('.').skip(2); // model.layers.LAYER.BLOCK.PROJECTION.weight
            let (Some(layer), Some(projection)) = (parts.next(), parts.nth(1)) else { continue };
            let Some(at) = PROJECTIONS.iter().position(|name| *name == projection) else {
                continue;
            };
            match layers.last_mut() {
                Some((last, matrices)) if *last == layer => matrices[at] = Some(matrix),
                _ => {
                    let mut matrices = [None; PROJECTIONS.len()];
                    matrices[at] = Some(matrix);
                    layers.push((layer, matrices));
                }
            }
        }
        layers
    }

    fn print(&self, out: &mut impl Write) -> io::Result<()> {
        match self.flipped() {
            None => writeln!(out, "{} matrices, which have no codes to flip", self.matrices.len())?,
            Some(all) => {
                let percent = |part: Option<f64>| match part {
                    Some(part) => format!("{:.3}", 100. * part),
                    None => "-".into(),
                };
                writeln!(out, "codes that flip, in %")?;
                write!(out, "{:>5}", "layer")?;
                for name in PROJECTIONS.iter().chain(&["all"]) {
                    write!(out, "{name:>10}")?;
                }
                writeln!(out)?;
                for (layer, matrices) in self.layers() {
                    write!(out, "{layer:>5}")?;
                    for matrix in matrices {
                        write!(out, "{:>10}", percent(fraction(matrix.into_iter())))?;
                    }
                    writeln!(out, "{:>10}", percent(fraction(matrices.into_iter().flatten())))?;
                }
                writeln!(out, "all layers: {} %", percent(Some(all)))?;
            }
        }
        match &self.losses {
            Some(Losses { base, adapter, merged }) => writeln!(
                out,
                "loss, in nats a token: base {base:.4}, adapter beside it {adapter:.4}, merged {merged:.4}"
            ),
            None => writeln!(out, "loss: not measured, as no --text was given"),
        }
    }

    fn to_json(&self, written: Option<String>) -> Value {
        let layers = self.layers().into_iter().map(|(layer, matrices)| {
            let mut row = json!({
                "layer": layer.parse::<usize>().ok(),
                "flipped": fraction(matrices.into_iter().flatten()),
            });
            for (name, matrix) in PROJECTIONS.iter().zip(matrices) {
                row[name] = json!(fraction(matrix.into_iter()));
            }
            row
        });
        let losses = self.losses.as_ref().map(|Losses { base, adapter, merged }| {
            json!({"base": base, "adapter": adapter, "merged": merged})
        });
        json!({
            "written": written, "flipped": self.flipped(), "layers": layers.collect::<Vec<_>>(),
            "loss": losses,
        })
    }
}
