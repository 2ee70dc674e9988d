//! Every kernel against naive code: equal integers, and floats of equal bits.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;

/// Lengths below, at and above one vector, with every kind of ragged end.
const LENGTHS: [usize; 14] = [0, 1, 5, 15, 16, 17, 31, 32, 33, 48, 63, 100, 128, 1003];

/// Kernels of tests alone.
static TEST_KERNELS: &[&Kernel] = &[
    #[cfg(target_arch = "x86_64")]
    &avxvnni::EVEX,
];

/// Every kernel that this processor can run.
pub(super) fn tested() -> impl Iterator<Item = &'static Kernel> {
    let more = TEST_KERNELS.iter().copied().filter(|kernel| kernel.is_available());
    available().chain(more)
}

pub(super) fn rng() -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(158)
}

fn floats(rng: &mut ChaCha8Rng, len: usize) -> Vec<f32> {
    (0..len).map(|_| rng.random_range(-3f32..3.)).collect()
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// Sixteen partial sums, then halves: the definition of every reduction.
fn naive_sum(terms: impl Iterator<Item = (f32, f32)>) -> f32 {
    let mut lanes = [0f32; 16];
    let mut len = 0;
    for (i, (a, b)) in terms.enumerate() {
        lanes[i % 16] = a.mul_add(b, lanes[i % 16]);
        len = i + 1;
    }
    for lane in &mut lanes[len % 16..] {
        *lane += 0.; // padding: −0 becomes +0
    }
    for half in [8, 4, 2, 1] {
        for l in 0..half {
            lanes[l] += lanes[l + half];
        }
    }
    lanes[0]
}

fn bf16(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

#[test]
fn the_fastest_kernel_is_active_and_all_have_names() {
    if std::env::var(KERNEL_VARIABLE).is_err() {
        assert_eq!(available().next().map(Kernel::name), Some(active().name()));
    }
    for kernel in available() {
        assert_eq!(by_name(kernel.name()).map(Kernel::name), Some(kernel.name()));
    }
    assert!(by_name("scalar").is_some());
    assert!(by_name("mmx").is_none());
}

#[test]
fn a_kernel_is_chosen_before_it_is_used() {
    assert_eq!(choose(active().name()).map(Kernel::name), Ok(active().name()));
    let names: Vec<_> = available().map(Kernel::name).collect();
    for name in &names {
        assert_eq!(choose(name).is_ok(), *name == active().name(), "{name}");
    }
    let error = choose("mmx").unwrap_err();
    assert_eq!(error, ChoiceError::Unavailable { name: "mmx".into(), available: names.clone() });
    assert!(error.to_string().ends_with(&names.join(", ")), "{error}");
}

#[test]
fn multiplying_in_registers_counts_products() {
    for kernel in available() {
        let products = kernel.multiply_in_registers(3);
        assert!(products > 0 && products == 3 * kernel.multiply_in_registers(1), "{}", kernel.name);
    }
}

#[test]
fn quantization_equals_naive() {
    let mut rng = rng();
    let mut rows: Vec<Vec<f32>> = LENGTHS.iter().map(|len| floats(&mut rng, *len)).collect();
    // 254 makes a = ½, so that every odd integer is a tie; the others are the ends of the range.
    rows.push(
        (-127..=127)
            .map(|i| 2. * i as f32)
            .chain((-127..127).map(|i| (2 * i + 1) as f32))
            .collect(),
    );
    rows.extend([vec![0.; 40], vec![-0., 0.], vec![1e-30; 20], vec![f32::MAX, f32::MIN, 1e38]]);
    rows.extend([vec![1e-5, -4e-6], vec![f32::from_bits(1); 3], vec![0.499_999_97, 127.]]);
    for _ in 0..300 {
        let scale = 2f32.powi(rng.random_range(-60..60));
        rows.push(floats(&mut rng, 200).into_iter().map(|x| x * scale).collect());
    }
    for x in rows {
        for half_up in [false, true] {
            let absmax = x.iter().fold(0f32, |max, x| max.max(x.abs()));
            let a = 127. / absmax.max(1e-5);
            let mut expected: Vec<i8> = x
                .iter()
                .map(|x| if half_up { (x * a + 0.5).floor() } else { (x * a).round_ties_even() })
                .map(|code| code.clamp(-128., 127.) as i8)
                .collect();
            let sum: i32 = expected.iter().map(|code| i32::from(*code)).sum();
            expected.resize(x.len().next_multiple_of(16), 0);
            for kernel in tested() {
                let mut codes = vec![9; expected.len()];
                let (scale, codes_sum) = kernel.quantize_row(&x, half_up, &mut codes);
                assert_eq!(codes, expected, "{}: {x:?}", kernel.name());
                assert_eq!((scale, codes_sum), (a, sum), "{}", kernel.name());
            }
        }
    }
}

#[test]
fn rows_that_are_not_finite_have_a_scale_that_is_nan() {
    for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for position in [0, 16, 39] {
            let mut x = [1.; 40];
            x[position] = bad;
            for kernel in tested() {
                let mut codes = [9; 48];
                let (a, sum) = kernel.quantize_row(&x, false, &mut codes);
                assert!(a.is_nan(), "{}", kernel.name());
                assert_eq!((codes, sum), ([0; 48], 0), "{}", kernel.name());
            }
        }
    }
}

#[test]
fn dense_products_equal_naive() {
    let mut rng = rng();
    for k in LENGTHS {
        for (m, n) in [(0, 3), (3, 0), (1, 1), (1, 9), (2, 4), (3, 7), (5, 5), (8, 8), (9, 13)] {
            let (x_stride, w_stride, y_stride) = (k + 3, k + 1, n + 2);
            let x = floats(&mut rng, m * x_stride);
            let w16: Vec<u16> =
                floats(&mut rng, n * w_stride).iter().map(|w| (w.to_bits() >> 16) as u16).collect();
            let w: Vec<f32> = w16.iter().map(|w| bf16(*w)).collect();
            let mut expected = vec![5.; m * y_stride];
            for i in 0..m {
                for j in 0..n {
                    let terms = (0..k).map(|l| (x[i * x_stride + l], w[j * w_stride + l]));
                    expected[i * y_stride + j] = naive_sum(terms);
                }
            }
            let x = Matrix::strided(&x, m, k, x_stride);
            let single = DenseWeights::F32(Matrix::strided(&w, n, k, w_stride));
            let half = DenseWeights::Bf16(Matrix::strided(&w16, n, k, w_stride));
            for kernel in tested() {
                for w in [single, half] {
                    let mut y = vec![5.; m * y_stride];
                    kernel.matmul_nt(x, w, &mut y, y_stride);
                    assert_eq!(bits(&y), bits(&expected), "{}: {m} × {n} × {k}", kernel.name());
                }
            }
        }
    }
}

#[test]
fn panels_of_a_large_product_do_not_show() {
    let mut rng = rng();
    let (m, n, k) = (13, 6, 1 << 15); // panels of four rows
    let (x, w) = (floats(&mut rng, m * k), floats(&mut rng, n * k));
    for kernel in tested() {
        let mut y = vec![0.; m * n];
        kernel.matmul_nt(
            Matrix::new(&x, m, k),
            DenseWeights::F32(Matrix::new(&w, n, k)),
            &mut y,
            n,
        );
        for (i, j) in [(0, 0), (3, 5), (4, 1), (11, 4), (12, 5)] {
            let terms = x[i * k..][..k].iter().copied().zip(w[j * k..][..k].iter().copied());
            assert_eq!(y[i * n + j].to_bits(), naive_sum(terms).to_bits(), "{}", kernel.name());
        }
    }
}

#[test]
fn bfloat16_widens_exactly() {
    let w: Vec<u16> = (0..=u16::MAX).filter(|bits| bf16(*bits).is_finite()).collect();
    for kernel in tested() {
        let mut y = vec![0.; w.len()];
        let x = Matrix::new(&[1.], 1, 1);
        kernel.matmul_nt(x, DenseWeights::Bf16(Matrix::new(&w, w.len(), 1)), &mut y, w.len());
        for (y, w) in y.iter().zip(&w) {
            assert_eq!(*y, bf16(*w), "{}", kernel.name());
        }
    }
}

#[test]
fn reductions_equal_naive() {
    let mut rng = rng();
    for len in LENGTHS {
        let x = floats(&mut rng, len);
        for kernel in tested() {
            let name = kernel.name();
            assert_eq!(kernel.sum(&x), naive_sum(x.iter().map(|x| (*x, 1.))), "{name}");
            assert_eq!(kernel.sum_squares(&x), naive_sum(x.iter().map(|x| (*x, *x))), "{name}");
            assert_eq!(
                kernel.max(&x),
                x.iter().copied().fold(f32::NEG_INFINITY, f32::max),
                "{name}"
            );
        }
    }
    for kernel in tested() {
        for nan in 0..20 {
            let mut x: Vec<f32> = (0..20).map(|i| -(i as f32)).collect();
            x[nan] = f32::NAN;
            assert_eq!(kernel.max(&x), if nan == 0 { -1. } else { 0. }, "{}", kernel.name());
        }
    }
}

#[test]
fn weighted_sums_and_axpy_equal_naive() {
    let mut rng = rng();
    for dims in LENGTHS {
        for rows in [0, 1, 2, 7, 32, 71] {
            let stride = dims + 5;
            let (p, v) = (floats(&mut rng, rows), floats(&mut rng, rows * stride));
            let mut expected = vec![0f32; dims];
            for (j, p) in p.iter().enumerate() {
                for (d, sum) in expected.iter_mut().enumerate() {
                    *sum = p.mul_add(v[j * stride + d], *sum);
                }
            }
            for kernel in tested() {
                for copies in [1, 3, 4, 9] {
                    let mut out = vec![f32::NAN; copies * dims];
                    let (p, v) = (p.repeat(copies), Matrix::strided(&v, rows, dims, stride));
                    let p = Matrix::new(&p, copies, rows);
                    kernel.weighted_sums(p, DenseWeights::F32(v), &mut out);
                    let expected = expected.repeat(copies);
                    assert_eq!(bits(&out), bits(&expected), "{}: {rows} × {dims}", kernel.name());
                }
                let mut out = vec![0.; dims];
                for (j, p) in p.iter().enumerate() {
                    kernel.axpy(*p, &v[j * stride..][..dims], &mut out);
                }
                assert_eq!(bits(&out), bits(&expected), "{}: {rows} × {dims}", kernel.name());
            }
        }
    }
}

/// Panels that end inside, in either order of the left factor.
#[test]
fn products_of_panels_equal_naive() {
    let mut rng = rng();
    for kernel in tested() {
        let widths = kernel.panel_widths();
        let (rows, cols) = (2 * widths.rows + 1, widths.cols + 3);
        for depth in [1, 7, PANEL_DEPTH] {
            let [a, b] = [rows, cols].map(|count| floats(&mut rng, count * depth));
            let before = floats(&mut rng, rows * cols);
            let panels = |values: &[f32], count: usize, width: usize, at: fn(_, _, _) -> usize| {
                let row = if at(0, 1, width) == 1 { PANEL_DEPTH } else { depth };
                let mut out = vec![f32::NAN; count.next_multiple_of(width) * row];
                for (i, d) in (0..count).flat_map(|i| (0..depth).map(move |d| (i, d))) {
                    out[i / width * width * row + at(i % width, d, width)] = values[i * depth + d];
                }
                out
            };
            let by_depths = |i: usize, d: usize, width: usize| d * width + i;
            let by_rows = |i: usize, d: usize, _: usize| i * PANEL_DEPTH + d;
            let right = panels(&b, cols, widths.cols, by_depths);
            for (order, at) in
                [(Order::Depths, by_depths as fn(_, _, _) -> _), (Order::Rows, by_rows)]
            {
                let left = panels(&a, rows, widths.rows, at);
                for add in [false, true] {
                    let mut out = before.clone();
                    let product = PanelProduct { rows, cols, depth, scale: 0.7, add, order };
                    kernel.multiply_panels(&left, &right, product, &mut out);
                    for (place, (found, before)) in out.iter().zip(&before).enumerate() {
                        let (i, j) = (place / cols, place % cols);
                        let terms = a[i * depth..][..depth].iter().zip(&b[j * depth..]);
                        let sum = terms.fold(0f32, |sum, (a, b)| a.mul_add(*b, sum));
                        let expected = if add { sum.mul_add(0.7, *before) } else { sum * 0.7 };
                        let what = format!("{}: {order:?}, {depth}, {add}", kernel.name());
                        assert_eq!(found.to_bits(), expected.to_bits(), "{what}");
                    }
                }
            }
        }
    }
}

/// Every half-precision float and every integer, as a product with 1.
#[test]
fn stored_elements_widen_exactly() {
    let halves: Vec<u16> = (0..=u16::MAX).collect();
    let integers: Vec<i8> = (i8::MIN..=i8::MAX).collect();
    for kernel in tested() {
        let mut out = vec![0f32; halves.len()];
        let one = Matrix::new(&[1.], 1, 1);
        kernel.weighted_sums(
            one,
            DenseWeights::F16(Matrix::new(&halves, 1, halves.len())),
            &mut out,
        );
        for (half, value) in halves.iter().zip(&out) {
            let want = half::f16::from_bits(*half).to_f32() + 0.; // the sum begins with +0
            let same = want.to_bits() == value.to_bits() || want.is_nan() && value.is_nan();
            assert!(same, "{}: {half:#06x} is {want}, not {value}", kernel.name());
        }
        let out = &mut out[..integers.len()];
        kernel.weighted_sums(one, DenseWeights::I8(Matrix::new(&integers, 1, out.len())), out);
        assert!(integers.iter().zip(out).all(|(i, x)| f32::from(*i) == *x), "{}", kernel.name());
    }
}

/// Distance from the true value in units of the last place of the f32 nearest to it.
fn ulps(value: f32, exact: f64) -> f64 {
    let nearest = exact as f32;
    let ulp = f64::from(f32::from_bits(nearest.to_bits() + 1)) - f64::from(nearest);
    (f64::from(value) - exact).abs() / ulp
}

#[test]
fn exp_is_accurate_and_equal_everywhere() {
    // Every 797th float from the underflow to the overflow, both signs.
    let range = |end: f32| (0..end.to_bits()).step_by(797).map(f32::from_bits);
    let x: Vec<f32> = range(88.722).chain(range(104.5).map(|x| -x)).collect();
    let mut first: Option<Vec<f32>> = None;
    for kernel in tested() {
        let mut e = x.clone();
        kernel.exp(&mut e);
        for (e, x) in e.iter().zip(&x) {
            assert!(ulps(*e, f64::from(*x).exp()) < 1.02, "{}: exp({x}) = {e}", kernel.name());
        }
        let first = first.get_or_insert_with(|| e.clone());
        assert!(bits(first) == bits(&e), "{}", kernel.name());
    }
}

#[test]
fn exp_of_special_values() {
    for kernel in tested() {
        let mut x =
            [0., -0., f32::NEG_INFINITY, f32::MIN, -104., f32::INFINITY, f32::MAX, 88.73, f32::NAN];
        kernel.exp(&mut x);
        let (numbers, nan) = x.split_at(8);
        let inf = f32::INFINITY;
        assert_eq!(numbers, [1., 1., 0., 0., 0., inf, inf, inf], "{}", kernel.name());
        assert!(nan[0].is_nan(), "{}", kernel.name());
    }
}

#[test]
fn softmax_equals_its_definition() {
    let mut rng = rng();
    for len in LENGTHS {
        let mut scores: Vec<f32> = floats(&mut rng, len).iter().map(|x| 10. * x).collect();
        if len > 20 {
            scores[7] = f32::NEG_INFINITY; // a masked position
        }
        for kernel in tested() {
            let max = kernel.max(&scores);
            let mut expected: Vec<f32> = scores.iter().map(|score| score - max).collect();
            kernel.exp(&mut expected);
            let sum = naive_sum(expected.iter().map(|e| (*e, 1.)));
            expected.iter_mut().for_each(|e| *e /= sum);
            let mut out = scores.clone();
            kernel.softmax(&mut out);
            assert_eq!(bits(&out), bits(&expected), "{}: {len}", kernel.name());
            assert!(len < 20 || out[7] == 0.);
            assert!(len == 0 || (out.iter().sum::<f32>() - 1.).abs() < 1e-6, "{}", kernel.name());
        }
    }
    for kernel in tested() {
        for bad in [vec![f32::NEG_INFINITY; 3], vec![1., f32::NAN], vec![f32::INFINITY, 0.]] {
            let mut out = bad.clone();
            kernel.softmax(&mut out);
            assert!(out.iter().any(|p| p.is_nan()), "{}: {bad:?} → {out:?}", kernel.name());
        }
    }
}

#[test]
fn shapes_that_do_not_match_are_refused() {
    fn refused<T>(f: impl FnOnce() -> T + std::panic::UnwindSafe) {
        assert!(std::panic::catch_unwind(f).is_err());
    }
    let kernel = active();
    for format in TileFormat::ALL {
        let (tiles, cols) = ([format.empty(); 2], 2 * format.cols());
        let dots = |x: usize, sums: usize, out: usize| {
            let mut out = vec![[0; ROWS]; out];
            kernel.ternary_dots(format, &tiles, &vec![0; x], &vec![0; sums], &mut out);
        };
        dots(cols, 1, 1);
        refused(|| dots(cols - 1, 1, 1));
        refused(|| dots(2 * cols, 2, 1));
        refused(|| dots(cols, 2, 1));
    }
    refused(|| kernel.quantize_row(&[0.; 2], false, &mut [0; 1]));
    refused(|| Matrix::new(&[0.; 5], 2, 3));
    refused(|| Matrix::strided(&[0.; 9], 2, 3, 2));
    refused(|| Matrix::strided(&[0.; 9], usize::MAX, 3, usize::MAX));
    let (x, w) = ([0.; 6], [0.; 6]);
    let two = Matrix::new(&x, 2, 3);
    refused(|| kernel.matmul_nt(two, DenseWeights::F32(Matrix::new(&w, 3, 2)), &mut [0.; 9], 3));
    refused(|| kernel.matmul_nt(two, DenseWeights::F32(Matrix::new(&w, 2, 3)), &mut [0.; 3], 2));
    refused(|| kernel.matmul_nt(two, DenseWeights::F32(Matrix::new(&w, 2, 3)), &mut [0.; 9], 1));
    let p = Matrix::new(&[1.; 2], 1, 2);
    refused(|| kernel.weighted_sums(p, DenseWeights::F32(Matrix::new(&w, 3, 2)), &mut [0.; 2]));
    refused(|| kernel.weighted_sums(p, DenseWeights::F32(Matrix::new(&w, 2, 3)), &mut [0.; 2]));
    refused(|| kernel.axpy(1., &[0.; 2], &mut [0.; 3]));
}
