//! Values and gradients of each op against the same thing composed of Candle's differentiable ops.

use candle_core::{D, DType, Device, Tensor, Var};

use super::{
    KvType, attention, dense_matmul, gated, gemm::Precision, rms_norm, rope, self_attention,
    ternary_matmul, ternary_matmul_part,
};
use crate::{
    activations::SharedActivations, config::Activation, kernels::TileFormat, quant::Rounding,
    weights::TernaryWeight,
};

fn random(shape: &[usize]) -> Var {
    Var::randn(0f32, 1., shape, &Device::Cpu).unwrap()
}

fn flat(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// Asserts that both functions agree in value and in the gradients of all `vars`, to a few units in the
/// last place of sums over hundreds of terms of order one.
fn assert_same(
    vars: &[&Var],
    ours: impl Fn() -> candle_core::Result<Tensor>,
    theirs: impl Fn() -> candle_core::Result<Tensor>,
) {
    let (y, want) = (ours().unwrap(), theirs().unwrap());
    assert_eq!(y.shape(), want.shape());
    let weights = Tensor::randn(0f32, 1., y.shape(), &Device::Cpu).unwrap();
    let backward = |y: &Tensor| (y * &weights).unwrap().sum_all().unwrap().backward().unwrap();
    let (grads, want_grads) = (backward(&y), backward(&want));
    let close = |what: &str, a: &Tensor, b: &Tensor| {
        let scale = flat(b).iter().fold(1f32, |max, x| max.max(x.abs()));
        for (a, b) in flat(a).iter().zip(flat(b)) {
            assert!((a - b).abs() <= 1e-5 * scale, "{what}: {a} is not {b}");
        }
    };
    close("value", &y, &want);
    for (i, var) in vars.iter().enumerate() {
        let grad = grads.get(var.as_tensor()).unwrap();
        close(&format!("gradient {i}"), grad, want_grads.get(var.as_tensor()).unwrap());
    }
}

#[test]
fn rms_norm_equals_its_composition() {
    let (x, weight) = (random(&[3, 70, 48]), random(&[48]));
    assert_same(
        &[&x, &weight],
        || rms_norm(&x, &weight, 1e-5),
        || candle_nn::ops::rms_norm_slow(&x, &weight, 1e-5),
    );
}

#[test]
fn rope_equals_its_composition() {
    let (seq, half) = (9, 6);
    let x = random(&[2, seq, 3, 2 * half]);
    let angles = Tensor::rand(0f32, 6., (seq, half), &Device::Cpu).unwrap();
    let (cos, sin) = (angles.cos().unwrap(), angles.sin().unwrap());
    assert_same(
        &[&x],
        || rope(&x.flatten_from(2)?, 3, &cos.unsqueeze(0)?, &sin.unsqueeze(0)?),
        || {
            // candle's layout is (batch, heads, seq, head_dim)
            let x = x.transpose(1, 2)?.contiguous()?;
            candle_nn::rotary_emb::rope_slow(&x, &cos, &sin)?.transpose(1, 2)?.contiguous()
        },
    );
}

#[test]
fn gates_equal_their_composition() {
    let (gate, up) = (random(&[5, 33]), random(&[5, 33]));
    assert_same(
        &[&gate, &up],
        || gated(&gate, &up, Activation::Relu2),
        || gate.relu()?.sqr()? * up.as_tensor(),
    );
    assert_same(
        &[&gate, &up],
        || gated(&gate, &up, Activation::Silu),
        || candle_nn::ops::silu(&gate)? * up.as_tensor(),
    );
    let nan = Tensor::new(&[f32::NAN], &Device::Cpu).unwrap();
    let y = gated(&nan, &nan.ones_like().unwrap(), Activation::Relu2).unwrap();
    assert!(flat(&y)[0].is_nan(), "a NaN must not vanish in the gate");
}

#[test]
fn dense_matmul_equals_candles() {
    for tokens in [1, 7, 64, 150] {
        let (x, weight) = (random(&[2, tokens, 40]), random(&[70, 40]));
        assert_same(
            &[&x, &weight],
            || dense_matmul(&x, &weight),
            || x.broadcast_matmul(&weight.t()?.unsqueeze(0)?),
        );
    }
    let (x, weight) = (random(&[3, 40]), random(&[70, 40]));
    let bf16 = weight.as_detached_tensor().to_dtype(DType::BF16).unwrap();
    let widened = bf16.to_dtype(DType::F32).unwrap();
    assert_same(&[&x], || dense_matmul(&x, &bf16), || x.matmul(&widened.t()?));
}

#[test]
fn ternary_matmul_passes_gradients_straight_through() {
    let x = random(&[2, 9, 40]);
    let latents = [24, 8, 17].map(|rows| flat(&random(&[rows, 40])));
    let weights: std::sync::Arc<[TernaryWeight]> = latents
        .iter()
        .map(|latent| {
            let shape = (latent.len() / 40, 40);
            TernaryWeight::from_latent(latent, shape, Rounding::HalfEven, TileFormat::TwoBit)
        })
        .collect();
    let dense = weights.iter().flat_map(|weight| weight.dequantize());
    let dense = Tensor::from_iter(dense, &Device::Cpu).unwrap().reshape(((), 40)).unwrap();
    let stacked = ternary_matmul(&x, &weights, Rounding::HalfEven).unwrap();
    let input = SharedActivations::default();
    let part = |index| ternary_matmul_part(&x, &weights, index, Rounding::HalfEven, &input);
    let each: Vec<Tensor> = (0..3).map(|index| part(index).unwrap()).collect();
    assert_eq!(flat(&stacked), flat(&Tensor::cat(&each, D::Minus1).unwrap()));
    let gradient = |y: &Tensor| {
        let upstream = (y.detach() * 2.).unwrap();
        (y * upstream).unwrap().sum_all().unwrap().backward().unwrap().remove(&x).unwrap()
    };
    let expected = (&stacked * 2.).unwrap().broadcast_matmul(&dense).unwrap();
    for found in [gradient(&stacked), gradient(&Tensor::cat(&each, D::Minus1).unwrap())] {
        let scale = flat(&expected).iter().fold(0f32, |most, x| most.max(x.abs()));
        for (found, expected) in flat(&found).iter().zip(flat(&expected)) {
            assert!((found - expected).abs() <= 1e-5 * scale, "{found} is not {expected}");
        }
    }
}

#[test]
fn attention_equals_its_composition() {
    let (batch, seq, heads, kv_heads, dim) = (2, 11, 6, 2, 8);
    let q = random(&[batch, seq, heads, dim]);
    let (k, v) = (random(&[batch, kv_heads, seq, dim]), random(&[batch, kv_heads, seq, dim]));
    let repeat = |x: &Var| {
        let groups = heads / kv_heads;
        let wide = x.unsqueeze(2)?.broadcast_as((batch, kv_heads, groups, seq, dim))?;
        wide.contiguous()?.reshape((batch, heads, seq, dim))
    };
    let mask: Vec<f32> =
        (0..seq * seq).map(|i| if i % seq > i / seq { f32::NEG_INFINITY } else { 0. }).collect();
    let mask = Tensor::from_vec(mask, (seq, seq), &Device::Cpu).unwrap();
    assert_same(
        &[&q, &k, &v],
        || attention(&q, &k, &v, &[]),
        || {
            let q = q.transpose(1, 2)?.contiguous()?;
            let scores = (q.matmul(&repeat(&k)?.t()?)? / (dim as f64).sqrt())?;
            let p = candle_nn::ops::softmax(&scores.broadcast_add(&mask)?, D::Minus1)?;
            p.matmul(&repeat(&v)?)?.transpose(1, 2)?.contiguous()
        },
    );
}

#[test]
fn attention_does_not_look_at_padding() {
    let (seq, start) = (5, 2);
    let q = random(&[1, seq, 2, 4]);
    let (k, v) = (random(&[1, 1, seq, 4]), random(&[1, 1, seq, 4]));
    let padded = attention(&q, &k, &v, &[start; 5]).unwrap();
    let cut = |x: &Var, dim| x.narrow(dim, start, seq - start).unwrap();
    let alone = attention(&cut(&q, 1), &cut(&k, 2), &cut(&v, 2), &[]).unwrap();
    assert_eq!(flat(&padded.narrow(1, start, seq - start).unwrap()), flat(&alone));
    assert!(flat(&padded.narrow(1, 0, start).unwrap()).iter().all(|&y| y == 0.));
    // No gradient flows into what was not seen.
    let grads = padded.sum_all().unwrap().backward().unwrap();
    let dk = grads.get(k.as_tensor()).unwrap().narrow(2, 0, start).unwrap();
    assert!(flat(&dk).iter().all(|&g| g == 0.));
}

#[test]
fn self_attention_is_attention_over_the_own_tokens() {
    let (batch, seq, heads, kv_heads, dim) = (2, 130, 4, 2, 8);
    let q = random(&[batch, seq, heads, dim]);
    let (k, v) = (random(&[batch, seq, kv_heads, dim]), random(&[batch, seq, kv_heads * dim]));
    for starts in [Vec::new(), [vec![0; 40], vec![40; 90]].concat().repeat(batch)] {
        let own = || self_attention(&q, &k, &v, &starts, Precision::F32);
        let cached = || {
            let v = v.reshape((batch, seq, kv_heads, dim))?.transpose(1, 2)?;
            attention(&q, &k.transpose(1, 2)?, &v, &starts)?.reshape((batch, seq, heads * dim))
        };
        assert_eq!(flat(&own().unwrap()), flat(&cached().unwrap()));
        assert_same(&[&q, &k, &v], own, cached);
    }
    assert!(self_attention(&q, &v, &v, &[], Precision::F32).is_err());
    assert!(self_attention(&q, &k, &v, &[0; 3], Precision::F32).is_err());
}

/// Against double precision, one head. With `u` the roundings of two factors a product has an error of at most `u·Σ|terms|`;
/// that of `dp` goes on to `ds`, times `p`, and from there to `dq` and `dk`. Sums of 140 terms in single precision, and
/// probabilities of it, add far less than the tenth of a rounding that `u` has more than two.
#[test]
fn gradients_of_attention_in_bfloat16_are_within_their_roundings() {
    let (seq, dim) = (140, 8);
    let u = 2.1 * 2f64.powi(-8); // bfloat16 has eight bits
    let [q, k] = [0; 2].map(|_| random(&[1, seq, 1, dim]));
    let v = random(&[1, seq, dim]);
    let dy = Tensor::randn(0f32, 1., (1, seq, dim), &Device::Cpu).unwrap();
    let run = |precision| {
        let y = self_attention(&q, &k, &v, &[], precision).unwrap();
        (flat(&y), (y * &dy).unwrap().sum_all().unwrap().backward().unwrap())
    };
    let ((y, single), (rounded_y, grads)) = (run(Precision::F32), run(Precision::Bf16));
    assert_eq!(y, rounded_y);
    for x in [&q, &k, &v] {
        assert_ne!(flat(single.get(x).unwrap()), flat(grads.get(x).unwrap()));
    }
    let [q, k, v, dy, dq, dk, dv] = [
        q.as_tensor(),
        k.as_tensor(),
        v.as_tensor(),
        &dy,
        grads.get(&q).unwrap(),
        grads.get(&k).unwrap(),
        grads.get(&v).unwrap(),
    ]
    .map(|x| Vec::from_iter(flat(x).into_iter().map(f64::from)));
    let row = |x: &[f64], i: usize| Vec::from(&x[i * dim..][..dim]);
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let size = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a * b).abs()).sum::<f64>();
    let scale = 1. / (dim as f64).sqrt();
    // Value and bound of each gradient.
    let [mut want_q, mut want_k, mut want_v] = [(); 3].map(|()| vec![(0f64, 0f64); seq * dim]);
    let add = |(sum, bound): &mut (f64, f64), (a, off): (f64, f64), b: f64| {
        *sum += a * b;
        *bound += (off + u * (a.abs() + off)) * b.abs();
    };
    for i in 0..seq {
        let (q, dy) = (row(&q, i), row(&dy, i));
        let e = Vec::from_iter((0..=i).map(|j| (dot(&q, &row(&k, j)) * scale).exp()));
        let total: f64 = e.iter().sum();
        let p = Vec::from_iter(e.iter().map(|e| e / total));
        let dp = Vec::from_iter((0..=i).map(|j| dot(&dy, &row(&v, j))));
        let off = Vec::from_iter((0..=i).map(|j| u * size(&dy, &row(&v, j))));
        let (mean, mean_off) = (dot(&p, &dp), dot(&p, &off));
        for j in 0..=i {
            let ds = (p[j] * (dp[j] - mean) * scale, p[j] * (off[j] + mean_off) * scale);
            for d in 0..dim {
                add(&mut want_q[i * dim + d], ds, k[j * dim + d]);
                add(&mut want_k[j * dim + d], ds, q[d]);
                add(&mut want_v[j * dim + d], (p[j], 0.), dy[d]);
            }
        }
    }
    for (what, found, want) in [("q", dq, want_q), ("k", dk, want_k), ("v", dv, want_v)] {
        for (i, (found, (want, bound))) in found.iter().zip(want).enumerate() {
            let off = (found - want).abs();
            assert!(off <= bound + 1e-6, "d{what}[{i}]: {found} is not {want} ± {bound:e}");
        }
    }
}

/// Documents of more and of fewer keys than a block has, packed into rows: outputs have the bits that they have alone,
/// whether blocks or queries are shared out among the threads, and gradients are the same but for the order of sums.
#[test]
fn attention_to_a_document_does_not_look_at_its_neighbours() {
    let (batch, heads, kv_heads, dim) = (2, 4, 2, 8);
    let lengths = [3, 300, 1, 29, 270];
    let seq: usize = lengths.iter().sum();
    let q = random(&[batch, seq, heads, dim]);
    let (k, v) = (random(&[batch, kv_heads, seq, dim]), random(&[batch, kv_heads, seq, dim]));
    let dy = Tensor::randn(0f32, 1., (batch, seq, heads, dim), &Device::Cpu).unwrap();
    let ends = lengths.iter().scan(0, |end, length| {
        *end += length;
        Some(*end)
    });
    let documents: Vec<_> = lengths.iter().zip(ends).map(|(len, end)| (end - len, *len)).collect();
    let row = documents.iter().flat_map(|&(start, len)| std::iter::repeat_n(start, len));
    let starts = Vec::from_iter(row).repeat(batch);
    let y = attention(&q, &k, &v, &starts).unwrap();
    let grads = (&y * &dy).unwrap().sum_all().unwrap().backward().unwrap();
    for (start, len) in documents {
        let cut = |x: &Tensor, dim| x.narrow(dim, start, len).unwrap().contiguous().unwrap();
        let alone =
            [(&q, 1), (&k, 2), (&v, 2)].map(|(x, dim)| Var::from_tensor(&cut(x, dim)).unwrap());
        let [q1, k1, v1] = &alone;
        let y1 = attention(q1, k1, v1, &[]).unwrap();
        assert_eq!(flat(&y1), flat(&cut(&y, 1)));
        let grads1 = (y1 * cut(&dy, 1)).unwrap().sum_all().unwrap().backward().unwrap();
        for ((x1, x), dim) in alone.iter().zip([&q, &k, &v]).zip([1, 2, 2]) {
            let (alone, packed) =
                (flat(grads1.get(x1).unwrap()), flat(&cut(grads.get(x).unwrap(), dim)));
            // Up to 300 terms in chains of 64, cut elsewhere: a rounding of 2⁻²⁴ for each of them at the worst, of
            // partial sums that are not larger than the largest result.
            let largest = alone.iter().fold(0f32, |most, g| most.max(g.abs()));
            for (alone, packed) in alone.iter().zip(&packed) {
                assert!((alone - packed).abs() <= 300. * 2f32.powi(-24) * largest);
            }
        }
        // The document's last query by itself, over a context that holds the documents before.
        let last = start + len - 1;
        let seen = |x: &Tensor| x.narrow(2, 0, last + 1).unwrap();
        let one = attention(&q.narrow(1, last, 1).unwrap(), &seen(&k), &seen(&v), &[start; 2]);
        assert_eq!(flat(&one.unwrap()), flat(&y.narrow(1, last, 1).unwrap()));
    }
    assert!(attention(&q, &k, &v, &starts[1..]).is_err());
}

#[test]
fn views_equal_their_copies() {
    let wide = random(&[2, 5, 40]);
    let part = |first, len| wide.narrow(2, first, len).unwrap();
    let copy = |first, len| part(first, len).contiguous().unwrap();
    for act in [Activation::Relu2, Activation::Silu] {
        let y = gated(&part(3, 17), &part(20, 17), act).unwrap();
        assert_eq!(flat(&y), flat(&gated(&copy(3, 17), &copy(20, 17), act).unwrap()));
    }
    let angles = Tensor::rand(0f32, 6., (1, 5, 4), &Device::Cpu).unwrap();
    let y = rope(&part(8, 24), 3, &angles, &angles).unwrap();
    assert_eq!(flat(&y), flat(&rope(&copy(8, 24), 3, &angles, &angles).unwrap()));
    let one = gated(
        &part(3, 17).narrow(1, 2, 1).unwrap(),
        &copy(20, 17).narrow(1, 2, 1).unwrap(),
        Activation::Relu2,
    );
    assert_eq!(one.unwrap().dims(), [2, 1, 17]);
}

/// More keys than a block has: the same bits however many queries come at once, wherever the row begins, and however
/// keys and values are stored.
#[test]
fn attention_over_many_keys_does_not_depend_on_the_cut() {
    let (seq, heads, kv_heads, dim) = (600, 4, 2, 16);
    let q = random(&[1, seq, heads, dim]);
    let (k, v) = (random(&[1, kv_heads, seq, dim]), random(&[1, kv_heads, seq, dim]));
    let exact = flat(&attention(&q, &k, &v, &[]).unwrap());
    for kv_type in KvType::ALL {
        let (k, v) = (kv_type.encode(&k).unwrap(), kv_type.encode(&v).unwrap());
        let whole = attention(&q, &k, &v, &[]).unwrap();
        for (from, to) in [(0, 1), (1, 7), (255, 257), (300, 301), (511, 600), (599, 600)] {
            let cut = |x: &Tensor, first, len| x.narrow(2, first, len).unwrap();
            let some = |len| q.narrow(1, from, len).unwrap();
            let y = attention(&some(to - from), &cut(&k, 0, to), &cut(&v, 0, to), &[]).unwrap();
            assert_eq!(flat(&y), flat(&whole.narrow(1, from, to - from).unwrap()), "{kv_type:?}");
        }
        // The same row behind padding, beside another.
        let pad = |x: &Tensor, dim: usize| {
            let padding = x.narrow(dim, 0, 37).unwrap();
            let other = Tensor::cat(&[x, &padding], dim).unwrap();
            Tensor::cat(&[&Tensor::cat(&[&padding, x], dim).unwrap(), &other], 0).unwrap()
        };
        let starts = [[37; 637], [0; 637]].concat();
        let padded = attention(&pad(&q, 1), &pad(&k, 2), &pad(&v, 2), &starts).unwrap();
        assert_eq!(
            flat(&padded.narrow(0, 0, 1).unwrap().narrow(1, 37, seq).unwrap()),
            flat(&whole)
        );
        // Values of order one: half a unit of the last stored bit in keys and values.
        let bound = match kv_type {
            KvType::F32 => 0.,
            KvType::F16 => 4e-3,
            KvType::Bf16 => 3e-2,
            KvType::Int8 => 5e-2,
        };
        let error =
            flat(&whole).iter().zip(&exact).fold(0f32, |max, (a, b)| max.max((a - b).abs()));
        assert!(error <= bound, "{kv_type:?}: {error}");
    }
    let large = Tensor::new(&[[70000f32, 1.]], &Device::Cpu).unwrap();
    let error = KvType::F16.encode(&large).unwrap_err().to_string();
    assert!(error.contains("exceeds 65504"), "{error}");
    assert!(KvType::Bf16.encode(&large).is_ok());
}

#[test]
fn shapes_that_do_not_fit_are_errors() {
    let x = random(&[2, 3, 4]);
    assert!(rms_norm(&x, &random(&[5]), 1e-5).is_err());
    assert!(dense_matmul(&x, &random(&[6, 5])).is_err());
    assert!(gated(&x, &random(&[2, 3, 5]), Activation::Silu).is_err());
    let q = random(&[1, 2, 3, 4]);
    assert!(attention(&q, &random(&[1, 2, 2, 4]), &random(&[1, 2, 2, 4]), &[]).is_err());
    assert!(attention(&q, &random(&[1, 3, 1, 4]), &random(&[1, 3, 1, 4]), &[]).is_err());
}
