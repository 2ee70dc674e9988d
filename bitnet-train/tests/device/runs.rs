//! Runs of recipes and of adapters, whose losses and files are the processor's.

use std::{
    fs,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
};

use bitnet_model::{
    adapter::AdapterConfig,
    hub::Hub,
    ops::gemm::Precision,
    pretrained::{Precision as Form, Source},
};
use bitnet_train::{
    Result,
    batch::Batch,
    distributed::{Communicator, Single},
    experiment::{Place, run_as},
    language_model::LanguageModel,
    lora::{LoraModel, LoraTask, Mode, Training},
    loss::shift_labels,
    metrics::{self, Record},
    objective::NextToken,
    optimizer::{AdamW, AdamWConfig, Decay, Rates, Update, clip_factor, global_norm},
    recipe::{Recipe, Weights},
    task::{Gradients, Task},
    trainer::{Event, Outcome},
};
use candle_core::Device;

/// A tiny model whose quantization comes in over two updates of three: weights and inputs are on their way at first, and
/// integers at the end.
const RECIPE: &str = r#"
    DISTILLATION
    [model]
    hidden_size = 32
    intermediate_size = 48
    num_hidden_layers = 2
    num_attention_heads = 4
    num_key_value_heads = 2
    vocab_size = 262
    max_position_embeddings = 32
    [quantization]
    activations = "ACTIVATIONS"
    hadamard = ["o_proj", "down_proj"]
    lambda_steps = 2
    [data]
    sequence_length = 8
    train = [{ path = "corpus.txt", documents = "line" }]
    validation = [{ path = "corpus.txt", documents = "line" }]
    validation_bytes = 30
    [train]
    batch_size = 2
    gradient_accumulation = 2
    steps = 3
    eval_every = 3
    save_every = 1
    recompute_blocks = RECOMPUTE
    [optimizer]
    peak_lr = 0.01
    warmup_steps = 1
    [output]
    dir = "run"
"#;

/// Activations, whether blocks are computed again, and another table.
type Kind = (&'static str, bool, &'static str);

fn recipe(dir: &Path, output: &str, (activations, recompute, table): Kind) -> Recipe {
    let line = |i: usize| format!("the {} hens and {i} cats\n", i * 7 % 11);
    fs::write(dir.join("corpus.txt"), (0..20).map(line).collect::<String>()).unwrap();
    let text = RECIPE.replace("ACTIVATIONS", activations).replace("DISTILLATION", table);
    let text = text.replace("RECOMPUTE", &recompute.to_string());
    fs::write(dir.join("recipe.toml"), text).unwrap();
    let mut recipe = Recipe::from_file(&dir.join("recipe.toml")).unwrap();
    recipe.output.dir = dir.join(output);
    recipe
}

/// Runs on `device`, until its end or until so many updates were made.
fn run(recipe: &Recipe, device: &Device, resume: bool, updates: usize) -> Outcome {
    let interrupted = AtomicBool::new(false);
    let mut observe = |event: Event| {
        if let Event::Update { record, .. } = event {
            interrupted.store(record.step == updates, Ordering::Relaxed);
        }
    };
    let place = Place { device: device.clone(), ..Place::default() };
    run_as(place, recipe, resume, &mut observe, &interrupted).unwrap().outcome
}

/// The run on the device is cut in two, and goes on from what it saved; its last part may be the processor's as well.
#[test]
fn a_run_has_the_losses_and_the_files_of_the_processor() {
    let cuda = Device::new_cuda(0).unwrap();
    let (dir, teacher) = (
        tempfile::tempdir().unwrap(),
        "distillation = { teacher = \"0-cpu/latent\", attention_weight = 0.5 }",
    );
    let kinds: [(Kind, &Device); 3] = [
        (("int8", false, ""), &cuda),
        (("int4", true, ""), &Device::Cpu),
        (("int8", false, teacher), &cuda),
    ];
    for (index, (kind, last)) in kinds.into_iter().enumerate() {
        let [expected, found] =
            ["cpu", "cuda"].map(|device| recipe(dir.path(), &format!("{index}-{device}"), kind));
        assert_eq!(run(&expected, &Device::Cpu, false, usize::MAX), Outcome::Finished);
        assert_eq!(run(&found, &cuda, false, 2), Outcome::Interrupted);
        assert_eq!(run(&found, last, true, usize::MAX), Outcome::Finished);
        let records = |recipe: &Recipe| -> Vec<Record> {
            let records = metrics::read(&recipe.output.dir.join("metrics.jsonl")).unwrap();
            records.into_iter().map(Record::untimed).collect()
        };
        assert_eq!(records(&found), records(&expected), "{kind:?}");
        for file in [
            "step-2/model.safetensors",
            "step-2/optimizer.safetensors",
            "step-3/model.safetensors",
            "step-3/optimizer.safetensors",
            "best.safetensors",
            "packed/model.safetensors",
        ] {
            let read = |recipe: &Recipe| fs::read(recipe.output.dir.join(file)).unwrap();
            assert!(read(&found) == read(&expected), "{kind:?}: {file}");
        }
    }
}

/// The first of two ranks.
#[derive(Debug, Default)]
struct OfTwo(Single);

impl Communicator for OfTwo {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        2
    }

    fn start_all_reduce(&mut self, values: Vec<f32>) -> Result<()> {
        self.0.start_all_reduce(values)
    }

    fn wait(&mut self) -> Result<Vec<f32>> {
        self.0.wait()
    }

    fn all_gather(&mut self, values: &[u64]) -> Result<Vec<u64>> {
        self.0.all_gather(values)
    }
}

#[test]
fn what_a_device_does_not_train_is_refused_before_a_run_begins() {
    let (dir, device) = (tempfile::tempdir().unwrap(), Device::new_cuda(0).unwrap());
    let mut recipe = recipe(dir.path(), "refused", ("int8", false, ""));
    let refusal = |recipe: &Recipe, communicator: Box<dyn Communicator>| {
        let place = Place { communicator, device: device.clone() };
        let interrupted = AtomicBool::new(false);
        run_as(place, recipe, false, &mut |_| (), &interrupted).unwrap_err().to_string()
    };
    let ranks = refusal(&recipe, Box::<OfTwo>::default());
    assert!(ranks.contains("2 processes train on `cpu` only so far"), "{ranks}");
    recipe.quantization.weights = Weights::Sign;
    let sign = refusal(&recipe, Box::<Single>::default());
    assert!(sign.contains("quantization.weights = \"sign\" is trained on `cpu` only"), "{sign}");
    assert!(!recipe.output.dir.exists());
}

/// Losses of two updates, and what the adapter's matrices are then.
fn adapter(
    fixture: &str,
    mode: Mode,
    recompute: bool,
    device: &Device,
) -> (Vec<f64>, Vec<Vec<f32>>) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(fixture);
    let source =
        Source::open(folder.to_str().unwrap(), Form::AsConfigured, &Hub::from_env()).unwrap();
    let config = AdapterConfig { rank: 3, alpha: 6., dropout: 0.2, ..AdapterConfig::default() };
    // Room for some products, so that some are kept and some are not.
    let training = Training { mode, seed: 7, backward: Precision::F32, keep_bytes: 20_000 };
    let LoraModel { trained, frozen, parameters, step } =
        LoraModel::load(&source, &config, training, device).unwrap();
    let task = LanguageModel::new(trained, frozen, Box::new(NextToken::default()));
    let task = LoraTask::new(task.recompute(recompute), step, 0);
    let named = parameters.named();
    let decay = Decay::Matrices;
    let mut adamw =
        AdamW::new(&named, AdamWConfig { beta1: 0.9, beta2: 0.999, eps: 1e-8, decay }).unwrap();
    let inputs = vec![5u32, 17, 99, 3, 42, 7, 7, 250, 11, 8, 5, 1];
    let labels = shift_labels(&inputs, 6);
    let batch = Batch { inputs, labels, starts: Vec::new(), sequence_length: 6 };
    let mut losses = Vec::new();
    for update in 0..2 {
        task.begin(update).unwrap();
        let mut gradients = Gradients::new(&named);
        losses.push(task.pass(&batch, batch.items(), &mut gradients).unwrap()[0].value);
        let gradients = gradients.finish().unwrap();
        let norm = global_norm(&gradients).unwrap();
        losses.push(norm);
        let rates = Rates { lr: 0.02, weight_decay: 0.1 };
        adamw.step(&gradients, Update { rates, grad_factor: clip_factor(norm, 0.5) }).unwrap();
    }
    let values = named.iter().map(|(_, var)| var.flatten_all().unwrap().to_vec1().unwrap());
    (losses, values.collect())
}

#[test]
fn adapters_are_trained_as_on_the_processor() {
    let cuda = Device::new_cuda(0).unwrap();
    for (fixture, mode, recompute) in [
        ("bitnet_packed_tied", Mode::Adapter, false),
        ("bitnet_packed_tied", Mode::Adapter, true),
        ("grad_bitnet_qat", Mode::Qat, false),
    ] {
        let found = adapter(fixture, mode, recompute, &cuda);
        let expected = adapter(fixture, mode, recompute, &Device::Cpu);
        assert!(found.0 == expected.0, "{mode:?}: {:?}, not {:?}", found.0, expected.0);
        assert!(found.1 == expected.1, "{mode:?}: matrices");
        assert!(found.0[0] != found.0[2], "{mode:?}: nothing was learnt");
    }
}
