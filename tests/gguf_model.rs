//! Models of the Hub's layout as GGUF files, and both loaded.

use std::{collections::HashMap, fs, path::Path};

use bitnet_model::{
    Result,
    config::Config,
    hub::Hub,
    model::Model,
    pretrained::{Precision, Source, default_files},
};
use candle_core::{DType, Device, Tensor};
use serde_json::Value;

use crate::{
    fixture::flat,
    gguf_file::{Codes, File, f32, integers, kind, string, strings, u32},
};

pub type Tensors = HashMap<String, Tensor>;

/// Names in a block: the file's and the Hub's.
pub const NAMES: [(&str, &str); 11] = [
    ("attn_norm", "input_layernorm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("attn_sub_norm", "self_attn.attn_sub_norm"),
    ("ffn_sub_norm", "mlp.ffn_sub_norm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

pub fn name_in_file(hub: &str) -> String {
    match hub {
        "model.embed_tokens.weight" => return "token_embd.weight".into(),
        "model.norm.weight" => return "output_norm.weight".into(),
        "lm_head.weight" => return "output.weight".into(),
        _ => {}
    }
    let (layer, part) = hub.strip_prefix("model.layers.").unwrap().split_once('.').unwrap();
    let part = part.strip_suffix(".weight").unwrap();
    let (ours, _) = NAMES.iter().find(|(_, hub)| *hub == part).unwrap();
    format!("blk.{layer}.{ours}.weight")
}

/// Row of the file for each row of a projection: the pairs that a rotation turns are neighbours.
pub fn interleaved(head_dim: usize) -> impl Fn(usize) -> usize {
    move |row| {
        let (head, within) = (row / head_dim, row % head_dim);
        head * head_dim + within % 2 * (head_dim / 2) + within / 2
    }
}

pub fn raw(tensor: &Tensor) -> (u32, Vec<u8>) {
    let tensor = tensor.flatten_all().unwrap();
    match tensor.dtype() {
        DType::F32 => {
            let values: Vec<f32> = tensor.to_vec1().unwrap();
            (kind::F32, values.iter().flat_map(|v| v.to_le_bytes()).collect())
        }
        DType::F16 => {
            let values: Vec<half::f16> = tensor.to_vec1().unwrap();
            (kind::F16, values.iter().flat_map(|v| v.to_le_bytes()).collect())
        }
        _ => {
            let values: Vec<half::bf16> = tensor.to_vec1().unwrap();
            (kind::BF16, values.iter().flat_map(|v| v.to_le_bytes()).collect())
        }
    }
}

/// The file of a model in the Hub's layout; `ternary` is the type of its projections, if they are packed.
pub fn gguf_of(architecture: &str, config: &Config, tensors: &Tensors, ternary: u32) -> File {
    let mut file = File::new();
    let key = |name: &str| format!("{architecture}.{name}");
    let count = |value: usize| u32(value as u32);
    file.set("general.architecture", string(architecture))
        .set(&key("vocab_size"), count(config.vocab_size))
        .set(&key("context_length"), count(config.max_position_embeddings))
        .set(&key("embedding_length"), count(config.hidden_size))
        .set(&key("block_count"), count(config.num_hidden_layers))
        .set(&key("feed_forward_length"), count(config.intermediate_size))
        .set(&key("rope.dimension_count"), count(config.head_dim))
        .set(&key("attention.head_count"), count(config.num_attention_heads))
        .set(&key("attention.head_count_kv"), count(config.num_key_value_heads))
        .set(&key("attention.layer_norm_rms_epsilon"), f32(config.rms_norm_eps as f32))
        .set(&key("rope.freq_base"), f32(config.rope_theta as f32));
    if let Some(id) = config.bos_token_id {
        file.set("tokenizer.ggml.bos_token_id", u32(id));
    }
    if let Some(id) = config.eos_token_ids.first() {
        file.set("tokenizer.ggml.eos_token_id", u32(*id));
    }
    let mut names: Vec<&String> =
        tensors.keys().filter(|name| !name.ends_with(".weight_scale")).collect();
    names.sort();
    for name in names {
        let tensor = &tensors[name];
        let ours = name_in_file(name);
        let is_rotated = ours.ends_with("attn_q.weight") || ours.ends_with("attn_k.weight");
        let order = interleaved(config.head_dim);
        let order = |row: usize| match architecture == "llama" && is_rotated {
            true => order(row),
            false => row,
        };
        if tensor.dtype() == DType::U8 {
            let scale: f32 = scalar(&tensors[&format!("{name}_scale")]);
            let cols = tensor.dim(1).unwrap();
            let bytes: Vec<u8> = tensor.flatten_all().unwrap().to_vec1().unwrap();
            let codes = Codes::from_hub(&bytes, cols, scale).reordered(order);
            file.push(&ours, &[codes.rows, cols], ternary, codes.pack(ternary));
        } else {
            let rows = tensor.dim(0).unwrap();
            let ids = Vec::from_iter((0..rows).map(|row| order(row) as u32));
            let ids = Tensor::new(ids, &Device::Cpu).unwrap();
            let tensor = tensor.index_select(&ids, 0).unwrap();
            let (kind, data) = raw(&tensor);
            file.push(&ours, tensor.dims(), kind, data);
        }
    }
    file
}

pub fn scalar(tensor: &Tensor) -> f32 {
    tensor.flatten_all().unwrap().to_dtype(DType::F32).unwrap().to_vec1().unwrap()[0]
}

/// Tensors and configuration of the model inside the library, with scales that an f16 holds.
pub fn default_model() -> (Config, Tensors, Value) {
    let file = |name: &str| default_files().into_iter().find(|(n, _)| *n == name).unwrap().1;
    let config = str::from_utf8(file("config.json")).unwrap();
    let config = Config::from_json(Path::new("config.json"), config).unwrap();
    let mut tensors =
        candle_core::safetensors::load_buffer(file("model.safetensors"), &Device::Cpu).unwrap();
    for (_, tensor) in tensors.iter_mut().filter(|(name, _)| name.ends_with(".weight_scale")) {
        *tensor = tensor.to_dtype(DType::F16).unwrap().to_dtype(DType::F32).unwrap();
    }
    (config, tensors, serde_json::from_slice(file("tokenizer.json")).unwrap())
}

/// Writes a folder in the Hub's layout.
pub fn write_hub(folder: &Path, config: &Config, tensors: &Tensors) {
    fs::write(folder.join("config.json"), config.to_json().to_string()).unwrap();
    candle_core::safetensors::save(tensors, folder.join("model.safetensors")).unwrap();
}

pub fn open(path: &Path, precision: Precision) -> Result<Source> {
    Source::open(path.to_str().unwrap(), precision, &Hub::from_env().offline(true))
}

pub fn logits(model: &Model) -> Vec<f32> {
    let tokens = Tensor::new(&[[0u32, 17, 250, 3, 99, 4, 5, 200]], &Device::Cpu).unwrap();
    flat(&model.logits(&model.hidden_states(&tokens, None).unwrap()).unwrap())
}

pub fn load(source: &Source) -> Model {
    source.load(&Device::Cpu).unwrap()
}

/// A small file whose weights all lie in it, and its folder.
pub fn small() -> File {
    let config = r#"{"model_type": "bitnet", "vocab_size": 4, "hidden_size": 128, "intermediate_size": 128,
        "num_hidden_layers": 1, "num_attention_heads": 2, "tie_word_embeddings": true,
        "bos_token_id": 0, "eos_token_id": 1, "quantization_config":
        {"quant_method": "bitnet", "linear_class": "autobitlinear"}}"#;
    let config = Config::from_json(Path::new("config.json"), config).unwrap();
    let mut tensors = Tensors::new();
    let floats = |n: usize, shape: &[usize]| {
        Tensor::from_vec(vec![half::bf16::ONE; n], shape, &Device::Cpu).unwrap()
    };
    tensors.insert("model.embed_tokens.weight".into(), floats(512, &[4, 128]));
    tensors.insert("model.norm.weight".into(), floats(128, &[128]));
    for (_, part) in NAMES {
        let name = format!("model.layers.0.{part}.weight");
        if part.ends_with("proj") {
            let codes = Tensor::from_vec(vec![0x64u8; 4096], &[32, 128], &Device::Cpu).unwrap();
            let scale = Tensor::new(&[0.5f32], &Device::Cpu).unwrap();
            tensors.insert(format!("{name}_scale"), scale);
            tensors.insert(name, codes);
        } else {
            tensors.insert(name, floats(128, &[128]));
        }
    }
    let mut file = gguf_of("bitnet-b1.58", &config, &tensors, kind::I2_S);
    file.set("tokenizer.ggml.model", string("gpt2"))
        .set("tokenizer.ggml.tokens", strings(&["a", "b", "ab", "<|eot_id|>"]))
        .set("tokenizer.ggml.token_type", integers(&[1, 1, 1, 3]))
        .set("tokenizer.ggml.merges", strings(&["a b"]));
    file
}
