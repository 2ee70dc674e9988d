//! The ops on CUDA device 0 against the same ops on the processor, bit for bit, and models on both.
//!
//! The device may be a real one, or that of `tests/ptx` (scripts/cuda_interpret.sh), where sizes here keep it short.

#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used)] // test code

use std::sync::{Arc, OnceLock};

use bitnet_model::{
    adapter::{Adaptation, Adapter, AdapterConfig, Modules, Pair},
    config::Activation,
    head_weights::HeadWeights,
    hub::Hub,
    kernels::{TileFormat, head::HeadFormat},
    model::Model,
    nn::{Changed, HeadPrecision, LmHead, Need, ScreenedHead},
    ops::{self, KvType, TernaryProduct, gemm::Precision},
    pretrained::{self, Source},
    quant::{ActivationCodes, Quantizer, Rounding, WeightQuantizer, hadamard},
    rows::{Table, TensorRows},
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
            for input in [
                ActivationCodes::Int8(Rounding::HalfEven),
                ActivationCodes::Int8(Rounding::HalfUp),
                ActivationCodes::Int4(Rounding::HalfEven),
            ] {
                check(&format!("{tokens} × {cols}, {input:?}"), |device| {
                    ops::ternary_matmul(&view(&[tokens, cols], 1, device), &weights, input)
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
        ops::self_attention(&q, &k, &view(&[2, 5, 32], 18, device), &[], Precision::F32)
    });
}

#[test]
fn products_with_floats_are_those_of_the_processor() {
    for dtype in [DType::F32, DType::BF16] {
        for (tokens, rows, cols) in [(1, 3, 40), (2, 70, 17), (9, 20, 300)] {
            check(&format!("{tokens} × {rows} × {cols}, {dtype:?}"), |device| {
                let weight = tensor(&[rows + 1, cols], 19, device).to_dtype(dtype)?;
                ops::dense_matmul(&view(&[tokens, cols], 20, device), &weight.narrow(0, 1, rows)?)
            });
        }
    }
}

const HEADS: [HeadFormat; 3] = [HeadFormat::Q8, HeadFormat::Q6, HeadFormat::Q4];

#[test]
fn both_ends_of_the_network_are_those_of_the_processor() {
    for (dtype, rows, cols) in [(DType::F32, 37, 70), (DType::BF16, 130, 64)] {
        let weight = tensor(&[rows, cols], 21, &Device::Cpu).to_dtype(dtype).unwrap();
        let table = Table::new(Arc::new(TensorRows::new(&weight).unwrap()));
        for tokens in [1, 5] {
            let what = format!("{tokens} × {rows} × {cols}");
            let hidden = |device: &Device| view(&[tokens, cols], 22, device);
            for ids in [None, Some(&[3, 36, 0][..])] {
                check(&what, |device| ops::table_product(&hidden(device), &table, ids));
            }
            for format in HEADS {
                let head = Arc::new(HeadWeights::quantize(table.source(), format).unwrap());
                check(&format!("{what}, {format:?}"), |device| {
                    ops::head_product(&hidden(device), &head)
                });
            }
        }
        check("embedding", |device| {
            let ids = Tensor::new(&[9u32, 36, 0, 9, 1], device)?.narrow(0, 1, 3)?;
            ops::embed(&ids, &table)
        });
    }
}

/// Logits, −∞ where the screen excluded a token, and the numbers of rescored rows are all the same.
#[test]
fn screened_logits_are_those_of_the_processor() {
    let weight = tensor(&[700, 64], 23, &Device::Cpu);
    let needs = || {
        let changed = || Changed { freely: vec![5, 699], downwards: vec![7] };
        vec![
            Need::Top { k: 1, changed: Changed::default() },
            Need::Top { k: 5, changed: changed() },
            Need::All,
            Need::Mass { temperature: 0.3, changed: changed() },
        ]
    };
    let logits = |device: &Device| {
        let table = Table::new(Arc::new(TensorRows::new(&weight).unwrap()));
        let head = ScreenedHead::new(table).unwrap();
        head.logits(&tensor(&[4, 64], 24, device), &needs()).unwrap()
    };
    let expected = logits(&Device::Cpu);
    assert_eq!(logits(cuda()), expected);
    assert!(expected[0].rescored.is_some_and(|rows| rows < 88), "the screen excludes most");
}

/// The gradients of an op's inputs on both devices, one after another, for a reproducible gradient of its result.
fn check_gradients(what: &str, inputs: &[&[usize]], op: impl Fn(&[Var]) -> Result<Tensor>) {
    let gradients = |device: &Device| -> Result<Vec<Tensor>> {
        let seeds = 30..30 + inputs.len() as u32;
        let vars = inputs
            .iter()
            .zip(seeds)
            .map(|(shape, seed)| Var::from_tensor(&tensor(shape, seed, device)));
        let vars = vars.collect::<Result<Vec<Var>>>()?;
        let y = op(&vars)?;
        let grads = (&y * tensor(y.dims(), 29, device))?.backward()?;
        Ok(vars.iter().map(|var| grads.get(var).expect("a gradient").clone()).collect())
    };
    let found = gradients(cuda()).unwrap();
    for (i, (found, expected)) in found.iter().zip(gradients(&Device::Cpu).unwrap()).enumerate() {
        assert!(found.device().is_cuda(), "{what}");
        assert_same(found, &expected, &format!("{what}, input {i}"));
    }
}

#[test]
fn gradients_of_all_ops_are_those_of_the_processor() {
    for (rows, width) in [(3, 17), (70, 40)] {
        check_gradients("norm", &[&[rows, width], &[width]], |vars| {
            ops::rms_norm(&vars[0], &vars[1], 1e-5)
        });
    }
    check_gradients("gate", &[&[2, 3, 50], &[2, 3, 50]], |vars| {
        ops::gated(&vars[0], &vars[1], Activation::Relu2)
    });
    check_gradients("dense product", &[&[2, 5, 40], &[70, 40]], |vars| {
        ops::dense_matmul(&vars[0], &vars[1])
    });
    check_gradients("rotation", &[&[2, 3, 24]], |vars| {
        let angles = |seed| tensor(&[1, 3, 4], seed, vars[0].device());
        ops::rope(&vars[0], 3, &angles(9), &angles(10))
    });
    let starts = [0, 0, 2, 2, 0, 0, 0, 5];
    for starts in [&starts[..], &[]] {
        check_gradients("own tokens", &[&[2, 4, 4, 8], &[2, 4, 2, 8], &[2, 4, 16]], |vars| {
            ops::self_attention(&vars[0], &vars[1], &vars[2], starts, Precision::F32)
        });
    }
    // More queries than a block of the backward pass has; those of the second one do not see the first keys.
    let starts: Vec<usize> = (0..135).map(|i| if i < 120 { 0 } else { 120 }).collect();
    check_gradients("documents", &[&[1, 135, 2, 4], &[1, 135, 1, 4], &[1, 135, 4]], |vars| {
        ops::self_attention(&vars[0], &vars[1], &vars[2], &starts, Precision::F32)
    });
    check_gradients("a context", &[&[1, 130, 2, 4], &[1, 1, 133, 4], &[1, 1, 133, 4]], |vars| {
        ops::attention(&vars[0], &vars[1], &vars[2], &[])
    });
}

#[test]
fn rotated_rows_are_those_of_the_processor() {
    for width in [1, 48, 1024] {
        check_gradients(&format!("{width}"), &[&[3, width]], |vars| hadamard(&vars[0]));
        check(&format!("{width}"), |device| hadamard(&view(&[3, width], 26, device)));
    }
    let wide = tensor(&[1, 16384], 26, cuda());
    assert!(hadamard(&wide).unwrap_err().to_string().contains("leave out --device"));
}

#[test]
fn values_on_their_way_to_integers_are_those_of_the_processor() {
    for lambda in [0., 0.3, 1.] {
        for rounding in [Rounding::HalfEven, Rounding::HalfUp] {
            check_gradients(&format!("weights, {lambda}"), &[&[5, 70]], |vars| {
                WeightQuantizer::Absmean(rounding).blend(&vars[0], lambda)
            });
            for input in [ActivationCodes::Int8(rounding), ActivationCodes::Int4(rounding)] {
                check(&format!("{input:?}, {lambda}"), |device| {
                    input.blend(&view(&[5, 70], 27, device), lambda)
                });
            }
        }
        check(&format!("weights, {lambda}"), |device| {
            WeightQuantizer::Absmean(Rounding::HalfEven).blend(&view(&[5, 70], 28, device), lambda)
        });
    }
}

/// One launch normalizes and quantizes; the result is that of the two.
#[test]
fn products_of_normalized_rows_are_those_of_the_processor() {
    for (cols, tokens) in [(20, 1), (300, 3)] {
        let weights = weights(&[18, 5], cols);
        for rounding in [Rounding::HalfEven, Rounding::HalfUp] {
            let normed = |device: &Device| {
                let (x, norm) = (view(&[tokens, cols], 1, device), tensor(&[cols], 2, device));
                ops::normed_ternary_matmul(&x, (&norm, 1e-5), &weights, rounding)
            };
            check(&format!("{tokens} × {cols}, {rounding:?}"), normed);
            let (x, norm) = (view(&[tokens, cols], 1, cuda()), tensor(&[cols], 2, cuda()));
            let normalized = ops::rms_norm(&x, &norm, 1e-5).unwrap();
            let two = ops::ternary_matmul(&normalized, &weights, rounding).unwrap();
            assert_same(&normed(cuda()).unwrap(), &two, "one op for two");
        }
    }
}

/// Logits of a prompt in one pass, and of the token after it.
fn logits(model: &Model, kv_type: KvType) -> Result<[Tensor; 2]> {
    let tokens = Tensor::new(&[[5u32, 17, 99, 3, 42, 7, 7, 250]], model.device())?;
    let mut cache = model.cache(kv_type, 1);
    let prefill = model.forward(&tokens, &mut cache)?;
    let decode = model.forward(&Tensor::new(&[[11u32]], model.device())?, &mut cache)?;
    Ok([prefill, decode])
}

/// scripts/cuda_launches.py counts what the stand-in traces between the two lines.
#[test]
fn a_token_is_launched() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/bitnet_packed_tied");
    let mut source =
        Source::open(folder, pretrained::Precision::default(), &Hub::from_env()).unwrap();
    source.lm_head = HeadPrecision::Quantized(HeadFormat::Q8);
    let model = source.load(cuda()).unwrap();
    let mut cache = model.cache(KvType::F32, 1);
    let mut next = |id: u32| model.forward(&Tensor::new(&[[id]], cuda())?, &mut cache);
    next(5).unwrap();
    eprintln!("begin: a token of {} layers", model.blocks().len());
    let logits = next(7).unwrap();
    eprintln!("end");
    assert!(floats(&logits).iter().all(|logit| logit.is_finite()));
}

#[test]
fn a_model_computes_what_it_computes_on_the_processor() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/bitnet_packed_tied");
    let mut source =
        Source::open(folder, pretrained::Precision::default(), &Hub::from_env()).unwrap();
    let same = |source: &Source, kv_type: KvType| {
        let [found, expected] = [cuda(), &Device::Cpu]
            .map(|device| logits(&source.load(device).unwrap(), kv_type).unwrap());
        for (found, expected) in found.iter().zip(expected) {
            assert_same(found, &expected, &format!("{kv_type:?}, head {:?}", source.lm_head));
        }
    };
    same(&source, KvType::F16);
    same(&source, KvType::F32);
    for format in HEADS {
        source.lm_head = HeadPrecision::Quantized(format);
        same(&source, KvType::F16);
    }
}

/// An adapter of all projections, and whole norms if it is `for_all`.
fn adaptation(model: &Model, seed: u32, for_all: bool) -> Adaptation {
    let (rank, cpu) = (3, &Device::Cpu);
    let names = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"].map(String::from);
    let config = AdapterConfig {
        rank,
        alpha: 5.,
        target_modules: Modules::Names(names.into()),
        ..AdapterConfig::default()
    };
    let pairs = model.config().projections().filter_map(|(name, (rows, cols))| {
        let path = name.strip_suffix(".weight")?.to_owned();
        let pair = Pair {
            lora_a: tensor(&[rank, cols], seed, cpu),
            lora_b: tensor(&[rows, rank], seed + 1, cpu),
        };
        config.pair(&path).ok().flatten().map(|_| (path, pair))
    });
    let norm = tensor(&[model.config().hidden_size], seed + 2, cpu);
    let norms = for_all.then(|| ("model.norm.weight".to_owned(), norm));
    let adapter = Adapter::new(config.clone(), pairs.collect(), norms.into_iter().collect());
    let factor = if for_all { 1. } else { 0.5 };
    let adaptation = Adaptation::new(model.config(), &[(&adapter, factor)]).unwrap();
    adaptation.to_device(model.device()).unwrap()
}

/// One beside the whole model, and others beside single rows of a batch.
#[test]
fn adapters_compute_what_they_compute_on_the_processor() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/bitnet_packed_tied");
    let source = Source::open(folder, pretrained::Precision::default(), &Hub::from_env()).unwrap();
    let logits = |device: &Device| -> Result<[Tensor; 3]> {
        let base = source.load(device).unwrap();
        let adapted = base.adapted(&adaptation(&base, 40, true))?;
        let mut cache = base.cache(KvType::F32, 3);
        for row in [0, 2] {
            let adapter = adaptation(&base, 50 + row as u32, false);
            cache.adapt(row, Some(Arc::new(adapter)))?;
        }
        let tokens = Tensor::new(&[[5u32, 17], [99, 3], [42, 7]], device)?;
        let [prefill, decode] = self::logits(&adapted, KvType::F32)?;
        Ok([prefill, decode, base.forward(&tokens, &mut cache)?])
    };
    let expected = logits(&Device::Cpu).unwrap();
    for (found, expected) in logits(cuda()).unwrap().iter().zip(&expected) {
        assert_same(found, expected, "with adapters");
    }
    let base = source.load(&Device::Cpu).unwrap();
    let [plain, _] = self::logits(&base, KvType::F32).unwrap();
    assert_ne!(floats(&plain), floats(&expected[0]), "the adapter does nothing");
}
