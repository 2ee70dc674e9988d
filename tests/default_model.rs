//! The embedded model: what its card says is what it does.

#![allow(clippy::unwrap_used)]

use std::{ops::ControlFlow, path::Path};

use bitnet_model::{
    pretrained::{DEFAULT, Pretrained, default_files},
    sampler::{Sampler, SamplingParams},
    session::{Finish, GenerateOptions, Session},
};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// A sequence of five words that comes back.
fn looping_five_gram(text: &str) -> Option<String> {
    let words: Vec<&str> = text.split_whitespace().collect();
    let mut seen = std::collections::HashSet::new();
    words.windows(5).find(|gram| !seen.insert(gram.to_vec())).map(|gram| gram.join(" "))
}

#[test]
fn the_card_shows_what_the_model_writes() {
    let card = workspace().join("bitnet-model/assets/default/README.md");
    let card = std::fs::read_to_string(card).unwrap().replace("\n   > ", "\n");
    let prompts = workspace().join("tests/fixtures/default_prompts.json");
    let prompts: Vec<String> =
        serde_json::from_str(&std::fs::read_to_string(prompts).unwrap()).unwrap();
    assert_eq!(prompts.len(), 20);
    let bitnet = Pretrained::open(DEFAULT).unwrap();
    let (generation, tokenizer) = (&bitnet.generation, bitnet.tokenizer.as_ref().unwrap());
    let options = GenerateOptions {
        sampler: Sampler::new(SamplingParams {
            temperature: generation.temperature.unwrap() as f32,
            top_p: generation.top_p.unwrap() as f32,
            repetition_penalty: generation.repetition_penalty.unwrap_or(1.) as f32,
            ..SamplingParams::default()
        })
        .unwrap(),
        max_new_tokens: 120,
        eos_token_ids: generation.eos_token_ids.clone(),
        interrupt: Default::default(),
    };
    for prompt in &prompts {
        let ids = tokenizer.encode(prompt, true).unwrap();
        let mut rng = ChaCha8Rng::seed_from_u64(158);
        let mut session = Session::new(bitnet.model.clone());
        let reply =
            session.generate(&ids, &options, &mut rng, |_| ControlFlow::Continue(())).unwrap();
        let text = tokenizer.decode(&reply.tokens, true).unwrap();
        let story = format!("{prompt}{text}");
        assert!(card.contains(story.trim()), "not in the card: {story}");
        assert!(matches!(reply.finish, Finish::Eos | Finish::Length));
        assert_eq!(looping_five_gram(&story), None, "{story}");
    }
}

#[test]
fn it_is_small_and_its_tokenizer_loses_nothing() {
    let size: usize = default_files().iter().map(|(_, bytes)| bytes.len()).sum();
    assert!(size <= 6_000_000, "{size} bytes");
    let bitnet = Pretrained::open(DEFAULT).unwrap();
    let config = bitnet.model.config();
    assert_eq!((config.hidden_size % 256, config.intermediate_size % 256), (0, 0));
    assert!(config.tie_word_embeddings && config.num_key_value_heads < config.num_attention_heads);
    let tokenizer = bitnet.tokenizer.unwrap();
    for text in ["naïve — 日本語 🙂\u{200d}🔥", "\u{0}\u{7f}\t\r\n  x", "Zażółć gęślą jaźń", ""]
    {
        let ids = tokenizer.encode(text, false).unwrap();
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
    }
    let ids = tokenizer.encode("Once", true).unwrap();
    assert_eq!(Some(ids[0]), config.bos_token_id);
    let chat = tokenizer.chat_template().unwrap().unwrap();
    let messages = [bitnet_model::text::Message::new("user", " hi ")];
    assert_eq!(chat.render(&messages, true).unwrap(), "User: hi<|eot_id|>Assistant: ");
    assert!(
        bitnet.generation.eos_token_ids.contains(&tokenizer.token_to_id("<|eot_id|>").unwrap())
    );
}
