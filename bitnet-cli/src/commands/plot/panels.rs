//! Which curves are drawn together under which name.

use std::collections::BTreeSet;

use anyhow::bail;

use super::curves::Run;

/// One diagram.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Panel {
    /// Above the diagram.
    pub title: String,
    /// The names of its curves in the metrics. Those after the first are drawn thinner.
    pub curves: Vec<String>,
    /// Whether its curves are so noisy that they are smoothed unless the user says otherwise.
    pub is_noisy: bool,
}

/// Names for `--what`, with title, curves and whether they are noisy.
const KNOWN: &[(&str, &str, &[&str], bool)] = &[
    ("loss", "training loss", &["train/loss"], true),
    ("nats-per-byte", "held-out loss, nats per byte", &["evaluation/nats_per_byte"], false),
    ("nats-per-token", "held-out loss, nats per token", &["evaluation/nats_per_token"], false),
    ("accuracy", "held-out token accuracy", &["evaluation/token_accuracy"], false),
    ("lr", "learning rate", &["train/lr"], false),
    ("grad-norm", "norm of the gradients", &["train/grad_norm"], true),
    ("speed", "tokens per second", &["speed/tokens_per_second"], true),
    (
        "codes",
        "codes: 0 (thick), −1 and +1 (thin)",
        &["codes/zero", "codes/minus", "codes/plus"],
        false,
    ),
    ("flips", "codes flipped between censuses", &["codes/flipped"], false),
    ("lambda", "quantization in force, λ", &["train/lambda"], false),
    ("weight-decay", "weight decay", &["train/weight_decay"], false),
    ("clip", "clip factor", &["train/clip_factor"], false),
    (
        "memory",
        "memory, bytes: resident (thick), peak (thin)",
        &["memory/resident_bytes", "memory/peak_bytes"],
        false,
    ),
    (
        "diversity",
        "effective tokens: predicted (thick), in the text (thin)",
        &["evaluation/predicted_tokens", "evaluation/label_tokens"],
        false,
    ),
];

/// What is drawn unless the user says otherwise, as far as the runs have it.
const DEFAULT: &[&str] =
    &["loss", "nats-per-byte", "lr", "grad-norm", "speed", "codes", "flips", "lambda", "terms"];

/// One panel for each term of the loss.
const TERMS: &str = "terms";

/// The panels called `what`, or those of a sensible default that the runs have something for. A name is one of a
/// list, `terms`, or that of a number in the metrics, such as `codes/model.layers.0.mlp.up_proj/zero`.
///
/// # Errors
/// A name that no run has a curve for.
pub fn choose(what: &[String], runs: &[Run]) -> anyhow::Result<Vec<Panel>> {
    let exists = |curve: &str| runs.iter().any(|run| run.curves.contains_key(curve));
    if what.is_empty() {
        let found = DEFAULT.iter().flat_map(|name| named(name, runs));
        return Ok(found.filter(|panel| panel.curves.iter().any(|curve| exists(curve))).collect());
    }
    let mut panels = Vec::new();
    for name in what {
        let found = named(name, runs);
        if !found.iter().any(|panel| panel.curves.iter().any(|curve| exists(curve))) {
            let numbers: BTreeSet<&str> =
                runs.iter().flat_map(|run| run.curves.keys().map(String::as_str)).collect();
            let is_single = |name: &&str| name.matches('/').count() == 1;
            let known = KNOWN.iter().map(|known| known.0).chain([TERMS]);
            bail!(
                "--what `{name}`: the runs have no such curve; there are {}, and of the metrics' own names {}",
                Vec::from_iter(known).join(", "),
                Vec::from_iter(numbers.into_iter().filter(is_single)).join(", "),
            );
        }
        panels.extend(found);
    }
    Ok(panels)
}

fn named(name: &str, runs: &[Run]) -> Vec<Panel> {
    if name == TERMS {
        let names = runs.iter().flat_map(|run| run.curves.keys());
        let terms: BTreeSet<&String> = names.filter(|name| name.starts_with("terms/")).collect();
        // A single term is the loss, which has its panel.
        let terms = if terms.len() == 1 { BTreeSet::new() } else { terms };
        let panel = |term: &String| {
            let title = format!("term {}", term.trim_start_matches("terms/"));
            Panel { title, curves: vec![term.clone()], is_noisy: true }
        };
        return terms.into_iter().map(panel).collect();
    }
    let (title, curves, is_noisy) = match KNOWN.iter().find(|known| known.0 == name) {
        Some((_, title, curves, is_noisy)) => (*title, *curves, *is_noisy),
        None => (name, &[name][..], false),
    };
    let curves = curves.iter().map(|&curve| curve.to_owned()).collect();
    vec![Panel { title: title.to_owned(), curves, is_noisy }]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(curves: &[&str]) -> Run {
        let curves = curves.iter().map(|&name| (name.to_owned(), vec![(1., 2.)])).collect();
        Run { name: "run".into(), curves }
    }

    fn titles(what: &[&str], curves: &[&str]) -> anyhow::Result<Vec<String>> {
        let what: Vec<String> = what.iter().map(|&name| name.to_owned()).collect();
        let panels = choose(&what, &[run(curves)])?;
        Ok(panels.into_iter().map(|panel| panel.title).collect())
    }

    #[test]
    fn the_default_is_what_there_is() {
        let curves = ["train/loss", "train/lr", "terms/cross_entropy"];
        assert_eq!(titles(&[], &curves).unwrap(), ["training loss", "learning rate"]);
        let curves = ["terms/cross_entropy", "terms/logits"];
        assert_eq!(titles(&[], &curves).unwrap(), ["term cross_entropy", "term logits"]);
    }

    #[test]
    fn names_are_those_of_a_list_or_of_the_metrics() {
        let curves = ["train/loss", "codes/a/zero"];
        assert_eq!(
            titles(&["codes/a/zero", "loss"], &curves).unwrap(),
            ["codes/a/zero", "training loss"]
        );
        let message = titles(&["los"], &curves).unwrap_err().to_string();
        assert!(message.contains("`los`") && message.contains("grad-norm"), "{message}");
        assert!(message.contains("train/loss") && !message.contains("codes/a/zero"), "{message}");
    }
}
