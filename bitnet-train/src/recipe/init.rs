//! `[init]`: going on from a checkpoint. Its configuration takes the place of what `[model]` leaves out, and its tokenizer
//! that of `data.tokenizer`.

use std::path::Path;

use bitnet_model::{
    checkpoint::gguf::Gguf,
    config::Config,
    hub::Hub,
    pretrained::{DEFAULT, Precision, Source},
    synthetic,
};
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

/// `[init]`: where the weights come from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Init {
    /// A model of Llama's architecture in full precision, or latent masters of a BitNet: a folder (relative to the
    /// recipe), a `.safetensors` file or a Hub repo id. With `[lora]` packed models too, and `default`, the model inside this
    /// library.
    pub model: String,
    /// Insert the norms of BitNet before `o_proj` and `down_proj`, with gain 1. They bound what is quantized, and they
    /// change the function: the first losses are higher.
    #[serde(default)]
    pub sub_norms: bool,
}

/// The model `name` as seen from the folder `dir`: a path there if there is one, else what it says.
pub(super) fn locate(dir: &Path, name: &str) -> String {
    let path = dir.join(name);
    match path.exists() {
        true => std::path::absolute(&path).unwrap_or(path).display().to_string(),
        false => name.to_owned(),
    }
}

/// Fills in what the checkpoint of `[init]`, if there is one, says of model and tokenizer.
///
/// # Errors
/// A checkpoint that cannot be found; a key of the recipe that contradicts it.
pub(super) fn complete(table: &mut Table, dir: &Path) -> Result<(), String> {
    let Some(Value::Table(init)) = table.get_mut("init") else { return Ok(()) };
    let Some(Value::String(model)) = init.get_mut("model") else { return Ok(()) };
    *model = locate(dir, model);
    let wrong = |error: bitnet_model::Error| format!("`init.model`: {error}");
    let (config, place, tokenizer) = match model.as_str() {
        name if name == DEFAULT || name.starts_with(synthetic::PREFIX) => {
            let source = Source::open(name, Precision::AsFound, &Hub::from_env()).map_err(wrong)?;
            (source.config, name.to_owned(), (name == DEFAULT).then(|| DEFAULT.to_owned()))
        }
        _ => {
            let files = Hub::from_env().resolve(model).map_err(wrong)?;
            if Gguf::is_named_so(&files.config) {
                return Err(format!(
                    "`init.model`: {}: training begins with a model in the Hub's layout; `bitnet convert` makes one of a \
                     GGUF file with ternary weights",
                    files.config.display()
                ));
            }
            let tokenizer = files
                .tokenizer
                .map(|path| std::path::absolute(&path).unwrap_or(path).display().to_string());
            let config = Config::from_file(&files.config).map_err(wrong)?;
            (config, files.config.display().to_string(), tokenizer)
        }
    };
    let geometry = table.entry("model").or_insert_with(|| Value::Table(Table::new()));
    let Value::Table(geometry) = geometry else { return Ok(()) };
    for (key, value) in geometry_of(&config) {
        let given = geometry.entry(key).or_insert_with(|| value.clone());
        if *given != value {
            return Err(format!("`model.{key}` is {given}, but {value} in {place}"));
        }
    }
    let Some(Value::Table(data)) = table.get_mut("data") else { return Ok(()) };
    if let Some(tokenizer) = tokenizer {
        let is_its_own = |given: &Value| {
            given.as_str().is_some_and(|path| {
                path == tokenizer || dir.join(path).as_path() == Path::new(&tokenizer)
            })
        };
        if data.get("tokenizer").is_some_and(|given| !is_its_own(given)) {
            return Err("`data.tokenizer`: the model of [init] has a tokenizer of its own; leave one of them out".into());
        }
        data.insert("tokenizer".into(), tokenizer.into());
    }
    Ok(())
}

/// The keys of `[model]` that a configuration decides.
fn geometry_of(config: &Config) -> [(&'static str, Value); 11] {
    let size = |size: usize| Value::Integer(size as i64);
    [
        ("hidden_size", size(config.hidden_size)),
        ("intermediate_size", size(config.intermediate_size)),
        ("num_hidden_layers", size(config.num_hidden_layers)),
        ("num_attention_heads", size(config.num_attention_heads)),
        ("num_key_value_heads", size(config.num_key_value_heads)),
        ("head_dim", size(config.head_dim)),
        ("vocab_size", size(config.vocab_size)),
        ("max_position_embeddings", size(config.max_position_embeddings)),
        ("tie_word_embeddings", Value::Boolean(config.tie_word_embeddings)),
        ("rope_theta", Value::Float(config.rope_theta)),
        ("rms_norm_eps", Value::Float(config.rms_norm_eps)),
    ]
}
