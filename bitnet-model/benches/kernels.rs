//! Every routine of every kernel this processor can run, on one thread and on data that stays in its second-level cache:
//! `cargo bench -p bitnet-model --bench kernels -- ternary/1`.

#![allow(missing_docs)] // what the macros make

use std::{hint::black_box, time::Duration};

use bitnet_model::kernels::{
    Bf16Panels, DenseWeights, Kernel, Matrix, Order, PanelProduct, ROWS, Tile, TileFormat,
    available,
    head::{GROUP, HeadActivations, HeadBand, HeadFormat, quantize_hidden},
    tile,
};
use criterion::{
    BenchmarkGroup, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main,
    measurement::WallTime,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Columns of most matrices of the 2B-4T geometry.
const HIDDEN: usize = 2560;
/// Width of a head, and keys and values of a block of attention.
const HEAD_DIM: usize = 128;
const CONTEXT: usize = 512;

fn rng() -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(158)
}

fn floats(len: usize) -> Vec<f32> {
    let mut rng = rng();
    (0..len).map(|_| rng.random_range(-1f32..1.)).collect()
}

/// Times `run` with each kernel; one call is `elements` products or values.
fn each_kernel(
    c: &mut Criterion,
    routine: &str,
    elements: usize,
    mut run: impl FnMut(&Kernel) -> f32,
) {
    let mut group: BenchmarkGroup<'_, WallTime> = c.benchmark_group(routine);
    group.warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_secs(1));
    group.sample_size(20).throughput(Throughput::Elements(elements as u64));
    for kernel in available() {
        group.bench_function(BenchmarkId::from_parameter(kernel.name()), |b| {
            b.iter(|| run(kernel));
        });
    }
}

/// Sixteen rows of ternary weights times some tokens.
fn ternary(c: &mut Criterion) {
    let mut rng = rng();
    for (format, tokens) in TileFormat::ALL.into_iter().flat_map(|f| [1, 4, 8, 64].map(|t| (f, t)))
    {
        let cols = format.cols();
        let mut codes = || -> Vec<u8> { (0..cols).map(|_| rng.random_range(0..3)).collect() };
        let mut tiles: Vec<Tile> = vec![format.empty(); HIDDEN.div_ceil(cols)];
        for tile in &mut tiles {
            (0..ROWS).for_each(|row| tile::set_row(tile, row, format.pack_row(&codes())));
        }
        let width = tiles.len() * cols;
        let x: Vec<i8> = (0..tokens * width).map(|_| rng.random_range(-127..=127)).collect();
        let sum = |row: &[i8]| row.iter().map(|x| i32::from(*x)).sum();
        let sums: Vec<i32> = x.chunks(width).map(sum).collect();
        let mut out = vec![[0; ROWS]; tokens];
        let name = format!("ternary/{}/{tokens}", format.name());
        each_kernel(c, &name, tokens * HIDDEN * ROWS, |kernel| {
            kernel.ternary_dots(format, &tiles, &x, &sums, &mut out);
            black_box(&out)[0][0] as f32
        });
    }
}

/// Sixteen rows of an output head times some tokens.
fn head(c: &mut Criterion) {
    let mut rng = rng();
    let groups = HIDDEN / GROUP;
    for (format, name) in [(HeadFormat::Q8, "q8"), (HeadFormat::Q6, "q6"), (HeadFormat::Q4, "q4")] {
        let lines = groups * format.lines_per_group();
        let lines: Vec<[u8; 64]> =
            (0..lines).map(|_| std::array::from_fn(|_| rng.random())).collect();
        let row_scales = [0.01; ROWS];
        let group_scales = vec![[0x3c00; ROWS]; groups]; // bfloat16 of 2⁻⁷
        let band = match format {
            HeadFormat::Q8 => HeadBand::Q8 { lines: &lines, scales: &row_scales },
            HeadFormat::Q6 => HeadBand::Q6 { lines: &lines, scales: &group_scales },
            HeadFormat::Q4 => HeadBand::Q4 { lines: &lines, scales: &group_scales },
        };
        for tokens in [1, 8] {
            let mut quads = vec![[0; 8]; tokens * HIDDEN / 4];
            let mut sums = vec![0; tokens * groups];
            let rows = quads.chunks_mut(HIDDEN / 4).zip(sums.chunks_mut(groups));
            let hidden = floats(HIDDEN);
            let scales: Vec<f32> =
                rows.map(|(quads, sums)| quantize_hidden(&hidden, quads, sums)).collect();
            let x = HeadActivations { quads: &quads, sums: &sums, scales: &scales };
            let mut out = vec![[0.; ROWS]; tokens];
            each_kernel(c, &format!("head-{name}/{tokens}"), tokens * HIDDEN * ROWS, |kernel| {
                kernel.head_product(band, x, &mut out);
                black_box(&out)[0][0]
            });
        }
    }
}

/// Rows of activations and of an output head to integers.
fn quantize(c: &mut Criterion) {
    let x = floats(HIDDEN);
    let mut codes = vec![0i8; HIDDEN];
    each_kernel(c, "quantize_row", HIDDEN, |kernel| kernel.quantize_row(&x, false, &mut codes).0);
    let mut codes = vec![0u8; HIDDEN];
    each_kernel(c, "quantize_head_row", HIDDEN, |kernel| {
        kernel.quantize_head_row(&x, &mut codes).scale
    });
}

/// Products of floats as attention and the exact head have them.
fn dense(c: &mut Criterion) {
    let (keys, probabilities) = (floats(CONTEXT * HEAD_DIM), floats(4 * CONTEXT));
    let half: Vec<u16> = keys.iter().map(|x| half::f16::from_f32(*x).to_bits()).collect();
    let bytes: Vec<i8> = keys.iter().map(|x| (x * 127.) as i8).collect();
    let weights = [
        ("f32", DenseWeights::F32(Matrix::new(&keys, CONTEXT, HEAD_DIM))),
        ("f16", DenseWeights::F16(Matrix::new(&half, CONTEXT, HEAD_DIM))),
        ("bf16", DenseWeights::Bf16(Matrix::new(&half, CONTEXT, HEAD_DIM))),
        ("int8", DenseWeights::I8(Matrix::new(&bytes, CONTEXT, HEAD_DIM))),
    ];
    for (name, weights) in weights {
        // Four query heads share the keys and values of one head.
        for queries in [4, 64] {
            let q = floats(queries * HEAD_DIM);
            let mut scores = vec![0.; queries * CONTEXT];
            let products = queries * CONTEXT * HEAD_DIM;
            each_kernel(c, &format!("matmul_nt-{name}/{queries}"), products, |kernel| {
                let q = Matrix::new(&q, queries, HEAD_DIM);
                kernel.matmul_nt(q, weights, &mut scores, CONTEXT);
                black_box(&scores)[0]
            });
        }
        let mut out = vec![0.; 4 * HEAD_DIM];
        let products = 4 * CONTEXT * HEAD_DIM;
        each_kernel(c, &format!("weighted_sums-{name}/4"), products, |kernel| {
            kernel.weighted_sums(Matrix::new(&probabilities, 4, CONTEXT), weights, &mut out);
            black_box(&out)[0]
        });
    }
}

/// Products of panels, as gradients have them: a task's rows times 384 columns, of a block of the depth.
fn panels(c: &mut Criterion) {
    const DEPTH: usize = 512;
    let (rows, cols) = (48, 384);
    let (a, b) = (floats(rows * DEPTH), floats(cols * DEPTH));
    let mut out = vec![0.; rows * cols];
    let shape =
        PanelProduct { rows, cols, depth: DEPTH, scale: 1., add: false, order: Order::Rows };
    each_kernel(c, "multiply_panels-f32", rows * cols * DEPTH, |kernel| {
        kernel.multiply_panels(&a, &b, shape, &mut out);
        black_box(&out)[0]
    });
    let Some(bf16) = Bf16Panels::new() else { return };
    let pairs = |values: &[f32]| values[..values.len() / 2].iter().map(|x| x.to_bits()).collect();
    let (a, b): (Vec<u32>, Vec<u32>) = (pairs(&a), pairs(&b));
    let shape = PanelProduct { depth: DEPTH / 2, ..shape };
    each_kernel(c, "multiply_panels-bf16", rows * cols * DEPTH, |_| {
        bf16.multiply(&a, &b, shape, &mut out);
        black_box(&out)[0]
    });
}

/// Passes over one row.
fn rows(c: &mut Criterion) {
    let x = floats(HIDDEN);
    each_kernel(c, "sum", HIDDEN, |kernel| kernel.sum(black_box(&x)));
    each_kernel(c, "sum_squares", HIDDEN, |kernel| kernel.sum_squares(black_box(&x)));
    each_kernel(c, "max", HIDDEN, |kernel| kernel.max(black_box(&x)));
    let mut y = floats(HIDDEN);
    each_kernel(c, "axpy", HIDDEN, |kernel| {
        kernel.axpy(1e-6, &x, &mut y);
        black_box(&y)[0]
    });
    let mut y = x.clone();
    each_kernel(c, "exp", HIDDEN, |kernel| {
        y.copy_from_slice(&x);
        kernel.exp(&mut y);
        black_box(&y)[0]
    });
    each_kernel(c, "softmax", HIDDEN, |kernel| {
        y.copy_from_slice(&x);
        kernel.softmax(&mut y);
        black_box(&y)[0]
    });
}

criterion_group!(benches, ternary, head, quantize, dense, panels, rows);
criterion_main!(benches);
