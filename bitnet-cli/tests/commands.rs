//! `info`, `convert`, `logits`, `tokenize` and `download` as a user runs them.

#![allow(clippy::unwrap_used, missing_docs)] // test code

use std::{
    collections::HashMap,
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use candle_core::{DType, Device, Tensor};
use serde_json::Value;
use tempfile::TempDir;

const PACKED: [&str; 5] = [
    "bitnet_packed_tied",
    "bitnet_packed_untied",
    "llama_packed_headdim",
    "llama_packed_rmsnorm",
    "llama_packed_tied_sharded",
];

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(name)
}

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bitnet"));
    command.args(args).env("HF_HUB_OFFLINE", "1").stdin(Stdio::null());
    command
}

fn run(args: &[&str]) -> Output {
    command(args).output().unwrap()
}

/// What a successful run prints.
fn stdout(args: &[&str]) -> String {
    let output = run(args);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {stderr}");
    String::from_utf8(output.stdout).unwrap()
}

fn json(args: &[&str]) -> Value {
    serde_json::from_str(&stdout(args)).unwrap()
}

/// The one line of a failing run.
fn failure(args: &[&str]) -> String {
    let output = run(args);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{args:?}: {stderr}");
    assert!(output.stdout.is_empty(), "{args:?}");
    assert_eq!(stderr.lines().count(), 1, "{args:?}: {stderr}");
    assert!(stderr.starts_with("error: "), "{stderr}");
    stderr
}

fn str(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn tensors(file: &Path) -> HashMap<String, (safetensors::Dtype, Vec<usize>, Vec<u8>)> {
    let bytes = fs::read(file).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let owned = tensors
        .tensors()
        .into_iter()
        .map(|(name, view)| (name, (view.dtype(), view.shape().to_vec(), view.data().to_vec())));
    owned.collect()
}

fn weights(folder: &Path) -> HashMap<String, (safetensors::Dtype, Vec<usize>, Vec<u8>)> {
    let mut all = HashMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if name.starts_with("model") && name.ends_with(".safetensors") {
            all.extend(tensors(&path));
        }
    }
    all
}

/// A copy of a fixture's folder with its `config.json` edited.
fn copy(name: &str, edit: impl FnOnce(&mut Value)) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(fixture(name)).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
        }
    }
    let path = dir.path().join("config.json");
    let mut config = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    edit(&mut config);
    fs::write(&path, config.to_string()).unwrap();
    dir
}

/// The logits of a fixture's prompt under `folder`, (24, vocab), and what the reference says.
fn logits(folder: &Path, name: &str, extra: &[&str]) -> (Tensor, Tensor) {
    let expected =
        candle_core::safetensors::load(fixture(name).join("expected.safetensors"), &Device::Cpu)
            .unwrap();
    let tokens: Vec<u32> = expected["single.input_ids"]
        .to_dtype(DType::U32)
        .and_then(|ids| ids.flatten_all()?.to_vec1())
        .unwrap();
    let tokens = tokens.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
    let out = tempfile::tempdir().unwrap();
    let file = out.path().join("logits.safetensors");
    let args = ["logits", "-m", str(folder), "--tokens", &tokens, "-o", str(&file), "-q"];
    assert_eq!(stdout(&[&args[..], extra].concat()), "");
    let found = candle_core::safetensors::load(&file, &Device::Cpu).unwrap();
    assert_eq!(found.len(), 1);
    let reference = expected["single.logits"].to_dtype(DType::F32).unwrap().squeeze(0).unwrap();
    (found["logits"].clone(), reference)
}

fn relative_rms(a: &Tensor, b: &Tensor) -> f64 {
    let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let square = |x: f32| f64::from(x) * f64::from(x);
    let error: f64 = flat(a).iter().zip(flat(b)).map(|(a, b)| square(a - b)).sum();
    (error / flat(b).iter().map(|&b| square(b)).sum::<f64>()).sqrt()
}

#[test]
fn logits_are_the_references() {
    for name in PACKED.iter().chain(&["bitnet_online_tied", "legacy_1bitllm"]) {
        let (found, reference) = logits(&fixture(name), name, &[]);
        assert_eq!(found.dtype(), DType::F32);
        assert_eq!(found.dims(), reference.dims(), "{name}");
        let error = relative_rms(&found, &reference);
        // A flipped int8 code moves later rows by up to 0.03 (README of the fixtures).
        assert!(error < 0.03, "{name}: {error}");
    }
}

#[test]
fn logits_of_long_texts_come_in_pieces() {
    let dir = tempfile::tempdir().unwrap();
    let file = |n: usize| dir.path().join(format!("{n}.safetensors"));
    let model = fixture("bitnet_packed_tied");
    for n in [64, 150] {
        let tokens: Vec<String> = (0..n).map(|i| (i * 7 % 512).to_string()).collect();
        let (tokens, file) = (tokens.join(","), file(n));
        let args = ["logits", "-m", str(&model), "--tokens", &tokens, "-o", str(&file), "--json"];
        let summary = json(&args);
        assert_eq!(summary["shape"], serde_json::json!([n, 512]));
        assert_eq!(summary["argmax"].as_array().unwrap().len(), n);
    }
    let [short, long] = [64, 150].map(|n| tensors(&file(n)).remove("logits").unwrap().2);
    assert!(long[..short.len()] == short, "rows depend on later ones");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "temporary files are left");
}

#[test]
fn packing_the_source_gives_the_packed_bytes() {
    // (fixture, its masters, edit of its config, options)
    let online =
        |config: &mut Value| config["quantization_config"]["quantization_mode"] = "online".into();
    let plain = |config: &mut Value| {
        config.as_object_mut().unwrap().remove("quantization_config");
    };
    type Edit<'a> = &'a dyn Fn(&mut Value);
    let cases: [(&str, &str, Edit, &[&str]); 2] = [
        ("lora_bitnet_offline", "latent.safetensors", &online, &[]),
        ("llama_packed_rmsnorm", "latent.safetensors", &plain, &["--ternarize"]),
    ];
    for (name, masters, edit, options) in cases {
        let source = copy(name, edit);
        fs::copy(
            fixture(name).join("source").join(masters),
            source.path().join("model.safetensors"),
        )
        .unwrap();
        let out = source.path().join("out");
        let args = ["convert", str(source.path()), str(&out), "--to", "packed"];
        stdout(&[&args[..], options].concat());
        let (found, expected) = (weights(&out), weights(&fixture(name)));
        for (name, tensor) in &expected {
            // The masters of that fixture were packed into a layer that also has a norm.
            if !name.ends_with(".rms_norm.weight") {
                assert!(found.get(name) == Some(tensor), "{name}");
            }
        }
        assert!(found.keys().all(|name| expected.contains_key(name)));
        assert!(out.join("generation_config.json").is_file());
    }
}

#[test]
fn packing_differs_from_onebitllms_by_its_rounding() {
    // It computes in bf16: scales are off by up to 2⁻⁷, and weights near half a scale change sides.
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let source = fixture("onebitllms_converted/source");
    stdout(&["convert", str(&source), str(&out), "--to", "packed", "--ternarize"]);
    let (found, expected) = (weights(&out), weights(&fixture("onebitllms_converted")));
    assert_eq!(found.len(), expected.len());
    let bf16 = |data: &[u8]| f32::from_bits(u32::from_le_bytes([0, 0, data[0], data[1]]));
    for (name, (dtype, shape, data)) in &expected {
        let found = &found[name];
        assert_eq!((&found.0, &found.1), (dtype, shape), "{name}");
        if *dtype == safetensors::Dtype::U8 {
            let differing = found.2.iter().zip(data).filter(|(a, b)| a != b).count();
            assert!(differing * 50 < data.len(), "{name}: {differing} of {}", data.len());
        } else if name.ends_with("_scale") {
            let ratio = bf16(&found.2) / bf16(data);
            assert!((ratio - 1.).abs() < 1. / 128., "{name}: {ratio}");
        } else {
            assert!(&found.2 == data, "{name}");
        }
    }
}

#[test]
fn packed_to_latent_and_back_are_the_same_bytes() {
    for name in PACKED {
        let dir = tempfile::tempdir().unwrap();
        let (latent, packed) = (dir.path().join("latent"), dir.path().join("packed"));
        stdout(&["convert", str(&fixture(name)), str(&latent), "--to", "latent"]);
        // A packed Llama without norms of its projections has a plain configuration when latent.
        let is_plain = name.starts_with("llama") && !name.ends_with("rmsnorm");
        let options: &[&str] = if is_plain { &["--ternarize"] } else { &[] };
        if is_plain {
            let refused = failure(&["convert", str(&latent), str(&packed), "--to", "packed"]);
            assert!(refused.contains("--ternarize"), "{refused}");
            assert!(!packed.exists());
        }
        let args = ["convert", str(&latent), str(&packed), "--to", "packed", "--json"];
        let summary = json(&[&args[..], options].concat());
        assert_eq!(summary["folder"], str(&packed));
        let mut expected = weights(&fixture(name));
        expected.retain(|tensor, _| {
            tensor != "lm_head.weight" || !name.contains("tied") || name.contains("untied")
        });
        assert!(weights(&packed) == expected, "{name}");

        let (found, reference) = logits(&latent, name, options);
        assert!(relative_rms(&found, &reference) < 0.03, "{name}");
        let (back, _) = logits(&packed, name, &[]);
        let (original, _) = logits(&fixture(name), name, &[]);
        assert_eq!(relative_rms(&back, &original), 0., "{name}");
        let top = |logits: &Tensor| logits.argmax(1).unwrap().to_vec1::<u32>().unwrap();
        let (found, original) = (top(&found), top(&original));
        let equal = found.iter().zip(&original).filter(|(a, b)| a == b).count();
        assert!(equal + 1 >= original.len(), "{name}: {equal} of {}", original.len());
    }
}

#[test]
fn a_1bitllm_becomes_a_bitnet() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    stdout(&["convert", str(&fixture("legacy_1bitllm")), str(&out), "--to", "packed"]);
    assert!(weights(&out).contains_key("model.layers.0.self_attn.attn_sub_norm.weight"));
    let info = json(&["info", str(&out), "--json"]);
    assert_eq!(info["family"], "BitNet b1.58 (sub-norms)");
    assert_eq!(info["quantization"]["scale"], "multiplies");
    let (found, reference) = logits(&out, "legacy_1bitllm", &[]);
    // The scales, and f16 embeddings, were rounded to bf16.
    assert!(relative_rms(&found, &reference) < 0.05);
}

#[test]
fn masters_are_copied_as_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    stdout(&["convert", str(&fixture("grad_bitnet_qat")), str(&out), "--to", "latent"]);
    assert!(weights(&out) == weights(&fixture("grad_bitnet_qat")));
}

/// The masters of a fixture with all of one matrix set to the bf16 number `bits`.
fn filled(bits: u16) -> TempDir {
    let dir = copy("bitnet_online_tied", |_| ());
    let path = dir.path().join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let range = {
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let view = tensors.tensor("model.layers.1.mlp.up_proj.weight").unwrap();
        let start = view.data().as_ptr() as usize - bytes.as_ptr() as usize;
        start..start + view.data().len()
    };
    bytes[range].chunks_mut(2).for_each(|value| value.copy_from_slice(&bits.to_le_bytes()));
    fs::write(&path, bytes).unwrap();
    dir
}

#[test]
fn masters_of_zero_pack_and_those_of_nan_do_not() {
    let zeros = filled(0);
    let [packed, latent] = ["packed", "latent"].map(|name| zeros.path().join(name));
    stdout(&["convert", str(zeros.path()), str(&packed), "--to", "packed"]);
    stdout(&["convert", str(&packed), str(&latent), "--to", "latent"]);
    let nans = filled(0x7fc0);
    let message =
        failure(&["convert", str(nans.path()), str(&packed), "--to", "packed", "--force"]);
    assert!(message.contains("up_proj.weight`: row 0, column 0 is NaN"), "{message}");
}

#[test]
fn what_is_there_is_not_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let model = fixture("bitnet_packed_tied");
    let convert = |out: &Path, extra: &[&str]| {
        let args = ["convert", str(&model), str(out), "--to", "latent", "-q"];
        run(&[&args[..], extra].concat()).status.code()
    };
    let empty = dir.path().join("empty");
    fs::create_dir(&empty).unwrap();
    assert_eq!(convert(&empty, &[]), Some(0));
    let before = fs::read(empty.join("model.safetensors")).unwrap();
    assert_eq!(convert(&empty, &[]), Some(1));
    fs::write(empty.join("model.safetensors"), "old").unwrap();
    assert_eq!(convert(&empty, &["--force"]), Some(0));
    assert!(fs::read(empty.join("model.safetensors")).unwrap() == before);

    let other = dir.path().join("other");
    fs::create_dir(&other).unwrap();
    fs::write(other.join("thesis.txt"), "years").unwrap();
    assert_eq!(convert(&other, &["--force"]), Some(1));
    assert_eq!(convert(&other.join("thesis.txt"), &["--force"]), Some(1));
    assert_eq!(convert(&other.join("no/such"), &[]), Some(1));
    assert_eq!(fs::read_to_string(other.join("thesis.txt")).unwrap(), "years");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "temporary folders are left");
}

#[test]
fn info_of_every_fixture() {
    for entry in fs::read_dir(fixture("")).unwrap() {
        let dir = entry.unwrap().path();
        if !dir.join("config.json").is_file() {
            continue;
        }
        let info = json(&["info", "--json", str(&dir)]);
        let number = |pointer: &str| info.pointer(pointer).unwrap().as_u64().unwrap();
        let stored = weights(&dir);
        assert_eq!(info["tensors"].as_array().unwrap().len(), stored.len());
        if let Some(packed) = info["quantization"]["form"].as_str().map(|form| form == "packed") {
            let codes = stored.values().filter(|t| t.0 == safetensors::Dtype::U8);
            let codes: usize = codes.map(|t| t.2.len() * 4).sum();
            assert!(!packed || codes as u64 == number("/parameters/ternary"));
        } else {
            let values: usize = stored.values().map(|t| t.1.iter().product::<usize>()).sum();
            assert_eq!(values as u64, number("/parameters/total"), "{}", dir.display());
        }
        let table = stdout(&["info", str(&dir), "--tensors"]);
        assert!(table.contains("\nmemory at rest  "), "{table}");
        assert!(table.contains("model.norm.weight"), "{table}");
        assert_eq!(table, stdout(&["info", "-m", str(&dir), "--tensors"]));
    }
    let info = json(&["info", str(&fixture("bitnet_packed_tied")), "--json"]);
    // By hand: 2 · (128·128·2 + 64·128·2 + 3·256·128), and 2 bytes, 2 layers, 2 tensors, 64 wide.
    assert_eq!(info["parameters"]["ternary"], 294_912);
    assert_eq!(info["memory"]["projections"], 294_912 / 4);
    assert_eq!(info["memory"]["cache_per_1k_tokens"], 1000 * 2 * 2 * 2 * 64);
    assert_eq!(info["generation"]["max_length"], 256);
}

#[test]
fn info_of_the_default_model() {
    let info = json(&["info", "--json"]);
    assert_eq!(info["path"], "inside this program");
    assert_eq!(info["tokenizer"]["chat_template"], true);
    assert!(info["tokenizer"]["special_tokens"]["bos_token"]["id"].is_u64());
}

#[test]
fn tokenize_there_and_back() {
    let model = copy("bitnet_packed_tied", |_| ());
    for name in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"] {
        fs::copy(fixture("tokenizer_chat").join(name), model.path().join(name)).unwrap();
    }
    let model = str(model.path());
    let text = "Ünïcode, 漢字\n and\tspaces  ";
    let all = json(&["tokenize", "-m", model, "--json", text]);
    let ids: Vec<String> = all["tokens"].as_array().unwrap().iter().map(Value::to_string).collect();
    assert_eq!(ids[0], "1", "the post-processor's BOS");
    assert_eq!(stdout(&["tokenize", "-m", model, text]), format!("{}\n", ids.join(" ")));
    assert_eq!(stdout(&["tokenize", "-m", model, "--count", text]), format!("{}\n", ids.len()));
    let plain = stdout(&["tokenize", "-m", model, "--no-special", text]);
    assert_eq!(plain, format!("{}\n", ids[1..].join(" ")));
    assert_eq!(stdout(&["tokenize", "-m", model, "--pieces", text]).lines().count(), ids.len());
    let decode = ["tokenize", "-m", model, "--no-special", "--decode", &ids.join(",")];
    assert_eq!(stdout(&decode), format!("{text}\n"));
    let chat = stdout(&["tokenize", "-m", model, "--chat", "hi"]);
    let expected = stdout(&["tokenize", "-m", model, "User: hi<|eot_id|>Assistant: "]);
    assert_eq!(chat, expected);

    let mut child = command(&["tokenize", "-m", model])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let piped = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8(piped.stdout).unwrap(), format!("{}\n", ids.join(" ")));

    assert!(failure(&["tokenize", "-m", model, "--decode", "999999"]).contains("999999"));
    let without = fixture("bitnet_packed_tied");
    assert!(failure(&["tokenize", "-m", str(&without), "hi"]).contains("no tokenizer.json"));
    let file = Path::new(model).join("logits.safetensors");
    let args = ["logits", "-m", model, "--text", "hi", "-o", str(&file), "-q"];
    assert_eq!(stdout(&args), "");
}

#[test]
fn download_prints_the_snapshot() {
    let cache = tempfile::tempdir().unwrap();
    let commit = "0123456789abcdef0123456789abcdef01234567";
    let repo = cache.path().join("models--org--tiny");
    let snapshot = repo.join("snapshots").join(commit);
    fs::create_dir_all(repo.join("refs")).unwrap();
    fs::create_dir_all(&snapshot).unwrap();
    fs::write(repo.join("refs/main"), commit).unwrap();
    for name in ["config.json", "model.safetensors"] {
        fs::copy(fixture("bitnet_packed_tied").join(name), snapshot.join(name)).unwrap();
    }
    let download = |args: &[&str]| {
        let args = [&["download"], args].concat();
        command(&args).env("HF_HUB_CACHE", cache.path()).output().unwrap()
    };
    let output = download(&["org/tiny"]);
    assert_eq!(String::from_utf8(output.stdout).unwrap(), format!("{}\n", snapshot.display()));
    for (args, reason) in [
        (&["org/other"][..], "HF_HUB_OFFLINE"),
        (&["org/tiny", "--revision", "v2"], "`v2`"),
        (&["org/tiny", "--revision", "../x"], "no branch"),
        (&["tiny"], "org/name"),
    ] {
        let output = download(args);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{stderr}");
        assert!(stderr.contains(reason) && stderr.lines().count() == 1, "{stderr}");
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn damaged_models_are_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("out.safetensors");
    let empty = dir.path().join("empty");
    fs::create_dir(&empty).unwrap();
    let unknown = copy("bitnet_packed_tied", |config| config["model_type"] = "mamba".into());
    let truncated = copy("bitnet_packed_tied", |_| ());
    let weights = truncated.path().join("model.safetensors");
    let bytes = fs::read(&weights).unwrap();
    fs::write(&weights, &bytes[..bytes.len() - 1]).unwrap();
    for (model, reason) in [
        (dir.path().join("missing").as_path(), "no such file or folder"),
        (&empty, "no `config.json`"),
        (unknown.path(), "`model_type`"),
        (truncated.path(), "model.safetensors"),
    ] {
        let out = dir.path().join("out");
        for args in [
            &["info", str(model)][..],
            &["convert", str(model), str(&out), "--to", "latent"],
            &["logits", "-m", str(model), "--tokens", "1", "-o", str(&file)],
            &["tokenize", "-m", str(model), "hi"],
        ] {
            let message = failure(args);
            assert!(message.contains(reason), "{message}");
        }
    }

    // Code 3: the headers are right, the data is not.
    let bad = copy("bitnet_packed_tied", |_| ());
    let mut bytes = fs::read(&weights).unwrap();
    *bytes.last_mut().unwrap() = 0xff;
    bytes.push(0xff);
    fs::write(bad.path().join("model.safetensors"), bytes).unwrap();
    stdout(&["info", str(bad.path())]);
    let out = dir.path().join("out");
    for args in [
        &["convert", str(bad.path()), str(&out), "--to", "latent"][..],
        &["convert", str(bad.path()), str(&out), "--to", "packed"],
        &["logits", "-m", str(bad.path()), "--tokens", "1", "-o", str(&file)],
    ] {
        let message = failure(args);
        assert!(message.contains("code 3"), "{message}");
    }

    let model = fixture("bitnet_packed_tied");
    for (tokens, reason) in [("512", "token id 512"), (&vec!["1"; 257].join(","), "context of 256")]
    {
        let message = failure(&["logits", "-m", str(&model), "--tokens", tokens, "-o", str(&file)]);
        assert!(message.contains(reason), "{message}");
    }
    let nowhere = dir.path().join("no/such/folder/x.safetensors");
    failure(&["logits", "-m", str(&model), "--tokens", "1", "-o", str(&nowhere)]);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "something is half-written");
}
