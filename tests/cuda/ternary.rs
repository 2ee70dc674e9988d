//! Products with ternary weights, forward and backward.

use bitnet_model::{
    cuda::{
        launch::{Activations, BackwardMatrix, Launch, Rows, Weights, band_offsets, padded},
        layout::{Band, Stack, bands_of},
    },
    kernels::TileFormat,
    ops::{gemm::Precision, ternary_matmul::backward_x},
    quant::Rounding,
    weights::{TernaryWeight, ternary_product},
};

use super::{
    assert_same,
    emulator::{Buffer, Run, run},
    spread, values,
};

fn weights(rows: &[usize], cols: usize, format: TileFormat) -> Vec<TernaryWeight> {
    let weight = |&rows: &usize| {
        let latent = values(rows * cols, rows as u32);
        TernaryWeight::from_latent(&latent, (rows, cols), Rounding::HalfEven, format)
    };
    rows.iter().map(weight).collect()
}

/// A stack on the device.
struct Loaded {
    words: Buffer<u32>,
    bands: Buffer<Band>,
    chunks: usize,
}

impl Loaded {
    fn new(weights: &[TernaryWeight]) -> Self {
        let stack = Stack::new(weights);
        let (words, bands) = (Buffer::new(&stack.words), Buffer::new(&stack.bands));
        Self { words, bands, chunks: stack.chunks }
    }

    /// The product of `x` with the matrices of a part of the stack.
    fn product(
        &self,
        all: &[TernaryWeight],
        part: std::ops::Range<usize>,
        x: &[f32],
        how: Run,
    ) -> Vec<f32> {
        let cols = all[0].in_features();
        let tokens = x.len() / cols;
        let codes = Buffer::new(&vec![99i8; tokens * padded(cols)]);
        let (sums, factors) = (Buffer::new(&vec![0i32; tokens]), Buffer::new(&vec![0f32; tokens]));
        let to = Activations {
            codes: codes.address(),
            sums: sums.address(),
            factors: factors.address(),
        };
        let x = Buffer::new(x);
        let rows = Rows { address: x.address(), stride: cols, rows: tokens, width: cols };
        run(&Launch::quantize_rows(rows, Rounding::HalfEven.into(), to), how);
        let rows = |weights: &[TernaryWeight]| {
            weights.iter().map(TernaryWeight::out_features).sum::<usize>()
        };
        let first_band: usize = all[..part.start].iter().map(bands_of).sum();
        let (word, band) = band_offsets(first_band, self.chunks);
        let weights = Weights {
            codes: self.words.address() + word as u64,
            bands: self.bands.address() + band as u64,
            count: all[part.clone()].iter().map(bands_of).sum::<usize>() as u32,
            chunks: self.chunks as u32,
            first: rows(&all[..part.start]) as u32,
        };
        let width = rows(&all[part]);
        let y = Buffer::new(&vec![f32::NAN; tokens * width]);
        run(&Launch::ternary_product(weights, to, (tokens, width), y.address()), how);
        y.read()
    }
}

fn check_products(rows: &[usize], cols: usize, tokens: &[usize], format: TileFormat, runs: &[Run]) {
    let weights = weights(rows, cols, format);
    let loaded = Loaded::new(&weights);
    for &tokens in tokens {
        let x = values(tokens * cols, tokens as u32);
        let expected = ternary_product(&x, &weights, Rounding::HalfEven);
        for how in runs {
            let found = loaded.product(&weights, 0..weights.len(), &x, *how);
            let what = format!("{tokens} tokens × {rows:?} × {cols}, {format:?}, {how:?}");
            assert_same(&found, &expected, &what);
        }
    }
}

/// One, few, and many tokens: all three kernels and the places where they take turns. Every shape is ragged in something.
const TOKENS: [usize; 9] = [1, 2, 7, 8, 9, 32, 33, 65, 130];

#[test]
fn products_of_any_shape_are_those_of_the_cpu() {
    for cols in [1, 20, 128, 130, 300] {
        check_products(&[3, 16, 37, 133], cols, &TOKENS, TileFormat::TwoBit, &Run::ONE);
    }
    check_products(&[50], 260, &TOKENS, TileFormat::Trits, &Run::ONE);
}

#[test]
fn products_do_not_depend_on_the_order_of_threads() {
    check_products(&[16, 21], 300, &[1, 8, 40], TileFormat::TwoBit, &Run::ALL);
}

#[test]
fn products_with_the_instruction_of_sm_75_are_those_of_the_cpu() {
    check_products(&[40, 7], 300, &[1, 5, 70], TileFormat::TwoBit, &Run::SM75);
}

#[test]
fn products_of_the_models_widths_are_those_of_the_cpu() {
    check_products(&[23], 6912, &[1, 3, 40], TileFormat::TwoBit, &Run::ONE);
    check_products(&[20, 5, 5], 2560, &[1, 3], TileFormat::TwoBit, &Run::ONE);
}

/// Values of all rows are the largest: no sum may overflow on its way, and no sign may be lost.
#[test]
fn products_of_the_largest_codes_are_exact() {
    let cols = 6912;
    let latent: Vec<f32> = [1., -1.].iter().flat_map(|w| vec![*w; cols]).collect();
    let weights =
        [TernaryWeight::from_latent(&latent, (2, cols), Rounding::HalfEven, TileFormat::TwoBit)];
    let loaded = Loaded::new(&weights);
    for tokens in [1, 2, 40] {
        let x = Vec::from_iter((0..tokens * cols).map(|i| if i < cols { 3. } else { -3. }));
        let expected = ternary_product(&x, &weights, Rounding::HalfEven);
        assert_same(&loaded.product(&weights, 0..1, &x, Run::ONE[0]), &expected, "");
    }
}

#[test]
fn a_part_of_a_stack_is_multiplied_alone() {
    let weights = weights(&[18, 33, 5], 140, TileFormat::TwoBit);
    let loaded = Loaded::new(&weights);
    for tokens in [1, 4, 35] {
        let x = values(tokens * 140, 9);
        for part in [0..1, 1..2, 2..3, 1..3] {
            let expected = ternary_product(&x, &weights[part.clone()], Rounding::HalfEven);
            let found = loaded.product(&weights, part.clone(), &x, Run::ONE[0]);
            assert_same(&found, &expected, &format!("{part:?} of {tokens} tokens"));
        }
    }
}

/// Zeros of either sign are the same: the CPU's depend on where a value lies in its registers.
fn assert_equal(found: &[f32], expected: &[f32], what: &str) {
    let positive = |values: &[f32]| Vec::from_iter(values.iter().map(|x| x + 0.));
    assert_same(&positive(found), &positive(expected), what);
}

#[test]
fn gradients_are_those_of_the_cpu() {
    for (rows, cols, tokens) in [
        (&[7, 20][..], 130, 3),
        (&[512], 40, 65),
        (&[513, 3], 128, 2),
        (&[1100], 7, 1),
        (&[16], 2560, 1),
    ] {
        let weights = weights(rows, cols, TileFormat::TwoBit);
        let loaded = Loaded::new(&weights);
        let width: usize = rows.iter().sum();
        let dy = values(tokens * width, 11);
        let stride = width + 2;
        let gradients = Buffer::new(&spread(&dy, width, stride));
        for bf16 in [false, true] {
            let round = |x: &f32| if bf16 { half::bf16::from_f32(*x).to_f32() } else { *x };
            let rounded = Vec::from_iter(dy.iter().map(round));
            let mut expected = vec![0.; tokens * cols];
            backward_x(&rounded, &weights, Precision::F32, &mut expected);
            for how in Run::ALL {
                let dx = Buffer::new(&vec![f32::NAN; tokens * cols]);
                let (mut first_band, mut first) = (0, 0);
                for weight in &weights {
                    let (word, band) = band_offsets(first_band, loaded.chunks);
                    let matrix = BackwardMatrix {
                        codes: loaded.words.address() + word as u64,
                        bands: loaded.bands.address() + band as u64,
                        rows: weight.out_features() as u32,
                        cols: cols as u32,
                        chunks: loaded.chunks as u32,
                    };
                    let address = gradients.address() + 4 * first as u64;
                    let dy = Rows { address, stride, rows: tokens, width: weight.out_features() };
                    let launch =
                        Launch::ternary_backward(matrix, dy, first > 0, bf16, dx.address());
                    run(&launch, how);
                    first += weight.out_features();
                    first_band += bands_of(weight);
                }
                let what = format!("{tokens} tokens × {rows:?} × {cols}, bf16 {bf16}, {how:?}");
                assert_equal(&dx.read(), &expected, &what);
            }
        }
    }
}
