//! Signs that a run has gone wrong while its loss is still a number: divergence and vocabulary collapse.
//!
//! Both detectors are small states that see one number after another. They are part of a checkpoint, so a resumed
//! run stops where an uninterrupted one does.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::metrics::Diversity;

/// Losses whose median is the level of a run.
const WINDOW: usize = 32;

/// In nats: a loss near 0, of text that is known by heart, may double.
const LEAST_MARGIN: f64 = 0.1;

/// A model collapses onto fewer than this part of the effective number of tokens in the text.
const FEW: f64 = 0.1;

/// Even in a text of few tokens a model that predicts less than this effective number predicts only one.
const NARROW: f64 = 1.5;

/// Of the loss of a model that knows nothing but the frequencies of tokens: below it a model has learned more.
const LEARNED: f64 = 0.9;

/// When the loss counts as diverged.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DivergenceLimits {
    /// The loss may be higher than the lowest level so far by this part of it.
    pub margin: f64,
    /// So many updates in a row above that are a divergence; fewer are a spike.
    pub updates: usize,
}

/// Watches the loss of every update.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Divergence {
    /// The last losses, oldest first.
    recent: VecDeque<f64>,
    /// The first loss or the lowest median since, whichever is less.
    level: Option<f64>,
    /// The update that began the present row above the margin, and its length.
    trouble: Option<Trouble>,
}

/// Since when something has been wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Trouble {
    /// Updates after which the weights may have been bad already.
    pub since: usize,
    /// Signs in a row.
    pub count: usize,
}

impl Trouble {
    fn grown(trouble: Option<Self>, since: usize) -> Self {
        trouble.map_or(Self { since, count: 1 }, |t| Self { count: t.count + 1, ..t })
    }
}

/// Why a run should stop.
#[derive(Clone, Debug, PartialEq)]
pub struct Finding {
    /// What was seen, with its numbers.
    pub reason: String,
    /// Updates after which the weights may have been bad already; those of fewer are good.
    pub since: usize,
}

impl Divergence {
    /// Takes the loss of update `step`. While `is_settling`, because the objective itself is changing, nothing is
    /// remembered and nothing is found.
    pub fn observe(
        &mut self,
        step: usize,
        loss: f64,
        is_settling: bool,
        limits: DivergenceLimits,
    ) -> Option<Finding> {
        if is_settling {
            *self = Self::default();
            return None;
        }
        let level = *self.level.get_or_insert(loss);
        let limit = level + (level.abs() * limits.margin).max(LEAST_MARGIN);
        // The loss of update n is that of the weights after n − 1.
        self.trouble = (loss > limit).then(|| Trouble::grown(self.trouble, step - 1));
        if self.recent.len() == WINDOW {
            self.recent.pop_front();
        }
        self.recent.push_back(loss);
        if self.recent.len() == WINDOW {
            self.level = Some(level.min(median(&self.recent)));
        }
        let Trouble { since, count } = self.trouble?;
        (count >= limits.updates).then(|| Finding {
            reason: format!(
                "the loss, {loss:.4}, has been above {limit:.4} for {count} updates, after a level of {level:.4}"
            ),
            since,
        })
    }

    /// Updates after which the present trouble may have begun, if there is any.
    pub fn trouble(&self) -> Option<usize> {
        self.trouble.map(|trouble| trouble.since)
    }
}

/// The middle one of a window of finite values.
fn median(values: &VecDeque<f64>) -> f64 {
    let mut sorted = Vec::from_iter(values.iter().copied());
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

/// When predictions count as collapsed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CollapseLimits {
    /// So many evaluations in a row with the signs are a collapse.
    pub evaluations: usize,
    /// A model that has never learned more than the frequencies of tokens is given so many updates to do it.
    pub after: usize,
}

/// Watches the predictions of every evaluation.
///
/// The signs are a model that predicts few tokens at a loss that knowing their frequencies alone would reach. Every
/// model shows them in its first updates.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Collapse {
    /// Whether an evaluation has found more knowledge than frequencies.
    has_learned: bool,
    /// Updates before the last evaluation without the signs.
    last_sound: usize,
    trouble: Option<Trouble>,
}

impl Collapse {
    /// Takes an evaluation after `step` updates: its loss a token and how varied its predictions were.
    pub fn observe(
        &mut self,
        step: usize,
        nats_per_token: f64,
        diversity: Diversity,
        limits: CollapseLimits,
    ) -> Option<Finding> {
        let Diversity { predicted_tokens, label_tokens } = diversity;
        let knows_more = nats_per_token < LEARNED * diversity.unigram_nats();
        let is_young = !self.has_learned && step < limits.after;
        self.has_learned |= knows_more;
        let is_narrow = predicted_tokens < (FEW * label_tokens).max(NARROW);
        let signs = is_narrow && !knows_more && !is_young;
        self.trouble = signs.then(|| Trouble::grown(self.trouble, self.last_sound + 1));
        if !signs {
            self.last_sound = step;
        }
        let Trouble { since, count } = self.trouble?;
        (count >= limits.evaluations).then(|| Finding {
            reason: format!(
                "the predictions have collapsed to {predicted_tokens:.1} tokens where the text has {label_tokens:.0} (effective numbers), \
                 at {nats_per_token:.3} nats/token where their frequencies alone give {:.3}, in {count} evaluations in a row",
                diversity.unigram_nats()
            ),
            since,
        })
    }

    /// Updates after which the present trouble may have begun, if there is any.
    pub fn trouble(&self) -> Option<usize> {
        self.trouble.map(|trouble| trouble.since)
    }
}

/// Effective number of values of a histogram, exp of its entropy: 1 if all are equal, n if n are equally frequent.
/// 0 for an empty histogram.
pub fn effective_number(counts: &[u64]) -> f64 {
    let total = counts.iter().sum::<u64>();
    if total == 0 {
        return 0.;
    }
    let nats = |&count: &u64| {
        let p = count as f64 / total as f64;
        -p * p.ln()
    };
    counts.iter().filter(|&&count| count > 0).map(nats).sum::<f64>().exp()
}

#[cfg(test)]
#[path = "detector_tests.rs"]
mod tests;
