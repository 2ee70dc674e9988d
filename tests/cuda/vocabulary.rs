//! Products with rows of floats and with the output head, and rows by their numbers.

use std::sync::Arc;

use bitnet_model::{
    cuda::{
        head_layout::HeadBands,
        launch::{DenseRows, Element, HeadActivations, HeadMatrix, Launch, Rows, head_groups},
    },
    head_weights::HeadWeights,
    kernels::{
        DenseWeights, Matrix, active,
        head::{GROUP, HeadFormat},
    },
    ops,
    rows::{Table, TensorRows},
};
use candle_core::{Device, Tensor};

use super::{
    assert_same,
    emulator::{Buffer, Run, run},
    spread, values,
};

/// (rows, cols, tokens), ragged in everything.
const SHAPES: [(usize, usize, usize); 6] =
    [(1, 1, 1), (3, 17, 5), (64, 32, 4), (130, 70, 3), (20, 300, 9), (19, 2560, 1)];

/// All orders of threads for short rows, one for long ones.
fn runs(cols: usize) -> &'static [Run] {
    if cols < 2560 { &Run::ALL } else { &Run::ONE }
}

/// Stored floats, as bits of 16 or 32, and as f32.
fn stored(element: Element, count: usize, seed: u32) -> (Vec<u16>, Vec<f32>) {
    let mut values = values(count, seed);
    values.iter_mut().step_by(7).for_each(|x| *x *= 1e-6); // subnormal in f16
    let bits = |x: &f32| match element {
        Element::F16 => half::f16::from_f32(*x).to_bits(),
        Element::Bf16 => half::bf16::from_f32(*x).to_bits(),
        Element::F32 => 0,
    };
    (values.iter().map(bits).collect(), values)
}

/// Rows in the device's memory and as the CPU takes them.
struct Matrices {
    element: Element,
    bits: Vec<u16>,
    values: Vec<f32>,
    shape: (usize, usize),
    narrow: Buffer<u16>,
    wide: Buffer<f32>,
}

impl Matrices {
    fn new(element: Element, shape: (usize, usize)) -> Self {
        let (bits, values) = stored(element, shape.0 * shape.1, 21);
        let (narrow, wide) = (Buffer::new(&bits), Buffer::new(&values));
        Self { element, bits, values, shape, narrow, wide }
    }

    fn address(&self) -> u64 {
        match self.element {
            Element::F32 => self.wide.address(),
            Element::F16 | Element::Bf16 => self.narrow.address(),
        }
    }

    fn weights(&self) -> DenseWeights<'_> {
        let (rows, cols) = self.shape;
        match self.element {
            Element::F32 => DenseWeights::F32(Matrix::new(&self.values, rows, cols)),
            Element::F16 => DenseWeights::F16(Matrix::new(&self.bits, rows, cols)),
            Element::Bf16 => DenseWeights::Bf16(Matrix::new(&self.bits, rows, cols)),
        }
    }
}

const ELEMENTS: [Element; 3] = [Element::F32, Element::F16, Element::Bf16];

#[test]
fn products_with_floats_are_those_of_the_cpu() {
    for element in ELEMENTS {
        for (rows, cols, tokens) in SHAPES {
            let w = Matrices::new(element, (rows, cols));
            let x = values(tokens * cols, 22);
            let mut expected = vec![0.; tokens * rows];
            active().matmul_nt(Matrix::new(&x, tokens, cols), w.weights(), &mut expected, rows);
            let stride = cols + 3;
            let x = Buffer::new(&spread(&x, cols, stride));
            let x = Rows { address: x.address(), stride, rows: tokens, width: cols };
            for &how in runs(cols) {
                let what = format!("{tokens} × {rows} × {cols}, {element:?}, {how:?}");
                let product = |ids: &[u32]| {
                    let listed = Buffer::new(ids);
                    let (address, count) = match ids {
                        [] => (0, rows),
                        ids => (listed.address(), ids.len()),
                    };
                    let y = Buffer::new(&vec![f32::NAN; tokens * count]);
                    let (count, cols) = (count as u32, cols as u32);
                    let w = DenseRows { values: w.address(), ids: address, rows: count, cols };
                    run(&Launch::dense_product(element, x, w, y.address()), how);
                    y.read()
                };
                assert_same(&product(&[]), &expected, &what);
                let ids = [rows as u32 - 1, 0, rows as u32 / 2];
                let listed = expected.chunks(rows).flat_map(|all| ids.map(|id| all[id as usize]));
                assert_same(&product(&ids), &Vec::from_iter(listed), &what);
            }
        }
    }
}

#[test]
fn rows_by_their_numbers_are_exact() {
    for element in ELEMENTS {
        let (rows, cols) = (9, 300);
        let w = Matrices::new(element, (rows, cols));
        let ids = [8u32, 0, 9, 8];
        let mut expected = vec![f32::NAN; ids.len() * cols];
        for (id, out) in ids.iter().zip(expected.chunks_mut(cols)) {
            if (*id as usize) < rows {
                w.weights().widen_row(*id as usize, out);
            }
        }
        let (listed, y) = (Buffer::new(&ids), Buffer::new(&vec![0f32; ids.len() * cols]));
        let ids = (listed.address(), ids.len());
        let launch = Launch::gather_rows(element, ids, (w.address(), rows, cols), y.address());
        run(&launch, Run::ONE[0]);
        assert_same(&y.read(), &expected, &format!("{element:?}"));
    }
}

/// Hidden states: ordinary, NaN, infinite, zero, tiny.
fn hidden_states(tokens: usize, cols: usize) -> Vec<f32> {
    let mut hidden = values(tokens * cols, 23);
    for (token, row) in hidden.chunks_mut(cols).enumerate() {
        match token {
            1 => row[cols - 1] = f32::NAN,
            2 => row[0] = f32::NEG_INFINITY,
            3 => row.fill(0.),
            4 => row.iter_mut().for_each(|x| *x *= 1e-37),
            _ => row[cols / 2] = 3.,
        }
    }
    hidden
}

#[test]
fn heads_in_few_bits_are_those_of_the_cpu() {
    for (rows, cols, tokens) in SHAPES {
        let mut w = values(rows * cols, 24);
        w[..cols].fill(0.);
        let w = Tensor::from_vec(w, (rows, cols), &Device::Cpu).unwrap();
        let table = Table::new(Arc::new(TensorRows::new(&w).unwrap()));
        let hidden = hidden_states(tokens, cols);
        let tensor = Tensor::from_slice(&hidden, (tokens, cols), &Device::Cpu).unwrap();
        for format in [HeadFormat::Q8, HeadFormat::Q6, HeadFormat::Q4] {
            let head = Arc::new(HeadWeights::quantize(table.source(), format).unwrap());
            let expected = ops::head_product(&tensor, &head).unwrap().flatten_all().unwrap();
            let bands = HeadBands::new(&head);
            let (words, scales) = (Buffer::new(&bands.words), Buffer::new(&bands.scales));
            let groups = head_groups(cols);
            let w = HeadMatrix {
                codes: words.address(),
                scales: scales.address(),
                rows: rows as u32,
                groups: groups as u32,
            };
            let stride = cols + 1;
            let x = Buffer::new(&spread(&hidden, cols, stride));
            let x = Rows { address: x.address(), stride, rows: tokens, width: cols };
            for &how in runs(cols) {
                let codes = Buffer::new(&vec![99i8; tokens * groups * 2 * GROUP]);
                let (sums, scales) =
                    (Buffer::new(&vec![99; tokens * groups]), Buffer::new(&vec![99f32; tokens]));
                let to = HeadActivations {
                    codes: codes.address(),
                    sums: sums.address(),
                    scales: scales.address(),
                };
                let y = Buffer::new(&vec![0f32; tokens * rows]);
                run(&Launch::quantize_hidden(x, to), how);
                run(&Launch::head_product(format, w, to, tokens, y.address()), how);
                let what = format!("{tokens} × {rows} × {cols}, {format:?}, {how:?}");
                assert_same(&y.read(), &expected.to_vec1::<f32>().unwrap(), &what);
            }
        }
    }
}
