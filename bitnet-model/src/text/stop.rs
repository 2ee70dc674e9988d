//! Stop strings in streamed text.

use std::sync::Arc;

use crate::{Error, Result};

/// Ends a text at the first of several strings, wherever the text's pieces are cut.
///
/// Text that could still turn out to be the start of a stop string is held back; the stop string
/// itself is never given out.
///
/// ```
/// use bitnet_model::text::StopStrings;
///
/// let mut stop = StopStrings::new(vec!["User:".into()])?;
/// assert_eq!(stop.push("Bye.\nUs").text, "Bye.\n");
/// let last = stop.push("er: hi");
/// assert_eq!((last.text.as_str(), last.stopped), ("", Some(0)));
/// # Ok::<(), bitnet_model::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct StopStrings {
    /// Shared by all texts of a request: strangers make them long.
    stops: Arc<[String]>,
    /// The end of the text so far that is the start of a stop string.
    held: String,
    stopped: Option<usize>,
}

/// What one piece of text made certain.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StopOutcome {
    /// Text before any stop string.
    pub text: String,
    /// The index of the stop string that ended the text. Later pieces give no text.
    pub stopped: Option<usize>,
}

impl StopStrings {
    /// Stops at any of `stops`; with none it passes text through.
    ///
    /// # Errors
    /// If one is empty: it would stop every text at once.
    pub fn new(stops: Vec<String>) -> Result<Self> {
        if stops.iter().any(String::is_empty) {
            return Err(Error::Input("a stop string is empty".into()));
        }
        Ok(Self { stops: stops.into(), held: String::new(), stopped: None })
    }

    /// Takes the next piece of text.
    ///
    /// The stop string that is complete first ends the text; of several that end together, the
    /// longest.
    pub fn push(&mut self, piece: &str) -> StopOutcome {
        if self.stopped.is_some() {
            return StopOutcome { text: String::new(), stopped: self.stopped };
        }
        self.held.push_str(piece);
        let found = self.stops.iter().enumerate().filter_map(|(index, stop)| {
            // A search reads all of what it looks for first.
            let start =
                if stop.len() <= self.held.len() { self.held.find(stop)? } else { return None };
            Some((start + stop.len(), start, index))
        });
        if let Some((_, start, index)) = found.min() {
            self.stopped = Some(index);
            self.held.truncate(start);
            return StopOutcome { text: std::mem::take(&mut self.held), stopped: self.stopped };
        }
        let held = self.held.split_off(self.first_open());
        StopOutcome { text: std::mem::replace(&mut self.held, held), stopped: None }
    }

    /// Ends the text: what was held back, if no stop string came of it.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Where the longest end of the held text starts that is the start of a stop string.
    fn first_open(&self) -> usize {
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let starts = self.held.char_indices().map(|(i, _)| i);
        starts
            .filter(|i| self.held.len() - i < longest)
            .find(|&i| self.stops.iter().any(|stop| stop.starts_with(&self.held[i..])))
            .unwrap_or(self.held.len())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Looks at the whole text: the first end of any stop string, the longest of those that end
    /// there.
    fn naive(stops: &[String], text: &str) -> (String, Option<usize>) {
        for end in text.char_indices().map(|(i, c)| i + c.len_utf8()) {
            let at_end = stops.iter().enumerate().filter(|(_, stop)| text[..end].ends_with(*stop));
            let longest = at_end.max_by_key(|(index, stop)| (stop.len(), usize::MAX - index));
            if let Some((index, stop)) = longest {
                return (text[..end - stop.len()].to_owned(), Some(index));
            }
        }
        (text.to_owned(), None)
    }

    proptest! {
        #[test]
        fn any_cuts_give_what_the_whole_text_gives(
            stops in proptest::collection::vec("[ab🙂é]{1,4}", 0..4),
            pieces in proptest::collection::vec("[ab🙂é]{0,5}", 0..12),
        ) {
            let text = pieces.concat();
            let mut stop = StopStrings::new(stops.clone()).unwrap();
            let (mut got, mut stopped) = (String::new(), None);
            for piece in &pieces {
                let outcome = stop.push(piece);
                got.push_str(&outcome.text);
                stopped = outcome.stopped;
                let still_possible = naive(&stops, &text).0;
                prop_assert!(still_possible.starts_with(&got), "gave out {got:?} too early");
            }
            got.push_str(&stop.finish());
            prop_assert_eq!((got, stopped), naive(&stops, &text));
        }
    }

    #[test]
    fn holds_back_only_what_may_become_a_stop() {
        let mut stop = StopStrings::new(vec!["<|end|>".into(), "\n\n".into()]).unwrap();
        assert_eq!(stop.push("a <").text, "a ");
        assert_eq!(stop.push("b").text, "<b");
        assert_eq!(stop.push("\n").text, "");
        assert_eq!(stop.push("\n!"), StopOutcome { text: String::new(), stopped: Some(1) });
        assert_eq!(stop.push("more"), StopOutcome { text: String::new(), stopped: Some(1) });
        assert_eq!(stop.finish(), "");
    }

    #[test]
    fn no_stops_pass_everything_and_empty_ones_are_refused() {
        let mut stop = StopStrings::new(Vec::new()).unwrap();
        assert_eq!(stop.push("all").text, "all");
        let error = StopStrings::new(vec!["x".into(), String::new()]).unwrap_err();
        assert_eq!(error.to_string(), "a stop string is empty");
    }
}
