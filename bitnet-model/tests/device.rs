//! The ops on CUDA device 0 against the same ops on the processor, bit for bit, and models on both.
//!
//! The device may be a real one, or that of `tests/ptx` (scripts/cuda_interpret.sh), where sizes here keep it short.

#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used)] // test code

use std::sync::{Arc, OnceLock};

use bitnet_model::{
    config::Activation,
    hub::Hub,
    kernels::TileFormat,
    model::Model,
    ops::{self, KvType, TernaryProduct, gemm::Precision},
    pretrained::{self, Source},
    quant::{ActivationCodes, Rounding},
    weights::TernaryWeight,
};
use candle_core::{D, DType, Device, Result, Tensor, Var};

fn cuda() -> &'static Device {
    static DEVICE: OnceLock<Device> = OnceLock::new();
    DEVICE.get_or_init(|| Device::new_cuda(0).unwrap())
}

/// A reproducible sequence of values from −1 to 1.
fn values(len: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9) | 1;
    let next = move || {
        // xorshift32 (G. Marsaglia, 2003)
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        (state >> 8) as f32 / (1 << 23) as f32 - 1.
    };
    std::iter::repeat_with(next).take(len).collect()
}

fn tensor(shape: &[usize], seed: u32, device: &Device) -> Tensor {
    Tensor::from_vec(values(shape.iter().product(), seed), shape, device).unwrap()
}

/// As `tensor`, but a view into the middle of a larger one: rows are apart, and the first is not at the beginning.
fn view(shape: &[usize], seed: u32, device: &Device) -> Tensor {
    let width = shape[shape.len() - 1];
    let larger = [&shape[..shape.len() - 1], &[width + 7]].concat();
    tensor(&larger, seed, device).narrow(D::Minus1, 3, width).unwrap()
}

fn floats(x: &Tensor) -> Vec<f32> {
    let x = x.to_device(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap();
    x.flatten_all().unwrap().to_vec1().unwrap()
}

/// The same bits, or NaN in both; zeros of either sign are the same.
fn assert_same(found: &Tensor, expected: &Tensor, what: &str) {
    assert_eq!(found.shape(), expected.shape(), "{what}");
    for (i, (found, expected)) in floats(found).iter().zip(floats(expected)).enumerate() {
        let same = *found == expected || found.is_nan() && expected.is_nan();
        assert!(same, "{what}: {found:e} is not {expected:e} at {i}");
    }
}

/// An op on both devices.
fn check(what: &str, op: impl Fn(&Device) -> Result<Tensor>) {
    assert_same(&op(cuda()).unwrap(), &op(&Device::Cpu).unwrap(), what);
}

fn weights(rows: &[usize], cols: usize) -> Arc<[TernaryWeight]> {
    let weight = |&rows: &usize| {
        let latent = values(rows * cols, rows as u32);
        TernaryWeight::from_latent(&latent, (rows, cols), Rounding::HalfEven, TileFormat::TwoBit)
    };
    rows.iter().map(weight).collect()
}

#[test]
fn products_are_those_of_the_processor() {
    for cols in [1, 20, 130, 300] {
        let weights = weights(&[3, 16, 37], cols);
        for tokens in [1, 2, 9, 33, 66] {
            for rounding in [Rounding::HalfEven, Rounding::HalfUp] {
                check(&format!("{tokens} × {cols}, {rounding:?}"), |device| {
                    ops::ternary_matmul(&view(&[tokens, cols], 1, device), &weights, rounding)
                });
            }
            check(&format!("part 1 of {tokens} × {cols}"), |device| {
                let x = tensor(&[tokens, cols], 2, device);
                ops::ternary_matmul_part(&x, &weights, 1, Rounding::HalfEven, &Default::default())
            });
        }
    }
}

/// Columns of the default model's and of 2B-4T's widest rows.
#[test]
fn products_of_wide_rows_are_those_of_the_processor() {
    for (cols, tokens) in [(2560, 1), (6912, 1), (6912, 2), (2560, 33)] {
        let weights = weights(&[18], cols);
        check(&format!("{tokens} × {cols}"), |device| {
            ops::ternary_matmul(&tensor(&[tokens, cols], 3, device), &weights, Rounding::HalfEven)
        });
    }
}

#[test]
fn gradients_are_those_of_the_processor() {
    for (rows, cols, tokens) in [(&[7, 20][..], 130, 3), (&[513, 3], 40, 2), (&[16], 300, 65)] {
        let weights = weights(rows, cols);
        let gradient = |device: &Device, backward, round: fn(f32) -> f32| -> Result<Tensor> {
            let input = ActivationCodes::Int8(Rounding::HalfEven);
            let x = Var::from_tensor(&tensor(&[tokens, cols], 4, device))?;
            let y = ops::ternary_matmul(&x, &weights, TernaryProduct { input, backward })?;
            let dy = Vec::from_iter(values(y.elem_count(), 5).into_iter().map(round));
            let dy = Tensor::from_vec(dy, y.shape(), device)?;
            let gradients = (y * dy)?.backward()?;
            Ok(gradients.get(&x).expect("a gradient").clone())
        };
        let exact: fn(f32) -> f32 = |x| x;
        let rounded: fn(f32) -> f32 = |x| half::bf16::from_f32(x).to_f32();
        // In bfloat16 the processor adds pairs: here the same chains take gradients that were rounded before.
        for (precision, round) in [(Precision::F32, exact), (Precision::Bf16, rounded)] {
            let found = gradient(cuda(), precision, exact).unwrap();
            let expected = gradient(&Device::Cpu, Precision::F32, round).unwrap();
            let what = format!("{tokens} × {rows:?} × {cols}, {precision:?}");
            assert_same(&found, &expected, &what);
        }
    }
}

#[test]
fn norms_are_those_of_the_processor() {
    for width in [1, 15, 129, 2560, 4200] {
        check(&format!("{width}"), |device| {
            ops::rms_norm(&view(&[8, width], 6, device), &tensor(&[width], 7, device), 1e-5)
        });
    }
}

/// Rows that are not dense are gathered first, by Candle's kernel.
#[test]
fn norms_of_columns_are_those_of_the_processor() {
    check("columns", |device| {
        let x = tensor(&[40, 3], 6, device).t()?;
        ops::rms_norm(&x, &tensor(&[40], 7, device), 1e-5)
    });
}

#[test]
fn rotations_are_those_of_the_processor() {
    for (batch, seq, heads, half, angle_rows) in
        [(1, 1, 5, 64, 1), (2, 3, 3, 5, 2), (1, 4, 150, 1, 1)]
    {
        check(&format!("{batch} × {seq} × {heads} × {half}"), |device| {
            let x = view(&[batch, seq, heads * 2 * half], 8, device);
            let angles = |seed| tensor(&[angle_rows, seq, half], seed, device);
            ops::rope(&x, heads, &angles(9), &angles(10))
        });
    }
}

#[test]
fn gates_are_those_of_the_processor() {
    for width in [1, 300, 1030] {
        let gated = |act, device: &Device| {
            ops::gated(&view(&[3, width], 11, device), &view(&[3, width], 12, device), act)
        };
        check(&format!("{width}"), |device| gated(Activation::Relu2, device));
        let found = floats(&gated(Activation::Silu, cuda()).unwrap());
        let expected = floats(&gated(Activation::Silu, &Device::Cpu).unwrap());
        for (found, expected) in found.iter().zip(expected) {
            // Derived at `gates_with_silu_are_within_their_roundings` of tests/cuda.
            let off = (f64::from(*found) - f64::from(expected)).abs();
            assert!(off <= 5.05 * 2f64.powi(-23) * f64::from(expected.abs()), "{found} {expected}");
        }
    }
}

#[test]
fn attention_is_that_of_the_processor() {
    for kv_type in KvType::ALL {
        for (batch, seq, (heads, kv_heads), context, head_dim, starts) in [
            (1, 1, (8, 2), 300, 32, vec![]),
            (2, 3, (6, 1), 20, 40, vec![0, 0, 4, 17, 18, 20]),
            (1, 2, (3, 3), 7, 130, vec![]),
        ] {
            let shape = [batch, kv_heads, context + 3, head_dim];
            let stored = |seed| kv_type.encode(&tensor(&shape, seed, &Device::Cpu)).unwrap();
            let (k, v) = (stored(13), stored(14));
            check(&format!("{kv_type:?}, context {context}"), |device| {
                let q = tensor(&[batch, seq, heads, head_dim], 15, device);
                let view = |x: &Tensor| x.to_device(device)?.narrow(2, 2, context);
                ops::attention(&q, &view(&k)?, &view(&v)?, &starts)
            });
        }
    }
    check("of its own tokens", |device| {
        let (q, k) = (tensor(&[2, 5, 4, 16], 16, device), tensor(&[2, 5, 2, 16], 17, device));
        ops::self_attention(&q, &k, &view(&[2, 5, 32], 18, device), &[])
    });
}

/// Logits of a prompt in one pass, and of the token after it.
fn logits(model: &Model, kv_type: KvType) -> Result<[Tensor; 2]> {
    let tokens = Tensor::new(&[[5u32, 17, 99, 3, 42, 7, 7, 250]], model.device())?;
    let mut cache = model.cache(kv_type, 1);
    let prefill = model.forward(&tokens, &mut cache)?;
    let decode = model.forward(&Tensor::new(&[[11u32]], model.device())?, &mut cache)?;
    Ok([prefill, decode])
}

#[test]
fn a_model_computes_what_it_computes_on_the_processor() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/bitnet_packed_tied");
    let source = Source::open(folder, pretrained::Precision::default(), &Hub::from_env()).unwrap();
    let [on_cuda, on_cpu] = [cuda(), &Device::Cpu].map(|device| source.load(device).unwrap());
    for kv_type in [KvType::F16, KvType::F32] {
        let found = logits(&on_cuda, kv_type).unwrap();
        for (found, expected) in found.iter().zip(logits(&on_cpu, kv_type).unwrap()) {
            assert_same(found, &expected, &format!("{kv_type:?}"));
        }
    }
}
