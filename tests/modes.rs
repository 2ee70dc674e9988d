//! Ways of training: every quantizer reaches the checkpoint it is loaded from, λ goes from one model to the other,
//! training goes on from checkpoints of all families, and a run with a teacher resumes to the same bits.

#![allow(clippy::unwrap_used)] // test code

use std::{
    fs,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use bitnet_model::{
    checkpoint::{
        Checkpoint,
        export::{Target, convert, verify},
    },
    config::{Activation, Config, Family, Quantization, WeightForm},
    hub::Hub,
    model::Model,
    nn::{DenseLinears, LinearFactory},
    pretrained::{Precision, Source},
    quant::{InputKind, InputWidth, Rounding, Scheme, WeightKind},
};
use bitnet_tests::fixture::{flat, max_diff};
use bitnet_train::{
    experiment,
    init::Start,
    loss::cross_entropy,
    metrics::{self, Record},
    parameters::Parameters,
    qat::QatLinears,
    recipe::{Init, Recipe},
    trainer::{Event, Outcome},
    warmup::Lambda,
};
use candle_core::{DType, Device, Tensor};

const PLAIN: InputKind = InputKind { width: InputWidth::Int8, hadamard: false };
const FOUR: InputKind = InputKind { width: InputWidth::Int4, hadamard: false };
const ROTATED: InputKind = InputKind { width: InputWidth::Int4, hadamard: true };
const NONE: InputKind = InputKind { width: InputWidth::Full, hadamard: false };

/// b1.58, the first BitNet, v2's, a mixture, and halves of b1.58.
const SCHEMES: [Scheme; 6] = [
    Scheme::B158,
    Scheme { weights: WeightKind::Sign, ..Scheme::B158 },
    Scheme { weights: WeightKind::Absmean, stream: FOUR, o_proj: ROTATED, down_proj: ROTATED },
    Scheme { weights: WeightKind::Sign, stream: FOUR, o_proj: PLAIN, down_proj: ROTATED },
    Scheme { weights: WeightKind::Absmean, stream: NONE, o_proj: NONE, down_proj: PLAIN },
    Scheme { weights: WeightKind::Full, ..Scheme::B158 },
];

fn config(family: Family, scheme: Option<Scheme>) -> Config {
    Config {
        family,
        vocab_size: 60,
        hidden_size: 32,
        intermediate_size: 48,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 8,
        hidden_act: if family == Family::BitNet { Activation::Relu2 } else { Activation::Silu },
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.,
        max_position_embeddings: 64,
        tie_word_embeddings: true,
        attention_bias: false,
        bos_token_id: Some(1),
        eos_token_ids: vec![2],
        quantization: scheme.map(|scheme| Quantization {
            weights: WeightForm::Latent,
            rounding: Rounding::HalfEven,
            scheme,
            input_norm_eps: None,
        }),
    }
}

fn tokens() -> Tensor {
    let ids: Vec<u32> = (0..24).map(|i| (i * i + 3) % 60).collect();
    Tensor::from_vec(ids, (2, 12), &Device::Cpu).unwrap()
}

fn logits(model: &Model) -> Vec<f32> {
    flat(&model.logits(&model.hidden_states(&tokens(), None).unwrap()).unwrap())
}

fn qat(scheme: Scheme, lambda: f32) -> QatLinears {
    let shared = Lambda::default();
    shared.set(lambda);
    QatLinears::new(Rounding::HalfEven).with_scheme(scheme).with_lambda(shared)
}

/// A model all of whose numbers bf16 can hold, so that packing changes no bit: weights are 0 or ±1/4, one half each, and
/// with them their scale is 1/8.
fn model(config: &Config, linears: &dyn LinearFactory) -> (Arc<Parameters>, Model) {
    let parameters = Parameters::new(7);
    let model = Model::load(config, linears, parameters.var_builder()).unwrap();
    for (name, var) in parameters.named() {
        let value = if name.contains("_proj") {
            let signs = flat(&var).into_iter().enumerate();
            let signs = signs.map(|(i, w)| if i % 2 == 0 { 0. } else { 0.25f32.copysign(w) });
            Tensor::from_vec(signs.collect(), var.shape(), &Device::Cpu).unwrap()
        } else {
            var.to_dtype(DType::BF16).unwrap().to_dtype(DType::F32).unwrap()
        };
        var.set(&value).unwrap();
    }
    (parameters, model)
}

/// Writes a model as the Hub has it.
fn save(config: &Config, parameters: &Parameters, dir: &Path) {
    fs::create_dir_all(dir).unwrap();
    let tensors = parameters.named().into_iter().map(|(name, var)| (name, var.as_tensor().clone()));
    let path = dir.join("model.safetensors");
    candle_core::safetensors::save(&tensors.collect(), path).unwrap();
    fs::write(dir.join("config.json"), config.to_json().to_string()).unwrap();
}

fn open(dir: &Path) -> Source {
    Source::open(dir.to_str().unwrap(), Precision::AsFound, &Hub::from_env()).unwrap()
}

#[test]
fn every_scheme_trains_and_loads_as_it_was_trained() {
    for scheme in SCHEMES {
        for family in [Family::BitNet, Family::Llama] {
            let config = config(family, Some(scheme));
            let (parameters, trained) = model(&config, &qat(scheme, 1.));
            let dir = tempfile::tempdir().unwrap();
            let latent = dir.path().join("latent");
            save(&config, &parameters, &latent);
            let source = open(&latent);
            assert_eq!(source.config, config);
            let loaded = logits(&source.load(&Device::Cpu).unwrap());
            assert_eq!(loaded, logits(&trained), "{scheme:?}");

            let packed = dir.path().join("packed");
            let written = convert(&config, &source.checkpoint, &packed, Target::Packed, |_, _| ());
            if scheme.weights == WeightKind::Full {
                assert!(written.unwrap_err().to_string().contains("no codes"));
                continue;
            }
            let written = written.unwrap().config;
            let source_of_packed = open(&packed);
            assert_eq!(source_of_packed.config, written);
            assert_eq!(written.quantization.unwrap().scheme, scheme);
            let checkpoint = Checkpoint::open(&[packed.join("model.safetensors")]).unwrap();
            verify((&config, &source.checkpoint), (&written, &checkpoint), |_, _| ()).unwrap();
            assert_eq!(logits(&source_of_packed.load(&Device::Cpu).unwrap()), loaded, "{scheme:?}");
        }
    }
}

#[test]
fn gradients_reach_every_parameter_in_every_mode() {
    for scheme in SCHEMES {
        for lambda in [0., 0.3, 1.] {
            let (parameters, model) =
                model(&config(Family::BitNet, Some(scheme)), &qat(scheme, lambda));
            let hidden = model.hidden_states(&tokens(), None).unwrap();
            let logits = model.logits(&hidden).unwrap().flatten_to(1).unwrap();
            let labels: Vec<i64> = (0..24).map(|i| (i * 7) % 60).collect();
            let grads = cross_entropy(&logits, &labels, None).unwrap().backward().unwrap();
            for (name, var) in parameters.named() {
                let grad = grads.get(&var).unwrap_or_else(|| panic!("no gradient for {name}"));
                let sum = grad.abs().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
                assert!(sum.is_finite() && sum > 0., "{name}: {sum} {scheme:?} λ {lambda}");
            }
        }
    }
}

#[test]
fn lambda_goes_from_full_precision_to_quantized() {
    let scheme = Scheme::B158;
    let (parameters, full) = model(&config(Family::BitNet, None), &DenseLinears);
    let at = |lambda| {
        let config = config(Family::BitNet, Some(scheme));
        let linears = qat(scheme, lambda);
        logits(&Model::load(&config, &linears, parameters.frozen_builder()).unwrap())
    };
    assert_eq!(at(0.), logits(&full));
    let near = at(1. - f32::EPSILON);
    let scale = near.iter().fold(0f32, |most, x| most.max(x.abs()));
    // The last step, from f32 sums to integers, changes roundings and with them a code here or there.
    assert!(max_diff(&at(1.), &near) < 0.05 * scale);
    assert!(max_diff(&at(1.), &at(0.)) > 0.05 * scale);
}

fn start(dir: &Path, sub_norms: bool, scheme: Option<Scheme>) -> bitnet_train::Result<Start> {
    Start::open(&Init { model: dir.to_str().unwrap().into(), sub_norms }, scheme)
}

#[test]
fn a_full_precision_llama_goes_on_as_a_bitnet() {
    let dir = tempfile::tempdir().unwrap();
    let full = config(Family::Llama, None);
    let (parameters, oracle) = model(&full, &DenseLinears);
    save(&full, &parameters, dir.path());
    for scheme in [SCHEMES[0], SCHEMES[2]] {
        let start = start(dir.path(), false, Some(scheme)).unwrap();
        assert_eq!(*start.config(), config(Family::Llama, Some(scheme)));
        let fresh = Parameters::new(1);
        let converted = Model::load(start.config(), &qat(scheme, 0.), fresh.var_builder()).unwrap();
        start.load(&fresh).unwrap();
        // Rotated weights meet rotated inputs: the same function, up to the roundings of the transforms.
        assert!(max_diff(&logits(&converted), &logits(&oracle)) < 2e-4);
    }
    let scheme = Scheme::B158;
    let with_norms = start(dir.path(), true, Some(scheme)).unwrap();
    let wanted = Config { hidden_act: Activation::Silu, ..config(Family::BitNet, Some(scheme)) };
    assert_eq!(*with_norms.config(), wanted);
    let fresh = Parameters::new(1);
    let converted = Model::load(&wanted, &qat(scheme, 1.), fresh.var_builder()).unwrap();
    with_norms.load(&fresh).unwrap();
    for (name, var) in fresh.named() {
        match parameters.named().into_iter().find(|(old, _)| *old == name) {
            Some((_, old)) => assert_eq!(flat(&var), flat(&old), "{name}"),
            None => assert!(name.contains("sub_norm") && flat(&var).iter().all(|&x| x == 1.)),
        }
    }
    let saved = dir.path().join("bitnet");
    save(&wanted, &fresh, &saved);
    assert_eq!(logits(&open(&saved).load(&Device::Cpu).unwrap()), logits(&converted));
    // And on from there: the norms are those of the masters now.
    let again = start(&saved, false, Some(scheme)).unwrap();
    assert_eq!(*again.config(), wanted);
}

#[test]
fn masters_of_1bitllm_get_bitnets_names() {
    let dir = tempfile::tempdir().unwrap();
    let old = config(Family::OneBitLlm, Some(Scheme::B158));
    let (parameters, oracle) = model(&old, &qat(Scheme::B158, 1.));
    save(&old, &parameters, dir.path());
    let start = start(dir.path(), false, Some(Scheme::B158)).unwrap();
    assert_eq!(start.config().family, Family::BitNet);
    let fresh = Parameters::new(1);
    let model = Model::load(start.config(), &qat(Scheme::B158, 1.), fresh.var_builder()).unwrap();
    start.load(&fresh).unwrap();
    assert_eq!(logits(&model), logits(&oracle));
}

#[test]
fn what_cannot_be_gone_on_from_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let [full, latent, packed] = ["full", "latent", "packed"].map(|name| dir.path().join(name));
    let plain = config(Family::Llama, None);
    save(&plain, &model(&plain, &DenseLinears).0, &full);
    let quantized = config(Family::BitNet, Some(Scheme::B158));
    save(&quantized, &model(&quantized, &qat(Scheme::B158, 1.)).0, &latent);
    convert(&quantized, &open(&latent).checkpoint, &packed, Target::Packed, |_, _| ()).unwrap();
    let message = |dir: &Path, sub_norms, scheme| match start(dir, sub_norms, scheme) {
        Ok(_) => panic!("accepted"),
        Err(error) => error.to_string(),
    };
    let b158 = Some(Scheme::B158);
    assert!(message(&packed, false, b158).contains("`bitnet convert IN OUT --to latent`"));
    assert!(message(&latent, true, b158).contains("`init.sub_norms`"));
    assert!(message(&latent, false, None).contains("`model.precision`"));
    assert!(message(&dir.path().join("nothing"), false, b158).contains("nothing"));
    assert!(start(&full, true, b158).is_ok() && start(&full, false, None).is_ok());
}

/// A recipe in `dir`, with a corpus; `tables` come before the others.
fn recipe(dir: &Path, tables: &str, name: &str) -> Recipe {
    let corpus: String = (0..80)
        .map(|i| format!("the {} little hens and {i} cats played in the garden\n", i * 7 % 11))
        .collect();
    fs::write(dir.join("corpus.txt"), corpus).unwrap();
    let text = format!(
        r#"
        {tables}
        [data]
        sequence_length = 16
        train = [{{ path = "corpus.txt", documents = "line" }}]
        validation = [{{ path = "corpus.txt", documents = "line" }}]
        validation_bytes = 200
        [train]
        batch_size = 4
        gradient_accumulation = 2
        steps = 8
        eval_every = 4
        save_every = 4
        [optimizer]
        peak_lr = 0.01
        warmup_steps = 2
        [output]
        dir = "{name}"
        "#
    );
    let path = dir.join(format!("{name}.toml"));
    fs::write(&path, text).unwrap();
    Recipe::from_file(&path).unwrap()
}

const GEOMETRY: &str = "model = { hidden_size = 32, intermediate_size = 48, num_hidden_layers = 2, \
    num_attention_heads = 4, num_key_value_heads = 2, vocab_size = 270, max_position_embeddings = 32, \
    precision = \"full\" }";

fn run(recipe: &Recipe, resume: bool, stop_after: usize) -> Outcome {
    let interrupted = AtomicBool::new(false);
    let mut observe = |event: Event| {
        if matches!(event, Event::Update { record, .. } if record.step == stop_after) {
            interrupted.store(true, Ordering::Relaxed);
        }
    };
    experiment::run(recipe, resume, &mut observe, &interrupted).unwrap().outcome
}

/// The metrics without their timings.
fn untimed(recipe: &Recipe) -> Vec<Record> {
    let records = metrics::read(&recipe.output.dir.join("metrics.jsonl")).unwrap();
    records.into_iter().map(Record::untimed).collect()
}

#[test]
fn a_run_with_teacher_and_warmup_resumes_to_the_same_bits() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(run(&recipe(dir.path(), GEOMETRY, "teacher"), false, 0), Outcome::Finished);
    let tables = r#"
        init = { model = "teacher/latent" }
        quantization = { activations = "int4", hadamard = ["o_proj", "down_proj"], lambda_steps = 5 }
        distillation = { teacher = "teacher/latent", attention_weight = 0.5 }
    "#;
    let whole = recipe(dir.path(), tables, "whole");
    assert_eq!(run(&whole, false, 0), Outcome::Finished);
    let cut = recipe(dir.path(), tables, "cut");
    assert_eq!(run(&cut, false, 3), Outcome::Interrupted);
    assert_eq!(run(&cut, true, 0), Outcome::Finished);
    let records = untimed(&whole);
    assert_eq!(untimed(&cut), records);
    let best = |recipe: &Recipe| fs::read(recipe.output.dir.join("best.safetensors")).unwrap();
    assert_eq!(best(&cut), best(&whole));

    let terms = |index: usize| {
        let Record::Train(record) = &records[index] else { panic!("{index} is no update") };
        let names: Vec<&str> = record.terms.keys().map(String::as_str).collect();
        (names, record.loss, record.terms["cross_entropy"], record.terms["attention_relations"])
    };
    let (names, loss, cross_entropy, relations) = terms(0);
    assert_eq!(names, ["attention_relations", "cross_entropy", "logits_divergence"]);
    // λ is 0 and the student is its teacher: only the text has something to teach.
    assert!((loss, relations) == (cross_entropy, 0.) || relations < 1e-6, "{relations}");
    let (names, loss, cross_entropy, _) = terms(7);
    assert_eq!(names, ["attention_relations", "cross_entropy", "logits_divergence"]);
    assert!(loss > cross_entropy);

    // What evaluation saw is what the checkpoint gives.
    let source = open(&whole.output.dir.join("latent"));
    let scheme = source.config.quantization.unwrap().scheme;
    assert_eq!((scheme.stream, scheme.o_proj), (FOUR, ROTATED));
    for file in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        assert!(whole.output.dir.join("packed").join(file).is_file(), "{file}");
    }
}

#[test]
fn recipes_that_contradict_a_checkpoint_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let full = config(Family::Llama, None);
    save(&full, &model(&full, &DenseLinears).0, &dir.path().join("llama"));
    fs::write(dir.path().join("tokenizer.json"), "{}").unwrap();
    let text = |tables: &str| {
        format!(
            r#"{tables}
            optimizer = {{ peak_lr = 1e-3 }}
            output = {{ dir = "run" }}
            train = {{ batch_size = 2, steps = 1 }}
            [data]
            sequence_length = 16
            tokenizer = "tokenizer.json"
            train = [{{ path = "a", documents = "line" }}]
            validation = [{{ path = "a", documents = "line" }}]"#
        )
    };
    let path = dir.path().join("recipe.toml");
    let read = |tables: &str, settings: &[(String, String)]| {
        fs::write(&path, text(tables)).unwrap();
        Recipe::from_file_with(&path, settings)
    };
    let recipe = read("init = { model = \"llama\" }", &[]).unwrap();
    assert_eq!((recipe.model.hidden_size, recipe.model.head_dim), (32, Some(8)));
    let set = |key: &str, value: &str| vec![(key.to_owned(), value.to_owned())];
    for (tables, settings, reason) in [
        ("init = { model = \"llama\", sub_norm = true }", vec![], "sub_norm"),
        ("init = { model = \"gone\" }", vec![], "gone"),
        (
            "init = { model = \"llama\" }\nmodel = { hidden_size = 64 }",
            vec![],
            "`model.hidden_size`",
        ),
        ("init = { model = \"llama\" }", set("train.steps", "0"), "--i-know"),
        ("init = { model = \"llama\" }", set("model.precision", "half"), "half"),
        (
            "init = { model = \"llama\" }\nquantization = { weights = \"none\", activations = \"none\" }",
            vec![],
            "`quantization.weights`",
        ),
        (
            "init = { model = \"llama\" }\nquantization = { hadamard = [\"q_proj\"] }",
            vec![],
            "q_proj",
        ),
        (
            "init = { model = \"llama\" }\nquantization = { activations = \"int4\" }",
            set("model.precision", "full"),
            "`quantization`",
        ),
        (
            "init = { model = \"llama\" }\ndistillation = { teacher = \"llama\", temperature = 0 }",
            vec![],
            "temperature",
        ),
        (
            "init = { model = \"llama\" }\ndistillation = { teacher = \"llama\", attention_layer = 2 }",
            vec![],
            "`distillation.attention_layer`",
        ),
    ] {
        let message = read(tables, &settings).unwrap_err().to_string();
        assert!(message.contains(reason), "{tables}: {message}");
    }
}
