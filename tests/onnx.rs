//! ONNX graphs that the library writes: their interface, their weights, and what they compute.

#![allow(clippy::unwrap_used)]

mod support {
    pub mod onnx_file;
    pub mod onnx_run;
}

use std::{collections::HashMap, path::Path};

use bitnet_model::{
    checkpoint::{
        Checkpoint,
        onnx::{self, OnnxWeights},
    },
    config::Config,
    quant::{Rounding, Scheme, WeightKind},
};
use bitnet_tests::{fixture::Fixture, oracle};
use support::{
    onnx_file::{Array, File},
    onnx_run::run,
};

const ALL: [OnnxWeights; 2] = [OnnxWeights::Int2, OnnxWeights::Int8];

fn write(config: &Config, checkpoint: &Checkpoint, weights: OnnxWeights, path: &Path) -> File {
    let mut steps = Vec::new();
    onnx::write(config, checkpoint, weights, path, |at, len| steps.push((at, len))).unwrap();
    assert!(steps.iter().enumerate().all(|(i, &step)| step == (i + 1, steps.len())));
    File::read(path)
}

/// Runs tokens behind what `cache` holds; rows of one length, without padding.
fn logits(file: &File, tokens: &[Vec<u32>], cache: &mut HashMap<String, Array>) -> Vec<Vec<f64>> {
    let (batch, seq) = (tokens.len(), tokens[0].len());
    let mut inputs: HashMap<String, Array> = file
        .inputs
        .iter()
        .filter(|(name, ..)| name.starts_with("past"))
        .map(|(name, _, dims)| {
            let present = name.replace("past_key_values", "present");
            let [kv_heads, head_dim] = [1, 3].map(|i| dims[i].parse().unwrap());
            let empty = || Array::new(&[batch, kv_heads, 0, head_dim], vec![]);
            (name.clone(), cache.remove(&present).unwrap_or_else(empty))
        })
        .collect();
    let past = inputs.values().next().unwrap().dims[2];
    let rows = |row: &dyn Fn(usize) -> Vec<f64>, len| {
        Array::new(&[batch, len], (0..batch).flat_map(row).collect())
    };
    let ids = |row: usize| tokens[row].iter().map(|&token| f64::from(token)).collect();
    inputs.insert("input_ids".into(), rows(&ids, seq));
    let positions = |_| (past..past + seq).map(|position| position as f64).collect();
    inputs.insert("position_ids".into(), rows(&positions, seq));
    inputs.insert("attention_mask".into(), rows(&|_| vec![1.; past + seq], past + seq));
    *cache = run(file, inputs);
    let logits = cache.remove("logits").unwrap();
    logits.data.chunks(logits.dims[2]).map(<[f64]>::to_vec).collect()
}

fn max_diff(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0., f64::max)
}

/// Constants of the graph are f32, off by 2⁻²⁴ of themselves: values come out within some multiple of that, and codes, of
/// which the largest is 127, on the other side of a tie only if they are within 127 · 2⁻²⁴ · 8 of it.
const SAME: f64 = 1e-5;
const TIE: f64 = 6e-5;

#[test]
fn every_family_computes_what_it_is() {
    for fixture in Fixture::forward() {
        let tokens: Vec<u32> =
            fixture.tokens("single.input_ids").flatten_all().unwrap().to_vec1().unwrap();
        let tokens = &tokens[..12];
        let expected = oracle::run(&fixture, tokens);
        let dir = tempfile::tempdir().unwrap();
        for weights in ALL {
            let path = dir.path().join(format!("{weights:?}.onnx"));
            let file = write(&fixture.config, &fixture.checkpoint, weights, &path);
            let mut cache = HashMap::new();
            let mut found = logits(&file, &[tokens[..9].to_vec()], &mut cache);
            for &token in &tokens[9..] {
                found.extend(logits(&file, &[vec![token]], &mut cache));
            }
            for (row, (found, logits)) in found.iter().zip(&expected.logits).enumerate() {
                let off = max_diff(found, logits);
                if off > SAME {
                    let is_tie = expected.codes.values().any(|c| c.tie_distance[row] < TIE);
                    assert!(is_tie, "{} {weights:?}: row {row} is off by {off:e}", fixture.name);
                    assert!(row > 0, "{}: nothing was compared", fixture.name);
                    break; // later rows see this one
                }
            }
            let checked =
                onnx::verify((&fixture.config, &fixture.checkpoint), weights, &path, |_, _| ());
            let external = file.constants.values().filter(|c| c.external.is_some()).count();
            assert_eq!(checked.unwrap(), external, "{}", fixture.name);
        }
    }
}

#[test]
fn rows_of_a_batch_do_not_see_each_other_or_padding() {
    let fixture = Fixture::open("bitnet_packed_tied");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.onnx");
    let file = write(&fixture.config, &fixture.checkpoint, OnnxWeights::Int8, &path);
    let (long, short) = (vec![5, 9, 60, 7, 31], vec![8, 2, 44]);
    let alone = |tokens: &[u32]| logits(&file, &[tokens.to_vec()], &mut HashMap::new());
    let kv = |layer: usize, part: &str| format!("past_key_values.{layer}.{part}");
    let config = &fixture.config;
    let empty = Array::new(&[2, config.num_key_value_heads, 0, config.head_dim], vec![]);
    let mut inputs: HashMap<String, Array> = (0..config.num_hidden_layers)
        .flat_map(|layer| ["key", "value"].map(|part| (kv(layer, part), empty.clone())))
        .collect();
    let two = |rows: [[u32; 5]; 2]| {
        Array::new(&[2, 5], rows.as_flattened().iter().map(|&x| f64::from(x)).collect())
    };
    inputs.insert("input_ids".into(), two([[5, 9, 60, 7, 31], [0, 0, 8, 2, 44]]));
    inputs.insert("attention_mask".into(), two([[1; 5], [0, 0, 1, 1, 1]]));
    inputs.insert("position_ids".into(), two([[0, 1, 2, 3, 4], [0, 0, 0, 1, 2]]));
    let outputs = run(&file, inputs);
    let found: Vec<&[f64]> = outputs["logits"].data.chunks(config.vocab_size).collect();
    assert!(outputs.values().all(|output| output.data.iter().all(|x| x.is_finite())));
    for (found, expected) in found[..5].iter().zip(alone(&long)) {
        assert!(max_diff(found, &expected) < 1e-9);
    }
    for (found, expected) in found[7..].iter().zip(alone(&short)) {
        assert!(max_diff(found, &expected) < 1e-9);
    }
}

#[test]
fn the_interface_is_that_of_decoders() {
    let fixture = Fixture::open("llama_packed_headdim");
    let config = &fixture.config;
    let dir = tempfile::tempdir().unwrap();
    let file = write(config, &fixture.checkpoint, OnnxWeights::Int2, &dir.path().join("m.onnx"));
    let [both, past] = ["past_sequence_length + sequence_length", "past_sequence_length"];
    let (heads, head_dim) = (config.num_key_value_heads.to_string(), config.head_dim.to_string());
    let strings = |dims: &[&str]| dims.iter().map(|dim| dim.to_string()).collect::<Vec<_>>();
    let cache = |name: &str, length: &str| {
        let dims = strings(&["batch_size", &heads, length, &head_dim]);
        (0..config.num_hidden_layers)
            .flat_map(|layer| {
                ["key", "value"].map(|part| (format!("{name}.{layer}.{part}"), 1, dims.clone()))
            })
            .collect::<Vec<_>>()
    };
    let ids = |name: &str, length| (name.to_string(), 7, strings(&["batch_size", length]));
    let seq = "sequence_length";
    let tokens = vec![ids("input_ids", seq), ids("attention_mask", both), ids("position_ids", seq)];
    assert_eq!(file.inputs, [tokens, cache("past_key_values", past)].concat());
    let dims = strings(&["batch_size", seq, &config.vocab_size.to_string()]);
    assert_eq!(file.outputs, [vec![("logits".into(), 1, dims)], cache("present", both)].concat());
    assert_eq!(file.operators, [(String::new(), 21), ("com.microsoft".into(), 1)]);

    // Tensors lie at pages, one after the other, and nothing is in both files.
    let mut places: Vec<_> = file.constants.values().filter_map(|c| c.external).collect();
    places.sort_unstable();
    assert!(places.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0));
    assert!(places.iter().all(|(offset, _)| offset % 4096 == 0));
    let is_weight = |name: &&String| name.ends_with(".weight");
    assert!(file.constants.iter().all(|(name, c)| !is_weight(&name) || c.external.is_some()));
    assert_eq!(file.constants["model.embed_tokens.weight"].element_type, 16);
    assert_eq!(
        file.constants["lm_head.weight"].data,
        fixture.checkpoint.read_bytes("lm_head.weight").unwrap()
    );
    // The node list: one quantization for projections of one input, one product each.
    let count = |operator: &str| file.nodes.iter().filter(|n| n.operator == operator).count();
    let layers = config.num_hidden_layers;
    assert_eq!(count("MatMulNBits"), 7 * layers);
    assert_eq!((count("ReduceMax"), count("Round")), (4 * layers, 4 * layers));
    assert_eq!((count("ReduceMean"), count("Softmax")), (2 * layers + 1, layers));
}

#[test]
fn what_has_no_place_is_refused() {
    let fixture = Fixture::open("bitnet_online_tied");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.onnx");
    let refusal = |change: &dyn Fn(&mut Config)| {
        let mut config = fixture.config.clone();
        change(&mut config);
        let written =
            onnx::write(&config, &fixture.checkpoint, OnnxWeights::Int2, &path, |_, _| ());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        written.unwrap_err().to_string()
    };
    assert!(refusal(&|config| config.quantization = None).contains("quantization_config"));
    let sign = Scheme { weights: WeightKind::Sign, ..Scheme::B158 };
    let message = refusal(&|config| config.quantization.as_mut().unwrap().scheme = sign);
    assert!(message.contains("other quantizers than b1.58's"), "{message}");
    let message = refusal(&|config| config.num_hidden_layers += 1);
    assert!(message.contains("not in the checkpoint"), "{message}");
}

#[test]
fn halves_are_rounded_as_the_model_rounds_them() {
    let fixture = Fixture::open("bitnet_online_tied");
    let dir = tempfile::tempdir().unwrap();
    let operators = |rounding| {
        let mut config = fixture.config.clone();
        config.quantization.as_mut().unwrap().rounding = rounding;
        let path = dir.path().join("model.onnx");
        let file = write(&config, &fixture.checkpoint, OnnxWeights::Int8, &path);
        file.nodes.into_iter().map(|node| node.operator).collect::<Vec<_>>()
    };
    let [even, up] = [Rounding::HalfEven, Rounding::HalfUp].map(operators);
    assert!(even.contains(&"Round".into()) && !even.contains(&"Floor".into()));
    assert!(up.contains(&"Floor".into()) && !up.contains(&"Round".into()));
}

#[test]
fn a_damaged_file_is_found() {
    let fixture = Fixture::open("bitnet_packed_tied");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.onnx");
    for weights in ALL {
        let file = write(&fixture.config, &fixture.checkpoint, weights, &path);
        let name = "model.layers.1.mlp.down_proj.weight";
        let (offset, length) = file.constants[name].external.unwrap();
        let data = onnx::data_path(&path);
        let mut bytes = std::fs::read(&data).unwrap();
        bytes[offset + length / 2] ^= 1;
        std::fs::write(&data, bytes).unwrap();
        let from = (&fixture.config, &*fixture.checkpoint);
        let message = onnx::verify(from, weights, &path, |_, _| ()).unwrap_err().to_string();
        assert!(message.contains(name) && message.contains("codes"), "{message}");
    }
}
