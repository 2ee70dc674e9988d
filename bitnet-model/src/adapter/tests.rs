//! The settings: what PEFT writes is read, what it reads is written, and what cannot be computed is refused by name.

#![allow(clippy::unwrap_used)]

use std::path::Path;

use serde_json::{Value, json};

use super::{AdapterConfig, Modules, PairSpec, json};

fn parse(value: &Value) -> Result<AdapterConfig, String> {
    json::parse(Path::new("a/adapter_config.json"), &value.to_string()).map_err(|e| e.to_string())
}

/// Minimal settings with `changes` on top.
fn settings(changes: Value) -> Value {
    let mut value = json!({
        "peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "down_proj"],
    });
    for (key, change) in changes.as_object().unwrap() {
        value[key] = change.clone();
    }
    value
}

fn config(changes: Value) -> AdapterConfig {
    parse(&settings(changes)).unwrap()
}

const Q: &str = "model.layers.1.self_attn.q_proj";
const DOWN: &str = "model.layers.10.mlp.down_proj";

#[test]
fn modules_are_matched_as_peft_does() {
    let targets = |changes: Value, path: &str| config(changes).pair(path).unwrap().is_some();
    assert!(targets(json!({}), Q) && targets(json!({}), DOWN));
    assert!(!targets(json!({}), "model.layers.1.self_attn.k_proj"));
    assert!(!targets(json!({"target_modules": ["proj"]}), Q)); // only behind a dot
    assert!(targets(json!({"target_modules": [Q]}), Q));
    assert!(targets(json!({"target_modules": "all-linear"}), Q));
    let expression = json!({"target_modules": r"model\.layers\.(?!10\.)\d+\..*(q|down)_proj"});
    assert!(targets(expression.clone(), Q) && !targets(expression, DOWN));
    assert!(!targets(json!({"target_modules": "q_proj"}), Q)); // an expression fits the whole path
    let layers = json!({"layers_to_transform": [1], "layers_pattern": "layers"});
    assert!(targets(layers.clone(), Q) && !targets(layers, DOWN));
    assert!(targets(json!({"layers_to_transform": 10}), DOWN));
    assert!(!targets(json!({"layers_to_transform": 1, "layers_pattern": ["blocks"]}), Q));
    assert!(!targets(json!({"exclude_modules": ["down_proj"]}), DOWN));
    assert!(!targets(json!({"exclude_modules": ".*1.*q_proj"}), Q));
}

#[test]
fn ranks_and_scales_follow_their_patterns() {
    let changes = json!({
        "rank_pattern": {"q_proj": 4, r"layers\.1\.self_attn\.q_proj": 2},
        "alpha_pattern": {"^model.layers.10.*down_proj": 64},
    });
    let pair = |changes: &Value, path| config(changes.clone()).pair(path).unwrap().unwrap();
    assert_eq!(pair(&changes, Q), PairSpec { rank: 4, scale: 4. });
    assert_eq!(pair(&changes, DOWN), PairSpec { rank: 8, scale: 8. });
    let rslora = json!({"use_rslora": true, "r": 16});
    assert_eq!(pair(&rslora, Q), PairSpec { rank: 16, scale: 4. });
}

#[test]
fn what_is_stored_whole_is_named_by_any_end_of_its_path() {
    let norms = config(json!({"modules_to_save": ["norm"]}));
    let paths = ["model.norm", "model.layers.0.input_layernorm", "model.layers.1.mlp.ffn_sub_norm"];
    assert!(paths.iter().all(|path| norms.saves(path)));
    let last = config(json!({"modules_to_save": ["model.norm"]}));
    assert_eq!(paths.map(|path| last.saves(path)), [true, false, false]);
    assert!(!norms.saves("lm_head"));
}

#[test]
fn settings_survive_being_written() {
    let changes = json!({
        "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"down_proj": 2.5}, "use_rslora": true,
        "lora_dropout": 0.05, "modules_to_save": ["lm_head"], "layers_to_transform": [0, 3],
        "layers_pattern": ["layers"], "exclude_modules": ["k_proj"],
        "base_model_name_or_path": "microsoft/bitnet-b1.58-2B-4T", "task_type": "CAUSAL_LM",
    });
    for config in [config(changes), config(json!({"target_modules": r".*\.q_proj"}))] {
        assert_eq!(parse(&json::write(&config)).unwrap(), config);
    }
    let all = json::write(&config(json!({"target_modules": "all-linear"})));
    assert_eq!(all["target_modules"].as_array().unwrap().len(), 7);
    assert_eq!(all["lora_alpha"], json!(16));
    assert_eq!(parse(&json::write(&AdapterConfig::default())).unwrap(), AdapterConfig::default());
    assert!(
        matches!(AdapterConfig::default().target_modules, Modules::Names(names) if names.len() == 7)
    );
}

#[test]
fn what_is_off_is_passed_over() {
    parse(&settings(json!({
        "use_dora": false, "alora_invocation_tokens": null, "loftq_config": {}, "some_new_key": [],
        "peft_version": "0.21.2", "revision": "main", "init_lora_weights": "gaussian",
        "megatron_core": "megatron.core", "qalora_group_size": 16,
    })))
    .unwrap();
}

#[test]
fn refusals_name_the_key_and_say_what_to_do() {
    for (changes, key, reason) in [
        (json!({"peft_type": "IA3"}), "peft_type", "LORA"),
        (json!({"peft_type": null}), "peft_type", "LORA"),
        (json!({"use_dora": true}), "use_dora", "plain LoRA"),
        (json!({"bias": "all"}), "bias", "none"),
        (json!({"lora_bias": true}), "lora_bias", "lora_bias false"),
        (json!({"fan_in_fan_out": true}), "fan_in_fan_out", "transposed"),
        (json!({"alora_invocation_tokens": [1, 2]}), "alora_invocation_tokens", "aLoRA"),
        (json!({"trainable_token_indices": [5]}), "trainable_token_indices", "embed_tokens"),
        (json!({"some_new_key": "x"}), "some_new_key", "not known"),
        (json!({"init_lora_weights": "pissa"}), "init_lora_weights", "change the base"),
        (json!({"r": 0}), "`r`", "at least 1"),
        (json!({"r": -1}), "`r`", "non-negative integer"),
        (json!({"r": null}), "`r`", "missing"),
        (json!({"lora_alpha": null}), "lora_alpha", "missing"),
        (json!({"lora_dropout": 1.0}), "lora_dropout", "[0, 1)"),
        (json!({"target_modules": null}), "target_modules", "q_proj"),
        (json!({"target_modules": "("}), "target_modules", "no regular expression"),
        (json!({"target_modules": 3}), "target_modules", "list of strings"),
        (json!({"rank_pattern": {"q_proj": 0}}), "rank_pattern.q_proj", "positive"),
        (json!({"alpha_pattern": {"(": 1}}), "alpha_pattern.(", "no regular expression"),
        (json!({"layers_to_transform": "x"}), "layers_to_transform", "a number"),
        (
            json!({"layers_to_transform": [1], "target_modules": "all-linear"}),
            "layers_to_transform",
            "list of names",
        ),
    ] {
        let message = parse(&settings(changes.clone())).unwrap_err();
        let names = message.contains("a/adapter_config.json") && message.contains(key);
        assert!(names && message.contains(reason), "{changes}: {message}");
    }
}
