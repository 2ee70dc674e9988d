//! Training on CUDA device 0 against the same on the processor, bit for bit: a step, and whole runs ([`runs`]).
//!
//! The device may be a real one, or that of `tests/ptx` (scripts/cuda_interpret.sh).

#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used)] // test code

mod runs;

use std::{collections::BTreeMap, path::Path};

use bitnet_model::{
    checkpoint::Checkpoint, config::Config, model::Model, ops::gemm::Precision, quant::Rounding,
};
use bitnet_train::{
    head_loss::head_loss,
    loss::IGNORED,
    optimizer::global_norm,
    qat::QatLinears,
    qat_matmul::{QatProduct, qat_matmul},
};
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};

/// A step's loss, and the gradients of all variables by their names.
type Step = (f32, BTreeMap<String, Vec<f32>>);

/// A step of the fixture's model: two rows, of which the first packs two documents.
fn step(device: &Device, rounding: Rounding) -> Step {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/grad_bitnet_qat");
    let config = Config::from_file(&folder.join("config.json")).unwrap();
    let checkpoint = Checkpoint::open(&[folder.join("model.safetensors")]).unwrap();
    let variables = VarMap::new();
    for name in checkpoint.names() {
        let tensor = checkpoint.read(name).unwrap().to_dtype(DType::F32).unwrap();
        let var = Var::from_tensor(&tensor.to_device(device).unwrap()).unwrap();
        variables.data().lock().unwrap().insert(name.to_owned(), var);
    }
    let vb = VarBuilder::from_varmap(&variables, DType::F32, device);
    let model = Model::load(&config, &QatLinears::new(rounding), vb).unwrap();
    let tokens = Tensor::new(&[[5u32, 17, 99, 3, 42, 7], [7, 250, 11, 8, 5, 1]], device).unwrap();
    let starts = [0, 0, 0, 0, 4, 4, 0, 0, 0, 0, 0, 0];
    let labels = [17, 99, 3, IGNORED, 7, IGNORED, 250, 11, 8, 5, 1, IGNORED];
    let hidden = model.document_states(&tokens, &starts).unwrap();
    let embedding = variables.data().lock().unwrap()["model.embed_tokens.weight"].clone();
    let loss = head_loss(&hidden, &embedding, &labels, 9, Precision::F32).unwrap();
    let gradients = loss.backward().unwrap();
    let named = variables.data().lock().unwrap().clone().into_iter().map(|(name, var)| {
        let gradient = gradients.get(&var).unwrap_or_else(|| panic!("no gradient reached {name}"));
        assert!(gradient.device().same_device(device), "{name}");
        (name, gradient.flatten_all().unwrap().to_vec1().unwrap())
    });
    (loss.to_scalar().unwrap(), named.collect())
}

#[test]
fn a_step_on_the_device_has_the_gradients_of_the_processor() {
    let cuda = Device::new_cuda(0).unwrap();
    for rounding in [Rounding::HalfEven, Rounding::HalfUp] {
        let (loss, found) = step(&cuda, rounding);
        let (expected_loss, expected) = step(&Device::Cpu, rounding);
        assert_eq!(loss, expected_loss, "{rounding:?}");
        for (name, expected) in expected {
            // `==`: zeros of either sign are the same.
            assert!(found[&name] == expected, "{rounding:?}: the gradient of {name}");
            assert!(expected.iter().any(|x| *x != 0.), "{name}");
        }
    }
}

/// The mean of |w| is 1, so that ½ and −½ are halfway.
#[test]
fn weights_halfway_between_codes_are_rounded_as_on_the_processor() {
    let cuda = Device::new_cuda(0).unwrap();
    let product = |device: &Device, rounding: Rounding| -> Vec<f32> {
        let latent =
            Tensor::new(&[[0.5f32, 1.5, -0.5, -1.5], [1.5, -0.5, 0.5, 1.5]], device).unwrap();
        let x = Tensor::new(&[[1f32, 2., 4., 8.]], device).unwrap();
        let (weight, input) = (rounding.into(), rounding.into());
        let product = QatProduct { weight, input, backward: Precision::F32 };
        let y = qat_matmul(&x, &latent, product, &Default::default()).unwrap();
        y.flatten_all().unwrap().to_vec1().unwrap()
    };
    let products = [Rounding::HalfEven, Rounding::HalfUp].map(|rounding| {
        let expected = product(&Device::Cpu, rounding);
        assert_eq!(product(&cuda, rounding), expected, "{rounding:?}");
        expected
    });
    assert_ne!(products[0], products[1], "the roundings differ");
}

/// Of which none, some or all values are left of whole eights, in a chunk or two; one is a view.
#[test]
fn norms_of_gradients_are_those_of_the_processor() {
    let norm = |device: &Device| {
        let gradients = [1, 7, 8, 13, 65536, 65549].map(|count| {
            let values = Vec::from_iter((0..count).map(|i| (i as f32 * 0.7).sin()));
            Tensor::from_vec(values, count, device).unwrap()
        });
        let view = gradients[5].narrow(0, 5, 33).unwrap().reshape((3, 11)).unwrap().t().unwrap();
        global_norm(gradients.iter().chain([&view])).unwrap()
    };
    assert_eq!(norm(&Device::new_cuda(0).unwrap()), norm(&Device::Cpu));
}
