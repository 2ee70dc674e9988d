//! A recipe's text, with settings laid over it, as a [`Recipe`]. Messages name line, key and value.

use std::{fs, path::Path};

use toml::{Table, Value};

use super::{Recipe, init, lora};
use crate::{Error, Result};

/// Names that are more alike than this, by Jaro and Winkler, are taken for misspellings of each other.
const ALIKE: f64 = 0.8;

impl Recipe {
    /// Reads and validates a recipe; relative paths start at the recipe's directory.
    pub fn from_file(path: &Path) -> Result<Self> {
        Self::from_file_with(path, &[])
    }

    /// As [`from_file`](Self::from_file), with `settings` of dotted keys, such as `train.batch_size`, laid
    /// over it in order. A value is written as in TOML; the quotes of a string may be left out. Of
    /// `train.steps` and `train.epochs` the one that is set replaces the other.
    pub fn from_file_with(path: &Path, settings: &[(String, String)]) -> Result<Self> {
        let text = fs::read_to_string(path).map_err(Error::io(path))?;
        Self::from_text_with(&text, path, settings)
    }

    /// As [`from_file_with`](Self::from_file_with), of a recipe's `text`; errors and relative paths are as if it lay at
    /// `path`.
    pub fn from_text_with(text: &str, path: &Path, settings: &[(String, String)]) -> Result<Self> {
        let refuse =
            |error| Error::RecipeSyntax { path: path.into(), reason: describe(&error, text) };
        let mut table: Table = toml::from_str(text).map_err(refuse)?;
        let dir = path.parent().unwrap_or(Path::new(""));
        // Settings may still name another model, or what the recipe leaves open.
        let is_open = |section: &str| {
            table.contains_key(section)
                || settings.iter().any(|(key, _)| key.starts_with(&format!("{section}.")))
        };
        let mut recipe: Option<Self> = match is_open("init") || is_open("lora") {
            true => None,
            // With the lines of what is wrong.
            false => Some(toml::from_str(text).map_err(refuse)?),
        };
        for (index, (key, value)) in settings.iter().enumerate() {
            let named = |reason| Error::Input(format!("recipe setting `{key}={value}`: {reason}"));
            set(&mut table, key, value).map_err(named)?;
            if recipe.is_some() || index + 1 == settings.len() {
                recipe = Some(typed(&table, dir).map_err(named)?);
            }
        }
        let mut recipe = match recipe {
            Some(recipe) => recipe,
            None => typed(&table, dir)
                .map_err(|reason| Error::RecipeSyntax { path: path.into(), reason })?,
        };
        recipe.start_at(dir);
        recipe.validate()?;
        Ok(recipe)
    }
}

/// The recipe that `table` makes, with what its checkpoint says filled in.
fn typed(table: &Table, dir: &Path) -> Result<Recipe, String> {
    let mut table = table.clone();
    init::complete(&mut table, dir)?;
    lora::complete(&mut table);
    table.try_into().map_err(|error: toml::de::Error| reason(&error))
}

/// Sets one key of `table`.
fn set(table: &mut Table, key: &str, value: &str) -> Result<(), String> {
    let parts: Vec<&str> = key.split('.').collect();
    let Some((last, tables)) = parts.split_last() else { return Err("has no key".into()) };
    // Not an error: `schedule=two-stage` is a string without its quotes.
    let value = value.parse().unwrap_or_else(|_| Value::String(value.into()));
    let mut at = &mut *table;
    for (depth, part) in tables.iter().enumerate() {
        at = match at.entry(*part).or_insert_with(|| Value::Table(Table::new())) {
            Value::Table(table) => table,
            _ => return Err(format!("`{}` is not a table", parts[..=depth].join("."))),
        };
    }
    match key {
        "train.steps" => at.remove("epochs"),
        "train.epochs" => at.remove("steps"),
        _ => None,
    };
    at.insert((*last).into(), value);
    Ok(())
}

/// The parser's reason on one line. Of the names that an unknown one could have been, the one that looks most like it.
fn reason(error: &toml::de::Error) -> String {
    let message = error.message().trim_end().replace('\n', ", ");
    let unknown = ["unknown field `", "unknown variant `"];
    let names: Vec<&str> = message.split('`').skip(1).step_by(2).collect();
    let [name, known @ ..] = names.as_slice() else { return message };
    let likeness = |known: &str| strsim::jaro_winkler(name, known);
    let best = known.iter().max_by(|a, b| likeness(a).total_cmp(&likeness(b)));
    match best.filter(|best| likeness(best) > ALIKE) {
        Some(best) if unknown.iter().any(|start| message.starts_with(start)) => {
            let start = &message[..message.find(", expected").unwrap_or(message.len())];
            format!("{start}; did you mean `{best}`?")
        }
        _ => message,
    }
}

/// The parser's reason on one line, with the line of the recipe it is about.
fn describe(error: &toml::de::Error, text: &str) -> String {
    let reason = reason(error);
    let Some(before) = error.span().and_then(|span| text.get(..span.start)) else { return reason };
    let number = before.matches('\n').count();
    let line = text.lines().nth(number).unwrap_or_default().trim();
    format!("line {}, `{line}`: {reason}", number + 1)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    const TEXT: &str = r#"
        model = { hidden_size = 32, intermediate_size = 64, num_hidden_layers = 1, num_attention_heads = 2, num_key_value_heads = 1, vocab_size = 300, max_position_embeddings = 64 }
        data = { sequence_length = 16, train = [{ path = "a", documents = "line" }], validation = [{ path = "b", documents = "line" }] }
        train = { batch_size = 2, epochs = 1.5 }
        optimizer = { peak_lr = 1e-3 }
        output = { dir = "run" }
    "#;

    fn read(settings: &[(&str, &str)]) -> Result<Recipe> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("recipe.toml");
        fs::write(&path, TEXT).unwrap();
        let settings: Vec<_> =
            settings.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        Recipe::from_file_with(&path, &settings)
    }

    #[test]
    fn settings_replace_and_add() {
        let recipe = read(&[
            ("train.steps", "7"),
            ("train.seed", "3"),
            ("optimizer.schedule", "two-stage"),
            ("optimizer.peak_lr", "2e-3"),
            ("model.precision", "\"full\""),
            ("output.dir", "/elsewhere"),
        ])
        .unwrap();
        assert_eq!((recipe.train.steps, recipe.train.epochs), (Some(7), None));
        assert_eq!((recipe.train.seed, recipe.optimizer.peak_lr), (3, 2e-3));
        assert_eq!(recipe.output.dir, PathBuf::from("/elsewhere"));
        assert_eq!(
            read(&[("train.steps", "7"), ("train.epochs", "2.0")]).unwrap().train.steps,
            None
        );
    }

    #[test]
    fn a_setting_that_makes_no_recipe_is_named() {
        for (key, value, reason) in [
            (
                "train.stepz",
                "7",
                "recipe setting `train.stepz=7`: unknown field `stepz`; did you mean `steps`?",
            ),
            ("train.batch_size", "-7", "integer `-7`"),
            ("train.batch_size", "many", "string \"many\""),
            ("train.batch_size", "0", "`train.batch_size`: must be at least 1"),
            ("train.batch_size.x", "1", "`train.batch_size` is not a table"),
            ("", "1", "unknown field ``"),
        ] {
            let message = read(&[(key, value)]).unwrap_err().to_string();
            assert!(message.contains(reason), "{message}");
            assert!(!message.contains('\n'), "{message}");
        }
    }
}
