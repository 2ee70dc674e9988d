//! The loop with a small bigram model in place of a language model.

use std::{cell::Cell, fs, path::Path};

use bitnet_model::quant::Rounding;
use candle_core::{D, DType, Device, Tensor};

use super::*;
use crate::{
    codes::codes,
    loss::{cross_entropy, predictions},
    metrics,
    recipe::Limits,
    task::Prediction,
};

/// `logits = (embedding[token] · gain) @ head`: three parameters, of which one is a vector.
struct Bigram {
    parameters: Vec<(String, Var)>,
    forwards: Cell<usize>,
    /// Forward passes of evaluations count too, so that trouble comes in updates and in evaluations.
    trouble: Option<(usize, Trouble)>,
    lambda: Option<f64>,
}

enum Trouble {
    Killed,
    NaN,
    Collapse,
}

const VOCAB: usize = 300;
const WIDTH: usize = 8;

impl Bigram {
    fn new() -> Self {
        let device = Device::Cpu;
        let fill = |shape: &[usize], scale: f64| {
            let count = shape.iter().product::<usize>();
            let values: Vec<f32> =
                (0..count).map(|i| (scale * (i as f64 * 12.9898).sin()) as f32).collect();
            Var::from_vec(values, shape, &device).unwrap()
        };
        let parameters = vec![
            ("embed_tokens.weight".into(), fill(&[VOCAB, WIDTH], 0.5)),
            ("lm_head.weight".into(), fill(&[WIDTH, VOCAB], 0.5)),
            ("norm.weight".into(), Var::ones(WIDTH, DType::F32, &device).unwrap()),
        ];
        Self { parameters, forwards: Cell::new(0), trouble: None, lambda: None }
    }

    fn in_trouble(self, forwards: usize, trouble: Trouble) -> Self {
        Self { trouble: Some((forwards, trouble)), ..self }
    }

    /// Logits (rows, vocab).
    fn forward(&self, batch: &Batch) -> candle_core::Result<Tensor> {
        let tokens = Tensor::new(&batch.inputs[..], &Device::Cpu)?;
        let logits = self.logits(&tokens)?.flatten_to(D::Minus2)?;
        self.forwards.set(self.forwards.get() + 1);
        match &self.trouble {
            Some((last, Trouble::Killed)) if self.forwards.get() > *last => {
                candle_core::bail!("killed")
            }
            Some((last, Trouble::NaN)) if self.forwards.get() > *last => logits * f64::NAN,
            _ => Ok(logits),
        }
    }

    fn logits(&self, tokens: &Tensor) -> candle_core::Result<Tensor> {
        let [(_, embedding), (_, head), (_, gain)] = self.parameters.as_slice() else {
            unreachable!()
        };
        embedding.index_select(tokens, 0)?.broadcast_mul(gain)?.matmul(head)
    }

    fn weights(&self) -> Vec<Vec<f32>> {
        self.parameters
            .iter()
            .map(|(_, var)| var.flatten_all().unwrap().to_vec1().unwrap())
            .collect()
    }
}

impl Task for Bigram {
    fn pass(&self, batch: &Batch, items: usize, gradients: &mut Gradients) -> Result<Vec<Part>> {
        let loss = cross_entropy(&self.forward(batch)?, &batch.labels, Some(items))?;
        gradients.collect(&mut loss.backward()?)?;
        let value = f64::from(loss.to_scalar::<f32>()?);
        Ok(vec![Part { name: "cross_entropy", value, weight: 1. }])
    }

    fn evaluate(&self, batch: &Batch) -> Result<Vec<Prediction>> {
        let predictions = predictions(&self.forward(batch)?, &batch.labels)?;
        Ok(match &self.trouble {
            Some((last, Trouble::Collapse)) if self.forwards.get() > *last => {
                vec![Prediction { nats: 9., token: 7 }; predictions.len()]
            }
            _ => predictions,
        })
    }

    fn lambda(&self) -> Option<f64> {
        self.lambda
    }

    fn codes(&self, name: &str, latent: &[f32]) -> Option<Vec<i8>> {
        (name == "lm_head.weight").then(|| codes(latent, Rounding::HalfEven.into()))
    }
}

fn recipe(dir: &Path) -> Recipe {
    let text = format!(
        r#"
        [model]
        hidden_size = 8
        intermediate_size = 8
        num_hidden_layers = 1
        num_attention_heads = 1
        num_key_value_heads = 1
        vocab_size = {VOCAB}
        max_position_embeddings = 16
        [data]
        sequence_length = 16
        train = [{{ path = "corpus.txt", documents = "line" }}]
        validation = [{{ path = "corpus.txt", documents = "line" }}]
        validation_bytes = 200
        [train]
        batch_size = 4
        steps = 23
        eval_every = 4
        save_every = 5
        codes_every = 3
        [optimizer]
        peak_lr = 0.05
        warmup_steps = 3
        [output]
        dir = "run"
        tensorboard = true
        "#
    );
    let corpus: String = (0..60)
        .map(|i| format!("the {} little hens and the {i} cats played in the garden\n", i * 7 % 11))
        .collect();
    fs::write(dir.join("corpus.txt"), corpus).unwrap();
    fs::write(dir.join("recipe.toml"), text).unwrap();
    Recipe::from_file(&dir.join("recipe.toml")).unwrap()
}

fn start(recipe: &Recipe, model: &Bigram) -> Trainer {
    Trainer::start(recipe, Dataset::open(recipe).unwrap(), model.parameters.clone()).unwrap()
}

fn resume(recipe: &Recipe, model: &Bigram) -> Result<Trainer> {
    Trainer::resume(recipe, Dataset::open(recipe).unwrap(), model.parameters.clone())
}

fn run(trainer: &mut Trainer, model: &Bigram) -> Result<Outcome> {
    trainer.run(model, &mut |_| (), &AtomicBool::new(false))
}

/// The metrics without their timings.
fn untimed_metrics(recipe: &Recipe) -> Vec<metrics::Record> {
    let records = metrics::read(&recipe.output.dir.join(metrics::FILE)).unwrap();
    records.into_iter().map(Record::untimed).collect()
}

#[test]
fn it_learns() {
    let dir = tempfile::tempdir().unwrap();
    let (recipe, model) = (recipe(dir.path()), Bigram::new());
    let mut trainer = start(&recipe, &model);
    assert_eq!(run(&mut trainer, &model).unwrap(), Outcome::Finished);
    let records = untimed_metrics(&recipe);
    let losses: Vec<f64> = records
        .iter()
        .filter_map(|r| if let Record::Train(r) = r { Some(r.loss) } else { None })
        .collect();
    // Evaluations after 4, 8, …, 20 and 23, censuses after 1, 3, 6, …, 21 and 23.
    assert_eq!((losses.len(), records.len()), (23, 23 + 6 + 9));
    assert!(losses[22] < 0.6 * losses[0], "{losses:?}");
    let best = trainer.state().best.unwrap();
    assert_eq!((best.step, trainer.state().tokens), (23, 23 * 64));
    let loaded = Bigram::new();
    checkpoint::load_weights(&trainer.best(), &loaded.parameters).unwrap();
    assert_eq!(loaded.weights(), model.weights());
    for file in ["tokenizer.json", "tokenizer_config.json", "step-20", "step-23"] {
        assert!(recipe.output.dir.join(file).exists(), "{file}");
    }
    assert_eq!(run(&mut resume(&recipe, &model).unwrap(), &model).unwrap(), Outcome::Finished);
}

#[test]
fn killed_and_resumed_equals_uninterrupted() {
    let dir = tempfile::tempdir().unwrap();
    let (recipe, model) = (recipe(dir.path()), Bigram::new());
    let mut whole = start(&recipe, &model);
    run(&mut whole, &model).unwrap();
    for kill_at in [1, 6, 13, 26] {
        let dir = tempfile::tempdir().unwrap();
        let recipe = self::recipe(dir.path());
        let victim = Bigram::new().in_trouble(kill_at, Trouble::Killed);
        let mut trainer = start(&recipe, &victim);
        run(&mut trainer, &victim).unwrap_err();
        drop(trainer);
        let resumed = Bigram::new();
        let mut trainer = resume(&recipe, &resumed).unwrap();
        run(&mut trainer, &resumed).unwrap();
        assert_eq!(resumed.weights(), model.weights());
        assert_eq!(trainer.state(), whole.state());
        assert_eq!(untimed_metrics(&recipe), untimed_metrics(&whole.recipe));
    }
}

#[test]
fn an_interrupted_run_is_saved_and_resumed() {
    let dir = tempfile::tempdir().unwrap();
    let (recipe, model) = (recipe(dir.path()), Bigram::new());
    let interrupted = AtomicBool::new(false);
    let mut saved = Vec::new();
    let mut observe = |event: Event| match event {
        Event::Update { record, steps, .. } => {
            assert_eq!(steps, 23);
            interrupted.store(record.step == 7, Ordering::Relaxed);
        }
        Event::Data(_) | Event::Records(_) | Event::Samples(_) => {
            unreachable!("the trainer reads no text")
        }
        Event::Saved(path) => saved.push(path.file_name().unwrap().to_owned()),
        Event::Evaluation { .. } => (),
    };
    let mut trainer = start(&recipe, &model);
    assert_eq!(trainer.run(&model, &mut observe, &interrupted).unwrap(), Outcome::Interrupted);
    assert_eq!(saved, ["step-5", "step-7"]);
    let resumed = Bigram::new();
    let mut trainer = resume(&recipe, &resumed).unwrap();
    assert_eq!(trainer.state().step, 7);
    assert_eq!(run(&mut trainer, &resumed).unwrap(), Outcome::Finished);

    let whole_dir = tempfile::tempdir().unwrap();
    let (whole_recipe, whole) = (self::recipe(whole_dir.path()), Bigram::new());
    run(&mut start(&whole_recipe, &whole), &whole).unwrap();
    assert_eq!(resumed.weights(), whole.weights());
    assert_eq!(untimed_metrics(&recipe), untimed_metrics(&whole_recipe));
}

#[test]
fn accumulated_batches_equal_one_large_batch() {
    let [large, accumulated] = [(4, 1), (2, 2)].map(|(batch_size, gradient_accumulation)| {
        let dir = tempfile::tempdir().unwrap();
        let mut recipe = recipe(dir.path());
        recipe.train.batch_size = batch_size;
        recipe.train.gradient_accumulation = gradient_accumulation;
        recipe.train.steps = Some(6);
        let model = Bigram::new();
        run(&mut start(&recipe, &model), &model).unwrap();
        model.weights()
    });
    for (a, b) in large.iter().flatten().zip(accumulated.iter().flatten()) {
        assert!((a - b).abs() < 1e-4, "{a} {b}"); // the sign of a tiny gradient decides an early update
    }
}

#[test]
fn a_run_that_does_not_improve_stops_and_stays_stopped() {
    let dir = tempfile::tempdir().unwrap();
    let (mut recipe, model) = (recipe(dir.path()), Bigram::new());
    recipe.train.early_stop_patience = Some(2);
    recipe.optimizer.peak_lr = 1e-12; // too small to change an f32
    recipe.optimizer.weight_decay = 0.;
    recipe.validate().unwrap();
    let mut trainer = start(&recipe, &model);
    assert_eq!(run(&mut trainer, &model).unwrap(), Outcome::EarlyStopped);
    assert_eq!((trainer.state().step, trainer.state().best.unwrap().step), (12, 4));
    let mut trainer = resume(&recipe, &model).unwrap();
    assert_eq!(run(&mut trainer, &model).unwrap(), Outcome::EarlyStopped);
    assert_eq!(trainer.state().step, 12);
}

#[test]
fn a_diverged_run_names_step_and_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let (recipe, model) = (recipe(dir.path()), Bigram::new().in_trouble(13, Trouble::NaN));
    let message = run(&mut start(&recipe, &model), &model).unwrap_err().to_string();
    // 13 forward passes are 11 updates and the evaluations after the fourth and the eighth.
    assert!(message.starts_with("step 12: loss is NaN"), "{message}");
    assert!(message.ends_with("step-10"), "{message}");
    assert!(model.weights().iter().flatten().all(|weight| weight.is_finite()));
}

#[test]
fn a_loss_that_stays_high_stops_the_run() {
    let dir = tempfile::tempdir().unwrap();
    let (mut recipe, model) = (recipe(dir.path()), Bigram::new());
    recipe.train.limits.divergence_updates = 6;
    recipe.train.save_every = 1;
    (recipe.optimizer.peak_lr, recipe.optimizer.warmup_steps) = (6., 23);
    let message = run(&mut start(&recipe, &model), &model).unwrap_err().to_string();
    assert!(message.contains("for 6 updates") && message.contains("peak_lr"), "{message}");
    // The last good checkpoint is far beyond the two that are kept.
    let good = message.rsplit_once("step-").unwrap().1;
    assert!(recipe.output.dir.join(format!("step-{good}")).is_dir(), "{message}");
    let state = resume(&recipe, &model).unwrap().state().clone();
    assert!(good.parse::<usize>().unwrap() + 4 < state.step, "{message}");
    assert_eq!(
        run(&mut resume(&recipe, &model).unwrap(), &model).unwrap_err().to_string(),
        message
    );
    recipe.train.stop_on_divergence = false;
    assert_eq!(run(&mut resume(&recipe, &model).unwrap(), &model).unwrap(), Outcome::Finished);
}

#[test]
fn collapsed_predictions_stop_the_run() {
    let dir = tempfile::tempdir().unwrap();
    let (mut recipe, model) = (recipe(dir.path()), Bigram::new());
    recipe.train.limits =
        Limits { collapse_evaluations: 2, collapse_after: 0, ..Limits::default() };
    // 14 forward passes are 12 updates and 2 evaluations; the third evaluation is the first bad one.
    let model = model.in_trouble(14, Trouble::Collapse);
    let message = run(&mut start(&recipe, &model), &model).unwrap_err().to_string();
    assert!(
        message.starts_with("step 16: the predictions have collapsed to 1.0 tokens"),
        "{message}"
    );
    assert!(message.ends_with("step-5"), "{message}"); // sound after 8, and step-10 may be bad
    let another = tempfile::tempdir().unwrap();
    recipe.output.dir = another.path().to_owned();
    // While quantization comes in, the quantized model may be good for nothing.
    let warmed_up = Bigram { lambda: Some(0.5), ..Bigram::new() }.in_trouble(14, Trouble::Collapse);
    assert_eq!(run(&mut start(&recipe, &warmed_up), &warmed_up).unwrap(), Outcome::Finished);
    recipe.output.dir = dir.path().join("run");
    recipe.train.stop_on_collapse = false;
    assert_eq!(run(&mut resume(&recipe, &model).unwrap(), &model).unwrap(), Outcome::Finished);
}

#[test]
fn a_parameter_without_a_gradient_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let (recipe, model) = (recipe(dir.path()), Bigram::new());
    let mut parameters = model.parameters.clone();
    parameters.push(("unused.weight".into(), Var::zeros(3, DType::F32, &Device::Cpu).unwrap()));
    let mut trainer = Trainer::start(&recipe, Dataset::open(&recipe).unwrap(), parameters).unwrap();
    let message = run(&mut trainer, &model).unwrap_err().to_string();
    assert!(message.contains("`unused.weight`"), "{message}");
}

#[test]
fn another_run_is_not_continued() {
    let dir = tempfile::tempdir().unwrap();
    let (mut recipe, model) = (recipe(dir.path()), Bigram::new());
    run(&mut start(&recipe, &model), &model).unwrap();
    let dataset = Dataset::open(&recipe).unwrap();
    let message =
        Trainer::start(&recipe, dataset, model.parameters.clone()).unwrap_err().to_string();
    assert!(message.contains("resume it, or choose another `output.dir`"), "{message}");
    recipe.train.seed = 1;
    let message = resume(&recipe, &model).unwrap_err().to_string();
    assert!(message.contains("another recipe: `train.seed` was 0 and is 1"), "{message}");
    recipe.train.seed = 0;
    fs::write(&recipe.data.validation[0].path, "another text in the garden\n".repeat(60)).unwrap();
    recipe.data.tokenizer = Some(recipe.output.dir.join("tokenizer.json"));
    let message = resume(&recipe, &model).unwrap_err().to_string();
    assert!(message.contains("another dataset"), "{message}");
}

#[path = "trainer_example_tests.rs"]
mod examples;
#[path = "trainer_rank_tests.rs"]
mod ranks;
