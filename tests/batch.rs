//! Continuous batching: whatever joins and leaves, each sequence is what a session makes of it alone.

#![allow(clippy::unwrap_used)] // test code

use std::{
    collections::{BTreeMap, VecDeque},
    ops::ControlFlow,
    sync::Arc,
};

use bitnet_model::{
    adapter::{Adaptation, Adapter, AdapterConfig, Modules, Pair},
    batch::{Batch, Limits, Sequence, SequenceId, Update},
    kv_cache::KvCache,
    model::{Model, Next},
    ops::KvType,
    pretrained::Pretrained,
    sampler::{Sampler, SamplingParams},
    score::{ScoreRequest, loglikelihood},
    session::{Finish, GenerateOptions, Session},
};
use candle_core::{Device, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const LIMITS: Limits = Limits {
    sequences: 5,
    kv_bytes: 64 << 20,
    prompt_tokens: 16,
    prompt_tokens_beside: 7,
    kv_type: KvType::F16,
};

fn model() -> Arc<Model> {
    Pretrained::open("default").unwrap().model
}

fn greedy() -> Sampler {
    Sampler::new(SamplingParams::greedy()).unwrap()
}

fn sequence(prompt: &[u32], max_new_tokens: usize) -> Sequence {
    Sequence {
        prompt: prompt.to_vec(),
        sampler: greedy(),
        seed: 0,
        max_new_tokens,
        eos_token_ids: Vec::new(),
        grammar: None,
        adapter: None,
        logprobs: None,
        prompt_logprobs: false,
        pooled: false,
    }
}

fn ids(rng: &mut ChaCha8Rng, count: usize) -> Vec<u32> {
    (0..count).map(|_| rng.random_range(3..2000)).collect()
}

fn adaptation(model: &Model, frequency: f32) -> Arc<Adaptation> {
    let settings = AdapterConfig {
        rank: 2,
        alpha: 4.,
        target_modules: Modules::Names(["v_proj", "down_proj"].map(String::from).into()),
        ..AdapterConfig::default()
    };
    let matrix = |rows: usize, cols: usize| {
        let values = (0..rows * cols).map(|i| 0.2 * (i as f32 * frequency).sin());
        Tensor::from_vec(Vec::from_iter(values), (rows, cols), &Device::Cpu).unwrap()
    };
    let pairs = model.config().projections().filter_map(|(name, (rows, cols))| {
        let path = name.strip_suffix(".weight")?;
        let pair = Pair { lora_a: matrix(2, cols), lora_b: matrix(rows, 2) };
        (path.ends_with("v_proj") || path.ends_with("down_proj")).then(|| (path.to_owned(), pair))
    });
    let adapter = Adapter::new(settings, pairs.collect(), BTreeMap::new());
    Arc::new(Adaptation::new(model.config(), &[(&adapter, 1.)]).unwrap())
}

/// What a session makes of a sequence.
fn alone(model: &Arc<Model>, sequence: &Sequence) -> (Vec<u32>, Finish) {
    let model = match &sequence.adapter {
        Some(adapter) => Arc::new(model.adapted(adapter).unwrap()),
        None => model.clone(),
    };
    let options = GenerateOptions {
        sampler: sequence.sampler.clone(),
        max_new_tokens: sequence.max_new_tokens,
        eos_token_ids: sequence.eos_token_ids.clone(),
        interrupt: Arc::default(),
    };
    let mut rng = ChaCha8Rng::seed_from_u64(sequence.seed);
    let go_on = |_| ControlFlow::Continue(());
    let mut session = Session::new(model);
    let generation = session.generate(&sequence.prompt, &options, &mut rng, go_on).unwrap();
    (generation.tokens, generation.finish)
}

/// Runs all sequences, each admitted as soon as there is room; what they came to, in their order.
fn together(batch: &mut Batch, sequences: &[Sequence]) -> Vec<(Vec<u32>, Finish)> {
    let mut waiting: VecDeque<usize> = (0..sequences.len()).collect();
    let mut places: BTreeMap<SequenceId, usize> = BTreeMap::new();
    let mut results = vec![(Vec::new(), None); sequences.len()];
    while !waiting.is_empty() || !batch.is_empty() {
        while let Some(&place) = waiting.front() {
            let Some((id, _)) = batch.admit(sequences[place].clone()).unwrap() else { break };
            places.insert(id, place);
            waiting.pop_front();
        }
        for (id, update) in batch.step().unwrap() {
            let (tokens, finish) = &mut results[places[&id]];
            match update {
                Update::Token(token, _) => tokens.push(token),
                Update::End(end) => *finish = Some(end),
                Update::Prompt(..) | Update::Pooled(_) => {}
                Update::Failed(reason) => panic!("{reason}"),
            }
        }
    }
    results.into_iter().map(|(tokens, finish)| (tokens, finish.unwrap())).collect()
}

#[test]
fn each_sequence_is_what_it_is_alone() {
    let model = model();
    let rng = &mut ChaCha8Rng::seed_from_u64(7);
    let adapters = [None, Some(adaptation(&model, 0.7)), Some(adaptation(&model, 1.3))];
    let beginnings = [ids(rng, 40), ids(rng, 9)];
    let sampled = SamplingParams { temperature: 0.9, top_p: 0.9, ..SamplingParams::default() };
    let penalized = SamplingParams { repetition_penalty: 1.3, ..SamplingParams::greedy() };
    let samplers =
        [SamplingParams::greedy(), sampled, penalized].map(|params| Sampler::new(params).unwrap());
    let sequences = Vec::from_iter((0..24).map(|index| {
        let beginning = &beginnings[index % 2];
        let shared = rng.random_range(0..=beginning.len());
        let more = rng.random_range(1..30);
        Sequence {
            sampler: samplers[rng.random_range(0..3)].clone(),
            seed: index as u64,
            eos_token_ids: vec![1, 2, 16],
            adapter: adapters[rng.random_range(0..3)].clone(),
            ..sequence(&[&beginning[..shared], &ids(rng, more)].concat(), rng.random_range(0..24))
        }
    }));
    let expected = Vec::from_iter(sequences.iter().map(|sequence| alone(&model, sequence)));
    for (prompt_tokens, sequences_at_once) in [(1, 3), (7, 24), (512, 5)] {
        let limits = Limits { prompt_tokens, sequences: sequences_at_once, ..LIMITS };
        let mut batch = Batch::new(model.clone(), limits);
        assert!(together(&mut batch, &sequences) == expected, "{prompt_tokens} tokens a step");
        // Once more, when beginnings are found: the same.
        assert!(together(&mut batch, &sequences) == expected, "{prompt_tokens} tokens, again");
        let usage = batch.usage();
        assert_eq!((usage.running, usage.running_bytes, usage.joined), (0, 0, 48));
        assert!(usage.prefix_hits >= 24 && usage.kept_bytes <= limits.kv_bytes, "{usage:?}");
        let prompts: usize = sequences.iter().map(|sequence| sequence.prompt.len()).sum();
        assert_eq!(usage.prompt_tokens + usage.prefix_tokens, 2 * prompts as u64);
    }
}

#[test]
fn logprobs_are_those_of_scoring() {
    let model = model();
    let rng = &mut ChaCha8Rng::seed_from_u64(3);
    let prompt = ids(rng, 50);
    // Keys and values as they are computed, as scoring has them.
    let mut batch = Batch::new(model.clone(), Limits { kv_type: KvType::F32, ..LIMITS });
    let asked = Sequence { logprobs: Some(3), prompt_logprobs: true, ..sequence(&prompt, 6) };
    batch.admit(sequence(&ids(rng, 20), 30)).unwrap().unwrap();
    let (id, _) = batch.admit(asked).unwrap().unwrap();
    let (mut text, mut logprobs) = (prompt.clone(), Vec::new());
    while !batch.is_empty() {
        for (of, update) in batch.step().unwrap() {
            match update {
                Update::Prompt(position, found) if of == id => {
                    logprobs.push(found);
                    assert_eq!(position, logprobs.len());
                }
                Update::Token(token, Some(found)) if of == id => {
                    assert_eq!(found.top[0], (token, found.logprob), "greedy takes the likeliest");
                    assert!(found.top.is_sorted_by(|a, b| a.1 >= b.1));
                    logprobs.push(found);
                    text.push(token);
                }
                _ => {}
            }
        }
    }
    assert_eq!(text.len(), 56);
    let request = ScoreRequest { context: text[..1].to_vec(), continuation: text[1..].to_vec() };
    let scored = loglikelihood(&model, &[request], 1).unwrap().remove(0);
    let found = Vec::from_iter(logprobs.iter().map(|logprobs| logprobs.logprob));
    assert!(found == scored.token_logprobs);
}

#[test]
fn memory_is_set_aside_and_given_back() {
    let model = model();
    let config = model.config();
    let rng = &mut ChaCha8Rng::seed_from_u64(5);
    // A cache begins with 256 slots; these three sequences have room for 2 · 256 + 300.
    let room = |tokens| KvCache::reserved_bytes(config, KvType::F16, tokens);
    let limits = Limits { kv_bytes: room(256) * 2 + room(300), ..LIMITS };
    let mut batch = Batch::new(model.clone(), limits);
    assert_eq!(batch.bytes_for(&sequence(&[5], usize::MAX)), room(512), "a whole context");
    let (first, _) = batch.admit(sequence(&ids(rng, 100), 101)).unwrap().unwrap();
    batch.admit(sequence(&ids(rng, 250), 51)).unwrap().unwrap();
    batch.admit(sequence(&ids(rng, 5), 2)).unwrap().unwrap();
    assert_eq!(batch.usage().running_bytes, limits.kv_bytes);
    assert_eq!(batch.admit(sequence(&[5], 2)).unwrap(), None, "there is no room");
    batch.step().unwrap();
    batch.cancel(first);
    assert!(batch.usage().kept_bytes > 0);
    batch.admit(sequence(&[5], 2)).unwrap().unwrap();
    let usage = batch.usage();
    assert_eq!((usage.running, usage.kept_bytes), (3, 0), "what was kept makes room");
    while !batch.is_empty() {
        batch.step().unwrap();
    }
    let usage = batch.usage();
    assert_eq!((usage.running, usage.running_bytes), (0, 0));

    let refused = |sequence| batch_error(&mut Batch::new(model.clone(), limits), sequence);
    assert!(refused(sequence(&[], 1)).contains("no tokens"));
    assert!(refused(sequence(&[5000], 1)).contains("token id 5000"));
    assert!(refused(sequence(&vec![5; 513], 1)).contains("513 tokens"));
    let small = Limits { kv_bytes: 1000, ..LIMITS };
    let refused = batch_error(&mut Batch::new(model.clone(), small), sequence(&[5], 1));
    assert!(refused.contains("more than the 1000"), "{refused}");
}

fn batch_error(batch: &mut Batch, sequence: Sequence) -> String {
    batch.admit(sequence).unwrap_err().to_string()
}

#[test]
fn a_long_prompt_does_not_hold_up_the_others() {
    let rng = &mut ChaCha8Rng::seed_from_u64(9);
    let mut batch =
        Batch::new(model(), Limits { prompt_tokens: 8, prompt_tokens_beside: 8, ..LIMITS });
    let (talking, _) = batch.admit(sequence(&ids(rng, 4), 40)).unwrap().unwrap();
    batch.step().unwrap();
    batch.admit(sequence(&ids(rng, 200), 2)).unwrap().unwrap();
    let (short, _) = batch.admit(sequence(&ids(rng, 12), 2)).unwrap().unwrap();
    let steps = Vec::from_iter((0..3).map(|_| batch.step().unwrap()));
    let tokens = |of| {
        let is_it =
            |(id, update): &&(SequenceId, Update)| *id == of && matches!(update, Update::Token(..));
        steps.iter().map(|updates| updates.iter().filter(is_it).count()).collect::<Vec<_>>()
    };
    assert_eq!(tokens(talking), [1, 1, 1]);
    assert_eq!(tokens(short), [0, 0, 1], "half of the tokens of each step are its");
}

#[test]
fn a_mean_of_hidden_states_is_that_of_the_prompt_alone() {
    let (rng, model) = (&mut ChaCha8Rng::seed_from_u64(3), model());
    let mut batch = Batch::new(model.clone(), LIMITS);
    let prompt = ids(rng, 45);
    batch.admit(sequence(&prompt, 9)).unwrap().unwrap();
    while batch.step().unwrap().is_empty() {}
    let pooled = Sequence { pooled: true, ..sequence(&prompt, 0) };
    let (id, reused) = batch.admit(pooled).unwrap().unwrap();
    assert_eq!(reused, 0);
    let mean = loop {
        let updates = batch.step().unwrap();
        let its = Vec::from_iter(updates.into_iter().filter(|(of, _)| *of == id));
        if let [(_, Update::Pooled(mean)), (_, Update::End(Finish::Length))] = &its[..] {
            break mean.clone();
        }
        assert_eq!(its, []);
    };
    let mut cache = model.cache(KvType::F16, 1);
    let next = Next { tokens: &prompt, cache: &mut cache };
    let hidden = model.next_states(&mut [next]).unwrap().to_vec2::<f32>().unwrap();
    let sum = |column: usize| hidden.iter().map(|state| f64::from(state[column])).sum::<f64>();
    let expected = (0..mean.len()).map(|column| (sum(column) / prompt.len() as f64) as f32);
    assert!(mean.iter().copied().eq(expected), "the mean differs");
}
