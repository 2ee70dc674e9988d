//! Constrained decoding: whatever is sampled has the form that is asked for.

#![allow(clippy::unwrap_used)] // test code

use std::time::{Duration, Instant};

use bitnet_model::{
    batch::{Batch, Limits, Sequence, Update},
    grammar::{Grammar, GrammarFactory},
    ops::KvType,
    pretrained::Pretrained,
    sampler::{Sampler, SamplingParams},
    session::Finish,
    text::Tokenizer,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Map, Value, json};

/// Whether a value is valid under a schema, of the keywords that [`schema`] uses.
fn is_valid(schema: &Value, value: &Value) -> bool {
    let number = |name: &str| schema[name].as_f64();
    let within = |actual: f64, least: &str, most: &str| {
        number(least).is_none_or(|least| actual >= least)
            && number(most).is_none_or(|most| actual <= most)
    };
    if let Some(options) = schema["anyOf"].as_array() {
        return options.iter().any(|option| is_valid(option, value));
    }
    if let Some(values) = schema["enum"].as_array() {
        return values.contains(value);
    }
    match (schema["type"].as_str().unwrap(), value) {
        ("null", Value::Null) | ("boolean", Value::Bool(_)) => true,
        ("integer", Value::Number(number)) => {
            let number = number.as_f64().unwrap();
            number.fract() == 0. && within(number, "minimum", "maximum")
        }
        ("number", Value::Number(number)) => within(number.as_f64().unwrap(), "minimum", "maximum"),
        ("string", Value::String(text)) => {
            let fits = within(text.chars().count() as f64, "minLength", "maxLength");
            let digits =
                || text.split('-').map(|part| part.bytes().filter(u8::is_ascii_digit).count());
            fits && (schema["pattern"].is_null() || text.len() == 7 && digits().eq([3, 3]))
        }
        ("array", Value::Array(items)) => {
            let fits = within(items.len() as f64, "minItems", "maxItems");
            fits && items.iter().all(|item| is_valid(&schema["items"], item))
        }
        ("object", Value::Object(fields)) => {
            let required = schema["required"].as_array().unwrap();
            required.iter().all(|name| fields.contains_key(name.as_str().unwrap()))
                && fields.iter().all(|(name, field)| {
                    schema["properties"].get(name).is_some_and(|schema| is_valid(schema, field))
                })
        }
        _ => false,
    }
}

/// A random schema.
fn schema(rng: &mut ChaCha8Rng, depth: usize) -> Value {
    match rng.random_range(0..if depth == 0 { 7 } else { 10 }) {
        0 => json!({"type": "null"}),
        1 => json!({"type": "boolean"}),
        2 => json!({"type": "integer", "minimum": -rng.random_range(0..300), "maximum": 1000}),
        3 => json!({"type": "number", "minimum": 0, "maximum": 2.5}),
        4 => json!({"type": "string", "minLength": rng.random_range(0..3), "maxLength": 8}),
        5 => json!({"type": "string", "pattern": "^[0-9]{3}-[0-9]{3}$"}),
        6 => json!({"enum": ["yes", "no \"é\"", 3, null, [1, {"a": false}]]}),
        7 => {
            json!({"type": "array", "items": schema(rng, depth - 1), "minItems": rng.random_range(0..2), "maxItems": 3})
        }
        8 => json!({"anyOf": [schema(rng, depth - 1), schema(rng, depth - 1)]}),
        _ => object(rng, depth),
    }
}

fn object(rng: &mut ChaCha8Rng, depth: usize) -> Value {
    let names = ["name", "größe", "a b", "x\"y"];
    let names = &names[..rng.random_range(1..=names.len())];
    let properties =
        names.iter().map(|name| ((*name).to_owned(), schema(rng, depth.saturating_sub(1))));
    let properties = Value::from(properties.collect::<Map<_, _>>());
    let required = Vec::from_iter(names.iter().filter(|_| rng.random()));
    json!({"type": "object", "properties": properties, "required": required, "additionalProperties": false})
}

/// The embedded model.
struct Default {
    pretrained: Pretrained,
    tokenizer: Tokenizer,
    grammars: GrammarFactory,
}

fn default_model() -> Default {
    let pretrained = Pretrained::open("default").unwrap();
    let tokenizer = pretrained.tokenizer.clone().unwrap();
    let grammars = GrammarFactory::new(&tokenizer, pretrained.model.config().vocab_size);
    Default { pretrained, tokenizer, grammars }
}

impl Default {
    fn sequence(&self, prompt: &str, temperature: f32, grammar: Option<Grammar>) -> Sequence {
        let params = match temperature {
            0. => SamplingParams::greedy(),
            temperature => SamplingParams { temperature, ..SamplingParams::default() },
        };
        Sequence {
            prompt: self.tokenizer.encode(prompt, true).unwrap(),
            sampler: Sampler::new(params).unwrap(),
            seed: 0,
            max_new_tokens: 300,
            eos_token_ids: self.tokenizer.eos_token_id().into_iter().collect(),
            grammar,
            adapter: None,
            logprobs: None,
            prompt_logprobs: false,
        }
    }

    /// What sequences come to together.
    fn run(&self, sequences: &[Sequence]) -> Vec<(String, Finish)> {
        let limits =
            Limits { sequences: 64, kv_bytes: 1 << 30, prompt_tokens: 64, kv_type: KvType::F16 };
        let mut batch = Batch::new(self.pretrained.model.clone(), limits);
        let admit = |sequence: &Sequence| batch.admit(sequence.clone()).unwrap().unwrap().0;
        let ids = Vec::from_iter(sequences.iter().map(admit));
        let mut results = vec![(Vec::new(), None); ids.len()];
        while !batch.is_empty() {
            for (id, update) in batch.step().unwrap() {
                let (tokens, finish) =
                    &mut results[ids.iter().position(|other| *other == id).unwrap()];
                match update {
                    Update::Token(token, _) => tokens.push(token),
                    Update::End(end) => *finish = Some(end),
                    other => panic!("{other:?}"),
                }
            }
        }
        let text = |tokens: Vec<u32>| self.tokenizer.decode(&tokens, true).unwrap();
        results.into_iter().map(|(tokens, finish)| (text(tokens), finish.unwrap())).collect()
    }
}

#[test]
fn whatever_is_sampled_is_valid() {
    let model = default_model();
    let rng = &mut ChaCha8Rng::seed_from_u64(3);
    let mut complete = 0;
    let schemas = Vec::from_iter((0..50).map(|_| object(rng, 2)));
    let sequences = schemas.iter().zip(0..).map(|(schema, seed)| {
        let grammar = model.grammars.json_schema(schema).unwrap();
        Sequence { seed, ..model.sequence("Once upon a time", 1.5, Some(grammar)) }
    });
    let results = model.run(&Vec::from_iter(sequences));
    for (schema, (text, finish)) in schemas.iter().zip(results) {
        match finish {
            Finish::Eos => {
                let value = serde_json::from_str(&text);
                let value =
                    value.unwrap_or_else(|error| panic!("{error}: {text:?} under {schema}"));
                assert!(is_valid(schema, &value), "{text:?} under {schema}");
                complete += 1;
            }
            _ => assert_eq!(finish, Finish::Length, "{text:?}"),
        }
    }
    assert!(complete > 45, "only {complete} of 50 texts came to an end");
}
