//! Quantization-aware training against PyTorch and transformers: gradients of every parameter, the first update, and
//! the losses and norms of ten.

#![allow(clippy::unwrap_used)] // test code

use bitnet_model::{model::Model, quant::Rounding};
use bitnet_tests::fixture::Fixture;
use bitnet_train::{
    loss::{IGNORED, cross_entropy},
    optimizer::{AdamW, AdamWConfig, Decay, Rates, Update, clip_factor, global_norm},
    parameters::Parameters,
    qat::QatLinears,
};
use candle_core::{D, DType, Device, Tensor, Var};

const CONFIG: AdamWConfig = AdamWConfig { beta1: 0.9, beta2: 0.95, eps: 1e-8, decay: Decay::All };
const RATES: Rates = Rates { lr: 1e-3, weight_decay: 0.1 };
const MAX_NORM: f64 = 1.;

/// The fixture's masters as variables.
fn masters(fixture: &Fixture) -> std::sync::Arc<Parameters> {
    let parameters = Parameters::new(0);
    for name in fixture.expected.keys().filter_map(|key| key.strip_prefix("grad.")) {
        parameters.insert(name, &fixture.checkpoint.read(name).unwrap()).unwrap();
    }
    parameters
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn largest_difference(a: &Tensor, b: &Tensor) -> f32 {
    assert_eq!(a.shape(), b.shape());
    values(a).iter().zip(values(b)).map(|(a, b)| (a - b).abs()).fold(0., f32::max)
}

/// Labels of the next token, where it counts.
fn labels(fixture: &Fixture) -> Vec<i64> {
    let rows = fixture.expected["labels"].to_vec2::<i64>().unwrap();
    rows.into_iter().flat_map(|row| row.into_iter().skip(1).chain([IGNORED])).collect()
}

/// The optimizer alone: the reference's gradients give the reference's parameters.
#[test]
fn one_update_equals_torch() {
    let fixture = Fixture::open("grad_bitnet_qat");
    let named: Vec<(String, Var)> = masters(&fixture).named();
    let expected = |kind: &str, name: &str| fixture.expected[&format!("{kind}.{name}")].clone();
    let gradients: Vec<Tensor> = named.iter().map(|(name, _)| expected("grad", name)).collect();
    let norm = global_norm(&gradients).unwrap();
    let expected_norm = fixture.scalars["adamw_grad_norms"][0].as_f64().unwrap();
    assert!((norm / expected_norm - 1.).abs() < 1e-6, "norm {norm}, expected {expected_norm}");
    let update = Update { rates: RATES, grad_factor: clip_factor(norm, MAX_NORM) };
    AdamW::new(&named, CONFIG).unwrap().step(&gradients, update).unwrap();
    for (name, var) in &named {
        let off = largest_difference(var, &expected("adamw1", name));
        // Parameters are below 2, where an f32 is accurate to 1.2e-7; torch may fuse where we round twice.
        assert!(off < 3e-7, "{name} is off by {off:e}");
    }
}

/// Forward, backward, clipping and update together over ten steps.
#[test]
fn ten_steps_follow_torch() {
    // In the second one some codes lie at a rounding threshold, and one that flips moves everything after it.
    for (name, rounding, loss_bound, norm_bound) in [
        ("grad_bitnet_qat", Rounding::HalfEven, 3e-6, 1e-6),
        ("grad_llama_onebit_qat", Rounding::HalfUp, 2e-3, 1e-2),
    ] {
        let fixture = Fixture::open(name);
        let parameters = masters(&fixture);
        let model =
            Model::load(&fixture.config, &QatLinears::new(rounding), parameters.var_builder())
                .unwrap();
        let named = parameters.named();
        let mut adamw = AdamW::new(&named, CONFIG).unwrap();
        let tokens = fixture.expected["input_ids"].to_dtype(DType::U32).unwrap();
        let labels = labels(&fixture);
        for step in 0..10 {
            let hidden = model.hidden_states(&tokens, None).unwrap();
            let logits = model.logits(&hidden).unwrap().flatten_to(D::Minus2).unwrap();
            let loss = cross_entropy(&logits, &labels, None).unwrap();
            let grads = loss.backward().unwrap();
            let gradients: Vec<Tensor> = named
                .iter()
                .map(|(name, var)| {
                    grads.get(var).unwrap_or_else(|| panic!("no gradient reached {name}")).clone()
                })
                .collect();
            if step == 0 {
                for ((parameter, _), gradient) in named.iter().zip(&gradients) {
                    let expected = &fixture.expected[&format!("grad.{parameter}")];
                    let largest = values(expected).iter().fold(0f32, |most, g| most.max(g.abs()));
                    let difference = largest_difference(gradient, expected);
                    assert!(
                        largest > 0. && difference < 1e-4 * largest,
                        "{name}: {parameter}: {difference:e}"
                    );
                }
            }
            let norm = global_norm(&gradients).unwrap();
            let update = Update { rates: RATES, grad_factor: clip_factor(norm, MAX_NORM) };
            adamw.step(&gradients, update).unwrap();

            let expected = |key: &str| fixture.scalars[key][step].as_f64().unwrap();
            let loss = f64::from(loss.to_scalar::<f32>().unwrap());
            let (loss_off, norm_off) =
                (loss - expected("adamw_losses"), norm / expected("adamw_grad_norms") - 1.);
            assert!(
                loss_off.abs() < loss_bound,
                "{name}: loss of step {step} is off by {loss_off:e}"
            );
            assert!(
                norm_off.abs() < norm_bound,
                "{name}: norm of step {step} is off by {norm_off:e}"
            );
        }
    }
}

/// Documents packed into one row: states with the bits of the documents alone, and the gradients of their sum.
#[test]
fn packed_documents_train_as_they_do_alone() {
    let fixture = Fixture::open("grad_bitnet_qat");
    let parameters = masters(&fixture);
    let linears = QatLinears::new(Rounding::HalfEven);
    let model = Model::load(&fixture.config, &linears, parameters.var_builder()).unwrap();
    let ids: Vec<u32> = (0..21).map(|i| i * 7 % 50 + 1).collect();
    let tensor = |ids: &[u32]| Tensor::from_slice(ids, (1, ids.len()), &Device::Cpu).unwrap();
    let gradients = |states: &Tensor| states.sqr().unwrap().sum_all().unwrap().backward().unwrap();
    let documents = [0..4, 4..15, 15..21];
    let starts = [vec![0; 4], vec![4; 11], vec![15; 6]].concat();
    let packed = model.document_states(&tensor(&ids), &starts).unwrap();
    let alone = documents.map(|document| {
        let states = model.hidden_states(&tensor(&ids[document.clone()]), None).unwrap();
        let part = packed.narrow(1, document.start, document.len()).unwrap();
        assert_eq!(values(&states), values(&part));
        states
    });
    let (packed, alone) = (gradients(&packed), alone.map(|states| gradients(&states)));
    for (name, var) in parameters.named() {
        let Some(gradient) = packed.get(&var) else { continue }; // the head took no part
        let sum = alone.iter().map(|gradients| gradients.get(&var).unwrap().clone());
        let sum = sum.reduce(|sum, gradient| (sum + gradient).unwrap()).unwrap();
        let largest = values(&sum).iter().fold(0f32, |most, g| most.max(g.abs()));
        // The same addends in another order.
        let difference = largest_difference(gradient, &sum);
        assert!(
            largest > 0. && difference < 1e-5 * largest,
            "{name}: {difference:e} of {largest:e}"
        );
    }
    for (starts, reason) in [(vec![0; 20], "20 starts"), (vec![1; 21], "behind one of its tokens")]
    {
        let message = model.document_states(&tensor(&ids), &starts).unwrap_err().to_string();
        assert!(message.contains(reason), "{message}");
    }
}
