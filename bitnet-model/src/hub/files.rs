//! Which files make a model, in a folder and in a repository alike.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsStr,
    fs::{self, File},
    io::Read,
    path::{Component, Path, PathBuf},
};

use super::hub_error;
use crate::{Error, Result};

pub(super) const CONFIG: &str = "config.json";
pub(super) const WEIGHTS: &str = "model.safetensors";
pub(super) const INDEX: &str = "model.safetensors.index.json";
const GENERATION_CONFIG: &str = "generation_config.json";
const TOKENIZER: &str = "tokenizer.json";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
const SPECIAL_TOKENS_MAP: &str = "special_tokens_map.json";
const CHAT_TEMPLATE: &str = "chat_template.jinja";

/// What a model may have and can be used without.
pub(super) const OPTIONAL_FILES: [&str; 5] =
    [GENERATION_CONFIG, TOKENIZER, TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP, CHAT_TEMPLATE];

/// An index has some 100 bytes a tensor; the largest on the Hub stay below 10 MB.
const MAX_INDEX_BYTES: u64 = 64 << 20;

/// The files of one model, all of them present.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelFiles {
    /// The repo id or path as the user gave it, for messages.
    pub source: String,
    /// The folder that holds the files.
    pub root: PathBuf,
    /// `config.json`; a GGUF file is its own.
    pub config: PathBuf,
    /// `generation_config.json`.
    pub generation_config: Option<PathBuf>,
    /// `tokenizer.json`.
    pub tokenizer: Option<PathBuf>,
    /// `tokenizer_config.json`.
    pub tokenizer_config: Option<PathBuf>,
    /// `special_tokens_map.json`.
    pub special_tokens_map: Option<PathBuf>,
    /// `chat_template.jinja`.
    pub chat_template: Option<PathBuf>,
    /// `model.safetensors`, the shards that `model.safetensors.index.json` names, sorted, each once, or one GGUF file.
    pub weights: Vec<PathBuf>,
}

impl ModelFiles {
    /// The model in the folder `path`, the one that is the `.gguf` file `path`, or the one whose weights are the
    /// `.safetensors` file `path` and whose other files lie beside it.
    pub fn from_path(path: &Path) -> Result<Self> {
        let source = path.display().to_string();
        if path.is_dir() {
            return Self::from_folder(path, &source);
        }
        if is_gguf(&source) {
            return Ok(Self::of_gguf(&source, path));
        }
        let reason = match path.extension().and_then(OsStr::to_str) {
            Some("safetensors") => None,
            Some("onnx") => Some(
                "ONNX files are written, and described by `bitnet info`, but not read: give the model that it was made of",
            ),
            Some("bin" | "pt" | "pth") => Some(
                "weights of PyTorch and llama2.c are not read: convert them to safetensors, those of llama2.c with \
                 scripts/llama2c_to_hf.py",
            ),
            _ => Some(
                "this is no model: give a folder, a `.safetensors` or `.gguf` file or a repository id",
            ),
        };
        if let Some(reason) = reason {
            return Err(hub_error(&source, reason));
        }
        let root = match path.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        if !root.join(CONFIG).is_file() {
            let reason =
                format!("the folder of this file has no `{CONFIG}`: put the model's there");
            return Err(hub_error(&source, reason));
        }
        Ok(Self::new(&source, root, vec![path.to_path_buf()]))
    }

    /// What goes with the weights into another form of the model, as far as it is there: generation settings, tokenizer and
    /// chat template.
    pub fn companions(&self) -> impl Iterator<Item = &Path> {
        let files = [
            &self.generation_config,
            &self.tokenizer,
            &self.tokenizer_config,
            &self.special_tokens_map,
            &self.chat_template,
        ];
        files.into_iter().flatten().map(PathBuf::as_path)
    }

    /// The snapshot folder of the repository `repo_id`.
    pub(super) fn from_snapshot(snapshot: &Path, repo_id: &str) -> Result<Self> {
        Self::from_folder(snapshot, repo_id)
    }

    fn from_folder(root: &Path, source: &str) -> Result<Self> {
        let mut names = Vec::new();
        for entry in fs::read_dir(root).map_err(Error::io(root))? {
            let entry = entry.map_err(Error::io(root))?;
            // `is_file` follows links: one whose target is gone is no file.
            if let Ok(name) = entry.file_name().into_string()
                && entry.path().is_file()
            {
                names.push(name);
            }
        }
        names.sort();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let required = required(&names).map_err(|reason| hub_error(source, reason))?;
        if is_gguf(required) {
            return Ok(Self::of_gguf(source, &root.join(required)));
        }
        if required == WEIGHTS {
            return Ok(Self::new(source, root, vec![root.join(WEIGHTS)]));
        }
        let index = root.join(INDEX);
        let shards = read_index(&index)?;
        if let Some(absent) = shards.iter().find(|shard| !root.join(shard).is_file()) {
            let reason =
                format!("`{INDEX}` names `{absent}`, which is missing in {}", root.display());
            return Err(hub_error(source, reason));
        }
        Ok(Self::new(source, root, shards.iter().map(|shard| root.join(shard)).collect()))
    }

    /// All is in the one file: what lies beside it may belong to another model.
    pub(super) fn of_gguf(source: &str, file: &Path) -> Self {
        Self {
            source: source.to_string(),
            root: file.parent().unwrap_or(file).to_path_buf(),
            config: file.to_path_buf(),
            generation_config: None,
            tokenizer: None,
            tokenizer_config: None,
            special_tokens_map: None,
            chat_template: None,
            weights: vec![file.to_path_buf()],
        }
    }

    fn new(source: &str, root: &Path, weights: Vec<PathBuf>) -> Self {
        let optional = |name: &str| Some(root.join(name)).filter(|path| path.is_file());
        Self {
            source: source.to_string(),
            root: root.to_path_buf(),
            config: root.join(CONFIG),
            generation_config: optional(GENERATION_CONFIG),
            tokenizer: optional(TOKENIZER),
            tokenizer_config: optional(TOKENIZER_CONFIG),
            special_tokens_map: optional(SPECIAL_TOKENS_MAP),
            chat_template: optional(CHAT_TEMPLATE),
            weights,
        }
    }
}

/// Whether a file of this name is a whole model.
pub(super) fn is_gguf(name: &str) -> bool {
    let extension = Path::new(name).extension();
    extension.is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"))
}

/// The file that holds or names the weights ([`WEIGHTS`] before [`INDEX`], as transformers looks for them, and then the
/// one GGUF file), given the names of all files; or what is missing and which foreign formats are there instead.
pub(super) fn required<'a>(names: &[&'a str]) -> Result<&'a str, String> {
    let weights = [WEIGHTS, INDEX].into_iter().find(|wanted| names.contains(wanted));
    match weights {
        Some(weights) if names.contains(&CONFIG) => return Ok(weights),
        Some(weights) => return Err(format!("has `{weights}` but no `{CONFIG}`")),
        None => {}
    }
    let is_model = |name: &str| is_gguf(name) && !name.contains('/') && is_below(name);
    match &names.iter().filter(|name| is_model(name)).collect::<Vec<_>>()[..] {
        [] => {}
        [name] => return Ok(name),
        several => {
            let names: Vec<_> =
                several.iter().take(4).map(|n| format!("`{}`", n.escape_debug())).collect();
            return Err(format!(
                "has {} GGUF files: name one of them, as {}",
                several.len(),
                names.join(", ")
            ));
        }
    }
    let seen: Vec<String> = names
        .iter()
        .filter(|name| {
            let extension = Path::new(name).extension().and_then(|extension| extension.to_str());
            matches!(extension, Some("bin" | "pt" | "pth" | "safetensors"))
        })
        .take(3)
        .map(|name| format!("`{}`", name.escape_debug()))
        .collect();
    let config = if names.contains(&CONFIG) { "" } else { "no `config.json` and " };
    let seen = if seen.is_empty() {
        String::new()
    } else {
        format!(
            ", only {}: the weights must be in safetensors format under one of these names",
            seen.join(", ")
        )
    };
    Err(format!("has {config}no `{WEIGHTS}` or `{INDEX}`{seen}"))
}

/// The shards an index names: sorted, each once, all of them below the index's own folder.
pub(super) fn read_index(path: &Path) -> Result<Vec<String>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let malformed = |reason: String| Error::Checkpoint { path: path.to_path_buf(), reason };

    let mut json = Vec::new();
    let file = File::open(path).map_err(Error::io(path))?;
    file.take(MAX_INDEX_BYTES + 1).read_to_end(&mut json).map_err(Error::io(path))?;
    if json.len() as u64 > MAX_INDEX_BYTES {
        return Err(malformed(format!("an index of more than {MAX_INDEX_BYTES} bytes is refused")));
    }
    let index: Index = serde_json::from_slice(&json)
        .map_err(|error| malformed(format!("this is no index of safetensors shards: {error}")))?;
    let shards: BTreeSet<String> = index.weight_map.into_values().collect();
    if shards.is_empty() {
        return Err(malformed("`weight_map` is empty".to_string()));
    }
    if let Some(bad) = shards.iter().find(|shard| !is_shard_name(shard)) {
        return Err(malformed(format!(
            "`weight_map` names {bad:?}: a shard must be a `.safetensors` file below this folder"
        )));
    }
    Ok(shards.into_iter().collect())
}

fn is_shard_name(name: &str) -> bool {
    name.ends_with(".safetensors") && name.len() <= 255 && is_below(name)
}

/// A relative path of plain components; `\` and `:` are separators on Windows.
pub(super) fn is_below(name: &str) -> bool {
    Path::new(name).components().all(|part| matches!(part, Component::Normal(_)))
        && name.split('/').all(|part| !matches!(part, "" | "."))
        && !name.chars().any(|c| c.is_control() || c == '\\' || c == ':')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_said() {
        assert_eq!(required(&[CONFIG, WEIGHTS, INDEX]), Ok(WEIGHTS));
        assert_eq!(required(&[CONFIG, INDEX]), Ok(INDEX));
        assert_eq!(
            required(&[WEIGHTS]).unwrap_err(),
            "has `model.safetensors` but no `config.json`"
        );
        assert_eq!(
            required(&[]).unwrap_err(),
            "has no `config.json` and no `model.safetensors` or `model.safetensors.index.json`"
        );
        let foreign = required(&[CONFIG, "pytorch_model.bin"]).unwrap_err();
        assert!(
            foreign.contains("only `pytorch_model.bin`") && foreign.contains("safetensors format")
        );
        assert_eq!(required(&["README.md", "ggml-model-i2_s.gguf"]), Ok("ggml-model-i2_s.gguf"));
        assert_eq!(required(&[CONFIG, WEIGHTS, "a.gguf"]), Ok(WEIGHTS));
        let several = required(&["a.gguf", "b.gguf"]).unwrap_err();
        assert!(several.contains("`a.gguf`, `b.gguf`"), "{several}");
        assert!(required(&["../a.gguf"]).is_err());
    }

    #[test]
    fn shard_names() {
        for good in ["model-00001-of-00002.safetensors", "part/a b.safetensors"] {
            assert!(is_shard_name(good), "{good}");
        }
        for bad in [
            "../x.safetensors",
            "/etc/x.safetensors",
            "a/../../x.safetensors",
            "./x.safetensors",
            "a//x.safetensors",
            "..\\x.safetensors",
            "c:x.safetensors",
            "x\0.safetensors",
            "x.bin",
            "",
        ] {
            assert!(!is_shard_name(bad), "{bad:?}");
        }
    }

    #[test]
    fn hostile_indexes_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(INDEX);
        let deep = "[".repeat(100_000);
        for json in [
            "",
            "[]",
            "{}",
            r#"{"weight_map": {}}"#,
            r#"{"weight_map": {"a": 1}}"#,
            r#"{"weight_map": {"a": "../a.safetensors"}}"#,
            r#"{"weight_map": {"a": "/a.safetensors"}}"#,
            &deep,
        ] {
            fs::write(&path, json).unwrap();
            let error = read_index(&path).unwrap_err();
            assert!(matches!(error, Error::Checkpoint { .. }), "{error}");
        }
        fs::write(&path, r#"{"metadata": {}, "weight_map": {"b": "2.safetensors", "a": "1.safetensors", "c": "2.safetensors"}}"#)
            .unwrap();
        assert_eq!(read_index(&path).unwrap(), ["1.safetensors", "2.safetensors"]);
    }
}
