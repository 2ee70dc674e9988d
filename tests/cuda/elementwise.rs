//! Quantization, norm, rotary embedding and gate.

use bitnet_model::{
    activations::QuantizedActivations,
    config::Activation,
    cuda::launch::{Activations, Launch, Rows, padded},
    kernels::TileFormat,
    ops,
    quant::{ActivationCodes, Quantizer, Rounding},
};
use candle_core::{Device, Tensor};

use super::{
    assert_same,
    emulator::{Buffer, Run, run},
    spread, values,
};

const WIDTHS: [usize; 9] = [1, 3, 15, 16, 127, 129, 2560, 4097, 6912];

const INPUTS: [ActivationCodes; 4] = [
    ActivationCodes::Int8(Rounding::HalfEven),
    ActivationCodes::Int8(Rounding::HalfUp),
    ActivationCodes::Int4(Rounding::HalfEven),
    ActivationCodes::Int4(Rounding::HalfUp),
];

/// All orders of threads for short rows, one for long ones.
fn runs(width: usize) -> &'static [Run] {
    if width < 2560 { &Run::ALL } else { &Run::ONE }
}

/// Rows of activations on the device.
struct Quantized {
    codes: Buffer<i8>,
    sums: Buffer<i32>,
    factors: Buffer<f32>,
}

impl Quantized {
    fn new(rows: usize, width: usize) -> Self {
        Self {
            codes: Buffer::new(&vec![99i8; rows * padded(width)]),
            sums: Buffer::new(&vec![99i32; rows]),
            factors: Buffer::new(&vec![99f32; rows]),
        }
    }

    fn address(&self) -> Activations {
        Activations {
            codes: self.codes.address(),
            sums: self.sums.address(),
            factors: self.factors.address(),
        }
    }

    /// Against what the CPU makes of `x`.
    fn assert_holds(&self, x: &[f32], width: usize, input: ActivationCodes, what: &str) {
        let expected = QuantizedActivations::new(x, width, input, TileFormat::TwoBit);
        assert_same(&self.factors.read(), expected.factors(), what);
        let (codes, sums) = (self.codes.read(), self.sums.read());
        let rows = codes.chunks(padded(width)).zip(expected.codes().chunks(expected.stride()));
        for ((codes, expected), sum) in rows.zip(sums) {
            assert_eq!(codes[..width], expected[..width], "{what}");
            assert!(codes[width..].iter().all(|code| *code == 0), "{what}: padding");
            assert_eq!(sum, codes.iter().map(|&code| i32::from(code)).sum::<i32>(), "{what}");
        }
    }
}

/// A row each: ordinary, all zero, with ties, tiny, NaN, infinite.
fn rows_to_quantize(width: usize) -> Vec<f32> {
    let mut rows = values(6 * width, width as u32);
    rows[width..2 * width].fill(0.);
    for (i, x) in rows[2 * width..3 * width].iter_mut().enumerate() {
        *x = match i {
            0 => 127., // a is 1: the others are halfway between integers
            _ => (i % 200) as f32 - 100.5,
        };
    }
    rows[3 * width..4 * width].iter_mut().for_each(|x| *x *= 1e-39);
    rows[5 * width - 1] = f32::NAN;
    rows[6 * width - 1] = f32::NEG_INFINITY;
    rows
}

#[test]
fn quantized_rows_are_those_of_the_cpu() {
    for width in WIDTHS {
        let rows = rows_to_quantize(width);
        let stride = width + 5;
        let buffer = Buffer::new(&spread(&rows, width, stride));
        let x = Rows { address: buffer.address(), stride, rows: 6, width };
        for input in INPUTS {
            for &how in runs(width) {
                let quantized = Quantized::new(6, width);
                run(&Launch::quantize_rows(x, input, quantized.address()), how);
                quantized.assert_holds(&rows, width, input, &format!("{width} {input:?} {how:?}"));
            }
        }
    }
}

#[test]
fn rows_on_their_way_to_integers_are_those_of_the_cpu() {
    for width in [1, 127, 2560] {
        let rows = rows_to_quantize(width);
        let stride = width + 5;
        let tensor = Tensor::from_slice(&rows, (6, width), &Device::Cpu).unwrap();
        let buffer = Buffer::new(&spread(&rows, width, stride));
        let x = Rows { address: buffer.address(), stride, rows: 6, width };
        for (input, lambda) in INPUTS.into_iter().zip([1., 0.3, 0., 1.]) {
            let expected = input.blend(&tensor, lambda).unwrap().flatten_all().unwrap();
            let expected = expected.to_vec1::<f32>().unwrap();
            for &how in runs(width) {
                let y = Buffer::new(&vec![9f32; 6 * width]);
                run(&Launch::blend_rows(x, input, lambda, y.address()), how);
                assert_same(&y.read(), &expected, &format!("{width} {input:?} {lambda} {how:?}"));
            }
        }
    }
}

#[test]
fn norms_are_those_of_the_cpu_and_so_are_their_integers() {
    const EPS: f64 = 1e-5;
    for width in WIDTHS {
        let (rows, weight) = (values(3 * width, 1), values(width, 2));
        let stride = width + 3;
        let x = Buffer::new(&spread(&rows, width, stride));
        let tensor = Tensor::from_slice(&rows, (3, width), &Device::Cpu).unwrap();
        let norm = Tensor::from_slice(&weight, width, &Device::Cpu).unwrap();
        let expected = ops::rms_norm(&tensor, &norm, EPS).unwrap().flatten_all().unwrap();
        let expected = expected.to_vec1::<f32>().unwrap();
        let (x, weight) =
            (Rows { address: x.address(), stride, rows: 3, width }, Buffer::new(&weight));
        for &how in runs(width) {
            let what = format!("{width} {how:?}");
            let y = Buffer::new(&vec![f32::NAN; 3 * width]);
            run(&Launch::rms_norm(x, weight.address(), EPS as f32, y.address()), how);
            assert_same(&y.read(), &expected, &what);
            for input in [INPUTS[0], INPUTS[3]] {
                let quantized = Quantized::new(3, width);
                let to = quantized.address();
                run(&Launch::rms_norm_quantize(x, weight.address(), EPS as f32, input, to), how);
                quantized.assert_holds(&expected, width, input, &what);
            }
        }
    }
}

#[test]
fn rotations_are_those_of_the_cpu() {
    for (batch, seq, heads, half, angle_rows) in
        [(1, 1, 20, 64, 1), (2, 3, 5, 64, 1), (2, 3, 3, 5, 2), (1, 4, 300, 1, 1)]
    {
        let (tokens, width) = (batch * seq, heads * 2 * half);
        let (x, angles) = (values(tokens * width, 3), values(angle_rows * seq * half, 4));
        let (cos, sin): (Vec<f32>, Vec<f32>) = angles.iter().map(|x| (x.cos(), x.sin())).unzip();
        let tensor = |data: &[f32], shape| Tensor::from_slice(data, shape, &Device::Cpu).unwrap();
        let angles = (angle_rows, seq, half);
        let expected = ops::rope(
            &tensor(&x, (batch, seq, width)),
            heads,
            &tensor(&cos, angles),
            &tensor(&sin, angles),
        );
        let expected = expected.unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let stride = width + 7;
        let x = Buffer::new(&spread(&x, width, stride));
        let x = Rows { address: x.address(), stride, rows: tokens, width };
        let (cos, sin) = (Buffer::new(&cos), Buffer::new(&sin));
        for how in Run::ALL {
            let y = Buffer::new(&vec![f32::NAN; tokens * width]);
            let angles = (cos.address(), sin.address());
            run(&Launch::rope(x, angles, (angle_rows * seq, half), y.address()), how);
            assert_same(&y.read(), &expected, &format!("{heads} heads of {half} pairs, {how:?}"));
        }
    }
}

/// What the gate gives on the device, and on the CPU.
fn gates(act: Activation, gate: &[f32], up: &[f32], width: usize) -> [Vec<f32>; 2] {
    let rows = gate.len() / width;
    let tensor = |data: &[f32]| Tensor::from_slice(data, (rows, width), &Device::Cpu).unwrap();
    let expected = ops::gated(&tensor(gate), &tensor(up), act).unwrap();
    let expected = expected.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let strides = [width + 1, 2 * width];
    let [gate, up] = [(gate, strides[0]), (up, strides[1])]
        .map(|(data, stride)| (Buffer::new(&spread(data, width, stride)), stride));
    let view = |(buffer, stride): &(Buffer<f32>, usize)| Rows {
        address: buffer.address(),
        stride: *stride,
        rows,
        width,
    };
    let y = Buffer::new(&vec![f32::NAN; rows * width]);
    run(&Launch::gated(act, view(&gate), view(&up), y.address()), Run::ONE[0]);
    [y.read(), expected]
}

#[test]
fn gates_are_those_of_the_cpu() {
    for width in WIDTHS {
        let mut gate = values(3 * width, 5);
        gate[0] = f32::NAN;
        let [found, expected] = gates(Activation::Relu2, &gate, &values(3 * width, 6), width);
        assert_same(&found, &expected, &format!("{width}"));
    }
}

/// Both exponential functions are off by at most 1.02 units in the last place, 2⁻²³ of the value: together 2.04 · 2⁻²³. Each
/// side then rounds a sum, a quotient and a product, by 2⁻²⁴ of itself: 6 · 2⁻²⁴. In all, 5.04 · 2⁻²³, and terms of second
/// order. Where eˣ is near the end of the floats one side may have ∞ and give 0 for 90 · 2⁻¹²⁸.
#[test]
fn gates_with_silu_are_within_their_roundings() {
    let gate = Vec::from_iter(values(20_000, 7).into_iter().map(|x| x * 95.));
    let [found, expected] = gates(Activation::Silu, &gate, &values(20_000, 8), 5000);
    for (found, expected) in found.iter().zip(&expected) {
        let off = (f64::from(*found) - f64::from(*expected)).abs();
        let bound = 5.05 * 2f64.powi(-23) * f64::from(expected.abs()) + 90. * 2f64.powi(-128);
        assert!(off <= bound, "{found:e} is not {expected:e}");
    }
}
