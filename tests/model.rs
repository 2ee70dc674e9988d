//! The model as a whole: other people's Llama as its oracle, bits that do not depend on company, scores,
//! sessions, and gradients that reach every variable.

#![allow(clippy::unwrap_used)]

use std::{collections::HashMap, ops::ControlFlow, sync::Arc};

use bitnet_model::{
    config::{Activation, Config, Family, Quantization, ScaleConvention, WeightForm},
    kernels::TileFormat,
    model::Model,
    nn::{BitLinear, BitLinears, Context, DenseLinears, LinearFactory},
    ops::{KvType, gemm::Precision},
    quant::{self, Rounding},
    sampler::{Sampler, SamplingParams},
    score::{ScoreRequest, loglikelihood},
    session::{Finish, GenerateOptions, Session},
    weights::TernaryWeight,
};
use bitnet_tests::fixture::{Fixture, flat, max_diff};
use bitnet_train::{
    loss::cross_entropy,
    parameters::Parameters,
    qat::{QatLinear, QatLinears},
};
use candle_core::{DType, Device, IndexOp, Module, Tensor, Var};
use candle_nn::VarBuilder;
use proptest::prelude::*;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

fn config(family: Family, quantization: Option<Quantization>) -> Config {
    Config {
        family,
        vocab_size: 96,
        hidden_size: 64,
        intermediate_size: 112,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 16,
        hidden_act: if family == Family::Llama { Activation::Silu } else { Activation::Relu2 },
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.,
        max_position_embeddings: 64,
        tie_word_embeddings: false,
        attention_bias: false,
        bos_token_id: Some(1),
        eos_token_ids: vec![2],
        quantization,
    }
}

const LATENT: Quantization = Quantization {
    weights: WeightForm::Latent,
    rounding: Rounding::HalfEven,
    scheme: quant::Scheme::B158,
    input_norm_eps: None,
};

/// A small BitNet with random weights, and its variables.
fn small(seed: u64) -> (Arc<Parameters>, Model) {
    let parameters = Parameters::new(seed);
    let config = config(Family::BitNet, Some(LATENT));
    let linears = QatLinears::new(Rounding::HalfEven);
    let model = Model::load(&config, &linears, parameters.frozen_builder()).unwrap();
    (parameters, model)
}

fn ids(seed: u64, count: usize) -> Vec<u32> {
    use rand::Rng;
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..count).map(|_| rng.random_range(3..96)).collect()
}

fn tensor(rows: &[&[u32]]) -> Tensor {
    let data: Vec<u32> = rows.concat();
    Tensor::from_vec(data, (rows.len(), rows[0].len()), &Device::Cpu).unwrap()
}

#[test]
fn a_plain_llama_equals_candle_transformers() {
    use candle_transformers::models::llama;
    let parameters = Parameters::new(3);
    let config = config(Family::Llama, None);
    let model = Model::load(&config, &DenseLinears, parameters.frozen_builder()).unwrap();
    let tensors: HashMap<String, Tensor> = parameters
        .named()
        .into_iter()
        .map(|(name, var)| (name, var.as_detached_tensor()))
        .collect();
    let theirs = llama::Config {
        hidden_size: config.hidden_size,
        intermediate_size: config.intermediate_size,
        vocab_size: config.vocab_size,
        num_hidden_layers: config.num_hidden_layers,
        num_attention_heads: config.num_attention_heads,
        num_key_value_heads: config.num_key_value_heads,
        use_flash_attn: false,
        rms_norm_eps: config.rms_norm_eps,
        rope_theta: config.rope_theta as f32,
        bos_token_id: None,
        eos_token_id: None,
        rope_scaling: None,
        max_position_embeddings: config.max_position_embeddings,
        tie_word_embeddings: false,
    };
    let vb = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
    let oracle = llama::Llama::load(vb, &theirs).unwrap();
    let tokens = ids(5, 40);
    let mut cache = model.cache(KvType::F32, 1);
    for (from, to) in [(0, 17), (17, 18), (18, 40)] {
        let input = tensor(&[&tokens[from..to]]);
        let ours = flat(&model.forward(&input, &mut cache).unwrap());
        let mut theirs_cache = llama::Cache::new(false, DType::F32, &theirs, &Device::Cpu).unwrap();
        let whole = tensor(&[&tokens[..to]]);
        let want = flat(&oracle.forward(&whole, 0, &mut theirs_cache).unwrap());
        let scale = want.iter().fold(0f32, |m, x| m.max(x.abs()));
        assert!(max_diff(&ours, &want) < 2e-6 * scale.max(1.), "{}", max_diff(&ours, &want));
    }
}

/// Logits of every position, computed in the given cuts.
fn logits_in_cuts(model: &Model, kv_type: KvType, tokens: &[u32], cuts: &[usize]) -> Vec<f32> {
    let mut cache = model.cache(kv_type, 1);
    let mut logits = Vec::new();
    let mut from = 0;
    for to in cuts.iter().copied().chain([tokens.len()]).filter(|&to| to <= tokens.len()) {
        if to <= from {
            continue;
        }
        let hidden = model.hidden_states(&tensor(&[&tokens[from..to]]), Some(&mut cache)).unwrap();
        logits.extend(flat(&model.logits(&hidden).unwrap()));
        from = to;
    }
    logits
}

fn whole(model: &Model, tokens: &[u32]) -> Vec<f32> {
    flat(&model.logits(&model.hidden_states(&tensor(&[tokens]), None).unwrap()).unwrap())
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn logits_do_not_depend_on_how_the_prompt_is_cut(
        seed in 0u64..1000,
        len in 1usize..60,
        cuts in proptest::collection::vec(1usize..60, 0..6),
    ) {
        let (_, model) = small(1);
        let tokens = ids(seed, len);
        let mut cuts = cuts;
        cuts.sort_unstable();
        let in_cuts = |kv_type| bits(&logits_in_cuts(&model, kv_type, &tokens, &cuts));
        prop_assert_eq!(in_cuts(KvType::F32), bits(&whole(&model, &tokens)));
        for kv_type in KvType::ALL {
            prop_assert_eq!(in_cuts(kv_type), bits(&logits_in_cuts(&model, kv_type, &tokens, &[])));
        }
    }

    #[test]
    fn logits_do_not_depend_on_neighbours_or_padding(
        seed in 0u64..1000,
        lengths in proptest::collection::vec(1usize..40, 1..5),
    ) {
        let (_, model) = small(2);
        let rows: Vec<Vec<u32>> =
            lengths.iter().enumerate().map(|(i, &len)| ids(seed + i as u64, len)).collect();
        let longest = lengths.iter().copied().max().unwrap();
        let padded: Vec<Vec<u32>> =
            rows.iter().map(|row| [vec![0; longest - row.len()], row.clone()].concat()).collect();
        let input = tensor(&padded.iter().map(Vec::as_slice).collect::<Vec<_>>());
        let starts: Vec<usize> = lengths.iter().map(|len| longest - len).collect();
        let mut cache = model.padded_cache(KvType::F32, starts.clone());
        let hidden = model.hidden_states(&input, Some(&mut cache)).unwrap();
        let logits = model.logits(&hidden).unwrap();
        for (i, row) in rows.iter().enumerate() {
            let ours = flat(&logits.i((i, starts[i]..)).unwrap().contiguous().unwrap());
            prop_assert_eq!(bits(&ours), bits(&whole(&model, row)));
        }
    }

    /// Training computes what the packed model will: the same codes, and the same bits for the same scale.
    #[test]
    fn qat_linear_is_bit_linear_of_the_packed_latent(
        seed in 0u64..1000,
        (out, inp) in (1usize..20, 1usize..70),
        tokens in 1usize..6,
        half_up in any::<bool>(),
        format in prop::sample::select(&TileFormat::ALL),
    ) {
        use rand::Rng;
        let rounding = if half_up { Rounding::HalfUp } else { Rounding::HalfEven };
        let out = 4 * out;
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut values = |count| -> Vec<f32> { (0..count).map(|_| rng.random_range(-1f32..1.)).collect() };
        let (latent, x) = (values(out * inp), values(tokens * inp));
        let weight = TernaryWeight::from_latent(&latent, (out, inp), rounding, format);
        let packed = weight.to_packed().unwrap();
        let loaded = TernaryWeight::from_packed(&packed, (out, inp), weight.scale(), format).unwrap();
        prop_assert_eq!(&loaded, &weight);
        let x = Tensor::from_vec(x, (1, tokens, inp), &Device::Cpu).unwrap();
        let latent = Tensor::from_vec(latent, (out, inp), &Device::Cpu).unwrap();
        let qat = QatLinear::new(latent.clone(), rounding).forward(&x).unwrap();
        let bit = BitLinear::new(loaded, rounding, None).forward(&x).unwrap();
        prop_assert_eq!(bits(&flat(&qat)), bits(&flat(&bit)));
        // And both are the readable formula, up to the rounding of its float sums.
        let grid = quant::fake_quantize_activation(&x, rounding).unwrap().squeeze(0).unwrap();
        let weights = quant::fake_quantize_weight(&latent, rounding).unwrap();
        let formula = flat(&grid.matmul(&weights.t().unwrap()).unwrap());
        let bound = 1e-6 * inp as f32;
        prop_assert!(max_diff(&flat(&qat), &formula) < bound);
    }
}

#[test]
fn every_variable_trains() {
    let parameters = Parameters::new(9);
    let config = config(Family::BitNet, Some(LATENT));
    for linears in [&QatLinears::new(Rounding::HalfEven) as &dyn LinearFactory, &DenseLinears] {
        let model = Model::load(&config, linears, parameters.var_builder()).unwrap();
        let tokens = ids(1, 48);
        let hidden = model.hidden_states(&tensor(&[&tokens[..24], &tokens[24..]]), None).unwrap();
        let logits = model.logits(&hidden).unwrap().reshape(((), config.vocab_size)).unwrap();
        let labels: Vec<i64> = ids(2, 48).iter().map(|&id| i64::from(id)).collect();
        let grads = cross_entropy(&logits, &labels, None).unwrap().backward().unwrap();
        let named = parameters.named();
        // embedding, head, final norm and per block seven projections and four norms
        assert_eq!(named.len(), 3 + 2 * 11);
        for (name, var) in named {
            let grad =
                grads.get(var.as_tensor()).unwrap_or_else(|| panic!("no gradient for {name}"));
            let sum = grad.abs().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
            assert!(sum.is_finite() && sum > 0., "{name}: {sum}");
        }
    }
}

/// A frozen packed base passes gradients on to its input: `dx = dy·(scale·T)`.
#[test]
fn packed_weights_pass_gradients_through() {
    let fixture = Fixture::open("bitnet_packed_tied");
    let model = fixture.model();
    let x = Var::randn(0f32, 1., (1, 5, fixture.config.hidden_size), &Device::Cpu).unwrap();
    let angles = model.angles(&[0, 1, 2, 3, 4], 1).unwrap();
    let own = Context::Own { starts: &[], backward: Precision::F32 };
    let y = model.blocks()[0].forward(x.as_tensor(), &angles, own).unwrap();
    let grads = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
    let grad = flat(grads.get(x.as_tensor()).unwrap());
    assert!(grad.iter().all(|g| g.is_finite()) && grad.iter().any(|&g| g != 0.));

    let latent: Vec<f32> = (0..48 * 33).map(|i| ((i * 37 % 101) as f32 - 50.) / 50.).collect();
    let weight =
        TernaryWeight::from_latent(&latent, (48, 33), Rounding::HalfEven, TileFormat::TwoBit);
    let dense = Tensor::from_vec(weight.dequantize(), (48, 33), &Device::Cpu).unwrap();
    let x = Var::randn(0f32, 1., (70, 33), &Device::Cpu).unwrap();
    let dy = Tensor::randn(0f32, 1., (70, 48), &Device::Cpu).unwrap();
    let y = BitLinear::new(weight, Rounding::HalfEven, None).forward(x.as_tensor()).unwrap();
    let grads = (y * &dy).unwrap().sum_all().unwrap().backward().unwrap();
    let want = flat(&dy.matmul(&dense).unwrap());
    assert!(max_diff(&flat(grads.get(x.as_tensor()).unwrap()), &want) < 1e-4);
}

#[test]
fn packing_is_bit_exact_with_the_reference() {
    let fixture = Fixture::open("bitnet_packed_tied");
    let name = "model.layers.0.mlp.down_proj.weight";
    let bytes = fixture.checkpoint.read_bytes(name).unwrap();
    let scale = fixture.checkpoint.read_scale(&format!("{name}_scale")).unwrap();
    let (out, inp) = (fixture.config.hidden_size, fixture.config.intermediate_size);
    let mut damaged = bytes.clone();
    damaged[3 * inp + 7] |= 0b11_00_00;
    for format in TileFormat::ALL {
        let weight = TernaryWeight::from_packed(&bytes, (out, inp), scale, format).unwrap();
        assert_eq!(weight.to_packed().unwrap(), bytes);
        let error = TernaryWeight::from_packed(&damaged, (out, inp), scale, format).unwrap_err();
        let place = format!("row {}, column 7", 2 * out / 4 + 3);
        assert!(error.to_string().contains(&place), "{error}");
    }
}

/// How the weights lie in memory does not show in the logits.
#[test]
fn both_tile_formats_give_the_same_bits() {
    for name in ["bitnet_packed_tied", "llama_packed_headdim"] {
        let fixture = Fixture::open(name);
        let logits = TileFormat::ALL.map(|format| {
            let linears = BitLinears::new(fixture.config.quantization.unwrap());
            let model = fixture.model_with(&linears.with_format(format));
            [1, 3, 9, 21].map(|len| bits(&whole(&model, &ids(7, len)))).concat()
        });
        assert_eq!(logits[0], logits[1], "{name}");
    }
}

#[test]
fn scores_equal_the_logits_for_any_batch_size() {
    let (_, model) = small(4);
    let requests: Vec<ScoreRequest> = (0..9u64)
        .map(|i| ScoreRequest {
            context: ids(i, 1 + (i as usize * 5) % 17),
            continuation: ids(100 + i, 1 + (i as usize * 7) % 11),
        })
        .collect();
    let one = loglikelihood(&model, &requests, 1).unwrap();
    for batch in [2, 4, 100] {
        assert_eq!(loglikelihood(&model, &requests, batch).unwrap(), one, "batches of {batch}");
    }
    for (request, score) in requests.iter().zip(&one) {
        let tokens = [&request.context[..], &request.continuation].concat();
        let logits = whole(&model, &tokens);
        let vocab = model.config().vocab_size;
        let mut is_greedy = true;
        for (i, &target) in request.continuation.iter().enumerate() {
            let row = &logits[(request.context.len() + i - 1) * vocab..][..vocab];
            let total: f64 = row.iter().map(|&l| f64::from(l).exp()).sum();
            let want = f64::from(row[target as usize]) - total.ln();
            assert!((f64::from(score.token_logprobs[i]) - want).abs() < 1e-5);
            is_greedy &= row.iter().all(|&l| l <= row[target as usize]);
        }
        assert_eq!(score.is_greedy, is_greedy);
    }
    let refused = |context: Vec<u32>, continuation: Vec<u32>| {
        loglikelihood(&model, &[ScoreRequest { context, continuation }], 1).unwrap_err().to_string()
    };
    assert!(refused(vec![], vec![3]).contains("at least one token"));
    assert!(refused(vec![3], vec![96]).contains("token id 96"));
    assert!(refused(vec![3], vec![3; 65]).contains("65 tokens"));
    // A long context is cut on the left: the last 64 tokens decide.
    let long = ScoreRequest { context: ids(7, 90), continuation: ids(8, 4) };
    let cut = ScoreRequest { context: long.context[90 - 61..].to_vec(), ..long.clone() };
    assert_eq!(
        loglikelihood(&model, &[long], 1).unwrap(),
        loglikelihood(&model, &[cut], 1).unwrap()
    );
}

fn options(max_new_tokens: usize, eos_token_ids: Vec<u32>) -> GenerateOptions {
    GenerateOptions {
        sampler: Sampler::new(SamplingParams::greedy()).unwrap(),
        max_new_tokens,
        eos_token_ids,
        interrupt: Default::default(),
    }
}

#[test]
fn a_session_reuses_its_prefix_and_ends_where_it_should() {
    let (_, model) = small(6);
    let model = Arc::new(model);
    let rng = || ChaCha8Rng::seed_from_u64(0);
    let go = |_: u32| ControlFlow::Continue(());
    let prompt = ids(11, 20);
    let mut session = Session::new(model.clone());
    let first = session.generate(&prompt, &options(8, vec![]), &mut rng(), go).unwrap();
    assert_eq!((first.finish, first.tokens.len(), first.prompt_tokens), (Finish::Length, 8, 20));

    // A longer prompt with the same beginning: only the rest is run, and the result is a fresh one's.
    let longer = [&prompt[..], &first.tokens, &ids(12, 3)].concat();
    let again = session.generate(&longer, &options(8, vec![]), &mut rng(), go).unwrap();
    assert_eq!(again.prompt_tokens, 4);
    let mut fresh = Session::new(model.clone());
    let want = fresh.generate(&longer, &options(8, vec![]), &mut rng(), go).unwrap();
    assert_eq!(again.tokens, want.tokens);

    // The same prompt once more still yields logits.
    let same = session.generate(&prompt, &options(8, vec![]), &mut rng(), go).unwrap();
    assert_eq!((same.tokens, same.prompt_tokens), (first.tokens.clone(), 1));

    let eos = first.tokens[3];
    let stop = first.tokens.iter().position(|&t| t == eos).unwrap();
    let ended = session.generate(&prompt, &options(8, vec![eos]), &mut rng(), go).unwrap();
    assert_eq!((ended.finish, &ended.tokens[..]), (Finish::Eos, &first.tokens[..stop]));

    let full = session.generate(&ids(13, 60), &options(99, vec![]), &mut rng(), go).unwrap();
    assert_eq!((full.finish, full.tokens.len()), (Finish::Context, 5));

    let error = session.generate(&ids(13, 65), &options(1, vec![]), &mut rng(), go).unwrap_err();
    assert!(error.to_string().contains("65 tokens"), "{error}");
    let error = session.generate(&[5, 96], &options(1, vec![]), &mut rng(), go).unwrap_err();
    assert!(error.to_string().contains("token id 96"), "{error}");
    let error = session.generate(&[], &options(1, vec![]), &mut rng(), go).unwrap_err();
    assert!(error.to_string().contains("no tokens"), "{error}");
    // A refused call leaves the session usable.
    let after = session.generate(&prompt, &options(8, vec![]), &mut rng(), go).unwrap();
    assert_eq!(after.tokens, first.tokens);
}

/// Greedy or sampled, whatever is drafted: the tokens of plain decoding, the same end, and a session that goes on.
#[test]
fn speculation_changes_no_token() {
    let (_, model) = small(6);
    let model = Arc::new(model);
    let (mut drafted, mut accepted) = (0, 0);
    for seed in 0..12 {
        let some = ids(seed, 5);
        let prompt = [&some[..], &some, &some[..seed as usize % 5]].concat();
        for (temperature, max, eos) in [(0., 50, 96), (0.05, 50, 96), (0.05, 7, 96), (1., 50, 40)] {
            let mut options = options(max, vec![eos]);
            let params = SamplingParams { temperature, ..Default::default() };
            options.sampler = Sampler::new(params).unwrap();
            let run = |session: &mut Session, prompt: &[u32], stop: usize| {
                let mut left = stop;
                let go = |_: u32| {
                    left -= 1;
                    if left == 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
                };
                let mut rng = ChaCha8Rng::seed_from_u64(seed);
                let generation = session.generate(prompt, &options, &mut rng, go).unwrap();
                (
                    generation.tokens,
                    generation.finish,
                    generation.drafted,
                    session.tokens().to_vec(),
                )
            };
            for stop in [1, 9, usize::MAX] {
                let mut plain = Session::new(model.clone());
                let mut speculating = Session::new(model.clone()).speculating();
                let want = run(&mut plain, &prompt, stop);
                let ours = run(&mut speculating, &prompt, stop);
                assert_eq!((&ours.0, ours.1, &ours.3), (&want.0, want.1, &want.3));
                drafted += ours.2.tokens;
                accepted += ours.2.accepted;
                let longer = [&prompt[..], &ours.0[..ours.0.len() / 2]].concat();
                assert_eq!(run(&mut speculating, &longer, 5).0, run(&mut plain, &longer, 5).0);
            }
        }
    }
    assert!(0 < accepted && accepted < drafted, "{accepted} of {drafted}");
}

#[test]
fn a_divided_scale_and_a_multiplied_one_are_the_same_matrix() {
    let latent: Vec<f32> = (0..16 * 16).map(|i| (i as f32 * 0.7).sin()).collect();
    let weight =
        TernaryWeight::from_latent(&latent, (16, 16), Rounding::HalfEven, TileFormat::TwoBit);
    let codes = Tensor::from_vec(weight.to_packed().unwrap(), (4, 16), &Device::Cpu).unwrap();
    let load = |convention, scale: f32| {
        let tensors = HashMap::from([
            ("w.weight".to_string(), codes.clone()),
            ("w.weight_scale".to_string(), Tensor::new(&[scale], &Device::Cpu).unwrap()),
        ]);
        let vb = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu).pp("w");
        let form = Quantization { weights: WeightForm::Packed(convention), ..LATENT };
        let spec = bitnet_model::nn::LinearSpec {
            name: "w",
            in_features: 16,
            out_features: 16,
            bias: false,
        };
        BitLinears::new(form).linear(spec, vb).map(|linear| {
            flat(
                &linear.forward(&Tensor::ones((1, 16), DType::F32, &Device::Cpu).unwrap()).unwrap(),
            )
        })
    };
    let multiplied = load(ScaleConvention::Multiply, 0.25).unwrap();
    assert_eq!(multiplied, load(ScaleConvention::Divide, 4.).unwrap());
    for bad in [f32::NAN, f32::INFINITY, 0., -1.] {
        let error = load(ScaleConvention::Multiply, bad).unwrap_err().to_string();
        assert!(error.contains("weight_scale is"), "{error}");
    }
}
