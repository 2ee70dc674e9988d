//! From files of records to examples.

use std::{fs, ops::ControlFlow, path::Path};

use bitnet_model::{hub::Hub, pretrained::default_files};

use super::*;
use crate::{
    Error, Result,
    batch::Batches,
    dataset::{Content, Dataset},
    recipe::Recipe,
};

/// A folder with the default model's tokenizer.
fn folder() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes) in default_files() {
        if name.starts_with("tokenizer") {
            fs::write(dir.path().join(name), bytes).unwrap();
        }
    }
    dir
}

fn recipe(dir: &Path, data: &str) -> Result<Recipe> {
    let text = format!(
        r#"
        model = {{ hidden_size = 8, intermediate_size = 8, num_hidden_layers = 1, num_attention_heads = 1, num_key_value_heads = 1, vocab_size = 2048, max_position_embeddings = 256 }}
        train = {{ batch_size = 2, steps = 2, seed = 3 }}
        optimizer = {{ peak_lr = 1e-3 }}
        output = {{ dir = "run" }}
        [data]
        sequence_length = 256
        tokenizer = "tokenizer.json"
        {data}
        "#
    );
    fs::write(dir.join("recipe.toml"), text).unwrap();
    Recipe::from_file(&dir.join("recipe.toml"))
}

fn open(dir: &Path, data: &str) -> Result<Dataset> {
    let recipe = recipe(dir, data)?;
    Dataset::open_with(&recipe, &Hub::from_env(), &mut |_| ControlFlow::Continue(()))
}

/// Each example as text, with what is trained in brackets.
fn shown(content: &Content, vocabulary: &crate::dataset::Vocabulary) -> Vec<String> {
    let mark = |shown: &Shown| match shown.is_trained {
        true => format!("[{}]", shown.text),
        false => shown.text.clone(),
    };
    let shown = preview(content, vocabulary, usize::MAX).unwrap();
    shown.iter().map(|parts| parts.iter().map(mark).collect()).collect()
}

/// Records of every form.
const MIXED: &str = r#"{"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Héllo?"}, {"role": "assistant", "content": " Hi 🐈! "}, {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "Bye."}]}
{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}, {"from": "human", "value": "c"}]}
{"instruction": "Add.", "input": "1 2", "output": "3"}

{"prompt": "Once", "response": "upon"}
{"input": "x", "output": "y"}
{"text": "A tale."}
"#;

const EXPECTED: [&str; 6] = [
    "<|begin_of_text|>System: Be kind.<|eot_id|>User: Héllo?<|eot_id|>Assistant: [Hi 🐈!<|eot_id|>]User: Bye<|eot_id|>Assistant: [Bye.<|eot_id|>]",
    "<|begin_of_text|>User: a<|eot_id|>Assistant: [b<|eot_id|>]",
    "<|begin_of_text|>User: Add.\n\n1 2<|eot_id|>Assistant: [3<|eot_id|>]",
    "<|begin_of_text|>User: Once<|eot_id|>Assistant: [upon<|eot_id|>]",
    "<|begin_of_text|>User: x<|eot_id|>Assistant: [y<|eot_id|>]",
    "<|begin_of_text|>[A tale.<|end_of_text|>]",
];

const TRAIN: &str = r#"
    train = [{ path = "a.jsonl" }]
    validation = [{ path = "a.jsonl" }]
    format = "auto"
"#;

#[test]
fn every_record_is_taken_by_its_form() {
    let dir = folder();
    fs::write(dir.path().join("a.jsonl"), MIXED).unwrap();
    let dataset = open(dir.path(), TRAIN).unwrap();
    assert_eq!(shown(&dataset.train, &dataset.vocabulary), EXPECTED);
    assert_eq!(dataset.train.fingerprint(), dataset.validation.fingerprint());
    // The bytes of what is trained, special tokens aside.
    assert_eq!(dataset.train.bytes(), "Hi 🐈!Bye.b3upony".len() + "A tale.".len());
    let report = dataset.report.unwrap();
    assert_eq!((report.records(), report.cut, report.dropped, report.bad), (12, 0, 0, 0));
    let text = report.to_string();
    assert!(
        text.starts_with("records: detected 2 messages, 2 conversations, 2 instruction/output"),
        "{text}"
    );
    // The same as an array, compressed records and all.
    let array = format!("[{}]", MIXED.trim().replace("\n\n", "\n").replace('\n', ",\n"));
    fs::write(dir.path().join("a.json"), array).unwrap();
    let array = open(dir.path(), &TRAIN.replace("a.jsonl", "a.json")).unwrap();
    assert_eq!(array.train.fingerprint(), dataset.train.fingerprint());
    let all = open(dir.path(), &format!("{TRAIN}\nloss_on = \"all\"")).unwrap();
    let whole = EXPECTED[2].replace(['[', ']'], "").replace("<|begin_of_text|>", "");
    assert_eq!(shown(&all.train, &all.vocabulary)[2], format!("<|begin_of_text|>[{whole}]"));
    assert_ne!(all.train.fingerprint(), dataset.train.fingerprint());
}

#[test]
fn without_a_template_prompts_are_plain() {
    let dir = folder();
    let records: Vec<&str> = MIXED.lines().skip(2).collect();
    fs::write(dir.path().join("a.jsonl"), records.join("\n")).unwrap();
    let data = format!("{TRAIN}\nchat_template = \"none\"");
    let dataset = open(dir.path(), &data).unwrap();
    let texts = shown(&dataset.train, &dataset.vocabulary);
    let end = "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n[3<|end_of_text|>]";
    assert!(texts[0].ends_with(end), "{}", texts[0]);
    assert_eq!(texts[1], "<|begin_of_text|>Once[upon<|end_of_text|>]");
    assert!(dataset.report.unwrap().to_string().ends_with("plain prompts (no chat template)"));
    fs::write(dir.path().join("a.jsonl"), MIXED).unwrap();
    let message = open(dir.path(), &data).unwrap_err().to_string();
    assert!(message.contains("a.jsonl: line 1: a conversation needs a chat template"), "{message}");
}

#[test]
fn another_template_is_read_from_a_file() {
    let dir = folder();
    fs::write(dir.path().join("a.jsonl"), MIXED).unwrap();
    let template = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}\n{% endfor %}\
        {% if add_generation_prompt %}<assistant>{% endif %}";
    fs::write(dir.path().join("chat.jinja"), template).unwrap();
    let data = format!("{TRAIN}\nchat_template = \"chat.jinja\"");
    let dataset = open(dir.path(), &data).unwrap();
    let texts = shown(&dataset.train, &dataset.vocabulary);
    // No second begin-of-text token, and no line end learned.
    assert_eq!(texts[1], "<|begin_of_text|><user>a<|end_of_text|>\n<assistant>[b<|end_of_text|>]");
    assert!(texts[0].contains("[ Hi 🐈! <|end_of_text|>]\n<user>"), "{}", texts[0]);
    fs::write(dir.path().join("chat.jinja"), "{% for").unwrap();
    let message = open(dir.path(), &data).unwrap_err().to_string();
    assert!(
        message.contains("`data.chat_template`") && message.contains("chat.jinja"),
        "{message}"
    );
    // A template that refuses a conversation names the record.
    fs::write(dir.path().join("chat.jinja"), "{{ raise_exception('only one turn') }}").unwrap();
    let message = open(dir.path(), &data).unwrap_err().to_string();
    assert!(
        message.contains("a.jsonl: line 1: ") && message.contains("only one turn"),
        "{message}"
    );
}

#[test]
fn malformed_records_are_named_or_skipped() {
    let dir = folder();
    let lines = format!("{}{{\"prompt\": \"x\"\n{{\"question\": 5}}\n{}", &MIXED, MIXED);
    fs::write(dir.path().join("a.jsonl"), &lines).unwrap();
    let message = open(dir.path(), TRAIN).unwrap_err().to_string();
    assert!(message.contains("a.jsonl: line 8, column 14: EOF while parsing"), "{message}");
    assert!(message.ends_with("or leave out such records with `data.skip_bad`"), "{message}");
    let skipping = format!("{TRAIN}\nskip_bad = true");
    let dataset = open(dir.path(), &skipping).unwrap();
    assert_eq!(dataset.train.documents(), 12);
    let report = dataset.report.unwrap();
    assert_eq!((report.bad, report.bad_shown.len()), (4, 4)); // of both parts
    assert!(report.bad_shown[1].contains("a.jsonl: line 9: a record of no known form"));
    assert!(report.to_string().contains("\n  4 malformed, left out:\n    "), "{report}");
    // In an array a record is told by its number.
    fs::write(dir.path().join("a.jsonl"), "").unwrap();
    fs::write(dir.path().join("a.json"), r#"[{"text": "a"}, {"text": 5}, {"text": "b"}]"#).unwrap();
    let dataset = open(dir.path(), &skipping.replace("a.jsonl", "a.json")).unwrap();
    assert!(dataset.report.unwrap().bad_shown[0].contains("a.json: record 2: `text` must be"));
    let message = open(dir.path(), &TRAIN.replace("a.jsonl", "a.json")).unwrap_err().to_string();
    assert!(message.contains("a.json: line 1, column 30: `text` must be a string"), "{message}");
}

#[test]
fn nothing_to_train_on_is_an_error() {
    let dir = folder();
    let write = |text: &str| fs::write(dir.path().join("a.jsonl"), text).unwrap();
    write("\n");
    let message = open(dir.path(), TRAIN).unwrap_err().to_string();
    assert!(message.ends_with("a.jsonl: holds no record"), "{message}");
    write("{}\n{}");
    let message = open(dir.path(), &format!("{TRAIN}\nskip_bad = true")).unwrap_err().to_string();
    assert!(
        message.contains("no example is left to train on: of 4 records 4 are malformed"),
        "{message}"
    );
    write(&format!("{{\"prompt\": \"{}\", \"response\": \"x\"}}", "a long story ".repeat(99)));
    let message = open(dir.path(), TRAIN).unwrap_err().to_string();
    assert!(message.contains("2 too long to leave a token that is trained"), "{message}");
    write(r#"{"text": "a"}"#);
    let split = TRAIN.replace("validation = [{ path = \"a.jsonl\" }]", "validation_split = 0.5");
    let message = open(dir.path(), &split).unwrap_err().to_string();
    assert!(message.contains("`data.validation_split`: 1 examples cannot be split"), "{message}");
}

#[test]
fn long_examples_are_cut_and_reported() {
    let dir = folder();
    let long =
        format!("{{\"prompt\": \"a\", \"response\": \"{}\"}}\n", "once upon a time ".repeat(99));
    fs::write(dir.path().join("a.jsonl"), long.repeat(3) + MIXED).unwrap();
    let dataset = open(dir.path(), TRAIN).unwrap();
    let Content::Examples(examples) = &dataset.train else { panic!("no examples") };
    assert_eq!((examples.len(), examples.longest()), (9, 257));
    let report = dataset.report.unwrap();
    assert_eq!((report.cut, report.dropped), (6, 0));
    let text = report.to_string();
    assert!(
        text.contains(&format!(
            "6 longer than data.sequence_length: {} tokens cut off",
            report.cut_tokens
        )),
        "{text}"
    );
    let mut batches =
        Batches::new(dataset.train, recipe(dir.path(), TRAIN).unwrap().cut(), 1).unwrap();
    assert_eq!(batches.draw().sequence_length, 256);
}

#[test]
fn a_share_is_held_out_by_the_seed() {
    let dir = folder();
    let lines: String =
        (0..40).map(|i| format!("{{\"input\": \"{i}\", \"output\": \"n{i}\"}}\n")).collect();
    fs::write(dir.path().join("a.jsonl"), lines).unwrap();
    let split = TRAIN.replace("validation = [{ path = \"a.jsonl\" }]", "validation_split = 0.1");
    let dataset = open(dir.path(), &split).unwrap();
    let parts = [&dataset.train, &dataset.validation].map(|part| shown(part, &dataset.vocabulary));
    assert_eq!((parts[0].len(), parts[1].len()), (36, 4));
    assert!(parts[1].iter().all(|text| !parts[0].contains(text)));
    let again = open(dir.path(), &split).unwrap();
    assert_eq!(shown(&again.validation, &again.vocabulary), parts[1]);
    let few = open(dir.path(), &format!("{split}\nmax_samples = 10")).unwrap();
    assert_eq!((few.train.documents(), few.validation.documents()), (9, 1));
}

#[test]
fn contradicting_keys_are_named() {
    let dir = folder();
    fs::write(dir.path().join("a.jsonl"), MIXED).unwrap();
    let plain = TRAIN.replace("format = \"auto\"", "");
    for (data, reason) in [
        (format!("{plain}\nloss_on = \"all\""), "`data.loss_on`: is about records"),
        (format!("{plain}\npacking = false"), "`data.packing`: is about records"),
        (format!("{plain}\nskip_bad = false"), "`data.skip_bad`: is about records"),
        (format!("{plain}\nmax_samples = 1"), "`data.max_samples`"),
        (format!("{plain}\nchat_template = \"none\""), "`data.chat_template`"),
        (format!("{TRAIN}\nmax_samples = 0"), "`data.max_samples`: must be at least 1"),
        (format!("{TRAIN}\nvalidation_bytes = 5"), "`data.validation_bytes`"),
        (format!("{TRAIN}\ncache = \"x\""), "`data.cache`"),
        (format!("{TRAIN}\nloss_on = \"user\""), "unknown variant `user`"),
        (TRAIN.replace("auto", "alpaca"), "unknown variant `alpaca`"),
        (TRAIN.replace("auto", "text") + "\nloss_on = \"assistant\"", "`data.loss_on`"),
    ] {
        let message = recipe(dir.path(), &data).unwrap_err().to_string();
        assert!(message.contains(reason), "{data}: {message}");
    }
    let stream = open(dir.path(), &plain.replace("a.jsonl\"", "a.jsonl\", field = \"text\""));
    assert!(stream.unwrap_err().to_string().contains("the record has no `text`"));
    assert!(matches!(
        preview(&open(dir.path(), TRAIN).unwrap().train, &open(dir.path(), TRAIN).unwrap().vocabulary, 1),
        Ok(shown) if shown.len() == 1
    ));
    let interrupted =
        Dataset::open_with(&recipe(dir.path(), TRAIN).unwrap(), &Hub::from_env(), &mut |_| {
            ControlFlow::Break(())
        });
    assert!(matches!(interrupted, Err(Error::Interrupted)));
}
