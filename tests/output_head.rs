//! Output heads: a screened one gives the samplers what the full product gives, bit for bit; a quantized one costs
//! little.

#![allow(clippy::unwrap_used)]

use std::{ops::ControlFlow, sync::Arc};

use bitnet_model::{
    checkpoint::StoredRows,
    hub::Hub,
    kernels::head::HeadFormat,
    model::Model,
    nn::{BitLinears, Changed, HeadPrecision, LmHead, NEGLIGIBLE, Need, ScreenedHead, Vocabulary},
    pretrained::{DEFAULT, Precision, Source},
    rows::{Table, TensorRows},
    sampler::{Sampler, SamplingParams},
    score::{ScoreRequest, loglikelihood},
    session::{GenerateOptions, Session},
};
use bitnet_tests::fixture::Fixture;
use candle_core::{DType, Device, Tensor};
use proptest::prelude::*;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Enough groups of rows for a screening to leave some out.
const VOCAB: usize = 1500;
const HIDDEN: usize = 40;

/// Rows and a hidden state that are hard on a screening, one kind for each bit of `traits`.
fn adversary(seed: u64, traits: u32) -> (Vec<f32>, Vec<f32>) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let has = |bit: u32| traits >> bit & 1 == 1;
    let mut normal =
        |scale: f32| -> f32 { (0..4).map(|_| rng.random_range(-1f32..1.)).sum::<f32>() * scale };
    let mut rows: Vec<f32> = (0..VOCAB * HIDDEN).map(|_| normal(0.5)).collect();
    let mut hidden: Vec<f32> = (0..HIDDEN).map(|_| normal(1.)).collect();
    let mut rng = ChaCha8Rng::seed_from_u64(!seed);
    let mut some = || rng.random_range(0..VOCAB);
    if has(0) {
        // Outliers, which make the steps of their rows coarse.
        for _ in 0..200 {
            rows[some() * HIDDEN + 7] = 1e3;
        }
        hidden[3] = 100.;
    }
    if has(1) {
        // Near ties: copies of a good row that differ in one last bit.
        let good: Vec<f32> = hidden.iter().map(|h| (h * 0.3).clamp(-1., 1.)).collect();
        for i in 0..20 {
            let row = &mut rows[some() * HIDDEN..][..HIDDEN];
            row.copy_from_slice(&good);
            row[i] = f32::from_bits(row[i].to_bits() ^ 1);
        }
    }
    if has(2) {
        for _ in 0..20 {
            let (from, to) = (some() * HIDDEN, some() * HIDDEN);
            rows.copy_within(from..from + HIDDEN, to); // exact ties
        }
    }
    if has(3) {
        for _ in 0..20 {
            rows[some() * HIDDEN..][..HIDDEN].fill(0.);
        }
    }
    if has(4) {
        rows.iter_mut().for_each(|w| *w *= 1e-25);
        hidden.iter_mut().for_each(|h| *h *= 1e-15); // products underflow
    }
    if has(5) {
        let bad = [f32::NAN, f32::INFINITY, 3e38][seed as usize % 3];
        rows[some() * HIDDEN + 1] = bad;
    }
    if has(6) {
        hidden[5] = [f32::NAN, f32::NEG_INFINITY, 1e38, 0.][seed as usize % 4];
    }
    if has(7) {
        hidden.fill(0.);
    }
    (rows, hidden)
}

fn table(rows: &Tensor) -> Table {
    Table::new(Arc::new(TensorRows::new(rows).unwrap()))
}

struct Heads {
    full: Arc<dyn LmHead>,
    screened: ScreenedHead,
    hidden: Tensor,
}

impl Heads {
    fn new(rows: Vec<f32>, hidden: Vec<f32>, dtype: DType) -> Self {
        let device = &Device::Cpu;
        let rows =
            Tensor::from_vec(rows, (VOCAB, HIDDEN), device).unwrap().to_dtype(dtype).unwrap();
        Self {
            full: Vocabulary::from_tensors(rows.clone(), rows.clone()).lm_head,
            screened: ScreenedHead::new(table(&rows)).unwrap(),
            hidden: Tensor::from_vec(hidden, (1, HIDDEN), device).unwrap(),
        }
    }

    /// All logits, and those that the screened head has for `need` with the number of rescored rows.
    fn logits(&self, need: Need) -> (Vec<f32>, Vec<f32>, Option<usize>) {
        let all = self.full.logits(&self.hidden, &[Need::All]).unwrap().pop().unwrap();
        let some = self.screened.logits(&self.hidden, &[need]).unwrap().pop().unwrap();
        let all_again = self.screened.forward(&self.hidden).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(bits(&all_again[0]), bits(&all.values));
        // Whatever is there is exact.
        for (all, some) in all.values.iter().zip(&some.values) {
            assert!(all.to_bits() == some.to_bits() || *some == f32::NEG_INFINITY, "{all} {some}");
        }
        (all.values, some.values, some.rescored)
    }
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// A sampler with some of its parameters on; `traits` says which.
fn sampler(seed: u64, traits: u32) -> (Sampler, Vec<u32>, Vec<u32>) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut ids =
        |n: usize| -> Vec<u32> { (0..n).map(|_| rng.random_range(0..VOCAB as u32)).collect() };
    let (prompt, generated, biased) = (ids(50), ids(30), ids(5));
    let has = |bit: u32| traits >> bit & 1 == 1;
    let pick = |bit: u32, on: f32, off: f32| if has(bit) { on } else { off };
    let params = SamplingParams {
        temperature: pick(0, 0.7, 0.),
        top_k: Some([1, 2, 10, 24][seed as usize % 4]),
        top_p: pick(1, 0.9, 1.),
        min_p: pick(2, 0.05, 0.),
        repetition_penalty: if has(3) { [1.3, 0.8][seed as usize % 2] } else { 1. },
        frequency_penalty: if has(4) { [0.5, -0.5][seed as usize / 2 % 2] } else { 0. },
        presence_penalty: if has(5) { [0.5, -0.7][seed as usize / 4 % 2] } else { 0. },
        logit_bias: match has(6) {
            true => biased.into_iter().zip([-5., 5., f32::NEG_INFINITY, 0.1, -0.1]).collect(),
            false => Vec::new(),
        },
    };
    (Sampler::new(params).unwrap(), prompt, generated)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn screened_logits_sample_as_all_logits_do(
        seed in any::<u64>(),
        traits in 0u32..256,
        sampling in 0u32..128,
        bf16 in any::<bool>(),
    ) {
        let (rows, hidden) = adversary(seed, traits);
        let heads = Heads::new(rows, hidden, if bf16 { DType::BF16 } else { DType::F32 });
        let (sampler, prompt, generated) = sampler(seed, sampling);
        let (all, some, _) = heads.logits(sampler.need(&prompt, &generated));
        let distribution = |logits: &[f32]| {
            // Which of several bad logits an error names is no matter.
            sampler.distribution(logits, &prompt, &generated).map_err(|_| ())
        };
        prop_assert_eq!(distribution(&all), distribution(&some));
    }

    #[test]
    fn what_a_mass_leaves_out_is_negligible(
        seed in any::<u64>(),
        traits in 0u32..32,
        temperature in 0.05f32..3.,
        scale in 0.1f32..30.,
    ) {
        let (mut rows, hidden) = adversary(seed, traits);
        rows.iter_mut().for_each(|w| *w *= scale);
        let heads = Heads::new(rows, hidden, DType::F32);
        let changed = Changed { freely: vec![3, 3, 70_000], downwards: vec![5, 1400] };
        let need = Need::Mass { temperature, changed: changed.clone() };
        let (all, some, _) = heads.logits(need);
        prop_assert!(some[3].is_finite());
        let plain = |id: &usize| *id != 3 && *id != 5 && *id != 1400;
        // Of the plain ones: beside a changed token all of them may have no weight that an f64 can hold.
        let best = (0..VOCAB).filter(plain).map(|id| all[id]).fold(f32::NEG_INFINITY, f32::max);
        let weight = |id: usize| (f64::from(all[id] - best) / f64::from(temperature)).exp();
        let total: f64 = (0..VOCAB).filter(plain).map(weight).sum();
        let left_out = |id: &usize| some[*id] == f32::NEG_INFINITY;
        let missing: f64 = (0..VOCAB).filter(left_out).map(weight).sum();
        prop_assert!(missing < NEGLIGIBLE * total, "{} of {}", missing, total);
    }
}

#[test]
fn a_screening_leaves_few_rows() {
    let (rows, hidden) = adversary(1, 0);
    let heads = Heads::new(rows, hidden, DType::BF16);
    let plain = Changed::default();
    let (all, some, rescored) = heads.logits(Need::Top { k: 1, changed: plain.clone() });
    let rescored = rescored.unwrap();
    assert!((1..20).contains(&rescored), "{rescored} rows of {VOCAB}");
    assert_eq!(some.iter().filter(|logit| logit.is_finite()).count(), rescored);
    let best = all.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    assert!(some.contains(&best));
    // Tokens that may only fall are read if they are good, others always.
    let worst = (0..VOCAB).min_by(|a, b| all[*a].total_cmp(&all[*b])).unwrap();
    for (freely, downwards) in [(vec![], vec![worst as u32]), (vec![worst as u32], vec![])] {
        let is_free = !freely.is_empty();
        let changed = Changed { freely, downwards };
        let (_, some, _) = heads.logits(Need::Top { k: 1, changed });
        assert_eq!(some[worst].is_finite(), is_free);
    }
    // The best one may fall: then the second best is needed.
    let first = (0..VOCAB).max_by(|a, b| all[*a].total_cmp(&all[*b])).unwrap();
    let changed = Changed { freely: Vec::new(), downwards: vec![first as u32] };
    let (_, some, _) = heads.logits(Need::Top { k: 1, changed });
    let mut sorted = all.clone();
    sorted.sort_by(|a, b| b.total_cmp(a));
    assert!(some.contains(&sorted[0]) && some.contains(&sorted[1]));
    // Nothing to screen by: k beyond the vocabulary, all logits asked for.
    assert!(heads.logits(Need::Top { k: 5000, changed: plain.clone() }).1 == all);
    assert!(heads.logits(Need::All).1 == all);
    // A peaked distribution has little mass outside of a few.
    let need = Need::Mass { temperature: 0.05, changed: plain };
    assert!(heads.logits(need).2.unwrap() < VOCAB / 8);
}

#[test]
fn rows_of_a_batch_have_their_own_needs() {
    let (rows, _) = adversary(5, 0);
    let device = &Device::Cpu;
    let rows = Tensor::from_vec(rows, (VOCAB, HIDDEN), device).unwrap();
    let head = ScreenedHead::new(table(&rows)).unwrap();
    let hidden = Tensor::randn(0f32, 1., (11, HIDDEN), device).unwrap();
    let top = |k| Need::Top { k, changed: Changed::default() };
    let needs: Vec<Need> = (0..11).map(|i| if i == 4 { Need::All } else { top(i + 1) }).collect();
    let together = head.logits(&hidden, &needs).unwrap();
    for (i, logits) in together.iter().enumerate() {
        let alone = hidden.narrow(0, i, 1).unwrap();
        let alone = head.logits(&alone, &needs[i..=i]).unwrap();
        assert!(&alone[0] == logits, "row {i}");
    }
    assert!(head.logits(&hidden, &needs[1..]).is_err(), "a need a row");
    assert!(head.forward(&rows.narrow(1, 0, 8).unwrap()).is_err(), "another hidden size");
    let tracked = candle_core::Var::from_tensor(&hidden).unwrap();
    let error = head.forward(tracked.as_tensor()).unwrap_err().to_string();
    assert!(error.contains("records no gradients"), "{error}");
}

/// The fixture's model with rows read from its files.
fn with_stored_rows(fixture: &Fixture, precision: HeadPrecision) -> Model {
    let rows = |name| Table::new(Arc::new(StoredRows::new(&fixture.checkpoint, name).unwrap()));
    let embed_tokens = rows("model.embed_tokens.weight");
    let lm_head = match fixture.config.tie_word_embeddings {
        true => embed_tokens.clone(),
        false => rows("lm_head.weight"),
    };
    let vocabulary = Vocabulary::from_rows(embed_tokens, lm_head, precision).unwrap();
    let linears = BitLinears::new(fixture.config.quantization.unwrap());
    let vb = fixture.checkpoint.var_builder(DType::F32, &Device::Cpu);
    Model::with_vocabulary(&fixture.config, &linears, vocabulary, vb).unwrap()
}

#[test]
fn stored_rows_make_the_same_model() {
    for name in ["bitnet_packed_tied", "bitnet_packed_untied", "llama_packed_tied_sharded"] {
        let fixture = Fixture::open(name);
        let (plain, stored) = (fixture.model(), with_stored_rows(&fixture, HeadPrecision::Exact));
        let tokens = Tensor::new(&[[1u32, 7, 3, 9, 9, 2]], &Device::Cpu).unwrap();
        let logits = |model: &Model| -> Vec<f32> {
            let hidden = model.hidden_states(&tokens, None).unwrap();
            model.logits(&hidden).unwrap().flatten_all().unwrap().to_vec1().unwrap()
        };
        assert_eq!(bits(&logits(&plain)), bits(&logits(&stored)), "{name}");
        let options = |params| GenerateOptions {
            sampler: Sampler::new(params).unwrap(),
            max_new_tokens: 30,
            eos_token_ids: Vec::new(),
            interrupt: Default::default(),
        };
        let top_k =
            SamplingParams { top_k: Some(5), repetition_penalty: 1.2, ..Default::default() };
        let (plain, stored) = (Arc::new(plain), Arc::new(stored));
        for params in [SamplingParams::greedy(), top_k] {
            let options = options(params);
            let run = |model: &Arc<Model>, speculates: bool| {
                let mut rng = ChaCha8Rng::seed_from_u64(7);
                let session = Session::new(model.clone());
                let mut session = if speculates { session.speculating() } else { session };
                let go_on = |_| ControlFlow::Continue(());
                session.generate(&[1, 7, 3], &options, &mut rng, go_on).unwrap()
            };
            let expected = run(&plain, false);
            assert_eq!(expected.rescored_rows, None);
            for speculates in [false, true] {
                let got = run(&stored, speculates);
                assert_eq!(got.tokens, expected.tokens, "{name}");
                assert!(got.rescored_rows.is_some_and(|rows| rows >= 1.));
            }
        }
        let outside = Tensor::new(&[[60_000u32]], &Device::Cpu).unwrap();
        assert!(stored.embed(&outside).is_err());
    }
}

#[test]
fn fewer_bits_cost_little() {
    let nats = |precision: HeadPrecision| {
        let mut source = Source::open(DEFAULT, Precision::AsConfigured, &Hub::from_env()).unwrap();
        source.lm_head = precision;
        let tokenizer = source.tokenizer().unwrap().unwrap();
        let model = source.load(&Device::Cpu).unwrap();
        let text = "Once upon a time there was a little girl named Lily. She loved to play outside in \
                    the park with her mom. One day, she saw a big dog. The dog was very friendly and \
                    wanted to play with her. Lily was happy and they ran around together.";
        let mut ids = tokenizer.encode(text, true).unwrap();
        let continuation = ids.split_off(1);
        let count = continuation.len() as f64;
        let request = ScoreRequest { context: ids, continuation };
        -loglikelihood(&model, &[request], 1).unwrap()[0].sum() / count
    };
    let exact = nats(HeadPrecision::Exact);
    for (format, cost) in [(HeadFormat::Q8, 0.002), (HeadFormat::Q6, 0.02), (HeadFormat::Q4, 0.15)]
    {
        let quantized = nats(HeadPrecision::Quantized(format));
        println!("{format:?}: {:+.5} nats a token beside {exact:.5}", quantized - exact);
        assert_ne!(quantized, exact);
        assert!((quantized - exact).abs() < cost, "{format:?}: {quantized}, exact {exact}");
    }
}
