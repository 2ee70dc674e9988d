//! From files to tokens and back.

use std::{fs, path::Path};

use super::*;

fn recipe(dir: &Path, data: &str) -> Recipe {
    let text = format!(
        r#"
        model = {{ hidden_size = 8, intermediate_size = 8, num_hidden_layers = 1, num_attention_heads = 1, num_key_value_heads = 1, vocab_size = 280, max_position_embeddings = 16 }}
        train = {{ batch_size = 2, steps = 2, seed = 3 }}
        optimizer = {{ peak_lr = 1e-3 }}
        output = {{ dir = "run" }}
        [data]
        sequence_length = 16
        {data}
        "#
    );
    fs::write(dir.join("recipe.toml"), text).unwrap();
    Recipe::from_file(&dir.join("recipe.toml")).unwrap()
}

/// 200 short stories, one a line.
fn corpus(dir: &Path) -> Vec<String> {
    let stories: Vec<String> =
        (0..200).map(|i| format!("the {i} little hens played in the garden of the cat")).collect();
    fs::write(dir.join("corpus.txt"), stories.join("\n")).unwrap();
    stories
}

fn texts(content: &Content, vocabulary: &Vocabulary) -> Vec<String> {
    let Content::Stream(tokens) = content else { panic!("no text") };
    let text = |index| {
        let mut ids = Vec::new();
        tokens.read(index, 0..tokens.document_len(index), &mut ids);
        assert_eq!((ids[0], ids[ids.len() - 1]), (vocabulary.bos(), vocabulary.eos()));
        vocabulary.decode(&ids[1..ids.len() - 1]).unwrap()
    };
    (0..tokens.documents()).map(text).collect()
}

/// The stages in which the files were read.
fn stages(recipe: &Recipe) -> Vec<Stage> {
    let mut stages = Vec::new();
    let mut observe = |Progress { stage, done, total }| {
        assert!(done <= total);
        stages.push(stage);
        ControlFlow::Continue(())
    };
    Dataset::open_with(recipe, &Hub::from_env(), &mut observe).unwrap();
    stages
}

const BOTH: &str = r#"
    train = [{ path = "corpus.txt", documents = "line" }]
    validation = [{ path = "corpus.txt", documents = "line" }]
    validation_bytes = 107
"#;

#[test]
fn documents_stand_between_bos_and_eos() {
    let dir = tempfile::tempdir().unwrap();
    let stories = corpus(dir.path());
    let dataset = Dataset::open(&recipe(dir.path(), BOTH)).unwrap();
    assert_eq!(texts(&dataset.train, &dataset.vocabulary), stories);
    assert_eq!(dataset.train.bytes(), stories.iter().map(String::len).sum::<usize>());
    // Of the held-out text the first 107 bytes.
    let held_out = texts(&dataset.validation, &dataset.vocabulary);
    assert_eq!(held_out, [&stories[0], &stories[1], &stories[2][..107 - 2 * stories[0].len()]]);
    assert_eq!(dataset.validation.bytes(), 107);
}

#[test]
fn text_is_read_again_only_if_something_changed() {
    let dir = tempfile::tempdir().unwrap();
    corpus(dir.path());
    let mut recipe = recipe(dir.path(), BOTH);
    let all = [Stage::Vocabulary, Stage::Train, Stage::Validation];
    assert_eq!(stages(&recipe), all);
    assert_eq!(stages(&recipe), []);
    recipe.data.validation_bytes = Some(30);
    assert_eq!(stages(&recipe), [Stage::Validation]);
    recipe.model.vocab_size = 270;
    assert_eq!(stages(&recipe), all);
    // The folder of the run keeps what the run uses.
    let folder = recipe.output.dir.join("tokens");
    let partial = folder.join(".0123456789abcdef.partial"); // of a process that was killed
    fs::create_dir(&partial).unwrap();
    assert_eq!(stages(&recipe), []);
    assert!(!partial.exists());
    let count = |folder: &Path| {
        let names = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name());
        names.filter(|name| !name.to_string_lossy().starts_with('.')).count()
    };
    assert_eq!(count(&folder), 3);
    fs::write(dir.path().join("corpus.txt"), "one little hen\n".repeat(99)).unwrap();
    recipe.model.vocab_size = 262;
    recipe.data.cache = Some(dir.path().join("shared"));
    assert_eq!(stages(&recipe), all);
    // All of the held-out text is what is trained on here.
    recipe.data.validation_bytes = None;
    assert_eq!(stages(&recipe), []);
    assert_eq!(count(&dir.path().join("shared")), 3);
}

#[test]
fn reading_can_be_broken_off() {
    let dir = tempfile::tempdir().unwrap();
    corpus(dir.path());
    let recipe = recipe(dir.path(), BOTH);
    let mut observe = |Progress { stage, .. }| match stage {
        Stage::Train => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    };
    let stopped = Dataset::open_with(&recipe, &Hub::from_env(), &mut observe);
    assert!(matches!(stopped, Err(Error::Interrupted)));
    assert_eq!(stages(&recipe), [Stage::Train, Stage::Validation]); // the vocabulary was complete
}

#[test]
fn a_split_is_disjoint_and_seeded() {
    let dir = tempfile::tempdir().unwrap();
    let stories = corpus(dir.path());
    let split = r#"
        train = [{ path = "corpus.txt", documents = "line" }]
        validation_split = 0.2
    "#;
    let mut recipe = recipe(dir.path(), split);
    let Dataset { vocabulary, train, validation, .. } = Dataset::open(&recipe).unwrap();
    let (trained, held_out) = (texts(&train, &vocabulary), texts(&validation, &vocabulary));
    let mut all = [trained.clone(), held_out.clone()].concat();
    all.sort_by_key(|story| stories.iter().position(|other| other == story));
    assert_eq!(all, stories);
    assert!((20..60).contains(&held_out.len()), "{}", held_out.len());
    assert_eq!(validation.bytes(), held_out.iter().map(String::len).sum::<usize>());

    recipe.data.validation_bytes = Some(held_out[0].len() + 1);
    let shorter = Dataset::open(&recipe).unwrap();
    assert_eq!(texts(&shorter.validation, &vocabulary), held_out[..2]);
    assert_eq!(shorter.train.fingerprint(), train.fingerprint());
    assert_ne!(shorter.validation.fingerprint(), validation.fingerprint());
    recipe.train.seed = 4;
    assert_ne!(Dataset::open(&recipe).unwrap().train.fingerprint(), train.fingerprint());
    recipe.data.validation_split = Some(1e-9);
    let message = Dataset::open(&recipe).unwrap_err().to_string();
    assert!(message.contains("`data.validation_split`: leaves 200 documents"), "{message}");
}

#[test]
fn texts_that_are_not_there_are_named() {
    let dir = tempfile::tempdir().unwrap();
    for (path, reason) in [
        ("corpus.txt", "is not there; put the texts in that place"),
        ("none/*.txt", "no file of text or records is there"),
        #[cfg(unix)] // elsewhere that is not there either
        ("recipe.toml/corpus.txt", "Not a directory"),
    ] {
        let recipe = recipe(dir.path(), &BOTH.replace("corpus.txt", path));
        let message = Dataset::open(&recipe).unwrap_err().to_string();
        assert!(message.contains(path) && message.contains(reason), "{message}");
    }
}
