//! Repositories of data, and of adapters.

use std::{fs, ops::ControlFlow};

use bitnet_model::hub::Hub;
use bitnet_train::{dataset::Dataset, recipe::Recipe};

use crate::{
    nobody,
    support::{
        hub_fixture::{COMMIT, Fixture, NEXT, REPO},
        hub_server::Files,
    },
};

#[test]
fn wanted_files_of_a_dataset_are_fetched_and_found_again() {
    let it = Fixture::new();
    let files = ["a/1.parquet", "a/2.parquet", "a/b/3.parquet", "README.md"];
    let content = |file: &str| (file.to_string(), file.repeat(1000).into_bytes());
    it.server.commit_dataset("main", COMMIT, Files::from(files.map(content)));
    let is_wanted = |file: &str| file.ends_with(".parquet");
    let hub = || it.hub();
    let found = hub().download_dataset(REPO, &is_wanted).unwrap();
    let snapshot = it.cache().join("datasets--org--tiny-b1.58/snapshots").join(COMMIT);
    assert_eq!(found, files[..3].iter().map(|file| snapshot.join(file)).collect::<Vec<_>>());
    for (path, file) in found.iter().zip(files) {
        assert_eq!(fs::read_to_string(path).unwrap(), file.repeat(1000));
    }
    assert!(!snapshot.join("README.md").exists());
    it.server.take_log();
    assert_eq!(hub().download_dataset(REPO, &is_wanted).unwrap(), found);
    assert_eq!(it.server.take_log().len(), 1, "the listing alone");
    assert_eq!(hub().offline(true).download_dataset(REPO, &is_wanted).unwrap(), found);
    assert_eq!(hub().endpoint(nobody()).download_dataset(REPO, &is_wanted).unwrap(), found);

    let reason = |hub: Hub, file: &str| {
        hub.download_dataset(REPO, &|name| name == file).unwrap_err().to_string()
    };
    assert!(reason(hub(), "x").contains("none of the 4 files of revision `main` matches"));
    assert!(reason(hub().offline(true), "README.md").contains("HF_HUB_OFFLINE"));
    assert!(reason(hub().revision("v9"), "x").contains("no revision `v9`"));
    assert!(reason(hub().endpoint(nobody()), "README.md").contains("cannot reach"));
    // A server that names a file outside of the repository writes nothing there.
    it.server.commit_dataset("evil", NEXT, Files::from([content("../../x.parquet")]));
    let message = reason(hub().revision("evil"), "../../x.parquet");
    assert!(message.contains("no path below"), "{message}");
}

/// A recipe reads a repository's files as it reads others.
#[test]
fn a_corpus_may_lie_in_a_dataset_repository() {
    let it = Fixture::new();
    let lines: String =
        (0..300).map(|i| format!("{{\"body\": \"the {i} little hens\"}}\n")).collect();
    let files = Files::from([("data/a.jsonl".to_string(), lines.into_bytes())]);
    it.server.commit_dataset("v1", COMMIT, files);
    let text = format!(
        r#"
        model = {{ hidden_size = 8, intermediate_size = 8, num_hidden_layers = 1, num_attention_heads = 1, num_key_value_heads = 1, vocab_size = 265, max_position_embeddings = 16 }}
        data = {{ sequence_length = 16, validation_split = 0.1, train = [{{ path = "hf://datasets/{REPO}@v1/data/*.jsonl", field = "body" }}] }}
        train = {{ batch_size = 2, steps = 2 }}
        optimizer = {{ peak_lr = 1e-3 }}
        output = {{ dir = "run" }}
        "#
    );
    let path = it.folder.path().join("recipe.toml");
    fs::write(&path, text).unwrap();
    let recipe = Recipe::from_file(&path).unwrap();
    let dataset =
        Dataset::open_with(&recipe, &it.hub(), &mut |_| ControlFlow::Continue(())).unwrap();
    assert_eq!(dataset.train.documents() + dataset.validation.documents(), 300);
}

#[test]
fn an_adapter_is_fetched_and_found_again() {
    let it = Fixture::new();
    let files = ["adapter_config.json", "adapter_model.safetensors", "README.md"];
    let content = |file: &str| (file.to_string(), file.as_bytes().to_vec());
    it.server.commit("tuned", NEXT, Files::from(files.map(content)));
    let hub = || it.hub().revision("tuned");
    let folder = hub().resolve_adapter(REPO).unwrap();
    assert!(folder.ends_with(format!("snapshots/{NEXT}")), "{}", folder.display());
    assert_eq!(fs::read_to_string(folder.join(files[1])).unwrap(), files[1]);
    assert!(!folder.join("README.md").exists());
    assert_eq!(hub().offline(true).resolve_adapter(REPO).unwrap(), folder);

    let reason = |source: &str| it.hub().resolve_adapter(source).unwrap_err().to_string();
    assert!(reason(REPO).contains("none of the"), "a model is no adapter");
    assert!(reason("./no/such").contains("there is no such folder"));
    assert_eq!(it.hub().resolve_adapter(folder.to_str().unwrap()).unwrap(), folder);
}
