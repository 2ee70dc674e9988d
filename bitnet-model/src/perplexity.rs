//! How well a model foresees a long text, which is run in windows of the tokens that it sees at once.

use std::{num::NonZeroUsize, ops::ControlFlow, ops::Range};

use candle_core::Tensor;

use crate::{Error, Result, model::Model, ops::KvType, score::score_last};

/// How a text is cut into windows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// Every token but the first is scored once, by the first window that reaches it, as in transformers' "Perplexity of
    /// fixed-length models".
    Sliding {
        /// Tokens that the model sees at once.
        window: NonZeroUsize,
        /// Tokens from one window to the next, less than `window`: a token has at least `window − stride` tokens before it,
        /// where the text has so many.
        stride: NonZeroUsize,
    },
    /// Windows do not overlap, and of each only what is behind its middle is scored, as by llama.cpp. What is left at the end
    /// of the text is not looked at.
    SecondHalves {
        /// Tokens that the model sees at once.
        window: NonZeroUsize,
    },
}

/// What the model sees at once, and the part of it that is scored: places in the text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    /// The last of these is only foreseen.
    pub seen: Range<usize>,
    /// Ends where `seen` does, and begins behind its first.
    pub scored: Range<usize>,
}

impl Cut {
    /// The windows of a text of `tokens` tokens.
    ///
    /// # Errors
    /// No token would be scored, or windows are no longer than their stride.
    pub fn windows(self, tokens: usize) -> Result<Vec<Window>> {
        let mut windows = Vec::new();
        match self {
            Self::Sliding { window, stride } => {
                let (window, stride) = (window.get(), stride.get());
                if stride >= window {
                    return Err(Error::Input(format!(
                        "windows of {window} tokens, {stride} apart: a window is longer than the way to the next"
                    )));
                }
                if tokens < 2 {
                    let reason = "a text of two tokens is the least that can be scored";
                    return Err(Error::Input(reason.into()));
                }
                let (mut scored, mut start) = (1, 0);
                while scored < tokens {
                    let end = tokens.min(start + window);
                    windows.push(Window { seen: start..end, scored: scored..end });
                    (scored, start) = (end, start + stride);
                }
            }
            Self::SecondHalves { window } => {
                let window = window.get();
                let first = window / 2 + 1;
                if first >= window || tokens < window {
                    return Err(Error::Input(format!(
                        "the text has {tokens} tokens, and windows of {window} are scored in their second halves: a window \
                         has at least 3, and the text as many as a window"
                    )));
                }
                windows.extend((0..tokens / window).map(|index| {
                    let (start, end) = (index * window, (index + 1) * window);
                    Window { seen: start..end, scored: start + first..end }
                }));
            }
        }
        Ok(windows)
    }
}

/// How well a model foresees a text.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Perplexity {
    /// Tokens scored.
    pub tokens: usize,
    /// Σ −ln p of these, in nats.
    pub nll: f64,
}

impl Perplexity {
    /// `exp` of the mean of −ln p; NaN for no tokens.
    pub fn value(&self) -> f64 {
        (self.nll / self.tokens as f64).exp()
    }

    /// Bits that a byte takes on average, if what was scored is `bytes` long.
    pub fn bits_per_byte(&self, bytes: usize) -> f64 {
        self.nll / std::f64::consts::LN_2 / bytes as f64
    }
}

/// How windows are run.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    /// How keys and values are stored.
    pub kv_type: KvType,
    /// Stands in the place of each window's first token, as llama.cpp lets every window begin with begin-of-text.
    pub begin: Option<u32>,
}

/// Scores `tokens` window by window. `on_window` hears of each with its Σ −ln p, and may stop there.
///
/// # Errors
/// Windows longer than the model's context, or an id outside the vocabulary.
pub fn perplexity(
    model: &Model,
    tokens: &[u32],
    windows: &[Window],
    run: Run,
    mut on_window: impl FnMut(&Window, f64) -> ControlFlow<()>,
) -> Result<Perplexity> {
    let (context, vocab) = (model.config().max_position_embeddings, model.config().vocab_size);
    if let Some(id) = tokens.iter().chain(&run.begin).find(|&&id| id as usize >= vocab) {
        return Err(Error::Input(format!(
            "token id {id} is outside the model's vocabulary of {vocab}"
        )));
    }
    let mut sum = Perplexity::default();
    for window in windows {
        let Window { seen, scored } = window;
        if seen.len() > context {
            return Err(Error::Input(format!(
                "a window of {} tokens is longer than the model's context of {context}",
                seen.len()
            )));
        }
        let mut input = tokens[seen.start..seen.end - 1].to_vec();
        if let (Some(begin), Some(first)) = (run.begin, input.first_mut()) {
            *first = begin;
        }
        let input = Tensor::new(input, model.device())?.unsqueeze(0)?;
        let mut cache = model.cache(run.kv_type, 1);
        let hidden = model.hidden_states(&input, Some(&mut cache))?.squeeze(0)?;
        let nll = -score_last(model, &hidden, &tokens[scored.clone()])?.sum();
        sum.nll += nll;
        sum.tokens += scored.len();
        if on_window(window, nll).is_break() {
            break;
        }
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(seen: Range<usize>, scored: Range<usize>) -> Window {
        Window { seen, scored }
    }

    /// The loop of transformers' document: `for begin in range(0, n, stride)`, `end = min(begin + window, n)`, of which the last
    /// `end - previous_end` are scored.
    #[test]
    fn windows_slide() {
        let cut = |window: usize, stride: usize| Cut::Sliding {
            window: window.try_into().unwrap(),
            stride: stride.try_into().unwrap(),
        };
        assert_eq!(cut(4, 3).windows(9).unwrap(), [of(0..4, 1..4), of(3..7, 4..7), of(6..9, 7..9)]);
        assert_eq!(cut(4, 2).windows(5).unwrap(), [of(0..4, 1..4), of(2..5, 4..5)]);
        assert_eq!(cut(9, 1).windows(3).unwrap(), [of(0..3, 1..3)]);
        assert!(cut(4, 4).windows(9).is_err() && cut(4, 2).windows(1).is_err());
    }

    /// llama.cpp scores `n_ctx - n_ctx / 2 - 1` tokens of a window: 255 of 512.
    #[test]
    fn second_halves_are_scored() {
        let cut = |window: usize| Cut::SecondHalves { window: window.try_into().unwrap() };
        assert_eq!(cut(4).windows(11).unwrap(), [of(0..4, 3..4), of(4..8, 7..8)]);
        assert_eq!(cut(5).windows(5).unwrap(), [of(0..5, 3..5)]);
        assert_eq!(cut(512).windows(1024).unwrap()[1], of(512..1024, 769..1024));
        assert!(cut(8).windows(7).is_err() && cut(2).windows(9).is_err());
    }
}
