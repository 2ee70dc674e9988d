//! `bitnet diff A B`: how two models differ.

use std::io::{self, Write};

use anyhow::bail;
use bitnet_model::{
    checkpoint::difference::{Difference, compare},
    hub::Hub,
    pretrained::{Precision, Source},
};
use serde_json::{Value, json};

use crate::{args::Global, progress};

/// Options of `bitnet diff`.
#[derive(clap::Args)]
#[command(
    after_long_help = "Tensors are compared by name, whatever forms the models are stored in: ternary matrices by their codes and \
their scales, everything else by value. Masters are ternarized first.

A scale of a packed model is rounded to bf16, so after a conversion scales may differ by 0.4 % where codes are equal."
)]
pub struct Args {
    /// Hub repo id (org/name), folder, file, or `default`
    #[arg(value_name = "A")]
    first: String,
    /// The other one
    #[arg(value_name = "B")]
    second: String,
    /// Take float weights without a quantization_config for masters of a 1.58-bit model
    #[arg(long)]
    ternarize: bool,
    /// List tensors that are equal, too
    #[arg(long)]
    all: bool,
    /// Fail if they differ, for scripts
    #[arg(long)]
    exit_code: bool,
    /// Print one JSON object: `equal` and `different`, the numbers of tensors, and `tensors`
    #[arg(long)]
    json: bool,
}

/// Compares the models.
pub fn run(args: &Args, global: &Global) -> anyhow::Result<()> {
    let precision = if args.ternarize { Precision::Ternarize } else { Precision::AsFound };
    let hub = Hub::from_env().progress(!global.quiet);
    let open = |name: &str| Source::open(name, precision, &hub);
    let (first, second) = (open(&args.first)?, open(&args.second)?);
    let sides = [(&first.config, &*first.checkpoint), (&second.config, &*second.checkpoint)];
    let names = sides.map(|(_, checkpoint)| checkpoint.names().len()).into_iter().max();
    let bar = progress::bar(global, names.unwrap_or(0), "comparing {bar:30} {pos}/{len} {eta}");
    let (mut equal, mut different, mut rows) = (0, 0, Vec::new());
    let [a, b] = sides;
    compare(a, b, |name, difference| {
        bar.inc(1);
        let is_none = difference.is_none();
        *(if is_none { &mut equal } else { &mut different }) += 1;
        if !is_none || args.all {
            rows.push((name.to_owned(), difference));
        }
        Ok(())
    })?;
    bar.finish_and_clear();
    let out = &mut io::stdout().lock();
    if args.json {
        let tensors =
            Value::from_iter(rows.iter().map(|(name, difference)| to_json(name, difference)));
        let (equal, different) = (json!(equal), json!(different));
        writeln!(out, "{:#}", json!({"equal": equal, "different": different, "tensors": tensors}))?;
    } else {
        let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
        for (name, difference) in &rows {
            writeln!(out, "{name:width$}  {}", in_words(difference))?;
        }
        writeln!(out, "{equal} tensors equal, {different} different")?;
    }
    out.flush()?;
    if args.exit_code && different > 0 {
        bail!("the models differ in {different} tensors");
    }
    Ok(())
}

fn in_words(difference: &Difference) -> String {
    match difference {
        Difference::OnlyFirst => "only in A".into(),
        Difference::OnlySecond => "only in B".into(),
        Difference::Shape(a, b) => format!("{a:?} in A, {b:?} in B"),
        Difference::Ternary { changed: 0, scales: (a, b), .. } if a == b => "equal".into(),
        Difference::Ternary { weights, changed, flipped, scales: (a, b) } => {
            let part = 100. * *changed as f64 / (*weights).max(1) as f64;
            let scale = match a == b {
                true => String::new(),
                false => format!(", scale {a:e} → {b:e} ({:+.2} %)", 100. * (b / a - 1.)),
            };
            match changed {
                0 => format!("codes equal{scale}"),
                _ => format!(
                    "{changed} codes ({part:.3} %), {flipped} of them of the other sign{scale}"
                ),
            }
        }
        Difference::Float { changed: 0, .. } => "equal".into(),
        Difference::Float { values, changed, largest, mean, .. } => {
            let part = 100. * *changed as f64 / (*values).max(1) as f64;
            format!(
                "{changed} values ({part:.3} %), at most {largest:.3e} and {mean:.3e} in the mean"
            )
        }
    }
}

fn to_json(name: &str, difference: &Difference) -> Value {
    let mut json = match difference {
        Difference::OnlyFirst => json!({"only": "a"}),
        Difference::OnlySecond => json!({"only": "b"}),
        Difference::Shape(a, b) => json!({"shapes": [a, b]}),
        Difference::Ternary { weights, changed, flipped, scales } => {
            json!({"weights": weights, "codes_changed": changed, "codes_flipped": flipped, "scales": [scales.0, scales.1]})
        }
        Difference::Float { values, changed, largest, mean, dtypes } => json!({
            "values": values, "changed": changed, "largest": largest, "mean": mean,
            "dtypes": [format!("{:?}", dtypes.0), format!("{:?}", dtypes.1)],
        }),
    };
    json["name"] = name.into();
    json["equal"] = difference.is_none().into();
    json
}
