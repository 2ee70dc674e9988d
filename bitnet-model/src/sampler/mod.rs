//! From a row of logits to the next token.
//!
//! The order is fixed: repetition penalty, frequency and presence penalty, logit bias, temperature,
//! top-k, top-p, min-p, draw. The repetition penalty and the three filters are those of
//! transformers' `LogitsProcessor`s, the frequency and presence penalties and the bias those of
//! OpenAI's API. Filters compute in `f64`: a set can differ from the `f32` reference only where a
//! cumulative sum hits its bound.

mod params;

use rand::Rng;

pub use params::SamplingParams;

use crate::{
    Error, Result,
    nn::{Changed, Need},
};

/// Draws tokens as [`SamplingParams`] says. It keeps no state: history and randomness are
/// arguments, so the same seed gives the same tokens.
///
/// ```
/// use bitnet_model::sampler::{Sampler, SamplingParams};
/// use rand::SeedableRng;
///
/// let sampler = Sampler::new(SamplingParams { top_k: Some(1), ..Default::default() })?;
/// let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(7);
/// assert_eq!(sampler.sample(&[0.5, 2.0, -1.0], &[], &[], &mut rng)?, 1);
/// # Ok::<(), bitnet_model::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Sampler {
    params: SamplingParams,
}

impl Sampler {
    /// A sampler, if every parameter is in its range.
    pub fn new(params: SamplingParams) -> Result<Self> {
        params.validate()?;
        Ok(Self { params })
    }

    /// The parameters it was made with.
    pub fn params(&self) -> &SamplingParams {
        &self.params
    }

    /// The logits that [`sample`](Self::sample) will look at after `prompt` and `generated`.
    ///
    /// With top-k or greedily it then draws from the same distribution as from all logits. Otherwise tokens that have
    /// less than a millionth of the probability together ([`NEGLIGIBLE`](crate::nn::NEGLIGIBLE)) may be left out.
    pub fn need(&self, prompt: &[u32], generated: &[u32]) -> Need {
        let changed = self.changed(prompt, generated);
        match (self.params.temperature, self.params.top_k) {
            (0., _) => Need::Top { k: 1, changed },
            (_, Some(k)) => Need::Top { k, changed },
            (temperature, None) => Need::Mass { temperature, changed },
        }
    }

    /// The tokens whose logits [`scores`](Self::scores) changes.
    fn changed(&self, prompt: &[u32], generated: &[u32]) -> Changed {
        let SamplingParams { repetition_penalty, frequency_penalty, presence_penalty, .. } =
            self.params;
        let mut changed = Changed::default();
        let mut add = |lowers: bool, ids: &[u32]| match lowers {
            true => changed.downwards.extend(ids),
            false => changed.freely.extend(ids),
        };
        if repetition_penalty != 1. {
            add(repetition_penalty > 1., prompt);
            add(repetition_penalty > 1., generated);
        }
        if frequency_penalty != 0. || presence_penalty != 0. {
            add(frequency_penalty >= 0. && presence_penalty >= 0., generated);
        }
        for &(id, bias) in &self.params.logit_bias {
            add(bias <= 0., &[id]);
        }
        changed
    }

    /// The next token after `prompt` and `generated`, whose row of logits is `logits` (vocabulary).
    ///
    /// Greedy sampling leaves `rng` untouched; any other draws exactly one number from it.
    ///
    /// # Errors
    /// If a logit is NaN or `+inf`, if no token has a finite one, or if a penalized or biased token
    /// id is outside the vocabulary.
    pub fn sample(
        &self,
        logits: &[f32],
        prompt: &[u32],
        generated: &[u32],
        rng: &mut impl Rng,
    ) -> Result<u32> {
        let scores = self.scores(logits, prompt, generated)?;
        let best = best(&scores)?;
        if self.params.temperature == 0. {
            return Ok(best as u32);
        }
        let kept = self.filter(&scores, scores[best]);
        let mut left = rng.random::<f64>() * total(&kept);
        for &(id, weight) in &kept {
            left -= weight;
            if left < 0. {
                return Ok(id);
            }
        }
        // Rounding can leave a sliver past the last weight.
        Ok(kept.last().map_or(best as u32, |&(id, _)| id))
    }

    /// The tokens [`sample`](Self::sample) can return with their probabilities, by ascending id.
    pub fn distribution(
        &self,
        logits: &[f32],
        prompt: &[u32],
        generated: &[u32],
    ) -> Result<Vec<(u32, f64)>> {
        let scores = self.scores(logits, prompt, generated)?;
        let best = best(&scores)?;
        if self.params.temperature == 0. {
            return Ok(vec![(best as u32, 1.)]);
        }
        let mut kept = self.filter(&scores, scores[best]);
        let total = total(&kept);
        kept.iter_mut().for_each(|(_, weight)| *weight /= total);
        Ok(kept)
    }

    /// The logits after penalties and bias.
    fn scores(&self, logits: &[f32], prompt: &[u32], generated: &[u32]) -> Result<Vec<f32>> {
        let SamplingParams { repetition_penalty, frequency_penalty, presence_penalty, .. } =
            self.params;
        let mut scores = logits.to_vec();
        if repetition_penalty != 1. {
            let mut seen = vec![false; scores.len()];
            for &id in prompt.iter().chain(generated) {
                if !std::mem::replace(at(&mut seen, id, "history")?, true) {
                    let score = &mut scores[id as usize];
                    *score = if *score < 0. {
                        *score * repetition_penalty
                    } else {
                        *score / repetition_penalty
                    };
                }
            }
        }
        if frequency_penalty != 0. || presence_penalty != 0. {
            let mut counts = vec![0u32; scores.len()];
            for &id in generated {
                *at(&mut counts, id, "history")? += 1;
            }
            for (score, &count) in scores.iter_mut().zip(&counts).filter(|(_, count)| **count > 0) {
                *score -= count as f32 * frequency_penalty + presence_penalty;
            }
        }
        for &(id, bias) in &self.params.logit_bias {
            *at(&mut scores, id, "logit_bias")? += bias;
        }
        if let Some(id) = scores.iter().position(|s| s.is_nan() || *s == f32::INFINITY) {
            let score = scores[id];
            return Err(Error::Input(format!(
                "the logit of token {id} is {score} after penalties and bias"
            )));
        }
        Ok(scores)
    }

    /// The tokens that pass top-k, top-p and min-p, by ascending id, each with its probability
    /// relative to the best token's, `exp((score - best) / temperature)`.
    fn filter(&self, scores: &[f32], best: f32) -> Vec<(u32, f64)> {
        // A head that screens leaves few: what follows is for those alone.
        let possible = (0..).zip(scores.iter().copied());
        let mut possible: Vec<(u32, f32)> =
            possible.filter(|(_, score)| *score > f32::NEG_INFINITY).collect();
        if let Some(k) = self.params.top_k {
            let floor = kth_largest(possible.iter().map(|(_, score)| *score).collect(), k);
            possible.retain(|(_, score)| *score >= floor);
        }
        let temperature = f64::from(self.params.temperature);
        let weight = |score| ((f64::from(score) - f64::from(best)) / temperature).exp();
        let mut kept: Vec<(u32, f64)> =
            possible.into_iter().map(|(id, score)| (id, weight(score))).collect();
        kept.retain(|(_, weight)| *weight > 0.);
        if self.params.top_p < 1. {
            kept = nucleus(kept, f64::from(self.params.top_p));
        }
        // The best token's weight is exp(0) = 1.
        kept.retain(|(_, weight)| *weight >= f64::from(self.params.min_p));
        kept
    }
}

/// The shortest run of the most probable tokens whose mass reaches `top_p`, by ascending id. Of
/// equal tokens at the border the lower ids stay.
fn nucleus(mut tokens: Vec<(u32, f64)>, top_p: f64) -> Vec<(u32, f64)> {
    let total = total(&tokens);
    // Tokens no heavier than (1 - p) · total / n weigh at most (1 - p) · total together, so all of
    // them are in the tail that goes: only the few others need sorting. (1 - 1e-9) keeps rounding
    // on the safe side.
    let negligible = (1. - top_p) * total / tokens.len() as f64 * (1. - 1e-9);
    tokens.retain(|(_, weight)| *weight > negligible);
    tokens.sort_unstable_by(|(id, weight), (other_id, other)| {
        other.total_cmp(weight).then(id.cmp(other_id))
    });
    let mut mass = 0.;
    let len = tokens.iter().take_while(|(_, weight)| {
        let short = mass < top_p * total;
        mass += weight;
        short
    });
    let len = len.count();
    tokens.truncate(len);
    tokens.sort_unstable_by_key(|(id, _)| *id);
    tokens
}

/// The k-th largest score; −∞ if there are fewer.
fn kth_largest(mut scores: Vec<f32>, k: usize) -> f32 {
    if k >= scores.len() {
        return f32::NEG_INFINITY;
    }
    *scores.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a)).1
}

/// The index of the largest value, the first of equals; 0 if there are none.
pub fn argmax(values: &[f32]) -> usize {
    /// Values that are compared with the largest so far all at once: few of as many hold a larger one.
    const CHUNK: usize = 64;
    let mut best = 0;
    for (index, chunk) in values.chunks(CHUNK).enumerate() {
        let largest = values[best];
        if !chunk.iter().fold(false, |any, value| any | (*value > largest)) {
            continue;
        }
        for i in index * CHUNK..index * CHUNK + chunk.len() {
            if values[i] > values[best] {
                best = i;
            }
        }
    }
    best
}

/// The [`argmax`] of scores that do not all exclude their token.
fn best(scores: &[f32]) -> Result<usize> {
    let best = argmax(scores);
    match scores.get(best).is_some_and(|&score| score > f32::NEG_INFINITY) {
        true => Ok(best),
        false => Err(Error::Input(format!("all {} logits exclude their token", scores.len()))),
    }
}

fn total(weights: &[(u32, f64)]) -> f64 {
    weights.iter().map(|(_, weight)| weight).sum()
}

fn at<'a, T>(values: &'a mut [T], id: u32, source: &str) -> Result<&'a mut T> {
    let len = values.len();
    values.get_mut(id as usize).ok_or_else(|| {
        Error::Input(format!("{source} names token {id}, but the vocabulary has {len} tokens"))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    use super::*;

    fn sampler(params: SamplingParams) -> Sampler {
        Sampler::new(params).unwrap()
    }

    /// The definitions, read off transformers and OpenAI: one softmax and one full sort per filter.
    fn naive(
        params: &SamplingParams,
        logits: &[f32],
        prompt: &[u32],
        generated: &[u32],
    ) -> Vec<f64> {
        let mut scores: Vec<f64> = logits.iter().map(|&x| f64::from(x)).collect();
        for (id, score) in scores.iter_mut().enumerate() {
            let id = id as u32;
            if prompt.contains(&id) || generated.contains(&id) {
                let penalty = f64::from(params.repetition_penalty);
                *score = if *score < 0. { *score * penalty } else { *score / penalty };
            }
            let count = generated.iter().filter(|&&g| g == id).count() as f64;
            *score -= count * f64::from(params.frequency_penalty);
            *score -= f64::from(params.presence_penalty) * f64::from(u8::from(count > 0.));
            *score += params
                .logit_bias
                .iter()
                .filter(|(biased, _)| *biased == id)
                .map(|(_, bias)| f64::from(*bias))
                .sum::<f64>();
            *score /= f64::from(params.temperature);
        }
        let mut order: Vec<usize> = (0..scores.len()).collect();
        if let Some(k) = params.top_k {
            order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
            let floor = scores[order[k.min(scores.len()) - 1]];
            scores.iter_mut().filter(|s| **s < floor).for_each(|s| *s = f64::NEG_INFINITY);
        }
        if params.top_p < 1. {
            let probs = softmax(&scores);
            order.sort_by(|&a, &b| scores[a].total_cmp(&scores[b]).then(b.cmp(&a))); // ascending
            let mut cumulative = 0.;
            for &id in &order[..order.len() - 1] {
                cumulative += probs[id];
                if cumulative <= 1. - f64::from(params.top_p) {
                    scores[id] = f64::NEG_INFINITY;
                }
            }
        }
        let probs = softmax(&scores);
        let best = probs.iter().copied().fold(0., f64::max);
        for (score, prob) in scores.iter_mut().zip(&probs) {
            if *prob < f64::from(params.min_p) * best {
                *score = f64::NEG_INFINITY;
            }
        }
        softmax(&scores)
    }

    fn softmax(scores: &[f64]) -> Vec<f64> {
        let best = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = scores.iter().map(|s| (s - best).exp()).sum();
        scores.iter().map(|s| (s - best).exp() / sum).collect()
    }

    fn params() -> impl Strategy<Value = SamplingParams> {
        (
            (0.2f32..3., proptest::option::of(1usize..60), prop_oneof![Just(1f32), 0.05f32..1.]),
            (prop_oneof![Just(0f32), 0f32..1.], prop_oneof![Just(1f32), 0.5f32..2.]),
            (-2f32..2., -2f32..2., proptest::collection::vec((0u32..40, -5f32..5.), 0..4)),
        )
            .prop_map(
                |((temperature, top_k, top_p), (min_p, repetition_penalty), rest)| {
                    let (frequency_penalty, presence_penalty, logit_bias) = rest;
                    SamplingParams {
                        temperature,
                        top_k,
                        top_p,
                        min_p,
                        repetition_penalty,
                        frequency_penalty,
                        presence_penalty,
                        logit_bias,
                    }
                },
            )
    }

    proptest! {
        #[test]
        fn distribution_equals_the_definitions(
            params in params(),
            logits in proptest::collection::vec(-6f32..6., 40),
            prompt in proptest::collection::vec(0u32..40, 0..12),
            generated in proptest::collection::vec(0u32..40, 0..12),
        ) {
            let got = sampler(params.clone()).distribution(&logits, &prompt, &generated).unwrap();
            let mut probs = vec![0.; logits.len()];
            got.iter().for_each(|&(id, p)| probs[id as usize] = p);
            prop_assert!(got.is_sorted_by_key(|&(id, _)| id));
            for (p, expected) in probs.iter().zip(naive(&params, &logits, &prompt, &generated)) {
                // Scores are f32: 2⁻²⁴ · 20 / 0.2 relative.
                prop_assert!((p - expected).abs() < 2e-5, "{p} {expected}");
            }
        }

        #[test]
        fn any_logits_give_a_token_or_an_error(
            params in params(),
            logits in proptest::collection::vec(any::<f32>(), 0..20),
            history in proptest::collection::vec(0u32..25, 0..5),
            seed in any::<u64>(),
        ) {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            if let Ok(id) = sampler(params).sample(&logits, &history, &history, &mut rng) {
                prop_assert!(logits[id as usize].is_finite());
            }
        }
    }

    #[test]
    fn penalties_by_hand() {
        let logits = [2., -2., 1., 0., 4.];
        let scores = |params| sampler(params).scores(&logits, &[0, 1, 0], &[1, 2, 2]).unwrap();
        let neutral = SamplingParams::default;
        assert_eq!(
            scores(SamplingParams { repetition_penalty: 2., ..neutral() }),
            [1., -4., 0.5, 0., 4.]
        );
        assert_eq!(
            scores(SamplingParams { frequency_penalty: 0.5, ..neutral() }),
            [2., -2.5, 0., 0., 4.]
        );
        assert_eq!(
            scores(SamplingParams { presence_penalty: -1., ..neutral() }),
            [2., -1., 2., 0., 4.]
        );
        let logit_bias = vec![(3, 1.5), (4, f32::NEG_INFINITY), (3, 1.)];
        assert_eq!(
            scores(SamplingParams { logit_bias, ..neutral() }),
            [2., -2., 1., 2.5, f32::NEG_INFINITY]
        );
    }

    #[test]
    fn greedy_is_the_first_maximum_after_penalties() {
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        let untouched = rng.clone();
        let greedy = sampler(SamplingParams::greedy());
        assert_eq!(greedy.sample(&[0., 3., 3., 1.], &[], &[], &mut rng).unwrap(), 1);
        assert_eq!(greedy.distribution(&[0., 3., 3.], &[], &[]).unwrap(), [(1, 1.)]);
        let penalized =
            sampler(SamplingParams { repetition_penalty: 2., ..SamplingParams::greedy() });
        assert_eq!(penalized.sample(&[0., 3., 3., 1.], &[1], &[], &mut rng).unwrap(), 2);
        assert_eq!(rng, untouched);
    }

    #[test]
    fn draws_follow_the_distribution_and_the_seed() {
        let logits: Vec<f32> = (0..12).map(|i| (i as f32 * 1.7).sin() * 2.).collect();
        let sampler = sampler(SamplingParams { top_p: 0.95, ..Default::default() });
        let expected = sampler.distribution(&logits, &[], &[]).unwrap();
        let draw = |seed| {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let draws = (0..20_000).map(|_| sampler.sample(&logits, &[], &[], &mut rng).unwrap());
            draws.collect::<Vec<u32>>()
        };
        let draws = draw(3);
        assert_eq!(draws, draw(3));
        assert_ne!(draws, draw(4));
        let mut chi_square = 0.;
        let mut counted = 0;
        for &(id, p) in &expected {
            let observed = draws.iter().filter(|&&d| d == id).count();
            counted += observed;
            chi_square += (observed as f64 - p * 20_000.).powi(2) / (p * 20_000.);
        }
        assert_eq!(counted, draws.len(), "a draw outside the distribution");
        // The 99.9 % point of chi-square with 11 degrees of freedom is 31.3; fewer are kept.
        assert!(chi_square < 31.3, "{chi_square} over {} tokens", expected.len());
    }

    #[test]
    fn filters_keep_ties_and_at_least_one() {
        let kept = |params, logits: &[f32]| -> Vec<u32> {
            let kept = sampler(params).distribution(logits, &[], &[]).unwrap();
            kept.into_iter().map(|(id, _)| id).collect()
        };
        let neutral = SamplingParams::default;
        let logits = [1., 2., 1., 0., f32::NEG_INFINITY];
        assert_eq!(kept(SamplingParams { top_k: Some(2), ..neutral() }, &logits), [0, 1, 2]);
        assert_eq!(kept(SamplingParams { top_k: Some(99), ..neutral() }, &logits), [0, 1, 2, 3]);
        assert_eq!(kept(SamplingParams { top_p: 1e-6, ..neutral() }, &logits), [1]);
        assert_eq!(kept(SamplingParams { min_p: 1., ..neutral() }, &logits), [1]);
        assert_eq!(kept(SamplingParams { temperature: 1e-30, ..neutral() }, &logits), [1]);
        assert_eq!(kept(SamplingParams { top_p: 0.5, ..neutral() }, &[0.; 4]), [0, 1]);
    }

    #[test]
    fn unusable_logits_and_ids_are_errors() {
        let error = |params, logits: &[f32], history: &[u32]| {
            let error = sampler(params).distribution(logits, history, &[]).unwrap_err();
            error.to_string()
        };
        let neutral = SamplingParams::default;
        let nan = error(neutral(), &[0., f32::NAN], &[]);
        assert_eq!(nan, "the logit of token 1 is NaN after penalties and bias");
        let overflow = SamplingParams { repetition_penalty: 1e-30, ..neutral() };
        let inf = error(overflow, &[1e30], &[0]);
        assert_eq!(inf, "the logit of token 0 is inf after penalties and bias");
        assert_eq!(error(neutral(), &[], &[]), "all 0 logits exclude their token");
        assert_eq!(
            error(SamplingParams::greedy(), &[f32::NEG_INFINITY; 2], &[]),
            "all 2 logits exclude their token"
        );
        assert_eq!(
            error(SamplingParams { repetition_penalty: 2., ..neutral() }, &[0.; 2], &[7]),
            "history names token 7, but the vocabulary has 2 tokens"
        );
        assert_eq!(
            error(SamplingParams { logit_bias: vec![(2, 1.)], ..neutral() }, &[0.; 2], &[]),
            "logit_bias names token 2, but the vocabulary has 2 tokens"
        );
    }
}
