//! LoRA adapters beside the model inside the program, and merged into it, as a user does it.

#![allow(clippy::unwrap_used)] // helpers of tests

mod support;

use std::{collections::BTreeMap, fs, path::Path};

use bitnet_model::{
    adapter::{Adaptation, Adapter, AdapterConfig, Modules, Pair},
    config::Config,
    hub::Hub,
    pretrained::{DEFAULT, Precision, Source},
};
use candle_core::{Device, Tensor};
use serde_json::{Value, json};
use support::{bitnet, edited_default, failure, fixture, run, stdout, text};
use tempfile::TempDir;

const RANK: usize = 3;
/// Of any output: greedy, and without the penalty that the model's publisher advises.
const GREEDY: [&str; 6] = ["--temperature", "0", "--repetition-penalty", "1", "-n", "12"];

fn source() -> Source {
    Source::open(DEFAULT, Precision::AsConfigured, &Hub::from_env()).unwrap()
}

/// An adapter on two projections of every layer, of waves of this frequency: strong enough to change what is said.
fn waves(config: &Config, frequency: f32) -> Adapter {
    let settings = AdapterConfig {
        rank: RANK,
        alpha: 6.,
        target_modules: Modules::Names(["q_proj", "down_proj"].map(String::from).into()),
        base_model: Some("default".into()),
        ..AdapterConfig::default()
    };
    let matrix = |rows: usize, cols: usize, size: f32| {
        let values = (0..rows * cols).map(|i| size * (i as f32 * frequency).sin());
        Tensor::from_vec(Vec::from_iter(values), (rows, cols), &Device::Cpu).unwrap()
    };
    let pair =
        |(rows, cols)| Pair { lora_a: matrix(RANK, cols, 0.2), lora_b: matrix(rows, RANK, 0.2) };
    let pairs = config.projections().filter_map(|(name, shape)| {
        let path = name.strip_suffix(".weight")?;
        let is_target = path.ends_with("q_proj") || path.ends_with("down_proj");
        is_target.then(|| (path.to_owned(), pair(shape)))
    });
    Adapter::new(settings, pairs.collect(), BTreeMap::new())
}

/// A folder with the adapters `one` and `two`.
fn adapters() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, frequency) in [("one", 0.7), ("two", 1.3)] {
        waves(&source().config, frequency).save(&folder.path().join(name)).unwrap();
    }
    folder
}

/// The adapter `one` with an edited file of settings.
fn edited(edit: impl FnOnce(&mut Value)) -> TempDir {
    let folder = adapters();
    let file = folder.path().join("one/adapter_config.json");
    let mut config = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    edit(&mut config);
    fs::write(&file, config.to_string()).unwrap();
    folder
}

fn generated(adapters: &[&str]) -> String {
    let mut args = vec!["generate", "A red dragon", "-q"];
    args.extend(GREEDY);
    adapters.iter().for_each(|adapter| args.extend(["--adapter", adapter]));
    stdout(&args, "")
}

#[test]
fn adapters_are_scaled_and_summed() {
    let folder = adapters();
    let [one, two] = ["one", "two"].map(|name| text(&folder.path().join(name)).to_owned());
    let base = generated(&[]);
    let with_one = generated(&[&one]);
    assert_ne!(with_one, base);
    assert_ne!(generated(&[&two]), with_one);
    assert_eq!(generated(&[&format!("{one}:0")]), base);
    assert_eq!(generated(&[&one, &format!("{two}:0")]), with_one);
    assert_eq!(generated(&[&one, &two]), generated(&[&two, &one]));
}

#[test]
fn logits_are_those_of_the_library() {
    let folder = adapters();
    let [one, two] = ["one", "two"].map(|name| folder.path().join(name));
    let output = folder.path().join("logits.safetensors");
    let half = format!("{}:0.5", text(&two));
    let tokens = ["--tokens", "1,5,9,30,4"];
    let args = ["logits", "-q", "-o", text(&output), "--adapter", text(&one), "--adapter", &half];
    stdout(&[&args[..], &tokens].concat(), "");

    let [first, second] = [one, two].map(|folder| Adapter::open(&folder).unwrap());
    let sum = Adaptation::new(&source().config, &[(&first, 1.), (&second, 0.5)]);
    let model = source().load(&Device::Cpu).unwrap().adapted(&sum.unwrap()).unwrap();
    let tokens = Tensor::new(&[[1u32, 5, 9, 30, 4]], &Device::Cpu).unwrap();
    let expected = model.logits(&model.hidden_states(&tokens, None).unwrap()).unwrap();
    let found = candle_core::safetensors::load(&output, &Device::Cpu).unwrap();
    let values = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert!(values(&found["logits"]) == values(&expected));
}

#[test]
fn a_conversation_changes_its_adapter() {
    let folder = adapters();
    let [one, two] = ["one", "two"].map(|name| text(&folder.path().join(name)).to_owned());
    let chat = |args: &[&str], script: &str| {
        stdout(&[&["chat", "-q"], &GREEDY[..], args].concat(), script)
    };
    let ask = "Tell me a story.\n";
    let [base, first, second] =
        [&[][..], &["--adapter", &one], &["--adapter", &two]].map(|adapter| chat(adapter, ask));
    assert!(base != first && first != second);
    let script = format!(
        "{ask}/reset\n/adapter {one}\n{ask}/reset\n/adapter {two}\n{ask}/reset\n/adapter none\n{ask}"
    );
    assert_eq!(chat(&[], &script), [&*base, &first, &second, &base].concat());
    // The conversation goes on: the next reply is to all that was said.
    let more = "And then?\n";
    let went_on =
        chat(&["--adapter", &two], &format!("/adapter none\n{ask}/adapter {one}\n{more}"));
    let answers = went_on.strip_prefix(&*base).unwrap();
    assert_ne!(answers, chat(&["--adapter", &one], more));

    let output = run(&["chat", "-q"], format!("/adapter\n/adapter {one}:0.5 {two}\n/adapter\n"));
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(stderr, format!("no adapter is beside the model\n{one}:0.5 {two}\n"));
    let line = failure(&["chat", "-q"], "/adapter nowhere\n");
    assert!(line.starts_with("nowhere: there is no such folder"), "{line}");
}

#[test]
fn info_tells_what_an_adapter_is() {
    let folder = edited(|config| config["rank_pattern"] = json!({}));
    let one = folder.path().join("one");
    let info: Value = serde_json::from_str(&stdout(&["info", text(&one), "--json"], "")).unwrap();
    let expected = json!({"pairs": 6, "ranks": [RANK], "scales": [2.0]});
    assert_eq!(info["projections"], json!({"down_proj": expected, "q_proj": expected}));
    assert_eq!((&info["base"], &info["dtypes"]), (&json!("default"), &json!({"F32": 24})));
    let parameters = 6 * RANK * (256 + 256 + 768 + 256);
    assert_eq!(info["parameters"], parameters);
    let table = stdout(&["info", text(&one), "--tensors"], "");
    for part in ["rank            3, alpha 6", "q_proj     in   6 layers", "lora_A.weight"] {
        assert!(table.contains(part), "{table}");
    }
    fs::write(one.join("adapter_model.safetensors"), "no tensors").unwrap();
    let line = failure(&["info", text(&one)], "");
    assert!(line.contains("adapter_model.safetensors"), "{line}");
}

#[test]
fn what_does_not_fit_is_refused() {
    let fits = adapters();
    let one = fits.path().join("one");
    let generate = |adapter: &Path, more: &[&str]| {
        let args = ["generate", "-q", "-n", "1", "Once", "--adapter", text(adapter)];
        failure(&[&args[..], more].concat(), "")
    };
    let dora = edited(|config| config["use_dora"] = json!(true));
    let line = generate(&dora.path().join("one"), &[]);
    assert!(line.contains("adapter_config.json") && line.contains("use_dora"), "{line}");
    let line = generate(&edited(|config| config["r"] = json!(4)).path().join("one"), &[]);
    assert!(line.contains("lora_A"), "{line}");
    let line =
        generate(&edited(|config| config["peft_type"] = json!("IA3")).path().join("one"), &[]);
    assert!(line.contains("IA3"), "{line}");
    let other = fixture("bitnet_packed_tied");
    let args =
        ["logits", "-q", "-m", text(&other), "--tokens", "1", "-o", "x", "--adapter", text(&one)];
    let line = failure(&args, "");
    assert!(line.contains("adapter_model.safetensors"), "{line}");

    let tokenizer = edited_default("tokenizer.json", |tokenizer| {
        let vocab = tokenizer["model"]["vocab"].as_object_mut().unwrap();
        let (first, second) = (vocab["a"].take(), vocab["b"].take());
        (vocab["a"], vocab["b"]) = (second, first);
    });
    fs::copy(tokenizer.path().join("tokenizer.json"), one.join("tokenizer.json")).unwrap();
    let line = generate(&one, &[]);
    assert!(line.contains("the adapter was trained with another one"), "{line}");
    fs::remove_file(one.join("adapter_model.safetensors")).unwrap();
    assert!(generate(&one, &[]).contains("adapter_model.safetensors is not there"));
}

#[test]
fn a_merge_reports_and_refuses() {
    let folder = adapters();
    let (one, out) = (folder.path().join("one"), folder.path().join("merged"));
    let story = folder.path().join("story.txt");
    fs::write(&story, "Once upon a time there was a little cat. It liked to play in the sun.")
        .unwrap();
    let merge = ["merge", "-q", "--adapter", text(&one), "-o", text(&out), "--json"];
    let strict = [&merge[..], &["--max-flipped", "0"]].concat();
    let output = run(&strict, "");
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr.contains("nothing was written"), "{stderr}");
    assert!(!out.exists());
    let refused: Value = serde_json::from_slice(&output.stdout).unwrap();

    let insist = [&strict[..], &["--i-know", "--text", text(&story)]].concat();
    let report: Value = serde_json::from_str(&stdout(&insist, "")).unwrap();
    assert_eq!(report["flipped"], refused["flipped"]);
    let flipped = report["flipped"].as_f64().unwrap();
    assert!(flipped > 0. && flipped < 0.5, "{flipped}");
    let perplexity = |args: &[&str]| {
        let args = [&["perplexity", "-q", "--json", text(&story)], args].concat();
        let report: Value = serde_json::from_str(&stdout(&args, "")).unwrap();
        report["perplexity"].as_f64().unwrap()
    };
    for (name, args) in [
        ("base", &[][..]),
        ("adapter", &["--adapter", text(&one)]),
        ("merged", &["-m", text(&out)]),
    ] {
        let (found, expected) = (report["loss"][name].as_f64().unwrap(), perplexity(args).ln());
        assert!((found - expected).abs() < 1e-9, "{name}: {found}, not {expected}");
    }
    let line = failure(&merge, "");
    assert!(line.contains(text(&out)) && line.contains("--force"), "{line}");
    let nothing = bitnet(&["merge", "-o", "x"]).output().unwrap();
    assert!(String::from_utf8_lossy(&nothing.stderr).contains("there is nothing to merge"));
}

#[test]
fn requests_of_one_batch_choose_their_adapters() {
    let folder = adapters();
    let [one, two] = ["one", "two"].map(|name| text(&folder.path().join(name)).to_owned());
    let models = ["default", "first", "default:second", "first"];
    let line = |(index, model): (usize, &str)| {
        let body = json!({
            "model": model, "prompt": "A red dragon", "max_tokens": 12, "temperature": 0,
            "repetition_penalty": 1,
        });
        let url = "/v1/completions";
        json!({"custom_id": index.to_string(), "method": "POST", "url": url, "body": body})
    };
    let [input, output] = ["in", "out"].map(|name| folder.path().join(name));
    let write = |models: &[&str]| {
        let lines =
            models.iter().copied().enumerate().map(|request| format!("{}\n", line(request)));
        fs::write(&input, lines.collect::<String>()).unwrap();
        let _ = fs::remove_file(&output);
    };
    write(&models);
    let (first, second) = (format!("first={one}"), format!("second={two}:0.5"));
    let args = ["batch", "-q", "-i", text(&input), "-o", text(&output)];
    let args = [&args[..], &["--adapter", &first, "--adapter", &second]].concat();
    stdout(&args, "");
    let half = format!("{two}:0.5");
    let expected = [vec![], vec![&*one], vec![&*half], vec![&*one]].map(|named| generated(&named));
    assert!(expected[0] != expected[1] && expected[1] != expected[2]);
    for line in fs::read_to_string(&output).unwrap().lines() {
        let answer: Value = serde_json::from_str(line).unwrap();
        let index: usize = answer["custom_id"].as_str().unwrap().parse().unwrap();
        let body = &answer["response"]["body"];
        let found = format!("A red dragon{}\n", body["choices"][0]["text"].as_str().unwrap());
        assert_eq!((found, &body["model"]), (expected[index].clone(), &json!(models[index])));
    }

    write(&["third"]);
    stdout(&args, "");
    let answer: Value = serde_json::from_slice(&fs::read(&output).unwrap()).unwrap();
    let error = &answer["response"]["body"]["error"];
    assert_eq!(
        (&answer["response"]["status_code"], &error["param"]),
        (&json!(400), &json!("model"))
    );
    assert!(error["message"].as_str().unwrap().contains("default:first, default:second"));
    let again = failure(&[&args[..], &["--adapter", &first]].concat(), "");
    assert!(again.contains("two of the name `first`"), "{again}");
}
