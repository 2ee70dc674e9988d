//! What of a recipe decides the bits of a run: a checkpoint of another recipe is not resumed.

use std::path::Path;

use serde_json::Value;

use super::Recipe;
use crate::{Error, Result};

impl Recipe {
    /// The part of the recipe that decides every bit of the run, for the checkpoint. Paths are not in it (the contents
    /// of the dataset are compared instead, of models the last part of the name), nor is what only decides when something is written.
    /// `batch_size` counts the windows of all `ranks`, so that a run may go on with other ranks and the same windows.
    pub(crate) fn identity(&self, ranks: usize) -> Result<Value> {
        let mut recipe = self.clone();
        recipe.train.batch_size = recipe.train.batch_size.saturating_mul(ranks);
        let mut value = serde_json::to_value(&recipe).map_err(|error| {
            Error::Input(format!("the recipe cannot be written as JSON: {error}"))
        })?;
        if let Some(recipe) = value.as_object_mut() {
            recipe.remove("output");
            recipe.remove("samples");
            for (table, key) in [("init", "model"), ("distillation", "teacher")] {
                if let Some(model) = recipe.get_mut(table).and_then(|table| table.get_mut(key)) {
                    let name = model.as_str().and_then(|path| Path::new(path).file_name());
                    *model = name.map_or(Value::Null, |name| name.to_string_lossy().into());
                }
            }
            for (table, keys) in [
                (
                    "data",
                    [
                        "train",
                        "validation",
                        "validation_split",
                        "validation_bytes",
                        "tokenizer",
                        "cache",
                        "format",
                        "loss_on",
                        "chat_template",
                        "max_samples",
                        "skip_bad",
                    ]
                    .as_slice(),
                ),
                ("lora", &["keep_mib"]),
                ("train", NOT_OF_THE_BITS),
            ] {
                if let Some(table) = recipe.get_mut(table).and_then(Value::as_object_mut) {
                    table.retain(|key, _| !keys.contains(&key.as_str()));
                }
            }
        }
        Ok(value)
    }
}

/// Keys of `[train]` that decide when a run stops and what it writes, or only what it costs.
const NOT_OF_THE_BITS: &[&str] = &[
    "recompute_blocks",
    "save_every",
    "save_total_limit",
    "early_stop_patience",
    "codes_every",
    "stop_on_divergence",
    "stop_on_collapse",
    "limits",
];

/// The first key, dotted, in which two JSON trees differ, with both values.
pub(crate) fn difference(old: &Value, new: &Value) -> Option<String> {
    fn walk(key: &str, old: &Value, new: &Value) -> Option<String> {
        let (Value::Object(olds), Value::Object(news)) = (old, new) else {
            return (old != new).then(|| format!("`{key}` was {old} and is {new}"));
        };
        let missing = olds.keys().find(|key| !news.contains_key(*key)).into_iter();
        missing.chain(news.keys()).find_map(|name| {
            let key = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
            walk(
                &key,
                olds.get(name).unwrap_or(&Value::Null),
                news.get(name).unwrap_or(&Value::Null),
            )
        })
    }
    walk("", old, new)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::recipe::tests::TEXT;

    #[test]
    fn the_identity_is_what_decides_the_bits() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("recipe.toml");
        fs::write(&path, TEXT).unwrap();
        let recipe = Recipe::from_file(&path).unwrap();
        let mut other = recipe.clone();
        other.output.dir = "elsewhere".into();
        other.data.train[0].path = "moved.txt".into();
        other.train.save_every = 7;
        let identity = |recipe: &Recipe| recipe.identity(1).unwrap();
        assert_eq!(difference(&identity(&recipe), &identity(&other)), None);
        other.optimizer.peak_lr = 2e-3;
        let found = difference(&identity(&recipe), &identity(&other)).unwrap();
        assert_eq!(found, "`optimizer.peak_lr` was 0.001 and is 0.002");
        let found =
            difference(&serde_json::json!({"model": {"bias": true}}), &identity(&other)).unwrap();
        assert!(found.starts_with("`model."), "{found}");
    }
}
