//! Constrained decoding: whatever is sampled has the form that is asked for.

#![allow(clippy::unwrap_used)] // test code

use bitnet_model::{
    Result,
    batch::{Batch, Limits, Sequence, Update},
    grammar::{Grammar, GrammarFactory, Matcher},
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
            pooled: false,
        }
    }

    /// What sequences come to together.
    fn run(&self, sequences: &[Sequence]) -> Vec<(String, Finish)> {
        let limits = Limits {
            sequences: 64,
            kv_bytes: 1 << 30,
            prompt_tokens: 64,
            prompt_tokens_beside: 64,
            kv_type: KvType::F16,
        };
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

/// A vocabulary that marks the starts of words and has all bytes, as SentencePiece makes them.
fn bytes_and_words() -> Tokenizer {
    let bytes = (0..=255u8).map(|byte| format!("<0x{byte:02X}>"));
    let pieces = ["▁", "▁a", "{\"", "\":", "▁\"", "na", "name", "}", "0", "12", "é", "]}", "</s>"];
    let tokens = bytes.chain(pieces.map(String::from)).zip((0..).map(Value::from));
    let metaspace = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first"});
    let file = json!({
        "version": "1.0", "normalizer": null, "post_processor": null, "pre_tokenizer": metaspace,
        "added_tokens": [{"id": 268, "content": "</s>", "special": true, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false}],
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": {"type": "BPE", "vocab": Value::from_iter(tokens), "merges": [], "byte_fallback": true},
    });
    Tokenizer::from_bytes(file.to_string().as_bytes(), None, None).unwrap()
}

#[test]
fn any_allowed_tokens_make_a_valid_text() {
    let (tokenizer, rng) = (bytes_and_words(), &mut ChaCha8Rng::seed_from_u64(4));
    let grammars = GrammarFactory::new(&tokenizer, 300);
    let mut complete = 0;
    for _ in 0..50 {
        let schema = object(rng, 2);
        let (mut matcher, mut tokens) = (grammars.json_schema(&schema).unwrap().matcher(), vec![]);
        while !matcher.is_finished() && tokens.len() < 500 {
            let allowed = allowed(&mut matcher, 300, &[268]).unwrap();
            assert!(allowed.iter().all(|id| *id < 268), "an object that is complete is finished");
            tokens.push(allowed[rng.random_range(0..allowed.len())]);
            matcher.accept(tokens[tokens.len() - 1]).unwrap();
        }
        if matcher.is_finished() {
            let text = tokenizer.decode(&tokens, true).unwrap();
            let value =
                serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text:?}"));
            assert!(is_valid(&schema, &value), "{text:?} under {schema}");
            complete += 1;
        }
    }
    assert!(complete > 45, "only {complete} of 50 texts came to an end");
}

#[test]
fn a_form_that_the_text_has_anyway_changes_nothing() {
    let model = default_model();
    let free = Sequence { max_new_tokens: 40, ..model.sequence("Once upon a time", 0., None) };
    let any = model.grammars.compile(r"start: /(?s:.*)/", []).unwrap();
    let constrained = Sequence { grammar: Some(any), ..free.clone() };
    let results = model.run(&[free, constrained]);
    assert_eq!(results[0], results[1]);
}

#[test]
fn neighbours_do_not_matter() {
    let model = default_model();
    let object = model.grammars.json_object().unwrap();
    let list =
        json!({"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 2, "maxItems": 9});
    let list = model.grammars.json_schema(&list).unwrap();
    let sequences = [
        Sequence { max_new_tokens: 30, ..model.sequence("Once upon a time", 0., None) },
        model.sequence("A list:", 1.5, Some(list.clone())),
        Sequence { max_new_tokens: 60, ..model.sequence("Once upon a time", 1., Some(object)) },
        Sequence { seed: 5, ..model.sequence("A list:", 1.5, Some(list)) },
    ];
    let together = model.run(&sequences);
    for (sequence, result) in sequences.iter().zip(&together) {
        assert_eq!(&model.run(std::slice::from_ref(sequence))[0], result);
    }
}

#[test]
fn a_text_that_is_cut_is_the_beginning_of_one() {
    let model = default_model();
    let schema = json!({"enum": ["a long story about a dragon"]});
    let grammar = model.grammars.json_schema(&schema).unwrap();
    let sequence = model.sequence("Once upon a time", 1., Some(grammar));
    let [(text, finish)] = &model.run(&[Sequence { max_new_tokens: 5, ..sequence.clone() }])[..]
    else {
        panic!()
    };
    assert!(text.len() > 4 && "\"a long story about a dragon\"".starts_with(text), "{text:?}");
    assert_eq!(*finish, Finish::Length);
    assert_eq!(model.run(&[sequence])[0], ("\"a long story about a dragon\"".into(), Finish::Eos));
}

/// The tokens that may come next.
fn allowed(matcher: &mut Matcher, vocab_size: usize, ends: &[u32]) -> Result<Vec<u32>> {
    let mut logits = vec![0.; vocab_size];
    matcher.allow(&mut logits, ends)?;
    let allowed = (0u32..).zip(logits).filter(|(_, logit)| *logit == 0.);
    Ok(allowed.map(|(id, _)| id).collect())
}

#[test]
fn only_ids_with_a_text_are_allowed_and_the_end_only_at_the_end() {
    let model = default_model();
    let size = model.pretrained.model.config().vocab_size;
    let padded = GrammarFactory::new(&model.tokenizer, size + 100);
    let grammar = padded.json_schema(&json!({"type": "integer"})).unwrap();
    let ends = [model.tokenizer.eos_token_id().unwrap(), size as u32 + 7];
    let mut matcher = grammar.matcher();
    let first = allowed(&mut matcher, size + 100, &ends).unwrap();
    assert!(!first.is_empty());
    for &id in &first {
        let text = model.tokenizer.decode(&[id], true).unwrap();
        assert!(
            !text.is_empty() && text.trim_start_matches('-').bytes().all(|b| b.is_ascii_digit()),
            "{text:?}"
        );
    }
    let digit =
        first.iter().find(|id| model.tokenizer.decode(&[**id], true).unwrap() == "3").unwrap();
    matcher.accept(*digit).unwrap();
    let next = allowed(&mut matcher, size + 100, &ends).unwrap();
    assert!(ends.iter().all(|end| next.contains(end)));
    assert_eq!(next.iter().filter(|id| **id as usize >= size).count(), 1);
}

#[test]
fn hostile_schemas_end_in_errors_or_in_texts() {
    let model = default_model();
    let nested = |depth: usize, wrap: fn(Value) -> Value| {
        (0..depth).fold(json!({"type": "null"}), |schema, _| wrap(schema))
    };
    let names = |count: usize| Vec::from_iter((0..count).map(|i| format!("name {i}")));
    let fields =
        |count: usize| Value::from_iter(names(count).into_iter().map(|name| (name, json!({}))));
    let twice = |i: usize| {
        let next = json!({"$ref": format!("#/$defs/{}", i + 1)});
        let option = |kind: &str| json!({"anyOf": [next, {"type": kind}]});
        (i.to_string(), json!({"allOf": [option("null"), option("string")]}))
    };
    let doubled = Value::from_iter((0..40).map(twice).chain([("40".into(), json!({}))]));
    let circle = json!({"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}});
    let pattern = |pattern: &str| json!({"type": "string", "pattern": pattern});
    // What the error says; nothing if there are texts.
    let schemas = [
        (nested(120, |item| json!({"type": "array", "items": item})), ""),
        (nested(60, |option| json!({"allOf": [option, {"type": "null"}]})), ""),
        (nested(60, |option| json!({"anyOf": [option, {"type": "string"}]})), ""),
        (nested(129, |item| json!({"items": item})), "more than 128 deep"),
        (json!({"enum": names(20_000)}), ""),
        (json!({"type": "object", "properties": fields(3000)}), "max is 2000"),
        (json!({"type": "object", "properties": fields(50_000)}), "schema too large"),
        (json!({"type": "object", "required": names(2000)}), ""),
        (json!({"$ref": "#"}), "no text has this form"),
        (json!({"$defs": circle, "$ref": "#/$defs/a"}), "no text has this form"),
        (json!({"allOf": [{"$ref": "#"}, {"type": "object"}]}), "circular"),
        (json!({"$defs": doubled, "$ref": "#/$defs/0"}), "schema too large"),
        (json!({"$ref": "https://example.com/schema"}), "does not fetch"),
        (json!({"$ref": "file:///etc/passwd"}), "does not fetch"),
        (json!({"$ref": "#/$defs/no"}), "'/$defs/no' does not exist"),
        (pattern("(a|a)*(b|b)*.*(x+x+)+y{1000}$"), ""),
        (pattern("^((a{0,1000}){0,1000}){0,1000}$"), ""),
        (pattern("^(a|b)*a(a|b){400}$"), ""),
        (pattern(r"^(\p{L}{0,1000}\w{0,1000}.){0,1000}$"), "too many expressions"),
        (pattern(r"^(?=a)\1$"), "look-around"),
        (pattern("((("), "unclosed group"),
        (json!({"type": "string", "minLength": 1_000_000_000}), ""),
        (json!({"type": "array", "minItems": 1_000_000_000}), ""),
        (json!({"type": "array", "minItems": -1}), "minItems"),
        (json!({"type": "integer", "minimum": 2, "maximum": 1}), "greater than maximum"),
        (json!({"enum": []}), "anyOf is empty"),
        (json!({"type": "number or so"}), "number or so"),
        (json!({"properties": 3}), "properties must be an object"),
        (json!({"not": {"type": "string"}}), "\"not\""),
        (json!({"x-guidance": {"lenient": true}, "not": {}}), "\"not\""),
        (json!(true), "must be an object"),
    ];
    for (schema, expected) in schemas {
        let walk = |grammar: Grammar| {
            let (mut matcher, mut rng) = (grammar.matcher(), ChaCha8Rng::seed_from_u64(1));
            for _ in 0..50 {
                let allowed =
                    allowed(&mut matcher, model.pretrained.model.config().vocab_size, &[])?;
                if matcher.is_finished() || allowed.is_empty() {
                    break;
                }
                matcher.accept(allowed[rng.random_range(0..allowed.len())])?;
            }
            Ok(())
        };
        let outcome = model.grammars.json_schema(&schema).and_then(walk);
        let said = outcome.map_or_else(|error| error.to_string(), |()| String::new());
        let name: String = schema.to_string().chars().take(100).collect();
        assert!(
            said.is_empty() == expected.is_empty() && said.contains(expected),
            "{name}: {said}"
        );
    }
}
