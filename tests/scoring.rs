//! Given texts: how likely they are, and what it takes to write them.

#![allow(clippy::unwrap_used)]

use std::{ops::ControlFlow, sync::Arc};

use bitnet_model::{
    choices::choice_loglikelihoods,
    ops::KvType,
    perplexity::{Cut, Run, Window, perplexity},
    score::{ScoreRequest, loglikelihood},
    session::{Finish, Session},
};
use bitnet_tests::fixture::Fixture;
use candle_core::Tensor;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Random token ids of the fixture's vocabulary.
fn ids(seed: u64, len: usize) -> Vec<u32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(0..512)).collect()
}

/// The given text is what becomes of it, drafted or not, and the session holds what decoding it leaves.
#[test]
fn a_replay_writes_the_given_text() {
    let model = Arc::new(Fixture::open("bitnet_packed_tied").model());
    let prompt = ids(3, 12);
    for text in [[&prompt[2..9], &prompt[4..10]].concat(), ids(4, 13), vec![]] {
        let mut plain = Session::new(model.clone());
        let mut speculating = Session::new(model.clone()).speculating();
        let without = plain.replay(&prompt, &text).unwrap();
        let with = speculating.replay(&prompt, &text).unwrap();
        assert_eq!((&without.tokens, &with.tokens), (&text, &text));
        assert_eq!(plain.tokens(), speculating.tokens());
        assert_eq!((without.drafted.tokens, with.finish), (0, Finish::Length));
        let repeats = text.starts_with(&prompt[2..9]);
        assert_eq!(with.drafted.accepted > 3, repeats, "{:?}", with.drafted);
        assert_eq!(plain.append(&[5]).unwrap(), speculating.append(&[5]).unwrap());
    }
}

fn go_on(_: &Window, _: f64) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

#[test]
fn perplexity_is_that_of_the_scores() {
    let model = Fixture::open("bitnet_packed_tied").model();
    let tokens = ids(8, 50);
    let run = Run { kv_type: KvType::F32, begin: None };
    for (window, stride) in [(64, 3), (50, 49), (16, 8), (7, 6), (2, 1)] {
        let (w, s) = (window.try_into().unwrap(), stride.try_into().unwrap());
        let windows = Cut::Sliding { window: w, stride: s }.windows(50).unwrap();
        let found = perplexity(&model, &tokens, &windows, run, go_on).unwrap();
        // Token i is in the first window that reaches it.
        let start = |i: usize| (i + 1usize).saturating_sub(window).div_ceil(stride) * stride;
        let requests = (1..50).map(|i| ScoreRequest {
            context: tokens[start(i)..i].to_vec(),
            continuation: vec![tokens[i]],
        });
        let scores = loglikelihood(&model, &requests.collect::<Vec<_>>(), 8).unwrap();
        let nll: f64 = -scores.iter().map(|score| score.sum()).sum::<f64>();
        assert_eq!(found.tokens, 49);
        assert!((found.nll - nll).abs() < 1e-9, "{window} {stride}: {} {nll}", found.nll);
        let half = Run { kv_type: KvType::F16, ..run };
        let half = perplexity(&model, &tokens, &windows, half, go_on).unwrap();
        // Keys and values of f16 are off by 2⁻¹¹ of themselves.
        assert!((half.value() / found.value() - 1.).abs() < 0.01 && half != found);
    }
    let windows = |window: usize, tokens| {
        let stride = 1.try_into().unwrap();
        Cut::Sliding { window: window.try_into().unwrap(), stride }.windows(tokens).unwrap()
    };
    let long = ids(8, 300);
    for (tokens, windows) in [(&long[..], windows(257, 300)), (&[1, 512], windows(8, 2))] {
        assert!(perplexity(&model, tokens, &windows, run, go_on).is_err(), "{windows:?}");
    }
}

/// Straight from the logits of all positions: of windows of 8 tokens that begin with token 3, the last three are scored.
#[test]
fn second_halves_are_those_of_the_logits() {
    let model = Fixture::open("bitnet_packed_tied").model();
    let tokens = ids(9, 30);
    let windows = Cut::SecondHalves { window: 8.try_into().unwrap() }.windows(30).unwrap();
    for begin in [None, Some(3)] {
        let run = Run { kv_type: KvType::F32, begin };
        let found = perplexity(&model, &tokens, &windows, run, go_on).unwrap();
        let mut nll = 0.;
        for chunk in tokens.chunks_exact(8) {
            let mut input = chunk.to_vec();
            input[0] = begin.unwrap_or(input[0]);
            let input = Tensor::new(input, model.device()).unwrap().unsqueeze(0).unwrap();
            let hidden = model.hidden_states(&input, None).unwrap();
            let logits = model.logits(&hidden.squeeze(0).unwrap()).unwrap();
            let logits = logits.to_vec2::<f32>().unwrap();
            for (logits, &next) in logits.iter().zip(&chunk[1..]).skip(4) {
                let sum: f64 = logits.iter().map(|&logit| f64::from(logit).exp()).sum();
                nll += sum.ln() - f64::from(logits[next as usize]);
            }
        }
        assert_eq!(found.tokens, 9);
        // ln p is kept in f32: 9 · 8 · 2⁻²⁴.
        assert!((found.nll - nll).abs() < 1e-5, "{begin:?}: {} {nll}", found.nll);
    }
}

/// Whether a question's answers begin alike, how long they are and what else is asked changes no bit.
#[test]
fn choices_score_as_they_do_alone() {
    let model = Fixture::open("bitnet_packed_tied").model();
    let max_len = model.config().max_position_embeddings;
    let request = |context: &[u32], continuation: &[u32]| ScoreRequest {
        context: context.to_vec(),
        continuation: continuation.to_vec(),
    };
    let question = ids(20, 17);
    let long = ids(21, max_len);
    let questions = vec![
        // One token each: the question alone is run.
        [3, 9, 400].map(|id| request(&question, &[id])).to_vec(),
        // Answers of several lengths, of which one is the beginning of another.
        vec![
            request(&question, &ids(22, 5)),
            request(&question, &ids(22, 3)),
            request(&question, &ids(23, 1)),
        ],
        // Different contexts, the same ending.
        vec![
            request(&ids(24, 6), &ids(25, 4)),
            request(&[&ids(24, 6)[..], &[7]].concat(), &ids(25, 4)),
        ],
        // Nothing in common, and what does not fit is cut on the left.
        vec![request(&[1], &ids(26, 2)), request(&long, &ids(27, 9))],
        vec![request(&[5], &[6])],
        vec![],
    ];
    let found = choice_loglikelihoods(&model, &questions, KvType::F32).unwrap();
    for (requests, found) in questions.iter().zip(&found) {
        assert_eq!(&loglikelihood(&model, requests, 4).unwrap(), found);
    }
    let greedy = found.iter().flatten().filter(|score| score.is_greedy).count();
    assert!(greedy < 12);
    let error = choice_loglikelihoods(&model, &[vec![request(&[1], &[])]], KvType::F32);
    assert!(error.unwrap_err().to_string().contains("at least one token"));
}
