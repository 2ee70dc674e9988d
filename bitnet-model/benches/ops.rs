//! The operations of a token and of a prompt at the sizes of 2B-4T, on all threads (`RAYON_NUM_THREADS`) and with the
//! kernel chosen for this machine (`BITNET_KERNEL`): `cargo bench -p bitnet-model --bench ops -- attention`.

#![allow(missing_docs, clippy::unwrap_used)] // what the macros make; a benchmark may stop

use std::{hint::black_box, sync::Arc, time::Duration};

use bitnet_model::{
    calibration::fastest_format,
    config::Activation,
    nn::RotaryEmbedding,
    ops::{
        self, KvType,
        gemm::{Factor, Precision, gemm, plain},
    },
    pages::Arena,
    quant::Rounding,
    weights::TernaryWeight,
};
use candle_core::{Device, Result, Tensor};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const HIDDEN: usize = 2560;
const INTERMEDIATE: usize = 6912;
const HEADS: usize = 20;
const KV_HEADS: usize = 5;
const HEAD_DIM: usize = 128;
/// Bytes of the copies of a projection.
const COPIES: usize = 256 << 20;
/// One token, and a chunk of a prompt.
const TOKENS: [usize; 2] = [1, 512];

fn random(shape: impl Into<candle_core::Shape>) -> Tensor {
    Tensor::randn(0f32, 1., shape, &Device::Cpu).unwrap()
}

/// Times `run`; one call is `elements` products or values.
fn time(c: &mut Criterion, op: &str, elements: usize, run: impl Fn() -> Result<Tensor>) {
    let mut group = c.benchmark_group("ops");
    group.warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(2));
    group.sample_size(20).throughput(Throughput::Elements(elements as u64));
    group.bench_function(op, |b| b.iter(|| black_box(run().unwrap())));
}

/// Random weights in large pages.
fn weight(out_features: usize, in_features: usize, arena: &Arena) -> TernaryWeight {
    let mut rng = ChaCha8Rng::seed_from_u64(158);
    let mut codes = || (0..4).fold(0, |byte, field| byte | rng.random_range(0..3u8) << (2 * field));
    let bytes: Vec<u8> = (0..out_features / 4 * in_features).map(|_| codes()).collect();
    let (shape, format) = ((out_features, in_features), fastest_format(usize::MAX));
    let weight = TernaryWeight::from_packed(&bytes, shape, 1., format).unwrap();
    weight.into_pages(arena).unwrap()
}

/// The projections of a layer. A token reads copies in turn, more than a cache holds.
fn ternary_matmul(c: &mut Criterion) {
    let kv = KV_HEADS * HEAD_DIM;
    let projections: [(&str, &[usize], usize); 4] = [
        ("qkv_proj", &[HIDDEN, kv, kv], HIDDEN),
        ("o_proj", &[HIDDEN], HIDDEN),
        ("gate_up_proj", &[INTERMEDIATE, INTERMEDIATE], HIDDEN),
        ("down_proj", &[HIDDEN], INTERMEDIATE),
    ];
    for (name, rows, cols) in projections {
        let arena = Arena::default();
        let copy = |_| rows.iter().map(|&rows| weight(rows, cols, &arena)).collect();
        let count = COPIES.div_ceil(rows.iter().sum::<usize>() * cols / 4);
        let copies: Vec<Arc<[TernaryWeight]>> = (0..count).map(copy).collect();
        for tokens in TOKENS {
            let x = random((tokens, cols));
            let next = std::cell::Cell::new(0);
            let products = tokens * cols * rows.iter().sum::<usize>();
            time(c, &format!("ternary_matmul-{name}/{tokens}"), products, || {
                next.set((next.get() + 1) % copies.len());
                ops::ternary_matmul(&x, &copies[next.get()], Rounding::HalfEven)
            });
        }
    }
}

/// What happens to every value of a hidden state.
fn elementwise(c: &mut Criterion) {
    for tokens in TOKENS {
        let (x, gain) = (random((1, tokens, HIDDEN)), random(HIDDEN));
        time(c, &format!("rms_norm/{tokens}"), tokens * HIDDEN, || ops::rms_norm(&x, &gain, 1e-5));
        let positions: Vec<usize> = (0..tokens).collect();
        let rope = RotaryEmbedding::new(HEAD_DIM, 500_000.);
        let angles = rope.angles(&positions, 1, &Device::Cpu).unwrap();
        time(c, &format!("rope/{tokens}"), tokens * HIDDEN, || angles.rotate(&x, HEADS));
        let (gate, up) = (random((1, tokens, INTERMEDIATE)), random((1, tokens, INTERMEDIATE)));
        for (name, act) in [("relu2", Activation::Relu2), ("silu", Activation::Silu)] {
            time(c, &format!("gated-{name}/{tokens}"), tokens * INTERMEDIATE, || {
                ops::gated(&gate, &up, act)
            });
        }
    }
}

/// A token behind 2048, and a chunk of a prompt.
fn attention(c: &mut Criterion) {
    for (queries, context) in [(1, 2048), (512, 512)] {
        let q = random((1, queries, HEADS, HEAD_DIM));
        let keys = random((1, KV_HEADS, context, HEAD_DIM));
        // A prompt's token sees itself and those before it.
        let pairs = match queries {
            1 => context,
            _ => queries * (queries + 1) / 2,
        };
        for kv_type in KvType::ALL {
            let (k, v) = (kv_type.encode(&keys).unwrap(), kv_type.encode(&keys).unwrap());
            let name = format!("attention-{}/{queries}x{context}", kv_type.name());
            time(c, &name, 2 * pairs * HEADS * HEAD_DIM, || ops::attention(&q, &k, &v, &[]));
        }
    }
}

/// The gradients of a projection of 384 to 1024 values, of 2048 tokens: products per second.
fn gradients(c: &mut Criterion) {
    const TOKENS: usize = 2048;
    let values = |len: usize| (0..len).map(|i| (i as f32 * 0.37).sin()).collect::<Vec<_>>();
    for (k, n) in [(384, 1024), (1024, 384)] {
        let (dy, x, w) = (values(TOKENS * n), values(TOKENS * k), values(n * k));
        let codes: Vec<i8> = x.iter().map(|x| (x * 127.) as i8).collect();
        for precision in [Precision::F32, Precision::Bf16] {
            let mut group = c.benchmark_group("ops");
            group.warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(2));
            group.sample_size(20).throughput(Throughput::Elements((TOKENS * k * n) as u64));
            let mut dx = vec![0.; TOKENS * k];
            group.bench_function(format!("gemm-dx-{k}-{n}/{precision:?}"), |b| {
                b.iter(|| {
                    let factors =
                        (Factor::depth_inner(n, &dy, plain), Factor::index_inner(k, &w, plain));
                    gemm((TOKENS, k, n), factors.0, factors.1, 1., precision, &mut dx);
                });
            });
            let mut dw = vec![0.; n * k];
            group.bench_function(format!("gemm-dw-{k}-{n}/{precision:?}"), |b| {
                b.iter(|| {
                    let code = |code: i8, _: usize| f32::from(code);
                    let scaled = |dy: f32, _: usize| dy * 0.7;
                    let factors =
                        (Factor::index_inner(n, &dy, scaled), Factor::index_inner(k, &codes, code));
                    gemm((n, k, TOKENS), factors.0, factors.1, 1., precision, &mut dw);
                });
            });
        }
    }
}

criterion_group!(benches, ternary_matmul, elementwise, attention, gradients);
criterion_main!(benches);
