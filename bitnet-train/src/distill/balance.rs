//! Weights of the terms of a loss: by hand, or such that every term is as large as the cross-entropy.
//!
//! A published weight such as 10⁵ fits one model and one loss; on another it makes a term a thousand times as large as
//! the rest. Here the running means of the terms are followed instead, `m ← 0.99·m + 0.01·value`, divided by
//! `1 − 0.99ⁿ` as in Adam, and the weight of a term is `weight · m_cross_entropy / m_term`.
//!
//! The means follow from the values of all updates before, summed over the ranks of a job, and those are in the metrics: a
//! resumed run reads them there ([`Balance::replay`]) and goes on with the same bits. In the first update there is no mean
//! yet: only the cross-entropy counts.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use serde::{Deserialize, Serialize};

use crate::{
    Result,
    batch::Batch,
    metrics::Record,
    objective::CROSS_ENTROPY,
    task::{Gradients, Part, Prediction, Task},
};

/// How the terms of a loss are weighted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Balancing {
    /// A term's weight is relative to the cross-entropy: at 1 it is as large.
    #[default]
    Auto,
    /// A term is multiplied by its weight.
    Manual,
}

const DECAY: f64 = 0.99;

/// Running means of the terms; a clone shares them.
#[derive(Clone, Debug)]
pub struct Balance {
    balancing: Balancing,
    means: Arc<Mutex<Means>>,
}

/// Uncorrected means by name, and how many values each has seen.
#[derive(Debug, Default)]
struct Means(BTreeMap<String, (f64, i32)>);

impl Means {
    fn observe(&mut self, terms: &BTreeMap<String, f64>) {
        for (name, value) in terms {
            let (mean, count) = self.0.entry(name.clone()).or_default();
            *mean = DECAY * *mean + (1. - DECAY) * value;
            *count += 1;
        }
    }

    fn get(&self, name: &str) -> Option<f64> {
        let (mean, count) = self.0.get(name)?;
        Some(mean / (1. - DECAY.powi(*count)))
    }
}

impl Balance {
    /// No mean yet.
    pub fn new(balancing: Balancing) -> Self {
        Self { balancing, means: Arc::default() }
    }

    fn means(&self) -> MutexGuard<'_, Means> {
        self.means.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Follows the updates that `records` tell of, in order.
    pub fn replay(&self, records: &[Record]) {
        for record in records {
            if let Record::Train(record) = record {
                self.means().observe(&record.terms);
            }
        }
    }

    /// What the term `name` is multiplied by in this update.
    pub fn weight(&self, name: &str, weight: f64) -> f64 {
        if self.balancing == Balancing::Manual {
            return weight;
        }
        let means = self.means();
        match (means.get(CROSS_ENTROPY), means.get(name)) {
            // A term that has vanished needs no weight, and none may become infinite.
            (Some(reference), Some(mean)) if mean > f64::MIN_POSITIVE => weight * reference / mean,
            _ => 0.,
        }
    }
}

/// A task whose [`Balance`] follows the terms of its updates.
pub struct Balanced<T> {
    task: T,
    balance: Balance,
}

impl<T> Balanced<T> {
    /// `balance` is the one that the objective of `task` asks for weights.
    pub fn new(task: T, balance: Balance) -> Self {
        Self { task, balance }
    }
}

impl<T: Task> Task for Balanced<T> {
    fn inner(&self) -> Option<&dyn Task> {
        Some(&self.task)
    }

    fn pass(&self, batch: &Batch, items: usize, gradients: &mut Gradients) -> Result<Vec<Part>> {
        self.task.pass(batch, items, gradients)
    }

    fn end(&self, terms: &BTreeMap<String, f64>) {
        self.balance.means().observe(terms);
        self.task.end(terms);
    }

    fn evaluate(&self, batch: &Batch) -> Result<Vec<Prediction>> {
        self.task.evaluate(batch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::TrainRecord;

    fn record(step: usize, cross_entropy: f64, term: f64) -> Record {
        let terms = [(CROSS_ENTROPY.to_owned(), cross_entropy), ("term".to_owned(), term)].into();
        Record::Train(TrainRecord { step, terms, ..TrainRecord::default() })
    }

    #[test]
    fn terms_become_as_large_as_the_cross_entropy() {
        let balance = Balance::new(Balancing::Auto);
        assert_eq!(balance.weight("term", 2.), 0.);
        balance.replay(&[record(1, 4., 1e-5)]);
        assert!((balance.weight("term", 1.) - 4e5).abs() < 1e-3);
        // The corrected means are those of the values so far, not drawn to zero.
        balance.replay(&[record(2, 2., 3e-5)]);
        let mean = |a: f64, b: f64| (0.99 * a + b) / 1.99;
        let wanted = mean(4., 2.) / mean(1e-5, 3e-5);
        assert!((balance.weight("term", 1.) / wanted - 1.).abs() < 1e-12);
        assert!((balance.weight("term", 2.) / wanted - 2.).abs() < 1e-12);
        assert_eq!(balance.weight("other", 1.), 0.);
    }

    #[test]
    fn by_hand_nothing_is_followed() {
        let balance = Balance::new(Balancing::Manual);
        balance.replay(&[record(1, 4., 1e-5)]);
        assert_eq!(balance.weight("term", 1e5), 1e5);
    }
}
