//! A sample of a corpus of unknown size, taken in one pass and in bounded memory.

use crate::fingerprint::scatter;

/// A share of the documents that halves whenever what is kept grows too large: all of a small corpus, and of a large one
/// between half of the limit and all of it. Which documents are kept depends on their numbers alone.
#[derive(Debug)]
pub(super) struct Sample {
    limit: usize,
    bytes: usize,
    /// The largest [`scatter`]ed number that is kept.
    most: u64,
    kept: Vec<(u64, String)>,
}

impl Sample {
    /// Of at most `limit` bytes, unless one document alone is larger.
    pub fn new(limit: usize) -> Self {
        Self { limit, bytes: 0, most: u64::MAX, kept: Vec::new() }
    }

    /// Offers document `index`.
    pub fn offer(&mut self, index: usize, text: String) {
        let place = scatter(index as u64);
        if place > self.most {
            return;
        }
        self.bytes += text.len();
        self.kept.push((place, text));
        while self.bytes > self.limit && self.kept.len() > 1 {
            self.most /= 2;
            let most = self.most;
            // One document stays, however unlucky its number is.
            let least = self.kept.iter().map(|&(place, _)| place).min().unwrap_or_default();
            self.kept.retain(|&(place, _)| place <= most || place == least);
            self.bytes = self.kept.iter().map(|(_, text)| text.len()).sum();
        }
    }

    /// What was kept, in the order of the corpus.
    pub fn into_texts(self) -> Vec<String> {
        self.kept.into_iter().map(|(_, text)| text).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(limit: usize, documents: usize) -> Vec<String> {
        let mut sample = Sample::new(limit);
        (0..documents).for_each(|index| sample.offer(index, format!("{index:010}")));
        sample.into_texts()
    }

    #[test]
    fn a_small_corpus_is_kept_and_a_large_one_sampled_evenly() {
        assert_eq!(sample(1000, 100).len(), 100);
        let kept = sample(10_000, 100_000);
        assert!((400..=1000).contains(&kept.len()), "{}", kept.len());
        assert!(kept.is_sorted());
        let first_half = kept.iter().filter(|text| text.as_str() < "0000050000").count();
        assert!(first_half.abs_diff(kept.len() / 2) < kept.len() / 8, "{first_half}");
        assert_eq!(sample(5, 1).len(), 1);
        assert_eq!(sample(5, 50).len(), 1);
    }
}
