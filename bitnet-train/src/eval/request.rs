//! What a model is asked about a document, as text and as tokens.

use bitnet_model::text::{ChatTemplate, Tokenizer};

use super::{
    Ask, Document,
    few_shot::{TARGET_DELIMITER, prompt},
};
use crate::{Error, Result};

/// What a model is asked.
#[derive(Clone, Debug, PartialEq)]
pub enum Request {
    /// How likely the continuation is after the context.
    Continuation {
        /// What is given.
        context: String,
        /// What is scored.
        continuation: String,
    },
    /// How likely a text is from its beginning on.
    Page(String),
    /// To continue the prompt.
    Generate(String),
}

/// What a model says.
#[derive(Clone, Debug, PartialEq)]
pub enum Response {
    /// ln p of what was scored, and whether greedy decoding would have written it.
    LogLikelihood(f64, bool),
    /// The continuation.
    Text(String),
    /// The continuation, a program, and whether it did what it was to do.
    Program {
        /// The continuation.
        text: String,
        /// Whether it and the tests behind it came to their end.
        passed: bool,
    },
}

/// What is asked about a document behind `examples`.
///
/// # Errors
/// The template refuses.
pub fn requests(
    document: &Document,
    examples: &[&Document],
    template: Option<&ChatTemplate>,
) -> Result<Vec<Request>> {
    let delimiter = if template.is_some() { "" } else { TARGET_DELIMITER };
    let prompt = |text: &str| prompt(examples, text, template);
    let continuation = |context: String, text: &str| Request::Continuation {
        context,
        continuation: format!("{delimiter}{text}"),
    };
    Ok(match &document.ask {
        Ask::Choices { choices, .. } => {
            let context = prompt(&document.text)?;
            choices.iter().map(|choice| continuation(context.clone(), choice)).collect()
        }
        Ask::Contexts { contexts, .. } => {
            let each = contexts.iter();
            let each = each.map(|context| Ok(continuation(prompt(context)?, &document.answer)));
            each.collect::<Result<_>>()?
        }
        Ask::Ending => {
            let (context, continuation) = (prompt(&document.text)?, document.answer.clone());
            vec![Request::Continuation { context, continuation }]
        }
        Ask::Page { .. } => vec![Request::Page(document.answer.clone())],
        Ask::Written { .. } | Ask::Program { .. } => {
            vec![Request::Generate(prompt(&document.text)?)]
        }
    })
}

/// The token that stands before a text which has nothing before it: begin-of-text, or the end of another one.
///
/// # Errors
/// The tokenizer has neither.
pub fn prefix_token(tokenizer: &Tokenizer) -> Result<u32> {
    let id = tokenizer.bos_token_id().or(tokenizer.eos_token_id());
    id.ok_or_else(|| Error::Tokenizer("names neither a `bos_token` nor an `eos_token`".into()))
}

/// White space as Python's `str.isspace` has it.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

/// The tokens of context and continuation. White space at the end of the context goes to the continuation, where
/// vocabularies have it, and both are tokenized together: the continuation is what is behind the context's own tokens.
///
/// # Errors
/// No token is left for the continuation.
pub fn encode_pair(
    tokenizer: &Tokenizer,
    context: &str,
    continuation: &str,
) -> Result<(Vec<u32>, Vec<u32>)> {
    let no_tokens = || Error::Input(format!("the continuation `{continuation}` has no tokens"));
    if context.is_empty() {
        let (mut tokens, prefix) =
            (tokenizer.encode(continuation, false)?, prefix_token(tokenizer)?);
        if tokens.first() != Some(&prefix) {
            tokens.insert(0, prefix);
        }
        let continuation = tokens.split_off(1);
        return if continuation.is_empty() { Err(no_tokens()) } else { Ok((tokens, continuation)) };
    }
    let (context, spaces) = context.split_at(context.trim_end_matches(is_space).len());
    let mut whole = tokenizer.encode_prompt(&format!("{context}{spaces}{continuation}"))?;
    let context = tokenizer.encode_prompt(context)?;
    let continuation = whole.split_off(context.len().min(whole.len()));
    if continuation.is_empty() {
        return Err(no_tokens());
    }
    Ok((context, continuation))
}

/// Cuts a text into pieces that fit a model of `max_len` tokens: each is scored once, behind the token before it. The text
/// begins behind `prefix`.
pub fn rolling_windows(tokens: &[u32], prefix: u32, max_len: usize) -> Vec<(Vec<u32>, Vec<u32>)> {
    let (mut windows, mut start) = (Vec::new(), 0);
    while start < tokens.len() {
        let end = tokens.len().min(start + max_len);
        // The last window is filled up with what is before it.
        let context = match start {
            0 => vec![prefix],
            _ => tokens[end.saturating_sub(max_len + 1).min(start - 1)..start].to_vec(),
        };
        windows.push((context, tokens[start..end].to_vec()));
        start = end;
    }
    windows
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `[make_disjoint_window(w) for w in get_rolling_token_windows(range(1, n + 1), 0, 4, 1)]` of the harness.
    #[test]
    fn windows_as_the_harness_cuts_them() {
        let windows = |n: u32| rolling_windows(&Vec::from_iter(1..=n), 0, 4);
        assert_eq!(windows(0), vec![]);
        assert_eq!(windows(3), vec![(vec![0], vec![1, 2, 3])]);
        assert_eq!(windows(8), vec![(vec![0], vec![1, 2, 3, 4]), (vec![4], vec![5, 6, 7, 8])]);
        assert_eq!(windows(6), vec![(vec![0], vec![1, 2, 3, 4]), (vec![2, 3, 4], vec![5, 6])]);
    }
}
