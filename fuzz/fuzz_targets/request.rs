//! Bodies of requests, of every route: the first byte chooses it. What is no JSON is none of ours.

#![no_main]
#![allow(dead_code, unused_imports)] // the modules of the program, of which only some is used here

#[path = "../../bitnet-cli/src/continuation.rs"]
mod continuation;
#[path = "../../bitnet-cli/src/openai/mod.rs"]
mod openai;
#[path = "../../bitnet-cli/src/sampling.rs"]
mod sampling;
#[path = "../../bitnet-cli/src/statistics.rs"]
mod statistics;

use std::{collections::BTreeMap, sync::LazyLock};

use bitnet_model::{
    config::{Config, GenerationConfig},
    grammar::GrammarFactory,
    hub::Hub,
    pretrained::Source,
    text::Tokenizer,
};
use libfuzzer_sys::fuzz_target;
use openai::{Lengths, Reader, Route, responses};

struct Model {
    tokenizer: Tokenizer,
    config: Config,
    generation: GenerationConfig,
    grammars: GrammarFactory,
}

static MODEL: LazyLock<Model> = LazyLock::new(|| {
    let source = Source::open("default", Default::default(), &Hub::from_env()).unwrap();
    let tokenizer = source.tokenizer().unwrap().unwrap();
    let grammars = GrammarFactory::new(&tokenizer, source.config.vocab_size);
    Model {
        tokenizer,
        grammars,
        config: source.config.clone(),
        generation: source.generation.clone(),
    }
});

fuzz_target!(|data: &[u8]| {
    let Some((route, body)) = data.split_first() else { return };
    let Ok(body) = serde_json::from_slice(body) else { return };
    let Model { tokenizer, config, generation, grammars } = &*MODEL;
    let (adapters, limits) =
        (BTreeMap::new(), Lengths { prompt: 400, new: 64, texts: 300, bytes: 100_000 });
    let reader = Reader {
        model: "default",
        adapters: &adapters,
        tokenizer,
        config,
        generation,
        grammars,
        limits,
    };
    match route % 5 {
        0 => drop(reader.read(Route::Chat, &body)),
        1 => drop(reader.read(Route::Completion, &body)),
        2 => drop(responses::to_chat(&body).and_then(|chat| reader.read(Route::Chat, &chat))),
        3 => drop(reader.read_embeddings(&body)),
        _ => drop(reader.read_tokens(&body)),
    }
});
