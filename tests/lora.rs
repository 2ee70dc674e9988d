//! Training of adapters against PyTorch, transformers and PEFT: gradients of every matrix and the losses of ten updates; that
//! nothing but the adapter changes; and runs that are interrupted and resumed.

#![allow(clippy::unwrap_used)] // test code

use std::{
    fs,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
};

use bitnet_model::{
    adapter::{Adapter, AdapterConfig},
    hub::Hub,
    model::Model,
    ops::gemm::Precision,
    pretrained::{Precision as Form, Source},
    weights::TernaryWeight,
};
use bitnet_tests::fixture::{Fixture, flat, max_diff};
use bitnet_train::{
    batch::Batch,
    experiment,
    language_model::{EmbeddingNoise, LanguageModel},
    lora::{LoraModel, LoraTask, Mode, Training},
    loss::IGNORED,
    metrics::{self, Record},
    objective::NextToken,
    optimizer::{AdamW, AdamWConfig, Decay, Rates, Update},
    parameters::Parameters,
    recipe::Recipe,
    task::{Gradients, Task},
    trainer::{Event, Outcome},
};
use candle_core::{DType, Device, Tensor, Var};

const CONFIG: AdamWConfig = AdamWConfig { beta1: 0.9, beta2: 0.95, eps: 1e-8, decay: Decay::All };
const RATES: Rates = Rates { lr: 2e-3, weight_decay: 0.1 };

fn source(fixture: &Fixture) -> Source {
    Source::open(fixture.dir.to_str().unwrap(), Form::AsConfigured, &Hub::from_env()).unwrap()
}

/// With room for so many bytes of products.
fn training(mode: Mode, keep_bytes: usize) -> Training {
    Training { mode, seed: 7, backward: Precision::F32, keep_bytes }
}

fn load(fixture: &Fixture, config: &AdapterConfig) -> LoraModel {
    LoraModel::load(&source(fixture), config, training(Mode::Adapter, 0), &Device::Cpu).unwrap()
}

/// Sets the variables to the matrices of `adapter`.
fn start_from(parameters: &Parameters, adapter: &Adapter) {
    for (name, var) in parameters.named() {
        let (path, matrix) = name.strip_suffix(".weight").unwrap().rsplit_once('.').unwrap();
        let pair = &adapter.pairs[path];
        var.set(if matrix == "lora_A" { &pair.lora_a } else { &pair.lora_b }).unwrap();
    }
}

/// The fixture's two rows and their labels.
fn batch(fixture: &Fixture) -> Batch {
    let rows = fixture.rows("labels");
    let labels = rows.into_iter().flat_map(|row| row.into_iter().skip(1).chain([IGNORED]));
    let inputs: Vec<u32> = fixture.tokens("input_ids").flatten_all().unwrap().to_vec1().unwrap();
    let sequence_length = inputs.len() / 2;
    Batch { inputs, labels: labels.collect(), starts: Vec::new(), sequence_length }
}

fn gradients(task: &dyn Task, batch: &Batch, named: &[(String, Var)]) -> (f64, Vec<Tensor>) {
    let mut gradients = Gradients::new(named);
    let parts = task.pass(batch, batch.items(), &mut gradients).unwrap();
    (parts[0].value, gradients.finish().unwrap())
}

fn task(model: Model, frozen: Model, recompute: bool) -> LanguageModel {
    LanguageModel::new(model, frozen, Box::new(NextToken::default())).recompute(recompute)
}

#[test]
fn ten_steps_follow_peft() {
    let fixture = Fixture::open("lora_bitnet_offline");
    let adapter = Adapter::open(&fixture.dir.join("adapter")).unwrap();
    let LoraModel { trained, frozen, parameters, .. } = load(&fixture, &adapter.config);
    start_from(&parameters, &adapter);
    let (named, batch) = (parameters.named(), batch(&fixture));
    assert_eq!(named.len(), 2 * 7 * fixture.config.num_hidden_layers);
    // The base alone, to compare it with at the end.
    let zero = |named: &[(String, Var)]| {
        let pairs = named.iter().filter(|(name, _)| name.contains("lora_B"));
        pairs.for_each(|(_, var)| var.set(&var.zeros_like().unwrap()).unwrap());
    };
    let tokens = fixture.tokens("input_ids");
    let base = load(&fixture, &adapter.config);
    let logits =
        |model: &Model| flat(&model.logits(&model.hidden_states(&tokens, None).unwrap()).unwrap());
    let base_logits = logits(&base.frozen);
    // What comes after the end of a row is padding, which means nothing.
    let mask: Vec<i64> = fixture.rows("attention_mask").concat();
    let off = |found: &[f32], name: &str| {
        let (vocab, expected) = (fixture.config.vocab_size, fixture.floats(name));
        let rows = found.chunks(vocab).zip(expected.chunks(vocab)).zip(&mask);
        rows.filter(|(_, mask)| **mask == 1).map(|((a, b), _)| max_diff(a, b)).fold(0., f32::max)
    };
    // A few roundings of f32 each in two blocks, on values of order 1.
    assert!(off(&base_logits, "logits_base") < 1e-4);
    assert!(off(&logits(&frozen), "logits_adapter") < 1e-4);

    let frozen_again = load(&fixture, &adapter.config).frozen;
    let task = task(trained, frozen_again, false);
    let mut adamw = AdamW::new(&named, CONFIG).unwrap();
    for step in 0..10 {
        let (loss, gradients) = gradients(&task, &batch, &named);
        if step == 0 {
            for ((name, _), gradient) in named.iter().zip(&gradients) {
                let expected = fixture.floats(&format!("grad.base_model.model.{name}"));
                let largest = expected.iter().fold(0f32, |most, g| most.max(g.abs()));
                let off = max_diff(&flat(gradient), &expected);
                assert!(largest > 0. && off < 1e-4 * largest, "{name}: {off:e} of {largest:e}");
            }
        }
        let expected = fixture.scalars["adamw_losses"][step].as_f64().unwrap();
        // f32 losses of order 5 are 5e-7 apart. In the fourth step an activation lies at a rounding threshold, and a code that
        // flips (by a 127th of the largest of its row) moves everything after it.
        let (off, bound) = (loss - expected, if step < 3 { 3e-6 } else { 2e-3 });
        assert!(off.abs() < bound, "loss of step {step} is off by {off:e}");
        let before: Vec<Vec<f32>> = named.iter().map(|(_, var)| flat(var)).collect();
        adamw.step(&gradients, Update { rates: RATES, grad_factor: 1. }).unwrap();
        for ((name, var), before) in named.iter().zip(before) {
            assert!(flat(var) != before, "{name} did not train");
        }
    }
    zero(&named);
    assert!(logits(&frozen) == base_logits, "something beside the adapter has changed");
}

/// What is dropped and added follows from the step: blocks that are computed again drop the same.
#[test]
fn recomputed_blocks_drop_what_they_dropped() {
    let fixture = Fixture::open("lora_bitnet_offline");
    let adapter = Adapter::open(&fixture.dir.join("adapter")).unwrap();
    let run_with = |dropout: f64, recompute: bool, update: usize, keep_bytes: usize| {
        let config = AdapterConfig { dropout, ..adapter.config.clone() };
        let LoraModel { trained, frozen, parameters, step } = LoraModel::load(
            &source(&fixture),
            &config,
            training(Mode::Adapter, keep_bytes),
            &Device::Cpu,
        )
        .unwrap();
        start_from(&parameters, &adapter);
        let noise = EmbeddingNoise { alpha: 5., step: step.clone() };
        let inner = task(trained, frozen, recompute).noise((dropout > 0.).then_some(noise));
        let task = LoraTask::new(inner, step, 0);
        task.begin(update).unwrap();
        let named = parameters.named();
        let all = [(); 2].map(|()| {
            let (loss, gradients) = gradients(&task, &batch(&fixture), &named);
            (loss, gradients.iter().flat_map(flat).collect::<Vec<f32>>())
        });
        let nats: f32 = task.evaluate(&batch(&fixture)).unwrap().iter().map(|p| p.nats).sum();
        (all, nats)
    };
    let run = |dropout, recompute, update| run_with(dropout, recompute, update, 0);
    let (kept, recomputed) = (run(0.3, false, 4), run(0.3, true, 4));
    assert!(kept == recomputed);
    // Room for the products of a few projections, and for all: 2 × 24 tokens of at most 160 values.
    for room in [100_000, 1 << 20] {
        assert!(
            run_with(0.3, true, 4, room) == kept,
            "products that are kept change the gradients"
        );
    }
    let [first, second] = &kept.0;
    assert!(first != second, "two micro-batches dropped the same");
    assert!(run(0.3, true, 5).0[0] != *first, "two updates dropped the same");
    // Evaluations drop nothing.
    assert_eq!(run(0., true, 4).1, kept.1);
}

/// Two processes with a row each drop what one drops that has both rows.
#[test]
fn the_ranks_of_a_job_see_what_one_process_sees() {
    let fixture = Fixture::open("lora_bitnet_offline");
    let adapter = Adapter::open(&fixture.dir.join("adapter")).unwrap();
    let config = AdapterConfig { dropout: 0.3, ..adapter.config.clone() };
    let all = batch(&fixture);
    let run = |rank: usize, size: usize| {
        let LoraModel { trained, frozen, parameters, step } = load(&fixture, &config);
        start_from(&parameters, &adapter);
        let noise = EmbeddingNoise { alpha: 5., step: step.clone() };
        let task = LoraTask::new(task(trained, frozen, true).noise(Some(noise)), step, rank);
        task.begin(3).unwrap();
        let named = parameters.named();
        let mut gradients = Gradients::new(&named);
        task.pass(&all.share(rank, size), all.items(), &mut gradients).unwrap();
        gradients.finish().unwrap().iter().flat_map(flat).collect::<Vec<f32>>()
    };
    let whole = run(0, 1);
    let sum: Vec<f32> = run(0, 2).iter().zip(run(1, 2)).map(|(a, b)| a + b).collect();
    let largest = whole.iter().fold(0f32, |most, g| most.max(g.abs()));
    // The same addends in another order.
    assert!(largest > 0. && max_diff(&whole, &sum) < 1e-5 * largest);
}

/// Packed with norms of their own or without, latent, tied and untied: with `B` zero it is the base, and every `B` learns.
#[test]
fn an_adapter_goes_beside_every_kind_of_model() {
    for name in
        ["llama_packed_rmsnorm", "llama_packed_headdim", "bitnet_packed_untied", "legacy_1bitllm"]
    {
        let fixture = Fixture::open(name);
        let config = AdapterConfig { rank: 2, ..AdapterConfig::default() };
        let LoraModel { trained, frozen, parameters, .. } = load(&fixture, &config);
        let tokens = fixture.tokens("single.input_ids");
        let logits = |model: &Model| {
            flat(&model.logits(&model.hidden_states(&tokens, None).unwrap()).unwrap())
        };
        let base = source(&fixture).load_with(
            &bitnet_model::nn::BitLinears::new(fixture.config.quantization.unwrap()),
            &Device::Cpu,
        );
        assert!(logits(&frozen) == logits(&base.unwrap()), "{name}: it is not the base");
        let inputs: Vec<u32> = tokens.flatten_all().unwrap().to_vec1().unwrap();
        let sequence_length = inputs.len();
        let labels = bitnet_train::loss::shift_labels(&inputs, sequence_length);
        let batch = Batch { inputs, labels, starts: Vec::new(), sequence_length };
        let named = parameters.named();
        assert_eq!(named.len(), 2 * 7 * fixture.config.num_hidden_layers);
        let (_, gradients) = gradients(&task(trained, frozen, true), &batch, &named);
        for ((parameter, _), gradient) in named.iter().zip(&gradients) {
            let largest = flat(gradient).iter().fold(0f32, |most, g| most.max(g.abs()));
            // As long as B is zero, nothing reaches A.
            assert!(largest.is_finite(), "{name}: {parameter}");
            assert_eq!(largest > 0., parameter.contains("lora_B"), "{name}: {parameter}");
        }
    }
}

/// Sixteen examples are learnt by heart, whatever the frozen base thinks of them.
#[test]
fn sixteen_examples_are_overfitted() {
    let fixture = Fixture::open("lora_bitnet_offline");
    // The fixture's embedding is so small that its head, which is tied to it, cannot be sure of anything: it is trained too.
    let modules_to_save = vec!["norm".to_owned(), "lm_head".to_owned()];
    let config = AdapterConfig { dropout: 0., modules_to_save, ..AdapterConfig::default() };
    let LoraModel { trained, frozen, parameters, .. } = load(&fixture, &config);
    let (named, task) = (parameters.named(), task(trained, frozen, false));
    let (rows, length) = (16, 8);
    // Each row begins with a token of its own, from which the others follow.
    let token = |row: usize, at: usize| (row * 13 + at * (5 + row) * 3) as u32 % 250 + 4;
    let inputs: Vec<u32> = (0..rows * length).map(|i| token(i / length, i % length)).collect();
    let labels = bitnet_train::loss::shift_labels(&inputs, length);
    let batch = Batch { inputs, labels, starts: Vec::new(), sequence_length: length };
    let mut adamw = AdamW::new(&named, CONFIG).unwrap();
    let mut last = f64::INFINITY;
    for _ in 0..100 {
        let (loss, gradients) = gradients(&task, &batch, &named);
        let update = Update { rates: Rates { lr: 3e-3, weight_decay: 0. }, grad_factor: 1. };
        adamw.step(&gradients, update).unwrap();
        last = loss;
    }
    assert!(last < 0.05, "the loss is still {last}");
}

/// With the pairs inside the quantizer, packing the sums gives the trained function.
#[test]
fn a_pair_inside_the_quantizer_merges_exactly() {
    let fixture = Fixture::open("bitnet_online_tied");
    let config = AdapterConfig { rank: 4, dropout: 0., ..AdapterConfig::default() };
    let source = source(&fixture);
    let LoraModel { trained, frozen, parameters, .. } =
        LoraModel::load(&source, &config, training(Mode::Qat, 0), &Device::Cpu).unwrap();
    let named = parameters.named();
    for (i, (name, var)) in named.iter().enumerate() {
        let wave = |j: usize| ((i * 31 + j) as f32 * 0.7).sin() * 0.02;
        if name.contains("lora_B") {
            let values = Vec::from_iter((0..var.elem_count()).map(wave));
            var.set(&Tensor::from_vec(values, var.shape(), var.device()).unwrap()).unwrap();
        }
    }
    let ids: Vec<u32> = (0..12).map(|i| i * 5 % 200 + 1).collect();
    let mut labels: Vec<i64> = ids[1..].iter().map(|&id| id.into()).collect();
    labels.push(IGNORED);
    let batch = Batch { inputs: ids.clone(), labels, starts: Vec::new(), sequence_length: 12 };
    let tokens = Tensor::from_vec(ids, (1, 12), &Device::Cpu).unwrap();
    let states = |model: &Model| flat(&model.hidden_states(&tokens, None).unwrap());
    // The merged masters, quantized as a checkpoint of them would be.
    let merged = Parameters::new(0);
    for name in source.checkpoint.names() {
        let mut tensor = source.checkpoint.read(name).unwrap().to_dtype(DType::F32).unwrap();
        let path = name.strip_suffix(".weight").unwrap();
        let var = |matrix: &str| {
            let name = format!("{path}.{matrix}.weight");
            named.iter().find(|(found, _)| *found == name).map(|(_, var)| var.as_detached_tensor())
        };
        if let (Some(a), Some(b)) = (var("lora_A"), var("lora_B")) {
            let pair = bitnet_model::adapter::LowRank::new(a, b, 16.).unwrap();
            let before = flat(&tensor);
            tensor = (tensor + pair.weight_delta().unwrap()).unwrap();
            let codes = |values: &[f32]| {
                let shape = (values.len(), 1);
                TernaryWeight::from_latent(
                    values,
                    shape,
                    source.config.quantization.unwrap().rounding,
                    Default::default(),
                )
            };
            assert!(
                !codes(&before).has_codes_of(&codes(&flat(&tensor))),
                "{name}: no code flipped"
            );
        }
        merged.insert(name, &tensor).unwrap();
    }
    let linears = bitnet_model::nn::BitLinears::new(source.config.quantization.unwrap());
    let expected = Model::load(&source.config, &linears, merged.frozen_builder()).unwrap();
    assert!(states(&frozen) == states(&expected));
    for (i, gradient) in
        gradients(&task(trained, frozen, true), &batch, &named).1.iter().enumerate()
    {
        let largest = flat(gradient).iter().fold(0f32, |most, g| most.max(g.abs()));
        assert!(largest > 0. && largest.is_finite(), "{}", named[i].0);
    }
}

const RECIPE: &str = r#"
    [init]
    model = "default"
    [lora]
    rank = 4
    target_modules = ["q_proj", "down_proj"]
    modules_to_save = ["norm"]
    neftune_alpha = 5.0
    [data]
    sequence_length = 32
    train = [{ path = "train.txt", documents = "line" }]
    validation = [{ path = "train.txt", documents = "line" }]
    [train]
    steps = 4
    gradient_accumulation = 2
    eval_every = 2
    save_every = 1
    [samples]
    prompts = ["The cat"]
    max_new_tokens = 4
    [output]
    dir = "run"
"#;

fn recipe(dir: &Path, output: &str) -> Recipe {
    let story = |i: usize| format!("The {i}. cat ran home and met {} mice.\n", i * i);
    fs::write(dir.join("train.txt"), (0..40).map(story).collect::<String>()).unwrap();
    fs::write(dir.join("recipe.toml"), RECIPE).unwrap();
    let mut recipe = Recipe::from_file(&dir.join("recipe.toml")).unwrap();
    recipe.output.dir = dir.join(output);
    recipe
}

/// Offline, on the model inside the library: the adapter of an interrupted run has the bits of an uninterrupted one's.
#[test]
fn an_interrupted_run_goes_on_to_the_same_adapter() {
    let dir = tempfile::tempdir().unwrap();
    let whole = recipe(dir.path(), "whole");
    let summary = experiment::run(&whole, false, &mut |_| (), &AtomicBool::new(false)).unwrap();
    assert_eq!((summary.outcome, summary.step), (Outcome::Finished, 4));

    let parts = recipe(dir.path(), "parts");
    let interrupted = AtomicBool::new(false);
    let mut stop = |event: Event| {
        if let Event::Update { record, .. } = event {
            interrupted.store(record.step == 2, Ordering::Relaxed);
        }
    };
    let summary = experiment::run(&parts, false, &mut stop, &interrupted).unwrap();
    assert_eq!((summary.outcome, summary.step), (Outcome::Interrupted, 2));
    experiment::run(&parts, true, &mut |_| (), &AtomicBool::new(false)).unwrap();

    let file = |recipe: &Recipe, name: &str| fs::read(recipe.output.dir.join(name)).unwrap();
    for name in ["adapter/adapter_config.json", "adapter/adapter_model.safetensors"] {
        assert!(file(&whole, name) == file(&parts, name), "{name}");
    }
    let records = |recipe: &Recipe| {
        let records = metrics::read(&recipe.output.dir.join("metrics.jsonl")).unwrap();
        records.into_iter().map(Record::untimed).collect::<Vec<_>>()
    };
    assert_eq!(records(&whole), records(&parts));
    assert!(records(&whole).iter().any(|record| matches!(record, Record::Samples(_))));

    // What was left is an adapter for the model, and all of it has been trained.
    let adapter = Adapter::open(&whole.output.dir.join("adapter")).unwrap();
    let base = Source::open("default", Form::AsConfigured, &Hub::from_env()).unwrap();
    adapter.check(&base.config).unwrap();
    assert_eq!(adapter.pairs.len(), 2 * base.config.num_hidden_layers);
    assert!(adapter.pairs.values().all(|pair| flat(&pair.lora_b).iter().any(|&b| b != 0.)));
    let norm = base.checkpoint.read("model.norm.weight").unwrap().to_dtype(DType::F32).unwrap();
    assert!(flat(&adapter.modules["model.norm.weight"]) != flat(&norm));
}
