//! How a run ended, to stdout.

use std::io::{self, Write};

use bitnet_train::{experiment::Summary, recipe::Recipe, trainer::Outcome};
use serde_json::json;

use crate::progress::count;

/// Says how the run of `recipe` ended and what it left, as text or JSON.
pub fn print(recipe: &Recipe, summary: &Summary, json: bool) -> anyhow::Result<()> {
    let Summary { outcome, step, best, parameters } = summary;
    let outcome = match outcome {
        Outcome::Finished => "finished",
        Outcome::EarlyStopped => "early-stopped",
        Outcome::Interrupted => "interrupted",
    };
    let folder = |name: &str| {
        let path = recipe.output.dir.join(name);
        path.is_dir().then(|| path.display().to_string())
    };
    let is_over = summary.outcome != Outcome::Interrupted;
    let [packed, latent] = ["packed", "latent"].map(|name| folder(name).filter(|_| is_over));
    let adapter = folder("adapter").filter(|_| recipe.lora.is_some());
    let out = &mut io::stdout().lock();
    if json {
        let best = best.map(|b| json!({"step": b.step, "nats_per_byte": b.nats_per_byte}));
        let summary = json!({
            "outcome": outcome, "step": step, "best": best, "parameters": parameters,
            "output": recipe.output.dir.display().to_string(), "packed": packed, "latent": latent,
            "adapter": adapter,
        });
        return Ok(writeln!(out, "{summary:#}")?);
    }
    writeln!(out, "{:12}{outcome} after {step} updates", "outcome")?;
    if let Some(best) = best {
        let nats = best.nats_per_byte;
        writeln!(out, "{:12}{nats:.4} nats/byte after {} updates", "best", best.step)?;
    }
    writeln!(out, "{:12}{}", "parameters", count(*parameters as u64))?;
    writeln!(out, "{:12}{}", "output", recipe.output.dir.display())?;
    for (name, folder) in [("packed", packed), ("latent", latent), ("adapter", adapter)] {
        if let Some(folder) = folder {
            writeln!(out, "{name:12}{folder}")?;
        }
    }
    Ok(())
}
