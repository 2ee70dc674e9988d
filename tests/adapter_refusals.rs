//! What is no LoRA adapter for a model is refused, by the name of what is wrong.

#![allow(clippy::unwrap_used)] // test code

use std::{collections::BTreeMap, fs, path::Path};

use bitnet_model::adapter::{Adapter, CONFIG, WEIGHTS};
use bitnet_tests::fixture::Fixture;
use candle_core::{DType, Device, Tensor};

const OFFLINE: &str = "lora_bitnet_offline";

/// Opens the fixture's adapter after a change and checks it against the model; the message it is refused with.
fn refused(change: impl FnOnce(&mut BTreeMap<String, Tensor>, &mut serde_json::Value)) -> String {
    let fixture = Fixture::open(OFFLINE);
    let from = fixture.dir.join("adapter");
    let mut tensors: BTreeMap<String, Tensor> =
        candle_core::safetensors::load(from.join(WEIGHTS), &Device::Cpu)
            .unwrap()
            .into_iter()
            .collect();
    let mut settings: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(from.join(CONFIG)).unwrap()).unwrap();
    change(&mut tensors, &mut settings);
    let dir = tempfile::tempdir().unwrap();
    candle_core::safetensors::save(
        &tensors.into_iter().collect::<std::collections::HashMap<_, _>>(),
        dir.path().join(WEIGHTS),
    )
    .unwrap();
    fs::write(dir.path().join(CONFIG), settings.to_string()).unwrap();
    let opened = Adapter::open(dir.path()).and_then(|adapter| adapter.check(&fixture.config));
    opened.unwrap_err().to_string()
}

const Q: &str = "base_model.model.model.layers.0.self_attn.q_proj";

#[test]
fn adapters_that_do_not_fit_are_refused_by_name() {
    let (a, b) = (format!("{Q}.lora_A.weight"), format!("{Q}.lora_B.weight"));
    let zeros = |shape: (usize, usize)| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
    let assert = |message: String, parts: &[&str]| {
        assert!(parts.iter().all(|part| message.contains(part)), "{message}");
    };
    assert(
        refused(|tensors, _| drop(tensors.insert(a.clone(), zeros((8, 65))))),
        &[&a, "another model", "expected [8, 64], found [8, 65]"],
    );
    assert(
        refused(|tensors, _| drop(tensors.insert(a.clone(), zeros((4, 64))))),
        &[&a, "found [4, 64]", "rank 8"],
    );
    assert(refused(|tensors, _| drop(tensors.remove(&b))), &[&a, "its partner", &b]);
    assert(refused(|tensors, _| drop(tensors.remove(&a))), &[&b, "its partner", &a]);
    assert(
        refused(|tensors, _| {
            tensors.remove(&a);
            tensors.remove(&b);
        }),
        &[&a, "not in the file", "target_modules"],
    );
    assert(
        refused(|tensors, _| {
            for which in ["A", "B"] {
                let tensor = tensors[&format!("{Q}.lora_{which}.weight")].clone();
                let name = Q.replace("layers.0", "layers.7");
                tensors.insert(format!("{name}.lora_{which}.weight"), tensor);
            }
        }),
        &["layers.7", "another model", "2 layers"],
    );
    assert(
        refused(|_, settings| settings["target_modules"] = serde_json::json!(["k_proj"])),
        &["lora_A.weight", "not one of the target_modules"],
    );
    assert(
        refused(|_, settings| {
            let targets = settings["target_modules"].as_array_mut().unwrap();
            targets.push("c_attn".into());
        }),
        &["target_modules", "`c_attn` is no projection", "q_proj, k_proj"],
    );
    assert(
        refused(|tensors, _| {
            let broken = (zeros((8, 64)) / 0.).unwrap();
            tensors.insert(a.clone(), broken);
        }),
        &[&a, "NaN", "damaged"],
    );
    assert(
        refused(|tensors, _| {
            drop(tensors.insert("something.else".into(), zeros((1, 1))));
        }),
        &["something.else", "not a tensor that can be used"],
    );
    assert(
        refused(|tensors, _| {
            let name = format!("{Q}.lora_magnitude_vector.weight");
            drop(tensors.insert(name, zeros((1, 1))));
        }),
        &["lora_magnitude_vector", "not a tensor that can be used"],
    );
    assert(
        refused(|tensors, _| {
            let name = "base_model.model.model.embed_tokens.weight".to_owned();
            drop(tensors.insert(name, zeros((300, 64))));
        }),
        &["embed_tokens", "another vocabulary", "[256, 64]", "[300, 64]"],
    );
    assert(
        refused(|tensors, _| drop(tensors.insert(format!("{Q}.weight"), zeros((64, 64))))),
        &["q_proj.weight", "a whole projection is not supported"],
    );
    assert(
        refused(|_, settings| settings["modules_to_save"] = serde_json::json!(["lm_head"])),
        &["modules_to_save", "no tensor of `lm_head`"],
    );
}

#[test]
fn folders_that_are_no_adapters_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let message = |path: &Path| Adapter::open(path).unwrap_err().to_string();
    assert!(message(&dir.path().join("absent")).contains("not a folder with adapter_config.json"));
    assert!(message(dir.path()).contains("no adapter in PEFT's format"));
    let fixture = Fixture::open(OFFLINE);
    assert!(message(&fixture.dir).contains("a model and no adapter"));
    fs::copy(fixture.dir.join("adapter").join(CONFIG), dir.path().join(CONFIG)).unwrap();
    assert!(message(dir.path()).contains("adapter_model.safetensors is not there"));
    fs::write(dir.path().join("adapter_model.bin"), "").unwrap();
    assert!(message(dir.path()).contains("convert adapter_model.bin"));
    fs::write(dir.path().join(WEIGHTS), "damaged").unwrap();
    assert!(message(dir.path()).contains(WEIGHTS));
}
