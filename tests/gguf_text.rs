//! Vocabularies of GGUF files, against the tokenizer of the same vocabulary and against SentencePiece's own algorithm.

use std::fs;

use bitnet_model::{
    hub::Hub,
    pretrained::{Precision, Source},
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use bitnet_tests::{
    gguf_file::{self, bool, floats, integers, kind, string, strings, u32},
    gguf_model::{default_model, gguf_of, open},
};

#[test]
fn byte_level_vocabularies() {
    let (config, tensors, tokenizer) = default_model();
    let mut file = gguf_of("bitnet-b1.58", &config, &tensors, kind::I2_S);
    gguf_file::byte_level(&mut file, &tokenizer);
    file.set("tokenizer.chat_template", string("{{ bos_token }}{{ messages[0].content }}"));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    fs::write(&path, file.bytes()).unwrap();
    let source = open(&path, Precision::AsConfigured).unwrap();
    assert!(source.has_tokenizer());
    // The metadata name 1; `<|eot_id|>` ends a turn by its name.
    assert_eq!(source.generation.eos_token_ids, [1, 2]);
    let found = source.tokenizer().unwrap().unwrap();
    let default = Source::open("default", Precision::AsConfigured, &Hub::from_env()).unwrap();
    let expected = default.tokenizer().unwrap().unwrap();
    for text in [
        "",
        "Once upon a time, there was a little girl.",
        "  two spaces\n\nand <|eot_id|> tokens<|end_of_text|>",
        "Zürich 東京 🙂 \u{0}\u{7f} 1234567",
    ] {
        for special in [false, true] {
            let ids = expected.encode(text, special).unwrap();
            assert_eq!(found.encode(text, special).unwrap(), ids, "{text:?}");
            assert_eq!(found.decode(&ids, true).unwrap(), expected.decode(&ids, true).unwrap());
        }
    }
    assert_eq!(found.bos_token(), expected.bos_token());
    assert_eq!(found.eos_token_id(), expected.eos_token_id());
    let template = found.chat_template().unwrap().unwrap();
    let message = bitnet_model::text::Message::new("user", "hi");
    assert_eq!(template.render(&[message], true).unwrap(), "<|begin_of_text|>hi");

    file.set("tokenizer.ggml.add_bos_token", bool(false));
    file.set("tokenizer.ggml.add_eos_token", bool(true));
    fs::write(&path, file.bytes()).unwrap();
    let found = open(&path, Precision::AsConfigured).unwrap().tokenizer().unwrap().unwrap();
    assert_eq!(found.encode("", true).unwrap(), [1]);
}

/// A vocabulary of SentencePiece: control tokens, bytes, and pieces with scores.
fn sentence_piece() -> (Vec<String>, Vec<f32>, Vec<i32>) {
    let mut tokens =
        vec![("<unk>".to_owned(), 0., 2), ("<s>".into(), 0., 3), ("</s>".into(), 0., 3)];
    tokens.extend((0..=255).map(|byte| (format!("<0x{byte:02X}>"), 0., 6)));
    let pieces = [
        "▁t", "he", "▁a", "in", "▁the", "re", "nd", "▁and", "er", "▁th", "ing", "ere", "▁there",
        "an", "▁an", "▁▁", "▁t", "th", "ng",
    ];
    let mut seen = std::collections::HashSet::new();
    for (rank, piece) in pieces.iter().filter(|piece| seen.insert(**piece)).enumerate() {
        tokens.push(((*piece).into(), -(rank as f32), 1));
    }
    for (rank, letter) in "▁etaoinsrhdglé.".chars().enumerate() {
        tokens.push((letter.to_string(), -1000. - rank as f32, 1));
    }
    let (mut names, mut scores, mut kinds) = (vec![], vec![], vec![]);
    for (name, score, kind) in tokens {
        names.push(name);
        scores.push(score);
        kinds.push(kind);
    }
    (names, scores, kinds)
}

/// SentencePiece's own algorithm: joins the neighbours whose union has the highest score, the leftmost of equals, until
/// none is a token; what is no token then becomes its bytes.
fn sentence_piece_ids(text: &str, tokens: &[String], scores: &[f32]) -> Vec<u32> {
    let id = |piece: &str| tokens.iter().position(|token| token == piece);
    let mut pieces: Vec<String> =
        format!("▁{}", text.replace(' ', "▁")).chars().map(String::from).collect();
    loop {
        let mut best: Option<(f32, usize)> = None;
        for at in 0..pieces.len().saturating_sub(1) {
            let union = format!("{}{}", pieces[at], pieces[at + 1]);
            if let Some(id) = id(&union)
                && best.is_none_or(|(score, _)| scores[id] > score)
            {
                best = Some((scores[id], at));
            }
        }
        let Some((_, at)) = best else { break };
        let right = pieces.remove(at + 1);
        pieces[at].push_str(&right);
    }
    let ids = pieces.iter().flat_map(|piece| match id(piece) {
        Some(id) => vec![id as u32],
        None => piece.bytes().map(|byte| id(&format!("<0x{byte:02X}>")).unwrap() as u32).collect(),
    });
    ids.collect()
}

#[test]
fn sentence_piece_vocabularies() {
    let (config, tensors, _) = default_model();
    let (tokens, scores, kinds) = sentence_piece();
    let mut file = gguf_of("bitnet-b1.58", &config, &tensors, kind::I2_S);
    file.set("tokenizer.ggml.model", string("llama"))
        .set("tokenizer.ggml.tokens", strings(&tokens))
        .set("tokenizer.ggml.scores", floats(&scores))
        .set("tokenizer.ggml.token_type", integers(&kinds))
        .set("tokenizer.ggml.bos_token_id", u32(1))
        .set("tokenizer.ggml.eos_token_id", u32(2));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    fs::write(&path, file.bytes()).unwrap();
    let tokenizer = open(&path, Precision::AsConfigured).unwrap().tokenizer().unwrap().unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let alphabet: Vec<char> = " ehtaindrgé.xü☃".chars().collect();
    let mut texts = vec!["the there and  then another".to_owned(), "Zürich ☃".into()];
    for _ in 0..300 {
        let len = rng.random_range(1..24);
        texts.push((0..len).map(|_| alphabet[rng.random_range(0..alphabet.len())]).collect());
    }
    for text in &texts {
        let ids = tokenizer.encode(text, false).unwrap();
        assert_eq!(ids, sentence_piece_ids(text, &tokens, &scores), "{text:?}");
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), *text, "{text:?}");
    }
    assert_eq!(tokenizer.encode("the</s>", true).unwrap().first(), Some(&1));
    assert_eq!(tokenizer.encode("</s>", false).unwrap(), [2]);
    assert_eq!(tokenizer.special_token("unk_token"), None);
}
