//! Speculative decoding without a second model: what followed the last few tokens before, follows again in summaries,
//! edits and code ("prompt lookup"). A draft is verified in one forward pass, which reads the weights once for all of its
//! tokens; a token that the sampler would not have chosen ends it, so the text is the one of plain decoding.

use std::ops::RangeInclusive;

/// Tokens at the end of the text that must have occurred before, longest first.
const MATCH: RangeInclusive<usize> = 2..=4;
/// Tokens of a draft at first, and at most.
const FIRST: usize = 4;
const LONGEST: usize = 12;
/// Tokens decoded plainly after a draft of which nothing was right; doubled each time, so that a text without repetitions
/// costs a few forward passes over a few tokens in all.
const PAUSE: usize = 8;
const LONGEST_PAUSE: usize = 128;

/// Proposes drafts, longer ones while they are right.
#[derive(Clone, Debug)]
pub struct NgramDrafter {
    /// Tokens of the next draft.
    len: usize,
    /// The next pause.
    pause: usize,
    /// Tokens left of the present one.
    wait: usize,
}

impl Default for NgramDrafter {
    fn default() -> Self {
        Self { len: FIRST, pause: PAUSE, wait: 0 }
    }
}

impl NgramDrafter {
    /// The tokens that may follow `text`, at most `limit`; often none.
    pub fn draft(&mut self, text: &[u32], limit: usize) -> Vec<u32> {
        if self.wait > 0 {
            self.wait -= 1;
            return Vec::new();
        }
        let Some(next) = MATCH.rev().find_map(|len| follower(text, len)) else { return Vec::new() };
        text[next..].iter().copied().take(self.len.min(limit)).collect()
    }

    /// Learns how many tokens of a draft of `drafted` were right.
    pub fn judge(&mut self, drafted: usize, accepted: usize) {
        if drafted == 0 {
            return;
        }
        if accepted == 0 {
            (self.wait, self.pause) = (self.pause, (2 * self.pause).min(LONGEST_PAUSE));
            self.len = FIRST;
        } else {
            self.pause = PAUSE;
            self.len = match accepted == drafted {
                true => (2 * drafted).clamp(FIRST, LONGEST),
                false => (accepted + 1).clamp(2, LONGEST),
            };
        }
    }
}

/// The position behind the latest earlier occurrence of the last `len` tokens.
fn follower(text: &[u32], len: usize) -> Option<usize> {
    let start = text.len().checked_sub(len)?;
    let end = &text[start..];
    let earlier = &text[..text.len() - 1];
    earlier.windows(len).rposition(|window| window == end).map(|found| found + len)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drafts_continue_the_latest_longest_match() {
        let mut drafter = NgramDrafter::default();
        assert!(drafter.draft(&[], 9).is_empty());
        assert!(drafter.draft(&[1, 2, 3], 9).is_empty());
        assert_eq!(drafter.draft(&[7, 8, 1, 2, 5, 7, 8], 9), [1, 2, 5, 7]);
        assert_eq!(drafter.draft(&[7, 8, 1, 7, 8, 2, 7, 8], 1), [2]);
        // Four tokens match further back, two of them later.
        assert_eq!(drafter.draft(&[1, 2, 3, 4, 9, 3, 4, 5, 1, 2, 3, 4], 1), [9]);
        // A run overlaps itself.
        assert_eq!(drafter.draft(&[6, 6, 6], 9), [6]);
    }

    #[test]
    fn wrong_drafts_become_rare_and_right_ones_long() {
        let text = [1, 2, 3, 1, 2];
        let mut drafter = NgramDrafter::default();
        let mut wrong = 0;
        for _ in 0..1000 {
            let drafted = drafter.draft(&text, 9).len();
            wrong += usize::from(drafted > 0);
            drafter.judge(drafted, 0);
        }
        assert!(wrong <= 12, "{wrong} drafts of 1000 tokens");
        drafter.judge(4, 4);
        drafter.judge(8, 8);
        assert_eq!((drafter.len, drafter.pause), (LONGEST, PAUSE));
        drafter.judge(12, 3);
        assert_eq!(drafter.len, 4);
    }
}
