//! Attention over a cache, of every type of keys and values.

use bitnet_model::{
    cuda::launch::{AttentionInputs, AttentionShape, Launch, Strides},
    ops::{self, KvType},
};
use candle_core::{Device, Tensor};

use super::{
    assert_same,
    emulator::{Buffer, Run, run},
    values,
};

#[derive(Clone, Copy, Debug)]
struct Case {
    batch: usize,
    seq: usize,
    heads: (usize, usize),
    context: usize,
    head_dim: usize,
    kv_type: KvType,
}

/// The bytes of a contiguous tensor as it is stored.
fn bytes(tensor: &Tensor) -> Vec<u8> {
    let tensor = tensor.flatten_all().unwrap();
    match tensor.dtype() {
        candle_core::DType::F32 => {
            tensor.to_vec1::<f32>().unwrap().iter().flat_map(|x| x.to_le_bytes()).collect()
        }
        candle_core::DType::F16 => {
            tensor.to_vec1::<half::f16>().unwrap().iter().flat_map(|x| x.to_le_bytes()).collect()
        }
        candle_core::DType::BF16 => {
            tensor.to_vec1::<half::bf16>().unwrap().iter().flat_map(|x| x.to_le_bytes()).collect()
        }
        _ => tensor.to_vec1::<u8>().unwrap(),
    }
}

fn check(case: Case, starts: &[usize], runs: &[Run]) {
    let Case { batch, seq, heads: (heads, kv_heads), context, head_dim, kv_type } = case;
    // A cache has room behind its context; its views begin somewhere in it.
    let (room, skipped) = (context + 3, 2);
    let tensor = |shape: &[usize], seed| {
        let data = values(shape.iter().product(), seed);
        let data = Vec::from_iter(data.into_iter().map(|x| x * 3.));
        Tensor::from_vec(data, shape, &Device::Cpu).unwrap()
    };
    let q = tensor(&[batch, seq, heads, head_dim], 1);
    let [k, v] = [2, 3]
        .map(|seed| kv_type.encode(&tensor(&[batch, kv_heads, room, head_dim], seed)).unwrap());
    let view = |x: &Tensor| x.narrow(2, skipped, context).unwrap();
    let expected = ops::attention(&q, &view(&k), &view(&v), starts).unwrap();
    let expected = expected.flatten_all().unwrap().to_vec1::<f32>().unwrap();

    let width = kv_type.width(head_dim);
    let strides = Strides {
        batch: (kv_heads * room * width) as u64,
        head: (room * width) as u64,
        position: width as u64,
    };
    let shape = AttentionShape::new(seq, (heads, kv_heads), context, head_dim);
    let queries = batch * seq;
    let q = Buffer::new(&q.flatten_all().unwrap().to_vec1::<f32>().unwrap());
    let [k, v] = [k, v].map(|x| Buffer::new(&bytes(&x)));
    let skipped = (skipped * kv_type.bytes(head_dim)) as u64;
    let starts = Vec::from_iter(starts.iter().map(|start| *start as u32));
    let starts = (!starts.is_empty()).then(|| Buffer::new(&starts));
    let inputs = AttentionInputs {
        q: q.address(),
        k: (k.address() + skipped, strides),
        v: (v.address() + skipped, strides),
        starts: starts.as_ref().map_or(0, Buffer::address),
    };
    let function = match kv_type {
        KvType::F32 => "attention_block_f32",
        KvType::F16 => "attention_block_f16",
        KvType::Bf16 => "attention_block_bf16",
        KvType::Int8 => "attention_block_int8",
    };
    for how in runs {
        let partials = Buffer::new(&vec![f32::NAN; shape.partials(queries) * 2]);
        let sums = Buffer::new(&vec![f32::NAN; shape.partials(queries) * head_dim]);
        let out = Buffer::new(&vec![f32::NAN; queries * heads * head_dim]);
        let between = (partials.address(), sums.address());
        run(&Launch::attention_block(function, shape, queries, inputs, between), *how);
        run(&Launch::attention_merge(shape, queries, between, out.address()), *how);
        assert_same(&out.read(), &expected, &format!("{case:?}, {how:?}"));
    }
}

#[test]
fn one_query_over_a_cache_is_that_of_the_cpu() {
    for kv_type in KvType::ALL {
        for context in [1, 2, 255, 256, 257, 700] {
            let heads = (8, 2);
            let case = Case { batch: 1, seq: 1, heads, context, head_dim: 128, kv_type };
            check(case, &[], &Run::ONE);
        }
    }
}

/// Heads that do not fill a block of threads, and elements of a head that do not fill a sum's lanes.
#[test]
fn heads_of_any_number_and_size_are_those_of_the_cpu() {
    for (heads, head_dim) in [((6, 1), 40), ((5, 5), 7), ((9, 3), 130), ((1, 1), 256)] {
        for kv_type in [KvType::F16, KvType::Int8] {
            let case = Case { batch: 2, seq: 3, heads, context: 20, head_dim, kv_type };
            check(case, &[], &Run::ALL);
        }
    }
}

/// Padding, and documents packed into a row; a query that starts behind itself sees nothing.
#[test]
fn queries_that_start_later_are_those_of_the_cpu() {
    let heads = (4, 2);
    let case = Case { batch: 2, seq: 4, heads, context: 300, head_dim: 16, kv_type: KvType::Bf16 };
    check(case, &[0, 5, 40, 290, 297, 298, 299, 300], &Run::ALL);
}
