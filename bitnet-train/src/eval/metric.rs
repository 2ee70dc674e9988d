//! What is found out about a model, and how sure it is.

use rayon::prelude::*;

use super::python_random::PythonRandom;

/// A figure that is computed from the values of a task's documents.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Metric {
    /// As the harness calls it.
    pub name: &'static str,
    /// How a written answer was read.
    pub filter: &'static str,
    /// Whether more is better.
    pub higher_is_better: bool,
    /// What the values become.
    pub aggregation: Aggregation,
}

/// The value of a document.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sample {
    /// Of what was asked.
    pub value: f64,
    /// Words or bytes that it is about.
    pub weight: f64,
}

/// What values become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Aggregation {
    /// Their mean.
    Mean,
    /// `exp` of minus the mean.
    Perplexity,
    /// `exp` of minus the sum over the sum of weights.
    WeightedPerplexity,
    /// Minus the sum over the sum of weights, in bits.
    BitsPerByte,
}

const MEAN: Metric =
    Metric { name: "", filter: "none", higher_is_better: true, aggregation: Aggregation::Mean };

/// Whether the likeliest answer is the right one.
pub const ACC: Metric = Metric { name: "acc", ..MEAN };
/// The same, by character.
pub const ACC_NORM: Metric = Metric { name: "acc_norm", ..MEAN };
/// Whether a written answer is the right one.
pub const EXACT_MATCH: Metric = Metric { name: "exact_match", ..MEAN };
/// Whether the first program that is written does what it is to do.
pub const PASS_AT_1: Metric = Metric { name: "pass@1", filter: "create_test", ..MEAN };
/// Of the answers.
pub const PERPLEXITY: Metric = Metric {
    name: "perplexity",
    higher_is_better: false,
    aggregation: Aggregation::Perplexity,
    ..MEAN
};
/// Of a text, by word.
pub const WORD_PERPLEXITY: Metric = Metric {
    name: "word_perplexity",
    higher_is_better: false,
    aggregation: Aggregation::WeightedPerplexity,
    ..MEAN
};
/// The same by byte.
pub const BYTE_PERPLEXITY: Metric = Metric { name: "byte_perplexity", ..WORD_PERPLEXITY };
/// The same in bits.
pub const BITS_PER_BYTE: Metric =
    Metric { name: "bits_per_byte", aggregation: Aggregation::BitsPerByte, ..WORD_PERPLEXITY };

impl Sample {
    /// A value that counts once.
    pub fn of(value: f64) -> Self {
        Self { value, weight: 1. }
    }
}

/// Draws that have one generator, as in the harness.
const CHUNK: usize = 1000;

impl Metric {
    /// Its name in files of results and in JSON: `acc,none`.
    pub fn key(&self) -> String {
        format!("{},{}", self.name, self.filter)
    }

    /// The figure; NaN of no values.
    pub fn value(&self, samples: &[Sample]) -> f64 {
        let sum: f64 = samples.iter().map(|sample| sample.value).sum();
        self.of_sums(sum, samples.iter().map(|sample| sample.weight).sum())
    }

    /// The same of the sums of values and of weights, on which alone it depends.
    pub fn of_sums(&self, sum: f64, weight: f64) -> f64 {
        match self.aggregation {
            Aggregation::Mean => sum / weight,
            Aggregation::Perplexity | Aggregation::WeightedPerplexity => (-sum / weight).exp(),
            Aggregation::BitsPerByte => -sum / weight / std::f64::consts::LN_2,
        }
    }

    /// The standard error of the figure: of a mean by the formula, of a perplexity by drawing the values anew `draws` times,
    /// in thousands. `None` where the harness gives none.
    pub fn standard_error(&self, samples: &[Sample], draws: usize) -> Option<f64> {
        if samples.len() < 2 || draws == 0 {
            return None;
        }
        match self.aggregation {
            Aggregation::Mean => {
                let values = Vec::from_iter(samples.iter().map(|sample| sample.value));
                Some(deviation(&values) / (values.len() as f64).sqrt())
            }
            Aggregation::Perplexity => {
                let chunk = draws.min(CHUNK);
                let chunks = (0..draws / chunk).into_par_iter();
                let values = chunks.flat_map_iter(|seed| {
                    let mut rng = PythonRandom::new(seed as u64);
                    (0..chunk).map(move |_| {
                        let draw = || samples[rng.choice(samples.len())].value;
                        let sum: f64 = std::iter::repeat_with(draw).take(samples.len()).sum();
                        (-sum / samples.len() as f64).exp()
                    })
                });
                Some(deviation(&values.collect::<Vec<f64>>()))
            }
            Aggregation::WeightedPerplexity | Aggregation::BitsPerByte => None,
        }
    }
}

/// The standard deviation of a sample.
fn deviation(values: &[f64]) -> f64 {
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    (squares / (values.len() - 1) as f64).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(values: &[f64]) -> Vec<Sample> {
        values.iter().copied().map(Sample::of).collect()
    }

    fn close(a: f64, b: f64) {
        assert!((a - b).abs() < 1e-12 * b.abs(), "{a} {b}");
    }

    #[test]
    fn figures_by_hand() {
        // Three of four: the variance of the sample is 4/3 · 3/4 · 1/4 = 1/4, of the mean 1/16.
        let hits = samples(&[1., 0., 1., 1.]);
        close(ACC.value(&hits), 0.75);
        close(ACC.standard_error(&hits, 1000).unwrap(), 0.25);
        close(PERPLEXITY.value(&samples(&[-(2f64.ln()), -(8f64.ln())])), 4.);
        let pages = [(-(2f64.ln()), 2.), (-(2f64.ln()) * 5., 4.)];
        let pages = pages.map(|(value, weight)| Sample { value, weight });
        close(WORD_PERPLEXITY.value(&pages), 2.);
        close(BITS_PER_BYTE.value(&pages), 1.);
        assert_eq!(BITS_PER_BYTE.standard_error(&pages, 1000), None);
        assert_eq!(ACC.standard_error(&hits[..1], 1000), None);
        assert_eq!(ACC.standard_error(&hits, 0), None);
    }

    /// `bootstrap_stderr(perplexity, [-1, -2, -0.5, -3.25, -0.125], 2000)` of the harness.
    #[test]
    fn a_perplexity_is_drawn_as_the_harness_draws() {
        let values = samples(&[-1., -2., -0.5, -3.25, -0.125]);
        close(PERPLEXITY.standard_error(&values, 2000).unwrap(), 2.5628868601461336);
    }
}
