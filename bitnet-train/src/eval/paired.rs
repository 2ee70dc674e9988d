//! Whether two models differ, judged by their values on the same questions.
//!
//! The questions are drawn anew, with what both models made of them (a paired bootstrap: Efron and Tibshirani, An Introduction to
//! the Bootstrap, 1993, §13.3 and §16.4; Koehn 2004). Of answers that are right or wrong McNemar's exact test looks at those that only
//! one of the two has right.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use super::{Aggregation, Metric, Sample};

/// Two figures of the same questions.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Paired {
    /// The first one.
    pub a: f64,
    /// The second one.
    pub b: f64,
    /// `b − a`.
    pub difference: f64,
    /// The standard deviation of the differences of all draws.
    pub error: f64,
    /// What 95 % of these differences lie between.
    pub interval: (f64, f64),
    /// How often a difference as large comes of chance, if there is none: the part of the draws that are as far from the
    /// difference found as that is from 0, in either direction.
    pub p: f64,
    /// Of answers that are right or wrong.
    pub discordant: Option<Discordant>,
}

/// Questions that one of two models answers rightly, and the other does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Discordant {
    /// Only the first one.
    pub only_a: usize,
    /// Only the second one.
    pub only_b: usize,
}

/// Draws that have one generator.
const CHUNK: usize = 500;

/// Sums in another order differ in their last bits: a draw that is this much closer counts as one as far.
const TIE: f64 = 1e-12;

impl Paired {
    /// Compares the values of the same questions by `draws` draws. The result depends on nothing but the arguments.
    ///
    /// `None` for no questions, or no draws.
    pub fn new(
        metric: &Metric,
        a: &[Sample],
        b: &[Sample],
        draws: usize,
        seed: u64,
    ) -> Option<Self> {
        if a.is_empty() || a.len() != b.len() || draws == 0 {
            return None;
        }
        let (value_a, value_b) = (metric.value(a), metric.value(b));
        let difference = value_b - value_a;
        let chunks = (0..draws.div_ceil(CHUNK)).into_par_iter();
        let drawn = chunks.flat_map_iter(|chunk| {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            rng.set_stream(chunk as u64);
            (chunk * CHUNK..draws.min((chunk + 1) * CHUNK)).map(move |_| {
                let mut sums = [(0., 0.); 2];
                for _ in 0..a.len() {
                    let index = rng.random_range(0..a.len());
                    for (sum, sample) in sums.iter_mut().zip([&a[index], &b[index]]) {
                        *sum = (sum.0 + sample.value, sum.1 + sample.weight);
                    }
                }
                let [a, b] = sums.map(|(sum, weight)| metric.of_sums(sum, weight));
                b - a
            })
        });
        let mut drawn = drawn.collect::<Vec<f64>>();
        drawn.par_sort_unstable_by(f64::total_cmp);
        let far = difference.abs() - TIE * difference.abs().max(1.);
        let as_far = drawn.iter().filter(|drawn| (**drawn - difference).abs() >= far).count();
        Some(Self {
            a: value_a,
            b: value_b,
            difference,
            error: deviation(&drawn),
            interval: (quantile(&drawn, 0.025), quantile(&drawn, 0.975)),
            // What was found is one of the draws that chance may give, so p is never 0.
            p: (1 + as_far) as f64 / (1 + draws) as f64,
            discordant: Discordant::new(metric, a, b),
        })
    }
}

impl Discordant {
    /// `None` where something else than right and wrong is counted.
    fn new(metric: &Metric, a: &[Sample], b: &[Sample]) -> Option<Self> {
        let is_binary = |sample: &Sample| sample.weight == 1. && [0., 1.].contains(&sample.value);
        let all = || a.iter().chain(b);
        if metric.aggregation != Aggregation::Mean || !all().all(is_binary) {
            return None;
        }
        let only = |one: &[Sample], other: &[Sample]| {
            one.iter().zip(other).filter(|(one, other)| one.value > other.value).count()
        };
        Some(Self { only_a: only(a, b), only_b: only(b, a) })
    }

    /// McNemar's exact p: how often `only_a + only_b` tosses of a coin are as uneven, in either direction.
    pub fn p(&self) -> f64 {
        let (few, all) = (self.only_a.min(self.only_b), self.only_a + self.only_b);
        // 2 Σₖ C(all, k) / 2^all over k ≤ few, whose largest term is the last: C(all, few) in logarithms, then the terms before
        // it by C(n, k − 1) = C(n, k) · k / (n − k + 1).
        let last: f64 = (1..=few).map(|i| ((all - few + i) as f64 / i as f64).ln()).sum();
        let (mut term, mut sum) = (1., 1.);
        for k in (1..=few).rev() {
            term *= k as f64 / (all - k + 1) as f64;
            sum += term;
        }
        (2. * (last - all as f64 * std::f64::consts::LN_2).exp() * sum).min(1.)
    }
}

fn deviation(values: &[f64]) -> f64 {
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    (squares / values.len() as f64).sqrt()
}

/// Of sorted values; between two of them in proportion.
fn quantile(sorted: &[f64], part: f64) -> f64 {
    let place = part * (sorted.len() - 1) as f64;
    let (low, high) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
    // Not `low + 0 · (high − low)`, which is NaN of infinite ends.
    if low == high { low } else { low + place.fract() * (high - low) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::metric::{ACC, BITS_PER_BYTE, PERPLEXITY};

    const DRAWS: usize = 20_000;

    fn samples(values: &[f64]) -> Vec<Sample> {
        values.iter().copied().map(Sample::of).collect()
    }

    /// Four standard deviations of the part `p` of all draws.
    fn chance(p: f64) -> f64 {
        4. * (p * (1. - p) / DRAWS as f64).sqrt()
    }

    const A: [u8; 20] = [1, 0, 1, 1, 0, 1, 0, 1, 1, 0, 1, 0, 0, 1, 1, 1, 0, 0, 1, 0];
    const B: [u8; 20] = [1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 0, 1, 1, 0, 1, 1, 0, 1, 1];

    /// By SciPy 1.17.1: `bootstrap((a, b), lambda x, y, axis: y.mean(axis) - x.mean(axis), paired=True, method="percentile",
    /// n_resamples=2_000_000, random_state=1)`, p from its `bootstrap_distribution`, and `binomtest(6, 8, .5)`.
    #[test]
    fn accuracies_as_scipy_compares_them() {
        let [a, b] = [A, B].map(|values| samples(&values.map(f64::from)));
        let found = Paired::new(&ACC, &a, &b, DRAWS, 1).unwrap();
        assert!((found.difference - 0.2).abs() < 1e-12);
        assert!((found.interval.0 + 0.05).abs() < 1e-12, "{found:?}");
        assert!((found.interval.1 - 0.45).abs() < 1e-12, "{found:?}");
        assert!((found.p - 0.1900445).abs() < chance(0.19), "{found:?}");
        // A mean's error has a formula; a standard deviation of n draws is off by 1 / √2n of itself.
        let differences = a.iter().zip(&b).map(|(a, b)| b.value - a.value - 0.2);
        let exact = differences.map(|d| d * d).sum::<f64>().sqrt() / 20.;
        assert!((found.error / exact - 1.).abs() < 4. / (2. * DRAWS as f64).sqrt(), "{found:?}");
        let discordant = found.discordant.unwrap();
        assert_eq!(discordant, Discordant { only_a: 2, only_b: 6 });
        assert!((discordant.p() - 0.2890625).abs() < 1e-12);
    }

    /// By the same with `np.exp(-y.mean(axis)) - np.exp(-x.mean(axis))`. A quantile q is off by √(q (1 − q) / n) over the
    /// density there, which is 0.0156 and 0.0822.
    #[test]
    fn perplexities_as_scipy_compares_them() {
        let a = samples(&[-1., -2., -0.5, -3.25, -0.125, -4., -2.2, -0.9]);
        let b = samples(&[-1.2, -1.5, -0.25, -3.5, -0.5, -3., -2., -0.1]);
        let found = Paired::new(&PERPLEXITY, &a, &b, DRAWS, 1).unwrap();
        assert!((found.difference + 1.2268602693794985).abs() < 1e-12);
        let (low, high) = found.interval;
        assert!((low + 5.021789568043197).abs() < chance(0.025) / 0.0156, "{found:?}");
        assert!((high - 0.3366766078402703).abs() < chance(0.975) / 0.0822, "{found:?}");
        assert!((found.p - 0.2485145).abs() < chance(0.249), "{found:?}");
        assert_eq!(found.discordant, None);
    }

    /// Of three questions all 27 draws can be told: the mean difference is −1/3 in 1, 0 in 3 …
    #[test]
    fn few_questions_are_enumerated() {
        let (a, b) = (samples(&[0., 0.5, 1.]), samples(&[1., 0.5, 0.]));
        let found = Paired::new(&ACC, &a, &b, DRAWS, 3).unwrap();
        // No difference: every draw is as far.
        assert_eq!((found.difference, found.p), (0., 1.));
        let (a, b) = (samples(&[0., 0., 0.]), samples(&[1., 0., 0.5]));
        let found = Paired::new(&ACC, &a, &b, DRAWS, 3).unwrap();
        // The mean of three of {1, 0, 1/2} is 0 in one draw of 27, and 1 in one.
        assert!((found.p - 2. / 27.).abs() < chance(2. / 27.), "{found:?}");
    }

    #[test]
    fn the_same_comes_of_the_same_seed() {
        let [a, b] = [A, B].map(|values| samples(&values.map(f64::from)));
        let of = |seed| Paired::new(&ACC, &a, &b, 1234, seed).unwrap();
        assert_eq!(of(7), of(7));
        assert_ne!(of(7), of(8));
        let pages = |values: [f64; 3]| values.map(|value| Sample { value, weight: 2. }).to_vec();
        let same = pages([-1., -2., -3.]);
        let found = Paired::new(&BITS_PER_BYTE, &same, &same, 100, 1).unwrap();
        assert_eq!((found.difference, found.interval, found.discordant), (0., (0., 0.), None));
        assert_eq!(Paired::new(&ACC, &[], &[], 10, 1), None);
    }

    /// `scipy.stats.binomtest(k, n, 0.5).pvalue`.
    #[test]
    fn mcnemar_as_scipy_has_it() {
        for (only_a, all, p) in [
            (3, 17, 0.012725830078125),
            (617, 1317, 0.02381302510173763),
            (30, 100, 7.85013964559367e-5),
            (4, 8, 1.),
            (0, 0, 1.),
        ] {
            for (only_a, only_b) in [(only_a, all - only_a), (all - only_a, only_a)] {
                let found = Discordant { only_a, only_b }.p();
                assert!((found / p - 1.).abs() < 1e-9, "{only_a} {only_b}: {found}");
            }
        }
    }
}
