//! What a LoRA adapter is, from its folder alone.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{self, Write},
    path::Path,
};

use anyhow::Context;
use bitnet_model::{
    adapter::{Adapter, CONFIG, WEIGHTS},
    checkpoint::Checkpoint,
};
use serde::Serialize;

use super::TensorRow;
use crate::progress::{bytes, count};

/// Everything that is known of an adapter.
#[derive(Serialize)]
pub struct AdapterInfo {
    adapter: String,
    /// The model it was trained on, as it says.
    base: Option<String>,
    rank: usize,
    alpha: f64,
    /// Whether pairs are scaled by `alpha / √rank`.
    rslora: bool,
    dropout: f64,
    /// By the name of the projection.
    projections: BTreeMap<String, Pairs>,
    modules_to_save: Vec<String>,
    parameters: usize,
    /// Bytes of the file of the tensors.
    bytes: u64,
    /// Tensors of each element type.
    dtypes: BTreeMap<String, usize>,
    tensors: Vec<TensorRow>,
}

/// The pairs of all projections of one name.
#[derive(Default, Serialize)]
struct Pairs {
    /// How many.
    pairs: usize,
    ranks: BTreeSet<usize>,
    /// What their products are multiplied by, ascending.
    scales: Vec<f64>,
}

impl AdapterInfo {
    /// Whether `folder` holds an adapter and no model.
    pub fn is_adapter(folder: &Path) -> bool {
        folder.join(CONFIG).is_file() && !folder.join("config.json").is_file()
    }

    /// Of the adapter in `folder`.
    ///
    /// # Errors
    /// Those of [`Adapter::open`].
    pub fn of(folder: &Path) -> anyhow::Result<Self> {
        let adapter = Adapter::open(folder)?;
        let mut projections: BTreeMap<String, Pairs> = BTreeMap::new();
        for path in adapter.pairs.keys() {
            let name = path.rsplit('.').next().unwrap_or(path);
            let spec = adapter.config.pair(path).map_err(anyhow::Error::msg)?;
            let spec = spec.with_context(|| format!("{path} is no target"))?;
            let pairs = projections.entry(name.into()).or_default();
            pairs.pairs += 1;
            pairs.ranks.insert(spec.rank);
            if let Err(place) = pairs.scales.binary_search_by(|scale| scale.total_cmp(&spec.scale))
            {
                pairs.scales.insert(place, spec.scale);
            }
        }
        let file = folder.join(WEIGHTS);
        let size = fs::metadata(&file).with_context(|| file.display().to_string())?.len();
        let tensors = TensorRow::all(&Checkpoint::open(&[file])?);
        let config = &adapter.config;
        Ok(Self {
            adapter: folder.display().to_string(),
            base: config.base_model.clone(),
            rank: config.rank,
            alpha: config.alpha,
            rslora: config.use_rslora,
            dropout: config.dropout,
            projections,
            modules_to_save: adapter.modules.keys().cloned().collect(),
            parameters: adapter.parameters(),
            bytes: size,
            dtypes: TensorRow::dtypes(&tensors),
            tensors,
        })
    }

    /// As a table, `with_tensors` below it.
    pub fn print(&self, with_tensors: bool, out: &mut impl Write) -> io::Result<()> {
        let mut row = |name: &str, value: String| writeln!(out, "{name:16}{value}");
        row("adapter", format!("{} (LoRA)", self.adapter))?;
        row("base", self.base.clone().unwrap_or_else(|| "not said".into()))?;
        let by = if self.rslora { "alpha / √rank" } else { "alpha / rank" };
        row("rank", format!("{}, alpha {}, scaled by {by}", self.rank, self.alpha))?;
        row("dropout", format!("{}, in training", self.dropout))?;
        for (index, (name, pairs)) in self.projections.iter().enumerate() {
            let list = |values: Vec<String>| values.join(", ");
            let ranks = list(pairs.ranks.iter().map(ToString::to_string).collect());
            let scales = list(pairs.scales.iter().map(|scale| format!("{scale:.4}")).collect());
            let number = pairs.pairs;
            row(
                if index == 0 { "projections" } else { "" },
                format!("{name:10} in {number:3} layers, rank {ranks}, scale {scales}"),
            )?;
        }
        if !self.modules_to_save.is_empty() {
            row("whole tensors", self.modules_to_save.join(", "))?;
        }
        row("parameters", count(self.parameters as u64))?;
        row("file", format!("{WEIGHTS}, {}", bytes(self.bytes)))?;
        let dtypes: Vec<String> = self.dtypes.iter().map(|(d, n)| format!("{n} {d}")).collect();
        row("tensors", format!("{} ({})", self.tensors.len(), dtypes.join(", ")))?;
        if with_tensors {
            TensorRow::print(&self.tensors, out)?;
        }
        Ok(())
    }
}
