use serde_json::{Value, json};

use super::*;
use crate::checkpoint::Dtype;

const PATH: &str = "models/config.json";

fn parse(json: &Value) -> Result<Config> {
    Config::from_json(Path::new(PATH), &json.to_string())
}

/// `base` with the fields of `changes`, where null removes a field (as it does for the parser).
fn with(base: &Value, changes: Value) -> Value {
    let mut json = base.clone();
    json.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    json
}

/// microsoft/bitnet-b1.58-2B-4T, verbatim.
const BITNET_2B_4T: &str = r#"{
    "architectures": ["BitNetForCausalLM"],
    "auto_map": {
      "AutoConfig": "configuration_bitnet.BitNetConfig",
      "AutoModelForCausalLM": "modeling_bitnet.BitNetForCausalLM"
    },
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "relu2",
    "hidden_size": 2560,
    "initializer_range": 0.02,
    "intermediate_size": 6912,
    "max_position_embeddings": 4096,
    "model_type": "bitnet",
    "rms_norm_eps": 1e-05,
    "num_attention_heads": 20,
    "num_hidden_layers": 30,
    "num_key_value_heads": 5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": true,
    "torch_dtype": "bfloat16",
    "use_cache": true,
    "vocab_size": 128256,
    "quantization_config": {
      "quant_method": "bitnet",
      "linear_class": "autobitlinear",
      "quantization_mode": "offline"
    }
}"#;

fn bitnet() -> Value {
    serde_json::from_str(BITNET_2B_4T).unwrap()
}

/// The geometry of Falcon3-3B, as plain Llama.
fn llama() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 131072,
        "hidden_size": 3072, "intermediate_size": 9216, "num_hidden_layers": 22, "num_attention_heads": 12,
        "num_key_value_heads": 4, "head_dim": 256, "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768, "rope_theta": 1000042, "tie_word_embeddings": false,
        "eos_token_id": 11, "attention_bias": false, "mlp_bias": false, "pretraining_tp": 1,
    })
}

fn falcon3() -> Value {
    let quantization = json!({"quant_method": "bitnet", "modules_to_not_convert": ["lm_head"]});
    with(&llama(), json!({"quantization_config": quantization, "is_bitnet_config": true}))
}

fn one_bit_llm() -> Value {
    json!({
        "architectures": ["BitnetForCausalLM"], "model_type": "llama", "weight_bits": 1, "input_bits": 8,
        "vocab_size": 32002, "hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16, "num_key_value_heads": 16, "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048, "rope_theta": 10000.0, "rope_scaling": null, "pad_token_id": 32000,
        "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": true, "torch_dtype": "float16",
    })
}

fn quantization(weights: WeightForm) -> Option<Quantization> {
    Some(Quantization {
        weights,
        rounding: Rounding::HalfEven,
        scheme: Scheme::default(),
        input_norm_eps: None,
    })
}

#[test]
fn bitnet_packed_and_master_weights() {
    let config = Config::from_json(Path::new(PATH), BITNET_2B_4T).unwrap();
    let expected = Config {
        family: Family::BitNet,
        vocab_size: 128256,
        hidden_size: 2560,
        intermediate_size: 6912,
        num_hidden_layers: 30,
        num_attention_heads: 20,
        num_key_value_heads: 5,
        head_dim: 128,
        hidden_act: Activation::Relu2,
        rms_norm_eps: 1e-5,
        rope_theta: 500_000.,
        max_position_embeddings: 4096,
        tie_word_embeddings: true,
        attention_bias: false,
        bos_token_id: Some(128000),
        eos_token_ids: vec![128001],
        quantization: quantization(WeightForm::Packed(ScaleConvention::Multiply)),
    };
    assert_eq!(config, expected);
    assert_eq!(config.sub_norm_names(), Some(("attn_sub_norm", "ffn_sub_norm")));

    let mut json = bitnet();
    json["quantization_config"]["quantization_mode"] = json!("online");
    assert_eq!(parse(&json).unwrap().quantization, quantization(WeightForm::Latent));
}

#[test]
fn packed_llama() {
    let config = parse(&falcon3()).unwrap();
    assert_eq!((config.family, config.head_dim), (Family::Llama, 256));
    assert_eq!(config.quantization, quantization(WeightForm::Packed(ScaleConvention::Divide)));
    assert_eq!(config.sub_norm_names(), None);

    for (class, mode, weights) in [
        ("bitlinear", "offline", WeightForm::Packed(ScaleConvention::Divide)),
        ("bitlinear", "online", WeightForm::Packed(ScaleConvention::Divide)),
        ("autobitlinear", "offline", WeightForm::Packed(ScaleConvention::Multiply)),
        ("autobitlinear", "online", WeightForm::Latent),
    ] {
        let mut json = falcon3();
        json["quantization_config"]["linear_class"] = json!(class);
        json["quantization_config"]["quantization_mode"] = json!(mode);
        assert_eq!(parse(&json).unwrap().quantization, quantization(weights), "{class} {mode}");
    }
}

#[test]
fn input_norms() {
    let mut json = falcon3();
    json["quantization_config"]["use_rms_norm"] = json!(true);
    assert_eq!(parse(&json).unwrap().quantization.unwrap().input_norm_eps, Some(1e-6));
    json["quantization_config"]["rms_norm_eps"] = json!(1e-5);
    assert_eq!(parse(&json).unwrap().quantization.unwrap().input_norm_eps, Some(1e-5));
}

#[test]
fn one_bit_llm_by_architecture_or_bits() {
    let config = parse(&one_bit_llm()).unwrap();
    assert_eq!((config.family, config.head_dim), (Family::OneBitLlm, 96));
    assert_eq!(config.quantization, quantization(WeightForm::Latent));
    assert_eq!(config.sub_norm_names(), Some(("inner_attn_ln", "ffn_layernorm")));
    let by_bits = with(&one_bit_llm(), json!({"architectures": null}));
    assert_eq!(parse(&by_bits).unwrap(), config);
    let by_name = with(&one_bit_llm(), json!({"weight_bits": null, "input_bits": null}));
    assert_eq!(parse(&by_name).unwrap(), config);
}

#[test]
fn ternarize_is_for_full_precision() {
    let plain = parse(&llama()).unwrap();
    assert_eq!(plain.quantization, None);
    let latent = plain.ternarize(Path::new(PATH)).unwrap();
    let quantization = latent.quantization.unwrap();
    assert_eq!(
        (quantization.weights, quantization.rounding),
        (WeightForm::Latent, Rounding::HalfUp)
    );

    for (json, field) in [
        (falcon3(), "`quantization_config`"),
        (with(&llama(), json!({"attention_bias": true})), "`attention_bias`"),
    ] {
        let error = parse(&json).unwrap().ternarize(Path::new(PATH)).unwrap_err().to_string();
        assert!(error.contains(PATH) && error.contains(field), "{error}");
    }
}

#[test]
fn defaults_of_transformers() {
    let geometry = json!({
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 4,
    });
    let bitnet = parse(&with(&geometry, json!({"model_type": "bitnet"}))).unwrap();
    assert_eq!((bitnet.num_key_value_heads, bitnet.head_dim), (4, 8));
    assert_eq!(
        (bitnet.hidden_act, bitnet.rms_norm_eps, bitnet.rope_theta),
        (Activation::Relu2, 1e-5, 5e5)
    );
    assert_eq!((bitnet.max_position_embeddings, bitnet.tie_word_embeddings), (2048, false));
    assert_eq!((bitnet.bos_token_id, bitnet.eos_token_ids), (None, vec![]));
    assert_eq!(bitnet.quantization, None);
    let llama = parse(&with(&geometry, json!({"model_type": "llama"}))).unwrap();
    assert_eq!(
        (llama.hidden_act, llama.rms_norm_eps, llama.rope_theta),
        (Activation::Silu, 1e-6, 1e4)
    );
}

#[test]
fn rotary_base_old_and_new() {
    let nested = json!({"rope_theta": 1000042.0, "rope_type": "default"});
    for changes in [
        json!({"rope_theta": null, "rope_parameters": nested}),
        json!({"rope_parameters": nested}),
        json!({"rope_scaling": {"type": "default"}}),
        json!({"dtype": "bfloat16", "sliding_window": null}),
    ] {
        assert_eq!(parse(&with(&llama(), changes)).unwrap().rope_theta, 1_000_042.);
    }
}

#[test]
fn several_ends() {
    let config = parse(&with(&llama(), json!({"eos_token_id": [11, 12]}))).unwrap();
    assert_eq!(config.eos_token_ids, [11, 12]);
}

#[test]
fn refusals_name_the_field_and_the_value() {
    let quantized = |key: &str, value: Value| {
        let mut json = bitnet();
        json["quantization_config"][key] = value;
        json
    };
    let cases = [
        (with(&bitnet(), json!({"model_type": "mistral"})), "`model_type`", "mistral"),
        (with(&bitnet(), json!({"model_type": null})), "`model_type`", "missing"),
        (with(&bitnet(), json!({"model_type": 7})), "`model_type`", "found 7"),
        (
            with(&bitnet(), json!({"architectures": ["LlamaForCausalLM"]})),
            "`architectures`",
            "Llama",
        ),
        (with(&llama(), json!({"architectures": ["LlamaModel"]})), "`architectures`", "LlamaModel"),
        (with(&llama(), json!({"architectures": ["a", "b"]})), "`architectures`", "one"),
        (with(&bitnet(), json!({"hidden_act": "gelu"})), "`hidden_act`", "gelu"),
        (with(&bitnet(), json!({"weight_bits": 2})), "`weight_bits`", "2"),
        (with(&one_bit_llm(), json!({"input_bits": 4})), "`input_bits`", "4"),
        (
            with(&one_bit_llm(), json!({"quantization_config": {"quant_method": "bitnet"}})),
            "`quantization_config`",
            "contradicts",
        ),
        (quantized("quant_method", json!("awq")), "`quantization_config.quant_method`", "awq"),
        (quantized("quant_method", json!(null)), "`quantization_config.quant_method`", "missing"),
        (
            quantized("linear_class", json!("linear")),
            "`quantization_config.linear_class`",
            "linear",
        ),
        (
            quantized("quantization_mode", json!("on")),
            "`quantization_config.quantization_mode`",
            "on",
        ),
        (
            quantized("modules_to_not_convert", json!(["lm_head", "model.layers.0.mlp.up_proj"])),
            "`quantization_config.modules_to_not_convert`",
            "model.layers.0.mlp.up_proj",
        ),
        (quantized("rms_norm_eps", json!(-0.5)), "`quantization_config.rms_norm_eps`", "-0.5"),
        (quantized("use_rms_norm", json!("yes")), "`quantization_config.use_rms_norm`", "yes"),
        (
            with(&llama(), json!({"rope_scaling": {"type": "linear"}})),
            "`rope_scaling.type`",
            "linear",
        ),
        (with(&llama(), json!({"rope_scaling": {"factor": 4.0}})), "`rope_scaling.factor`", "4"),
        (
            with(&llama(), json!({"rope_parameters": {"rope_type": "llama3"}})),
            "`rope_parameters.rope_type`",
            "llama3",
        ),
        (
            with(&llama(), json!({"rope_parameters": {"rope_theta": 10000.0}})),
            "`rope_parameters.rope_theta`",
            "10000",
        ),
        (with(&llama(), json!({"partial_rotary_factor": 0.5})), "`partial_rotary_factor`", "0.5"),
        (with(&bitnet(), json!({"num_key_value_heads": 3})), "`num_key_value_heads`", "3"),
        (with(&bitnet(), json!({"num_key_value_heads": 40})), "`num_key_value_heads`", "40"),
        (with(&bitnet(), json!({"head_dim": 64})), "`head_dim`", "64"),
        (with(&llama(), json!({"head_dim": 33})), "`head_dim`", "33"),
        (with(&llama(), json!({"head_dim": 1 << 20})), "`head_dim`", "1048576"),
        (
            with(&bitnet(), json!({"num_attention_heads": 7, "num_key_value_heads": 7})),
            "`num_attention_heads`",
            "7",
        ),
        (with(&bitnet(), json!({"hidden_size": null})), "`hidden_size`", "missing"),
        (with(&bitnet(), json!({"hidden_size": 0})), "`hidden_size`", "0"),
        (with(&bitnet(), json!({"hidden_size": -2560})), "`hidden_size`", "-2560"),
        (
            with(&bitnet(), json!({"hidden_size": u64::MAX})),
            "`hidden_size`",
            "18446744073709551615",
        ),
        (with(&bitnet(), json!({"hidden_size": 2560.5})), "`hidden_size`", "2560.5"),
        (
            with(&bitnet(), json!({"num_hidden_layers": 1_000_000})),
            "`num_hidden_layers`",
            "1000000",
        ),
        (with(&bitnet(), json!({"intermediate_size": 6910})), "`intermediate_size`", "6910"),
        (with(&bitnet(), json!({"vocab_size": 1u64 << 40})), "`vocab_size`", "1099511627776"),
        (with(&bitnet(), json!({"rms_norm_eps": -0.5})), "`rms_norm_eps`", "-0.5"),
        (with(&bitnet(), json!({"rms_norm_eps": "1e-5"})), "`rms_norm_eps`", "\"1e-5\""),
        (with(&bitnet(), json!({"rope_theta": 0})), "`rope_theta`", "0"),
        (with(&bitnet(), json!({"attention_bias": true})), "`attention_bias`", "true"),
        (with(&llama(), json!({"mlp_bias": true})), "`mlp_bias`", "true"),
        (with(&bitnet(), json!({"eos_token_id": [128001, 128256]})), "`eos_token_id`", "128256"),
        (with(&bitnet(), json!({"bos_token_id": -1})), "`bos_token_id`", "-1"),
        (with(&bitnet(), json!({"tie_word_embeddings": 1})), "`tie_word_embeddings`", "1"),
    ];
    for (json, field, value) in cases {
        let error = parse(&json).expect_err(field).to_string();
        assert!(error.starts_with(PATH) && error.contains(field), "{field}: {error}");
        assert!(error.contains(value), "{field}, {value}: {error}");
    }
}

#[test]
fn text_that_is_not_an_object() {
    for text in ["", "[]", "{\"rms_norm_eps\": NaN}", "{\"a\": 1e999}", "nul", &"[".repeat(100_000)]
    {
        let error = Config::from_json(Path::new(PATH), text).unwrap_err().to_string();
        assert!(error.starts_with(PATH), "{error}");
    }
    let long = with(&bitnet(), json!({"hidden_act": "ß".repeat(1000)}));
    assert!(parse(&long).unwrap_err().to_string().len() < 400);
}

#[test]
fn json_round_trip() {
    let mut input_norm = falcon3();
    input_norm["quantization_config"]["use_rms_norm"] = json!(true);
    let mut online = bitnet();
    online["quantization_config"]["quantization_mode"] = json!("online");
    let two_ends = with(&llama(), json!({"eos_token_id": [1, 2], "attention_bias": true}));
    for json in [bitnet(), online, falcon3(), input_norm, llama(), two_ends, one_bit_llm()] {
        let config = parse(&json).unwrap();
        assert_eq!(parse(&config.to_json()).unwrap(), config);
    }

    let plain = parse(&llama()).unwrap();
    let ternarized = plain.clone().ternarize(Path::new(PATH)).unwrap();
    assert_eq!(parse(&ternarized.to_json()).unwrap(), plain);

    let mut packed = parse(&one_bit_llm()).unwrap();
    packed.quantization = quantization(WeightForm::Packed(ScaleConvention::Multiply));
    let read = parse(&packed.to_json()).unwrap();
    assert_eq!(read, Config { family: Family::BitNet, ..packed });
}

#[test]
fn generation_config() {
    let path = Path::new("generation_config.json");
    let text = r#"{"bos_token_id": 128000, "eos_token_id": [128001, 128009], "do_sample": true,
        "temperature": 0.6, "max_length": 4096, "top_p": 0.9, "transformers_version": "4.40.0.dev0"}"#;
    let config = GenerationConfig::from_json(path, text).unwrap();
    let expected = GenerationConfig {
        do_sample: Some(true),
        temperature: Some(0.6),
        top_p: Some(0.9),
        bos_token_id: Some(128000),
        eos_token_ids: vec![128001, 128009],
        max_length: Some(4096),
        ..Default::default()
    };
    assert_eq!(config, expected);
    assert_eq!(GenerationConfig::from_json(path, &config.to_json().to_string()).unwrap(), config);
    assert_eq!(GenerationConfig::from_json(path, "{}").unwrap(), GenerationConfig::default());

    for (field, value) in [
        ("temperature", json!(-0.5)),
        ("top_p", json!(1.5)),
        ("min_p", json!(-0.1)),
        ("top_k", json!(-1)),
        ("repetition_penalty", json!(0)),
        ("eos_token_id", json!([1, "2"])),
        ("max_length", json!(1.5)),
        ("do_sample", json!("no")),
    ] {
        let error = GenerationConfig::from_json(path, &json!({ field: value }).to_string());
        let error = error.expect_err(field).to_string();
        assert!(error.contains(&format!("`{field}`")) && error.contains("generation"), "{error}");
    }
}

/// The tensors of a one-layer model; values do not matter.
fn tensors(config: &Config) -> Vec<(String, Dtype, Vec<usize>)> {
    let (hidden, inter) = (config.hidden_size, config.intermediate_size);
    let key_value = config.num_key_value_heads * config.head_dim;
    let layer = "model.layers.0";
    let mut tensors = vec![
        ("model.embed_tokens.weight".to_owned(), Dtype::BF16, vec![config.vocab_size, hidden]),
        ("model.norm.weight".to_owned(), Dtype::F32, vec![hidden]),
        (format!("{layer}.input_layernorm.weight"), Dtype::BF16, vec![hidden]),
        (format!("{layer}.post_attention_layernorm.weight"), Dtype::F16, vec![hidden]),
        (format!("{layer}.self_attn.attn_sub_norm.weight"), Dtype::BF16, vec![hidden]),
        (format!("{layer}.mlp.ffn_sub_norm.weight"), Dtype::BF16, vec![inter]),
        (format!("{layer}.self_attn.rotary_emb.inv_freq"), Dtype::F32, vec![config.head_dim / 2]),
    ];
    let packed = config.quantization.is_some_and(|q| q.weights != WeightForm::Latent);
    for (projection, out_features, in_features) in [
        ("self_attn.q_proj", hidden, hidden),
        ("self_attn.k_proj", key_value, hidden),
        ("self_attn.v_proj", key_value, hidden),
        ("self_attn.o_proj", hidden, hidden),
        ("mlp.gate_proj", inter, hidden),
        ("mlp.up_proj", inter, hidden),
        ("mlp.down_proj", hidden, inter),
    ] {
        let name = format!("{layer}.{projection}.weight");
        if packed {
            tensors.push((format!("{name}_scale"), Dtype::BF16, vec![1]));
            tensors.push((name, Dtype::U8, vec![out_features / 4, in_features]));
        } else {
            tensors.push((name, Dtype::BF16, vec![out_features, in_features]));
        }
    }
    tensors
}

fn checkpoint(tensors: &[(String, Dtype, Vec<usize>)]) -> Checkpoint {
    let zeros = vec![0; 1 << 16];
    let views = tensors.iter().map(|(name, dtype, shape)| {
        let bytes = shape.iter().product::<usize>() * dtype.bitsize() / 8;
        let view = safetensors::tensor::TensorView::new(*dtype, shape.clone(), &zeros[..bytes]);
        (name.as_str(), view.unwrap())
    });
    let bytes = safetensors::serialize(views, None).unwrap();
    Checkpoint::from_bytes("tiny.safetensors", bytes).unwrap()
}

#[test]
fn tensors_against_the_configuration() {
    let tiny = json!({
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2,
    });
    let offline = parse(&with(&bitnet(), tiny)).unwrap();
    let online = Config { quantization: quantization(WeightForm::Latent), ..offline.clone() };
    let plain = Config { quantization: None, ..offline.clone() };
    let untied = Config { tie_word_embeddings: false, ..offline.clone() };
    let deeper = Config { num_hidden_layers: 2, ..offline.clone() };
    let wider = Config { vocab_size: 65, ..offline.clone() };
    let packed = tensors(&offline);
    let latent = tensors(&online);
    offline.check_tensors(&checkpoint(&packed)).unwrap();
    online.check_tensors(&checkpoint(&latent)).unwrap();
    plain.check_tensors(&checkpoint(&latent)).unwrap();

    let replaced = |name: &str, dtype: Dtype, shape: &[usize]| {
        let mut tensors = packed.clone();
        let tensor = tensors.iter_mut().find(|(n, ..)| n.ends_with(name)).unwrap();
        (tensor.1, tensor.2) = (dtype, shape.to_vec());
        tensors
    };
    offline.check_tensors(&checkpoint(&replaced("up_proj.weight_scale", Dtype::F32, &[]))).unwrap();

    let cases = [
        (&offline, latent.clone(), "q_proj.weight", "quantization_mode online"),
        (&online, packed.clone(), "q_proj.weight", "quantization_mode offline"),
        (&plain, packed.clone(), "q_proj.weight", "need a quantization_config"),
        (&untied, packed.clone(), "lm_head.weight", "tie_word_embeddings"),
        (&deeper, packed.clone(), "layers.1.input_layernorm", "not in the checkpoint"),
        (
            &wider,
            packed.clone(),
            "embed_tokens",
            "expected BF16, F16 or F32 [65, 32], found BF16 [64, 32]",
        ),
        (
            &offline,
            replaced("k_proj.weight", Dtype::U8, &[5, 32]),
            "k_proj.weight",
            "found U8 [5, 32]",
        ),
        (&offline, replaced("k_proj.weight", Dtype::I8, &[4, 32]), "k_proj.weight", "found I8"),
        (&offline, replaced("weight_scale", Dtype::BF16, &[2]), "weight_scale", "found BF16 [2]"),
        (&offline, replaced("weight_scale", Dtype::F64, &[1]), "weight_scale", "found F64"),
        (&offline, replaced("attn_sub_norm.weight", Dtype::BF16, &[31]), "attn_sub_norm", "[31]"),
    ];
    for (config, tensors, name, message) in cases {
        let error = config.check_tensors(&checkpoint(&tensors)).expect_err(message).to_string();
        assert!(error.starts_with("tiny.safetensors: tensor `"), "{error}");
        assert!(error.contains(name) && error.contains(message), "{name}, {message}: {error}");
    }
}
