//! Documents packed end to end in some order, read window by window. Only their numbers and ends are held, 12 bytes a
//! document: the tokens stay where they are.

use std::ops::Range;

use rand::{Rng, seq::SliceRandom};

use super::Tokens;

/// An order of the documents of a corpus.
#[derive(Clone, Debug)]
pub struct Stream {
    /// The document at each place; as in the corpus if absent.
    order: Option<Vec<u32>>,
    /// Where the document at each place ends.
    ends: Vec<u64>,
}

/// Consecutive tokens of a stream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Window {
    /// The tokens.
    pub ids: Vec<u32>,
    /// For each token where in the window its document begins: 0 if it begins before.
    pub starts: Vec<usize>,
}

impl Stream {
    /// The documents as they lie in the corpus.
    pub fn in_order(tokens: &Tokens) -> Self {
        Self { order: None, ends: ends(tokens, 0..tokens.documents()) }
    }

    /// The documents in an order that `rng` decides.
    pub fn shuffled(tokens: &Tokens, rng: &mut impl Rng) -> Self {
        // `Tokens` holds no more documents than a u32 counts.
        let mut order: Vec<u32> = (0..tokens.documents() as u32).collect();
        order.shuffle(rng);
        let ends = ends(tokens, order.iter().map(|&index| index as usize));
        Self { order: Some(order), ends }
    }

    /// The tokens of `range`, of the corpus that the stream was made for.
    ///
    /// # Panics
    /// If the stream is shorter.
    pub fn window(&self, tokens: &Tokens, range: Range<usize>) -> Window {
        let mut window = Window::default();
        let mut place = self.ends.partition_point(|&end| end <= range.start as u64);
        while window.ids.len() < range.len() {
            let at = range.start + window.ids.len();
            let start = if place == 0 { 0 } else { self.ends[place - 1] as usize };
            let end = (self.ends[place] as usize).min(range.end);
            let document = self.order.as_ref().map_or(place, |order| order[place] as usize);
            let begin = window.ids.len();
            tokens.read(document, at - start..end - start, &mut window.ids);
            window.starts.extend(std::iter::repeat_n(begin, end - at));
            place += 1;
        }
        window
    }
}

fn ends(tokens: &Tokens, order: impl Iterator<Item = usize>) -> Vec<u64> {
    let lengths = order.map(|index| tokens.document_len(index) as u64);
    lengths
        .scan(0, |end, length| {
            *end += length;
            Some(*end)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    use super::*;

    #[test]
    fn windows_cross_documents() {
        let tokens = Tokens::new((0..10).collect(), vec![3, 4, 10], 10).unwrap();
        let stream = Stream::in_order(&tokens);
        let window = stream.window(&tokens, 1..6);
        assert_eq!((window.ids, window.starts), (vec![1, 2, 3, 4, 5], vec![0, 0, 2, 3, 3]));
        assert_eq!(stream.window(&tokens, 4..5).starts, [0]);
        assert_eq!(stream.window(&tokens, 0..10).ids, Vec::from_iter(0..10));
    }

    #[test]
    fn a_shuffled_stream_holds_every_document_whole() {
        let tokens = Tokens::new((0..10).collect(), vec![3, 4, 10], 10).unwrap();
        let mut orders = Vec::new();
        for seed in 0..20 {
            let stream = Stream::shuffled(&tokens, &mut ChaCha8Rng::seed_from_u64(seed));
            let ids = stream.window(&tokens, 0..10).ids;
            for document in [&[0, 1, 2][..], &[3], &[4, 5, 6, 7, 8, 9]] {
                assert!(ids.windows(document.len()).any(|ids| ids == document), "{ids:?}");
            }
            orders.push(ids);
        }
        orders.sort();
        orders.dedup();
        assert_eq!(orders.len(), 6); // all orders of three
    }
}
