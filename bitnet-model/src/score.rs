//! Scoring: the log-likelihood of a continuation after a context. Everything that evaluates a model goes through here.

use candle_core::{IndexOp, Tensor};

use crate::{Error, Result, model::Model, storage::with_slice};

/// A continuation to score after its context; both are token ids.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScoreRequest {
    /// At least one token; a text that begins here has BOS as its context.
    pub context: Vec<u32>,
    /// The tokens whose probability is asked.
    pub continuation: Vec<u32>,
}

/// How likely a continuation is.
#[derive(Clone, Debug, PartialEq)]
pub struct LogLikelihood {
    /// ln p of each continuation token, given all before it.
    pub token_logprobs: Vec<f32>,
    /// Whether each of them was the most likely one: greedy decoding would have written it.
    pub is_greedy: bool,
}

impl LogLikelihood {
    /// ln p of the whole continuation, in nats.
    pub fn sum(&self) -> f64 {
        self.token_logprobs.iter().map(|&logprob| f64::from(logprob)).sum()
    }
}

/// How likely a token was, and what was likelier or nearly so.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprobs {
    /// ln p of the token.
    pub logprob: f32,
    /// The likeliest tokens with their ln p, likeliest first.
    pub top: Vec<(u32, f32)>,
}

impl TokenLogprobs {
    /// Of `token` and the `count` likeliest, by their logits (vocab_size).
    pub fn of(logits: &[f32], token: u32, count: usize) -> Self {
        let (max, log_sum) = log_sum_exp(logits);
        let logprob = |id: u32| (f64::from(logits[id as usize] - max) - log_sum) as f32;
        let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
        let order =
            |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
        if count < ids.len() {
            ids.select_nth_unstable_by(count, order);
            ids.truncate(count);
        }
        ids.sort_unstable_by(order);
        Self { logprob: logprob(token), top: ids.iter().map(|&id| (id, logprob(id))).collect() }
    }
}

/// Rows of logits computed at once: 32 · 128256 · 4 bytes = 16 MB for the largest vocabulary.
pub(crate) const LOGIT_ROWS: usize = 32;

/// Scores all `requests`, `batch_size` at a time, in the order given. The batch size changes memory
/// and speed, never a bit of the result. A context that does not fit is cut on the left.
///
/// # Errors
/// An empty context or continuation, a continuation longer than the model's context, or an id
/// outside the vocabulary.
pub fn loglikelihood(
    model: &Model,
    requests: &[ScoreRequest],
    batch_size: usize,
) -> Result<Vec<LogLikelihood>> {
    let max_len = model.config().max_position_embeddings;
    for (index, request) in requests.iter().enumerate() {
        check(model, index, request)?;
    }
    // Neighbours of similar length waste little padding.
    let mut order: Vec<usize> = (0..requests.len()).collect();
    order.sort_by_key(|&i| requests[i].context.len() + requests[i].continuation.len());
    let mut scores = vec![None; requests.len()];
    for batch in order.chunks(batch_size.max(1)) {
        let rows: Vec<&ScoreRequest> = batch.iter().map(|&i| &requests[i]).collect();
        for (&index, score) in batch.iter().zip(score_batch(model, &rows, max_len)?) {
            scores[index] = Some(score);
        }
    }
    Ok(scores.into_iter().flatten().collect())
}

/// Refuses what cannot be scored.
pub(crate) fn check(model: &Model, index: usize, request: &ScoreRequest) -> Result<()> {
    let (vocab_size, max_len) = (model.config().vocab_size, model.config().max_position_embeddings);
    let continuation = request.continuation.len();
    if request.context.is_empty() || continuation == 0 {
        return Err(Error::Input(format!(
            "request {index}: context and continuation need at least one token each \
             (begin a text with BOS)"
        )));
    }
    if let Some(id) = request.continuation.iter().find(|&&id| id as usize >= vocab_size) {
        return Err(Error::Input(format!(
            "request {index}: token id {id} is outside the model's vocabulary of {vocab_size}"
        )));
    }
    if continuation > max_len {
        return Err(Error::Input(format!(
            "request {index}: a continuation of {continuation} tokens exceeds the model's \
             context of {max_len}"
        )));
    }
    Ok(())
}

impl ScoreRequest {
    /// What is run: all tokens but the last, which predicts nothing that is asked, and of these the last `max_len`.
    pub(crate) fn input(&self, max_len: usize) -> Vec<u32> {
        let mut tokens = [&self.context[..], &self.continuation].concat();
        tokens.pop();
        tokens.split_off(tokens.len().saturating_sub(max_len))
    }
}

/// The rows are padded on the right, where causal attention never looks.
fn score_batch(
    model: &Model,
    requests: &[&ScoreRequest],
    max_len: usize,
) -> Result<Vec<LogLikelihood>> {
    let inputs: Vec<Vec<u32>> = requests.iter().map(|request| request.input(max_len)).collect();
    let seq = inputs.iter().map(Vec::len).max().unwrap_or(0);
    let padded: Vec<u32> = inputs
        .iter()
        .flat_map(|row| row.iter().copied().chain(std::iter::repeat_n(0, seq - row.len())))
        .collect();
    let tokens = Tensor::from_vec(padded, (inputs.len(), seq), model.device())?;
    let hidden = model.hidden_states(&tokens, None)?;
    let score = |row: usize| {
        let continuation = &requests[row].continuation;
        score_last(model, &hidden.i((row, ..inputs[row].len()))?, continuation)
    };
    (0..requests.len()).map(score).collect()
}

/// The score of `targets`, each of which follows one of the last rows of `hidden` (tokens, hidden_size).
pub(crate) fn score_last(model: &Model, hidden: &Tensor, targets: &[u32]) -> Result<LogLikelihood> {
    let first = hidden.dim(0)? - targets.len();
    let mut score = LogLikelihood { token_logprobs: Vec::new(), is_greedy: true };
    for (chunk, targets) in targets.chunks(LOGIT_ROWS).enumerate() {
        let from = first + chunk * LOGIT_ROWS;
        let hidden = hidden.i(from..from + targets.len())?.contiguous()?;
        let vocab = model.config().vocab_size;
        with_slice::<f32, _>(&model.logits(&hidden)?, |logits| {
            for (logits, &target) in logits.chunks(vocab).zip(targets) {
                let (logprob, is_greedy) = token_logprob(logits, target as usize);
                score.token_logprobs.push(logprob);
                score.is_greedy &= is_greedy;
            }
            Ok(())
        })?;
    }
    Ok(score)
}

/// The largest logit `max` and `ln Σ exp(logit − max)`, summed in f64.
fn log_sum_exp(logits: &[f32]) -> (f32, f64) {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit - max).exp()).sum();
    (max, sum.ln())
}

/// `ln softmax(logits)[target]`, and whether `target` has the largest logit.
pub(crate) fn token_logprob(logits: &[f32], target: usize) -> (f32, bool) {
    let (max, log_sum) = log_sum_exp(logits);
    let logprob = f64::from(logits[target] - max) - log_sum;
    // On a tie greedy decoding takes the lowest id.
    let is_greedy = logits[target] == max && !logits[..target].contains(&max);
    (logprob as f32, is_greedy)
}
