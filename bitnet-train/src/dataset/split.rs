//! Which documents are held out of a corpus that is trained on.

use crate::fingerprint::place;

/// A share of all documents, chosen by their numbers and a seed: a document can be asked for before the corpus has been
/// read to its end.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Split {
    /// The share that is held out, between 0 and 1.
    pub share: f64,
    /// Decides which documents.
    pub seed: u64,
}

impl Split {
    /// Whether document `index` is evaluated on, and neither trained on nor in the vocabulary's text.
    pub fn holds_out(&self, index: usize) -> bool {
        (place(self.seed, index as u64) as f64) < self.share * 2f64.powi(64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn about_the_share_is_held_out_and_the_seed_says_which() {
        let held_out = |share, seed| -> Vec<usize> {
            let split = Split { share, seed };
            (0..100_000).filter(|&index| split.holds_out(index)).collect()
        };
        let (some, others) = (held_out(0.01, 1), held_out(0.01, 2));
        // Binomial: 1000 ± 31.
        assert!(some.len().abs_diff(1000) < 150 && others.len().abs_diff(1000) < 150);
        let common = some.iter().filter(|index| others.contains(index)).count();
        assert!(common < 40, "{common}");
        assert_eq!(held_out(0.01, 1), some);
    }
}
