//! `adapter_config.json` ⇄ [`AdapterConfig`].
//!
//! A key that is not understood must be off (null, false or empty): what would change the numbers is an error, never
//! ignored.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::{
    config::AdapterConfig,
    targets::{Modules, Pattern},
};
use crate::{
    config::{
        PROJECTIONS,
        fields::{Fields, parse_object, read_text},
    },
    error::Result,
};

/// Keys that are read.
const READ: [&str; 16] = [
    "peft_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "modules_to_save",
    "base_model_name_or_path",
    "task_type",
    "bias",
    "init_lora_weights",
];

/// Keys that say nothing of the function that a trained adapter computes.
const NEUTRAL: [&str; 9] = [
    "auto_mapping",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
];

/// What to do about keys that are known and refused.
const REFUSED: [(&str, &str); 9] = [
    ("use_dora", "DoRA rescales the base's weights, which stay packed here: train plain LoRA"),
    ("lora_bias", "biases of adapters are not supported: train with lora_bias false"),
    ("fan_in_fan_out", "transposed weights do not occur in these models"),
    ("alora_invocation_tokens", "activated LoRA (aLoRA) is not supported: train plain LoRA"),
    ("trainable_token_indices", "save the whole `embed_tokens` by modules_to_save instead"),
    ("layer_replication", "layers cannot be replicated: train on a model of that depth"),
    ("target_parameters", "only modules can be targets: name projections in target_modules"),
    ("use_qalora", "QALoRA pools the inputs by groups, which is not supported: train plain LoRA"),
    ("ensure_weight_tying", "saved modules are not tied: save both `embed_tokens` and `lm_head`"),
];

/// Reads and validates an `adapter_config.json`.
pub(super) fn read(path: &Path) -> Result<AdapterConfig> {
    parse(path, &read_text(path)?)
}

/// Validates the text of an `adapter_config.json`; errors name `path`.
pub(super) fn parse(path: &Path, text: &str) -> Result<AdapterConfig> {
    let object = parse_object(path, text)?;
    let fields = Fields::new(path, &object);
    match fields.string("peft_type")? {
        Some("LORA") => {}
        _ => return Err(fields.unsupported("peft_type", "LORA")),
    }
    for (name, value) in fields.entries() {
        if READ.contains(&name) || NEUTRAL.contains(&name) || is_off(value) {
            continue;
        }
        let hint = REFUSED.iter().find(|(refused, _)| *refused == name).map(|(_, hint)| *hint);
        let hint = hint.unwrap_or("not known to this version, and may change what it computes");
        return Err(fields.error(name, format!("{value} is not supported: {hint}")));
    }
    if !matches!(fields.string("bias")?, None | Some("none")) {
        return Err(fields.unsupported("bias", "none (the projections have no biases to train)"));
    }
    check_init(&fields, &object)?;
    let rank = match fields.integer("r")? {
        Some(rank @ 1..) => size(rank),
        Some(0) => return Err(fields.error("r", "0: the rank must be at least 1")),
        None => return Err(fields.error("r", "missing: the rank of the adapter")),
    };
    let alpha = fields.number("lora_alpha")?;
    let alpha = alpha.ok_or_else(|| fields.error("lora_alpha", "missing: scales the adapter"))?;
    let dropout = fields.number("lora_dropout")?.unwrap_or(0.);
    if !(0. ..1.).contains(&dropout) {
        return Err(fields.error("lora_dropout", format!("{dropout} is not in [0, 1)")));
    }
    let target_modules = modules(&fields, &object, "target_modules")?;
    let target_modules = target_modules.ok_or_else(|| {
        fields.error("target_modules", format!("missing; the projections: {PROJECTIONS:?}"))
    })?;
    let layers = integers(&fields, &object, "layers_to_transform")?;
    let layers_pattern = match object.get("layers_pattern") {
        Some(Value::String(one)) if one.is_empty() => Vec::new(),
        Some(Value::String(one)) => vec![pattern(&fields, "layers_pattern", one)?],
        _ => {
            let several = fields.strings("layers_pattern")?.into_iter();
            several.map(|text| pattern(&fields, "layers_pattern", text)).collect::<Result<_>>()?
        }
    };
    if !layers.is_empty() && !matches!(target_modules, Modules::Names(_)) {
        let reason = "needs a list of names in target_modules, not an expression";
        return Err(fields.error("layers_to_transform", reason));
    }
    let ranks = patterns(&fields, "rank_pattern", |value| value.as_u64().filter(|&r| r > 0))?;
    Ok(AdapterConfig {
        rank,
        alpha,
        dropout,
        target_modules,
        exclude_modules: modules(&fields, &object, "exclude_modules")?,
        layers_to_transform: layers,
        layers_pattern,
        rank_pattern: ranks.into_iter().map(|(pattern, rank)| (pattern, size(rank))).collect(),
        alpha_pattern: patterns(&fields, "alpha_pattern", Value::as_f64)?,
        use_rslora: fields.boolean("use_rslora")?.unwrap_or(false),
        modules_to_save: fields.strings("modules_to_save")?.into_iter().map(String::from).collect(),
        base_model: fields.string("base_model_name_or_path")?.map(String::from),
        task_type: fields.string("task_type")?.map(String::from),
    })
}

fn size(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX) // refused with the shapes
}

/// Null, false, or empty.
fn is_off(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(on) => !on,
        Value::Array(values) => values.is_empty(),
        Value::Object(values) => values.is_empty(),
        Value::String(text) => text.is_empty(),
        Value::Number(_) => false,
    }
}

/// Some initializations move a part of the base's weights into the adapter, which is then none for the base as it was.
fn check_init(fields: &Fields, object: &Map<String, Value>) -> Result<()> {
    match object.get("init_lora_weights") {
        None | Some(Value::Null | Value::Bool(_)) => Ok(()),
        Some(Value::String(name))
            if matches!(&name[..], "gaussian" | "eva" | "orthogonal" | "true" | "false") =>
        {
            Ok(())
        }
        _ => {
            let hint = "true, false, gaussian, eva, orthogonal; others change the base's weights \
                        (PEFT converts such adapters: save_pretrained with \
                        path_initial_model_for_weight_conversion)";
            Err(fields.unsupported("init_lora_weights", hint))
        }
    }
}

/// A list of names, or a string that is `all-linear` or a regular expression.
fn modules(fields: &Fields, object: &Map<String, Value>, name: &str) -> Result<Option<Modules>> {
    match object.get(name) {
        Some(Value::String(all)) if all == "all-linear" => Ok(Some(Modules::AllLinear)),
        Some(Value::String(text)) => Ok(Some(Modules::Pattern(pattern(fields, name, text)?))),
        _ => {
            let names = fields.strings(name)?;
            let names = Vec::from_iter(names.into_iter().map(String::from));
            Ok((!names.is_empty()).then_some(Modules::Names(names)))
        }
    }
}

fn pattern(fields: &Fields, name: &str, text: &str) -> Result<Pattern> {
    Pattern::new(text).map_err(|reason| fields.error(name, reason))
}

/// One integer or a list of them.
fn integers(fields: &Fields, object: &Map<String, Value>, name: &str) -> Result<Vec<usize>> {
    let read = |value: &Value| value.as_u64().map(size);
    let values = match object.get(name) {
        None | Some(Value::Null) => Some(Vec::new()),
        Some(Value::Array(values)) => values.iter().map(read).collect(),
        Some(one) => read(one).map(|one| vec![one]),
    };
    values.ok_or_else(|| fields.unsupported(name, "a number, or a list of them"))
}

/// The entries of `rank_pattern` or `alpha_pattern`, in their order.
fn patterns<T>(
    fields: &Fields,
    name: &'static str,
    read: impl Fn(&Value) -> Option<T>,
) -> Result<Vec<(Pattern, T)>> {
    let prefix = if name == "rank_pattern" { "rank_pattern." } else { "alpha_pattern." };
    let Some(entries) = fields.object(name, prefix)? else { return Ok(Vec::new()) };
    let entry = |(key, value): (&str, &Value)| {
        let read = read(value).ok_or_else(|| {
            entries.error(key, format!("expected a positive number, found {value}"))
        })?;
        Ok((pattern(&entries, key, key)?, read))
    };
    entries.entries().map(entry).collect()
}

/// The `adapter_config.json` of `config`, which PEFT reads.
pub(super) fn write(config: &AdapterConfig) -> Value {
    let modules = |modules: &Modules| match modules {
        Modules::Names(names) => json!(names),
        Modules::Pattern(pattern) => json!(pattern.text()),
        // What PEFT would make of `all-linear`.
        Modules::AllLinear => json!(PROJECTIONS),
    };
    let list = |values: &[String]| (!values.is_empty()).then(|| json!(values));
    let layers = &config.layers_to_transform;
    let layers_pattern: Vec<&str> = config.layers_pattern.iter().map(Pattern::text).collect();
    let ranks = config.rank_pattern.iter().map(|(key, rank)| (key.text().into(), json!(rank)));
    let alphas =
        config.alpha_pattern.iter().map(|(key, alpha)| (key.text().into(), number(*alpha)));
    json!({
        "alpha_pattern": Map::from_iter(alphas),
        "auto_mapping": null,
        "base_model_name_or_path": config.base_model,
        "bias": "none",
        "exclude_modules": config.exclude_modules.as_ref().map(modules),
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "layers_pattern": (!layers_pattern.is_empty()).then_some(layers_pattern),
        "layers_to_transform": (!layers.is_empty()).then_some(layers),
        "lora_alpha": number(config.alpha),
        "lora_bias": false,
        "lora_dropout": config.dropout,
        "modules_to_save": list(&config.modules_to_save),
        "peft_type": "LORA",
        "r": config.rank,
        "rank_pattern": Map::from_iter(ranks),
        "revision": null,
        "target_modules": modules(&config.target_modules),
        "task_type": config.task_type,
        "use_dora": false,
        "use_rslora": config.use_rslora,
    })
}

/// Whole numbers without a fraction, as PEFT writes them.
fn number(value: f64) -> Value {
    match value.fract() == 0. && value.abs() < 1e15 {
        true => json!(value as i64),
        false => json!(value),
    }
}
