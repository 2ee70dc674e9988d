//! What training alone launches: products of floats, quantization of weights, gradients of norm and gate, softmax and loss.

use bitnet_model::{
    config::Activation,
    cuda::{
        launch::{Factor, GemmShape, Launch, Right, Rows},
        layout::{Band, Stack},
    },
    kernels::{DenseWeights, Matrix, TileFormat, active},
    ops::{
        self,
        gemm::{self, Precision, gemm, gemm_add, plain},
    },
    quant::{Quantizer, Rounding, WeightQuantizer, hadamard, hadamard_block},
    weights::TernaryWeight,
};
use candle_core::{Device, Tensor, Var};

use super::{
    assert_same,
    emulator::{Buffer, Run, run},
    values,
};

/// Zeros of either sign are the same: the CPU's depend on where a value lies in its registers.
fn assert_equal(found: &[f32], expected: &[f32], what: &str) {
    let positive = |values: &[f32]| Vec::from_iter(values.iter().map(|x| x + 0.));
    assert_same(&positive(found), &positive(expected), what);
}

#[test]
fn products_of_floats_are_those_of_the_cpu() {
    for (rows, cols, depth) in [(1, 1, 1), (3, 70, 17), (65, 5, 513), (64, 64, 1030)] {
        let (a, b) = (values(rows * depth, 31), values(depth * cols, 32));
        let (a_device, b_device) = (Buffer::new(&a), Buffer::new(&b));
        for (depth_inner, add) in [(true, false), (false, true)] {
            let before = values(rows * cols, 33);
            let mut expected = before.clone();
            let (left, right) = match depth_inner {
                true => (
                    gemm::Factor::depth_inner(depth, &a, plain as fn(f32, usize) -> f32),
                    gemm::Factor::depth_inner(depth, &b, plain as fn(f32, usize) -> f32),
                ),
                false => (
                    gemm::Factor::index_inner(rows, &a, plain as fn(f32, usize) -> f32),
                    gemm::Factor::index_inner(cols, &b, plain as fn(f32, usize) -> f32),
                ),
            };
            let product = if add { gemm_add } else { gemm };
            product((rows, cols, depth), left, right, 0.75, Precision::F32, &mut expected);
            let (a, b) = (a_device.address(), b_device.address());
            let factors = match depth_inner {
                true => (Factor::depth_inner(depth, a), Factor::depth_inner(depth, b)),
                false => (Factor::index_inner(rows, a), Factor::index_inner(cols, b)),
            };
            let shape =
                GemmShape { scale: 0.75, ..GemmShape::new((rows, cols, depth), add, false) };
            for how in Run::ALL {
                let out = Buffer::new(&before);
                let (left, right) = ((factors.0, 0), (Right::F32, factors.1));
                run(&Launch::gemm(left, right, shape, 1, out.address()), how);
                assert_equal(&out.read(), &expected, &format!("{rows} × {cols} × {depth} {how:?}"));
            }
        }
    }
}

/// Right factors of integers and of bfloat16, left values divided by depth, several matrices, a wider result, and rounding.
#[test]
fn products_of_other_factors_are_those_of_their_values() {
    let (rows, cols, depth, batch) = (9, 70, 20, 2);
    let (a, divisors) = (values(batch * rows * depth, 34), values(depth, 35));
    let codes = Vec::from_iter((0..batch * depth * cols).map(|i| (i * 37 % 255) as i8));
    let bf16 = Vec::from_iter(codes.iter().map(|x| half::bf16::from_f32(f32::from(*x)).to_bits()));
    let round = |x: f32| half::bf16::from_f32(x).to_f32();
    let (a_device, divisors_device) = (Buffer::new(&a), Buffer::new(&divisors));
    let (codes_device, bf16_device) = (Buffer::new(&codes), Buffer::new(&bf16));
    let (stride, wide) = (cols + 3, rows * (cols + 3));
    for (right, address) in
        [(Right::I8, codes_device.address()), (Right::Bf16, bf16_device.address())]
    {
        let mut expected = vec![7f32; batch * wide];
        for index in 0..batch {
            let a = &a[index * rows * depth..][..rows * depth];
            let b = Vec::from_iter(
                codes[index * depth * cols..][..depth * cols].iter().map(|x| f32::from(*x)),
            );
            let mut out = vec![0.; rows * cols];
            let scaled = |x: f32, d: usize| round(x * (1. / divisors[d]));
            let left = gemm::Factor::index_inner(rows, a, scaled);
            let b = gemm::Factor::index_inner(cols, &b, plain);
            gemm((rows, cols, depth), left, b, 1., Precision::F32, &mut out);
            let to = expected[index * wide..][..wide].chunks_mut(stride);
            to.zip(out.chunks(cols)).for_each(|(to, out)| to[..cols].copy_from_slice(out));
        }
        let shape = GemmShape {
            stride: stride as u64,
            a_batch: (rows * depth) as u64,
            b_batch: (depth * cols) as u64,
            out_batch: wide as u64,
            ..GemmShape::new((rows, cols, depth), false, true)
        };
        let a = (Factor::index_inner(rows, a_device.address()), divisors_device.address());
        let b = (right, Factor::index_inner(cols, address));
        let out = Buffer::new(&vec![7f32; batch * wide]);
        run(&Launch::gemm(a, b, shape, batch, out.address()), Run::ONE[0]);
        assert_equal(&out.read(), &expected, &format!("{right:?}"));
    }
}

#[test]
fn weights_are_quantized_as_on_the_cpu() {
    for (rows, cols) in [(1, 1), (17, 130), (40, 2000), (3, 1025 * 64)] {
        let mut latent = values(rows * cols, 36);
        if rows == 40 {
            // The mean is 1, so that ½ and −½ are halfway.
            let ties = [0.5, 1.5, -0.5, -1.5];
            latent.iter_mut().enumerate().for_each(|(i, w)| *w = ties[i % 4]);
        }
        latent[0] = f32::NAN;
        for rounding in [Rounding::HalfEven, Rounding::HalfUp] {
            for nan in [true, false] {
                if !nan {
                    latent[0] = -0.5;
                }
                let format = TileFormat::TwoBit;
                let weight = TernaryWeight::from_latent(&latent, (rows, cols), rounding, format);
                let expected = Stack::new(&[weight]);
                let device = Buffer::new(&latent);
                let (words, bands) = (
                    Buffer::new(&vec![9u32; expected.words.len()]),
                    Buffer::new(&vec![Band { scale: 0., first: 0, rows: 0 }; expected.bands.len()]),
                );
                let sums = Buffer::new(&vec![f64::NAN; Launch::mean_chunks(rows * cols)]);
                let scale = Buffer::new(&[f32::NAN]);
                let how = Run::ALL[rows % 5];
                let count = rows * cols;
                run(&Launch::absolute_sums(device.address(), count, sums.address()), how);
                run(&Launch::absolute_mean(sums.address(), count, scale.address()), how);
                let (from, to) =
                    ((device.address(), scale.address()), (words.address(), bands.address()));
                let half_up = rounding == Rounding::HalfUp;
                run(&Launch::ternarize(from, (rows, cols), half_up, to), how);
                let what = format!("{rows} × {cols}, {rounding:?}, NaN {nan}");
                assert_eq!(bands.read(), expected.bands, "{what}");
                assert_eq!(words.read(), expected.words, "{what}");
            }
        }
    }
}

#[test]
fn weights_on_their_way_to_codes_are_those_of_the_cpu() {
    for count in [1, 1500, 70000] {
        let mut latent = values(count, 49);
        latent[count / 2] = -0.;
        let tensor = Tensor::from_slice(&latent, (1, count), &Device::Cpu).unwrap();
        let device = Buffer::new(&latent);
        for (rounding, lambda) in
            [(Rounding::HalfEven, 1.), (Rounding::HalfEven, 0.3), (Rounding::HalfUp, 0.)]
        {
            let expected = WeightQuantizer::Absmean(rounding).blend(&tensor, lambda).unwrap();
            let expected = expected.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let sums = Buffer::new(&vec![f64::NAN; Launch::mean_chunks(count)]);
            let (scale, y) = (Buffer::new(&[f32::NAN]), Buffer::new(&vec![f32::NAN; count]));
            let how = Run::ONE[0];
            run(&Launch::absolute_sums(device.address(), count, sums.address()), how);
            run(&Launch::absolute_mean(sums.address(), count, scale.address()), how);
            let from = (device.address(), scale.address());
            let half_up = rounding == Rounding::HalfUp;
            run(&Launch::blend_weights(from, count, half_up, lambda, y.address()), how);
            assert_same(&y.read(), &expected, &format!("{count}, {rounding:?}, {lambda}"));
        }
    }
}

#[test]
fn rotated_rows_are_those_of_the_cpu() {
    for (rows, width) in [(3, 1), (2, 48), (1, 512), (2, 6912), (1, 8192)] {
        let x = values(rows * width, 50);
        let expected = Tensor::from_slice(&x, (rows, width), &Device::Cpu).unwrap();
        let expected = hadamard(&expected).unwrap().flatten_all().unwrap();
        let expected = expected.to_vec1::<f32>().unwrap();
        let (x, size) = (Buffer::new(&x), hadamard_block(width));
        let runs = if width < 6912 { &Run::ALL[..] } else { &Run::ONE };
        for &how in runs {
            let y = Buffer::new(&vec![f32::NAN; rows * width]);
            let blocks = (rows * width / size, size);
            run(&Launch::hadamard(x.address(), blocks, y.address()), how);
            assert_same(&y.read(), &expected, &format!("{rows} × {width}, {how:?}"));
        }
    }
}

/// The gradients of two inputs of an op, whose result has the gradient `dy`.
fn gradients(
    inputs: [(&[f32], &[usize]); 2],
    dy: &[f32],
    op: impl Fn(&Tensor, &Tensor) -> candle_core::Result<Tensor>,
) -> [Vec<f32>; 2] {
    let [a, b] = inputs.map(|(data, shape)| {
        Var::from_tensor(&Tensor::from_slice(data, shape, &Device::Cpu).unwrap()).unwrap()
    });
    let y = op(&a, &b).unwrap();
    let dy = Tensor::from_slice(dy, y.shape(), &Device::Cpu).unwrap();
    let grads = (y * dy).unwrap().backward().unwrap();
    [a, b].map(|var| grads.get(&var).unwrap().flatten_all().unwrap().to_vec1().unwrap())
}

#[test]
fn gradients_of_norms_are_those_of_the_cpu() {
    const EPS: f64 = 1e-5;
    for (rows, width) in [(1, 1), (3, 17), (130, 300), (2, 4200)] {
        let (x, weight, dy) =
            (values(rows * width, 37), values(width, 38), values(rows * width, 39));
        let [expected_x, expected_weight] =
            gradients([(&x, &[rows, width]), (&weight, &[width])], &dy, |x, weight| {
                ops::rms_norm(x, weight, EPS)
            });
        let (x, weight, dy) = (Buffer::new(&x), Buffer::new(&weight), Buffer::new(&dy));
        for how in [Run::ALL[0], Run::ALL[4]] {
            let dx = Buffer::new(&vec![f32::NAN; rows * width]);
            let inverses = Buffer::new(&vec![f32::NAN; rows]);
            let shares = Buffer::new(&vec![f32::NAN; Launch::norm_shares(rows) * width]);
            let dweight = Buffer::new(&vec![f32::NAN; width]);
            let dense = |address, rows| Rows { address, stride: width, rows, width };
            let (x, dy) = (dense(x.address(), rows), dy.address());
            let weight = (weight.address(), EPS as f32);
            let to = (dx.address(), inverses.address());
            run(&Launch::rms_norm_backward(x, weight, dy, to), how);
            run(&Launch::rms_norm_shares(x, dy, inverses.address(), shares.address()), how);
            let shares = dense(shares.address(), Launch::norm_shares(rows));
            run(&Launch::sum_rows(shares, dweight.address()), how);
            let what = format!("{rows} × {width}, {how:?}");
            assert_equal(&dx.read(), &expected_x, &what);
            assert_equal(&dweight.read(), &expected_weight, &what);
        }
    }
}

/// SiLU: two exponential functions, 2.04 · 2⁻²³ apart, in 1 + e and so in σ; a quotient, then of x·(1 − σ) a difference whose
/// error is that of σ, a product, a sum and two products more: below 40 · 2⁻²⁴ of |x| + 1 times the factors.
#[test]
fn gradients_of_gates_are_those_of_the_cpu() {
    for act in [Activation::Relu2, Activation::Silu] {
        let count = 2500;
        let gate = Vec::from_iter(values(count, 41).into_iter().map(|x| x * 20.));
        let (up, dy) = (values(count, 42), values(count, 43));
        let shape = &[count][..];
        let expected =
            gradients([(&gate, shape), (&up, shape)], &dy, |gate, up| ops::gated(gate, up, act));
        let inputs = [&gate, &up, &dy].map(|values| Buffer::new(values));
        let outputs = [(); 2].map(|()| Buffer::new(&vec![f32::NAN; count]));
        let (from, to) =
            ([0, 1, 2].map(|i| inputs[i].address()), [0, 1].map(|i| outputs[i].address()));
        run(&Launch::gated_backward(act, from, count, to), Run::ONE[0]);
        for (found, expected) in outputs.iter().zip(&expected) {
            for (i, (found, expected)) in found.read().iter().zip(expected).enumerate() {
                let bound = match act {
                    Activation::Relu2 => 0.,
                    Activation::Silu => 40. * 2f32.powi(-24) * (gate[i].abs() + 1.) * dy[i].abs(),
                };
                assert!((found - expected).abs() <= bound, "{act:?} {found:e} {expected:e}");
            }
        }
    }
}

fn dot(x: &[f32], y: &[f32]) -> f32 {
    let mut out = [0.];
    let y = DenseWeights::F32(Matrix::new(y, 1, y.len()));
    active().matmul_nt(Matrix::new(x, 1, x.len()), y, &mut out, 1);
    out[0]
}

#[test]
fn gradients_of_softmax_are_those_of_the_cpu() {
    let (heads, queries, keys, begin, scale) = (2, 3, 300, 5, 0.3);
    // Positions: all, some, none.
    let visible = [[5u32, 305], [10, 290], [8, 8]];
    let (scores, upstream) =
        (values(heads * queries * keys, 44), values(heads * queries * keys, 45));
    let (mut p, mut ds) = (scores.clone(), upstream.clone());
    for (row, (p, ds)) in p.chunks_mut(keys).zip(ds.chunks_mut(keys)).enumerate() {
        let [first, end] = visible[row % queries].map(|position| position as usize - begin);
        for hidden in [0..first, end..keys] {
            p[hidden.clone()].fill(0.);
            ds[hidden].fill(0.);
        }
        let (p, ds) = (&mut p[first..end], &mut ds[first..end]);
        active().softmax(p);
        let mean = dot(p, ds);
        ds.iter_mut().zip(p.iter()).for_each(|(ds, p)| *ds = p * (*ds - mean) * scale);
    }
    for how in Run::ALL {
        let (scores, upstream) = (Buffer::new(&scores), Buffer::new(&upstream));
        let bounds = Buffer::new(visible.as_flattened());
        let (rows, shape) = ((scores.address(), upstream.address()), (heads, queries, keys));
        run(&Launch::softmax_backward(rows, (bounds.address(), begin), shape, scale), how);
        assert_equal(&scores.read(), &p, &format!("{how:?}"));
        assert_equal(&upstream.read(), &ds, &format!("{how:?}"));
    }
}

#[test]
fn losses_are_those_of_the_cpu() {
    for (rows, width) in [(1, 1), (3, 1300), (2, 5000)] {
        let logits = Vec::from_iter(values(rows * width, 46).into_iter().map(|x| 9. * x));
        let targets = Vec::from_iter((0..rows).map(|row| (row * 7 % width) as u32));
        let log_sums = values(rows, 47);
        let (mut sums, mut expected) = (Vec::new(), logits.clone());
        for (row, logits) in expected.chunks_mut(width).enumerate() {
            let (target, max) = (targets[row] as usize, active().max(logits));
            let mut shifted = Vec::from_iter(logits.iter().map(|x| x - max));
            active().exp(&mut shifted);
            sums.extend([max, active().sum(&shifted), logits[target]]);
            logits.iter_mut().for_each(|x| *x -= log_sums[row]);
            active().exp(logits);
            logits.iter_mut().for_each(|x| *x *= 0.3);
            logits[target] -= 0.3;
        }
        for how in [Run::ALL[0], Run::ALL[3]] {
            let device = Buffer::new(&logits);
            let (targets, out) = (Buffer::new(&targets), Buffer::new(&vec![f32::NAN; 3 * rows]));
            let all = Rows { address: device.address(), stride: width, rows, width };
            run(&Launch::exponential_sums(all, targets.address(), out.address()), how);
            assert_same(&out.read(), &sums, &format!("{rows} × {width}, {how:?}"));
            let log_sums = Buffer::new(&log_sums);
            let (targets, log_sums) = (targets.address(), log_sums.address());
            run(&Launch::softmax_minus_onehot(all, targets, log_sums, 0.3), how);
            assert_same(&device.read(), &expected, &format!("{rows} × {width}, {how:?}"));
        }
    }
}

#[test]
fn rows_are_scattered_to_their_places() {
    let (ids, cols) = ([4u32, 0], 300);
    let (x, mut expected) = (values(2 * cols, 48), vec![1f32; 5 * cols]);
    for (id, row) in ids.iter().zip(x.chunks(cols)) {
        expected[*id as usize * cols..][..cols].copy_from_slice(row);
    }
    let (ids, x, y) = (Buffer::new(&ids), Buffer::new(&x), Buffer::new(&vec![1f32; 5 * cols]));
    let x = Rows { address: x.address(), stride: cols, rows: 2, width: cols };
    run(&Launch::scatter_rows(ids.address(), x, y.address()), Run::ONE[0]);
    assert_same(&y.read(), &expected, "");
}
