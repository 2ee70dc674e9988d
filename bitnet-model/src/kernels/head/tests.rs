//! The quantized head against naive code: equal integers, and floats of equal bits.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::kernels::{active, tests::tested};

const FORMATS: [HeadFormat; 3] = [HeadFormat::Q8, HeadFormat::Q6, HeadFormat::Q4];

fn rng() -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(158)
}

fn floats(rng: &mut ChaCha8Rng, len: usize) -> Vec<f32> {
    (0..len).map(|_| rng.random_range(-3f32..3.)).collect()
}

/// A band of random codes; those of the first two rows are the largest and the smallest there are.
fn band(rng: &mut ChaCha8Rng, format: HeadFormat, groups: usize) -> (Vec<Line>, Vec<Vec<u8>>) {
    let largest = format.offset() - 1 + format.offset();
    let per_group = format.lines_per_group();
    let mut lines = vec![[0; 64]; groups * per_group];
    let mut codes = vec![Vec::new(); ROWS];
    for (group, lines) in lines.chunks_mut(per_group).enumerate() {
        for (row, codes) in codes.iter_mut().enumerate() {
            let group_codes: [u8; GROUP] = std::array::from_fn(|_| match row {
                0 => largest,
                1 => 0,
                _ => rng.random_range(0..=largest),
            });
            set_group(format, lines, row, &group_codes);
            assert_eq!(super::group(format, lines, row), group_codes, "{format:?} {group}");
            codes.extend(group_codes);
        }
    }
    (lines, codes)
}

struct Activations {
    quads: Vec<[i8; 8]>,
    sums: Vec<i32>,
    scales: Vec<f32>,
}

impl Activations {
    fn new(hidden: &[f32], tokens: usize, groups: usize) -> Self {
        let cols = hidden.len() / tokens.max(1);
        let mut quads = vec![[7; 8]; tokens * groups * GROUP / 4];
        let mut sums = vec![7; tokens * groups];
        let scales = (0..tokens)
            .map(|token| {
                let quads = &mut quads[token * groups * GROUP / 4..][..groups * GROUP / 4];
                let sums = &mut sums[token * groups..][..groups];
                quantize_hidden(&hidden[token * cols..][..cols], quads, sums)
            })
            .collect();
        Self { quads, sums, scales }
    }

    fn view(&self) -> HeadActivations<'_> {
        HeadActivations { quads: &self.quads, sums: &self.sums, scales: &self.scales }
    }

    /// The integers.
    fn codes(&self) -> Vec<i32> {
        let code = |quad: &[i8; 8], j: usize| 64 * i32::from(quad[j]) + i32::from(quad[4 + j]);
        self.quads.iter().flat_map(|quad| (0..4).map(|j| code(quad, j))).collect()
    }
}

#[test]
fn head_products_equal_naive() {
    let mut rng = rng();
    for (format, groups) in FORMATS.into_iter().flat_map(|f| [1, 2, 5, 80].map(|g| (f, g))) {
        let (lines, codes) = band(&mut rng, format, groups);
        let row_scales: [f32; ROWS] = std::array::from_fn(|_| rng.random_range(0.001..2.));
        let scales: Vec<[u16; ROWS]> = (0..groups)
            .map(|_| {
                std::array::from_fn(|_| (rng.random_range(0.001f32..2.).to_bits() >> 16) as u16)
            })
            .collect();
        let band = match format {
            HeadFormat::Q8 => HeadBand::Q8 { lines: &lines, scales: &row_scales },
            HeadFormat::Q6 => HeadBand::Q6 { lines: &lines, scales: &scales },
            HeadFormat::Q4 => HeadBand::Q4 { lines: &lines, scales: &scales },
        };
        for tokens in (0..=9).chain([17]) {
            let mut hidden = floats(&mut rng, tokens * groups * GROUP);
            for (row, extreme) in hidden.chunks_mut(groups * GROUP).zip([-2., 2.]) {
                row.fill(extreme); // the largest sums there are
            }
            let x = Activations::new(&hidden, tokens, groups);
            let x_codes = x.codes();
            let expected: Vec<[u32; ROWS]> = (0..tokens)
                .map(|token| {
                    let x_codes = &x_codes[token * groups * GROUP..][..groups * GROUP];
                    std::array::from_fn(|row| {
                        let terms = codes[row].iter().zip(x_codes);
                        let terms: Vec<i64> = terms
                            .map(|(c, x)| {
                                (i64::from(*c) - i64::from(format.offset())) * i64::from(*x)
                            })
                            .collect();
                        let y = match format {
                            HeadFormat::Q8 => terms.iter().sum::<i64>() as f32 * row_scales[row],
                            _ => {
                                terms.chunks(GROUP).zip(&scales).fold(0f32, |y, (terms, scales)| {
                                    let scale = f32::from_bits(u32::from(scales[row]) << 16);
                                    scale.mul_add(terms.iter().sum::<i64>() as f32, y)
                                })
                            }
                        };
                        (y * x.scales[token]).to_bits()
                    })
                })
                .collect();
            for kernel in tested() {
                let mut out = vec![[f32::NAN; ROWS]; tokens];
                kernel.head_product(band, x.view(), &mut out);
                let bits: Vec<_> = out.iter().map(|out| out.map(f32::to_bits)).collect();
                assert_eq!(bits, expected, "{}: {format:?}, {groups} × {tokens}", kernel.name());
            }
        }
    }
}

#[test]
fn hidden_states_of_13_bits() {
    let mut rng = rng();
    for cols in [1, 31, 32, 33, 100] {
        for scale in [1e-20, 1., 1e30] {
            let hidden: Vec<f32> = floats(&mut rng, cols).iter().map(|h| h * scale).collect();
            let x = Activations::new(&hidden, 1, cols.div_ceil(GROUP));
            let absmax = hidden.iter().fold(0f32, |max, h| max.max(h.abs()));
            assert_eq!(x.scales[0], absmax / 4063.);
            let codes = x.codes();
            for (h, code) in hidden.iter().zip(&codes) {
                let code = *code as f32 * x.scales[0];
                assert!((h - code).abs() <= 0.5001 * x.scales[0], "{h} → {code}");
            }
            assert!(codes[cols..].iter().all(|code| *code == 0));
            for (codes, sum) in codes.chunks(GROUP).zip(&x.sums) {
                assert_eq!(codes.iter().sum::<i32>(), *sum);
            }
        }
    }
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let x = Activations::new(&[1., bad, 2.], 1, 1);
        assert!(x.scales[0].is_nan() && x.codes().iter().all(|code| *code == 0));
    }
    assert!(Activations::new(&[0., -0., 1e-44], 1, 1).codes().iter().all(|code| *code == 0));
}

#[test]
fn rows_of_8_bits_are_bounded() {
    let mut rng = rng();
    let mut rows: Vec<Vec<f32>> =
        [1, 15, 16, 17, 640, 2560].iter().map(|len| floats(&mut rng, *len)).collect();
    for exponent in [-140, -100, -60, -30, 0, 60, 120] {
        rows.push(floats(&mut rng, 100).iter().map(|w| w * 2f32.powi(exponent)).collect());
    }
    let mut outlier = floats(&mut rng, 64);
    outlier[20] = 1e6;
    rows.extend([vec![0.; 40], outlier, vec![-1.; 33]]);
    for w in rows {
        let mut first = None;
        for kernel in tested() {
            let mut codes = vec![9; w.len().next_multiple_of(GROUP)];
            let row = kernel.quantize_head_row(&w, &mut codes);
            assert!(codes[w.len()..].iter().all(|code| *code == 128), "{}", kernel.name());
            let value = |code: u8| f64::from(row.scale) * (f64::from(code) - 128.);
            let norm = |terms: &dyn Fn(f32, u8) -> f64| {
                w.iter().zip(&codes).map(|(w, code)| terms(*w, *code).powi(2)).sum::<f64>().sqrt()
            };
            let (error, size) =
                (norm(&|w, code| f64::from(w) - value(code)), norm(&|_, code| value(code)));
            assert!(f64::from(row.error) >= error && f64::from(row.norm) >= size, "{row:?}");
            if size < 1e18 {
                // Tight, but where squares overflow.
                let slack = 1e-3 * error + 1e-5 * size + 1e-18;
                assert!(f64::from(row.error) <= error + slack, "{row:?} {error}");
                assert!(f64::from(row.norm) <= size * 1.001 + 1e-18, "{row:?} {size}");
            }
            let first = first.get_or_insert((row, codes.clone()));
            assert_eq!(first, &(row, codes), "{}", kernel.name());
        }
    }
    for bad in [f32::NAN, f32::INFINITY] {
        let mut codes = [9; 32];
        let row = active().quantize_head_row(&[1., bad], &mut codes);
        assert!(row.scale.is_nan() && row.error.is_nan() && row.norm.is_nan());
        assert_eq!(codes, [128; 32]);
    }
}

#[test]
fn shapes_that_do_not_match_are_refused() {
    let (lines, x) = ([[0; 64]; 8], Activations::new(&[1.; 64], 1, 2));
    let band = HeadBand::Q8 { lines: &lines, scales: &[1.; ROWS] };
    let product = |band, tokens: usize| {
        std::panic::catch_unwind(|| {
            active().head_product(band, x.view(), &mut vec![[0.; ROWS]; tokens]);
        })
    };
    assert!(product(band, 1).is_err(), "one group, activations of two");
    let lines = [[0; 64]; 16];
    let band = HeadBand::Q8 { lines: &lines, scales: &[1.; ROWS] };
    assert!(product(band, 1).is_ok());
    assert!(product(band, 2).is_err(), "activations of one token");
    let band = HeadBand::Q4 { lines: &lines[..8], scales: &[[0; ROWS]] };
    assert!(product(band, 1).is_err(), "scales of one group");
    let band = HeadBand::Q8 { lines: &lines[..15], scales: &[1.; ROWS] };
    assert!(product(band, 1).is_err(), "half a group");
}
