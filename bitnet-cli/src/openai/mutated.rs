//! Requests that nobody means: whatever they are, they are read or refused, and a refusal says something.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use bitnet_model::{adapter::Adaptation, grammar::GrammarFactory, hub::Hub, pretrained::Source};
use rand::{Rng, SeedableRng, seq::IndexedRandom};
use rand_chacha::ChaCha8Rng;
use serde_json::{Map, Value, json};

use super::{Lengths, Reader, Refusal, Route, responses};

/// Requests that are answered.
fn seeds() -> Vec<Value> {
    let schema = json!({"type": "object", "properties": {"a": {"type": "integer", "minimum": 0}, "b": {"enum": ["x", 1, null]}}, "required": ["a"]});
    let function = json!({"type": "function", "function": {"name": "go", "description": "Goes.", "parameters": schema}});
    let call = json!({"id": "1", "type": "function", "function": {"name": "go", "arguments": "{\"a\": 1}"}});
    vec![
        json!({"model": "default", "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
               "max_completion_tokens": 5, "temperature": 0.7, "top_p": 0.9, "stop": ["a", "b"], "logprobs": true, "top_logprobs": 3, "n": 2,
               "stream": true, "stream_options": {"include_usage": true}, "logit_bias": {"5": -100}, "seed": 1}),
        json!({"messages": [{"role": "user", "content": "Go"}, {"role": "assistant", "content": null, "tool_calls": [call]}, {"role": "tool", "tool_call_id": "1", "content": "3"}],
               "tools": [function], "tool_choice": "auto", "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": true}}}),
        json!({"prompt": ["a", [1, 2, 3]], "max_tokens": 5, "echo": true, "logprobs": 2, "n": 2, "best_of": 2, "min_p": 0.1, "top_k": 3,
               "frequency_penalty": 1, "presence_penalty": -1, "repetition_penalty": 1.1}),
        json!({"input": [{"role": "developer", "content": "x"}, {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "y"}]}],
               "instructions": "z", "max_output_tokens": 3, "text": {"format": {"type": "json_object"}}}),
    ]
}

/// Any value.
fn any(rng: &mut ChaCha8Rng, depth: usize) -> Value {
    let texts = [
        "",
        "a",
        "\u{0}",
        "\u{feff}💥",
        "default:x",
        "<|eot_id|>",
        "json_schema",
        "function",
        "{\"a\":",
        "\\u{d800}",
    ];
    match rng.random_range(0..if depth == 0 { 8 } else { 10 }) {
        0 => Value::Null,
        1 => rng.random_bool(0.5).into(),
        2 => rng.random_range(-3..200).into(),
        3 => (*[u64::MAX, 1 << 32, 4_294_967_295, 1 << 53].choose(rng).unwrap()).into(),
        4 => json!(*[1e308, -1e-308, 0.5, -0., i64::MIN as f64].choose(rng).unwrap()),
        5..=7 => (*texts.choose(rng).unwrap()).into(),
        8 => (0..rng.random_range(0..4)).map(|_| any(rng, depth - 1)).collect(),
        _ => {
            let fields = (0..rng.random_range(0..3))
                .map(|_| ((*texts.choose(rng).unwrap()).to_owned(), any(rng, depth - 1)));
            Value::Object(Map::from_iter(Vec::from_iter(fields)))
        }
    }
}

/// Another value in one place.
fn mutate(value: &mut Value, rng: &mut ChaCha8Rng) {
    let inner = match value {
        Value::Array(values) if rng.random_bool(0.85) => {
            if let Some(value) = values.choose(rng).filter(|_| rng.random_bool(0.1)).cloned() {
                values.push(value);
                return;
            }
            let len = values.len();
            (len > 0).then(|| &mut values[rng.random_range(0..len)])
        }
        Value::Object(fields) if rng.random_bool(0.95) => {
            let len = fields.len();
            (len > 0).then(|| fields.values_mut().nth(rng.random_range(0..len))).flatten()
        }
        _ => None,
    };
    match inner {
        Some(inner) => mutate(inner, rng),
        None => *value = any(rng, 3),
    }
}

#[test]
fn are_read_or_refused() {
    let source = Source::open("default", Default::default(), &Hub::from_env()).unwrap();
    let tokenizer = source.tokenizer().unwrap().unwrap();
    let adapters: BTreeMap<String, Arc<Adaptation>> = BTreeMap::new();
    let reader = Reader {
        model: "default",
        adapters: &adapters,
        tokenizer: &tokenizer,
        grammars: &GrammarFactory::new(&tokenizer, source.config.vocab_size),
        config: &source.config,
        generation: &source.generation,
        limits: Lengths { prompt: 400, new: 64, texts: 300, bytes: 100_000 },
    };
    let read = |kind: usize, body: &Value| match kind {
        0 => reader.read(Route::Chat, body).map(|asked| asked.sequences.len()),
        1 => reader.read(Route::Completion, body).map(|asked| asked.sequences.len()),
        2 => responses::to_chat(body)
            .and_then(|chat| reader.read(Route::Chat, &chat))
            .map(|asked| asked.sequences.len()),
        3 => reader.read_embeddings(body).map(|asked| asked.sequences.len()),
        _ => reader.read_tokens(body).map(|tokens| tokens.len() + 1),
    };
    // As tests/mutated.rs: 3000, or as many as fit into the time.
    let variable = |name| std::env::var(name).ok().map(|text| text.parse::<f64>().unwrap());
    let seconds = variable("BITNET_FUZZ_SECONDS").map(Duration::from_secs_f64);
    let seed = variable("BITNET_FUZZ_SEED").unwrap_or(6.) as u64;
    let (rng, begin) = (&mut ChaCha8Rng::seed_from_u64(seed), Instant::now());
    let (seeds, mut answered, mut refused) = (seeds(), 0, 0);
    for (kind, body) in [0, 0, 1, 2].into_iter().zip(&seeds) {
        read(kind, body).unwrap();
    }
    while seconds.map_or(answered + refused < 3000, |seconds| begin.elapsed() < seconds) {
        let mut body = seeds.choose(rng).unwrap().clone();
        (0..rng.random_range(1..4)).for_each(|_| mutate(&mut body, rng));
        match read(rng.random_range(0..5), &body) {
            Ok(count) => {
                assert!(count > 0, "no sequence of {body}");
                answered += 1;
            }
            Err(Refusal { message, .. }) => {
                assert!((10..2000).contains(&message.len()), "{message} to {body}");
                refused += 1;
            }
        }
    }
    println!("requests: {answered} of seed {seed} answered, {refused} refused");
    assert!(answered > 200 && refused > 200, "{answered} answered, {refused} refused");
}
