//! Scoring questions with several answers: what the answers of a question begin with in common, usually the question, runs
//! once, then each answer behind it. The questions of a batch run together.

use std::collections::BTreeMap;

use candle_core::Tensor;

use crate::{
    Result,
    kv_cache::KvCache,
    model::{Model, Next},
    ops::KvType,
    score::{LOGIT_ROWS, LogLikelihood, ScoreRequest, check, token_logprob},
    storage::with_slice,
};

/// Tokens of different questions that run in one pass; it bounds the memory of the activations.
const PASS_TOKENS: usize = 2048;

/// Scores the answers of each question. With a cache in f32 the results have the bits of
/// [`loglikelihood`](crate::score::loglikelihood), whatever else is in the batch.
///
/// # Errors
/// As [`loglikelihood`](crate::score::loglikelihood); requests are counted through all questions.
pub fn choice_loglikelihoods(
    model: &Model,
    questions: &[Vec<ScoreRequest>],
    kv_type: KvType,
) -> Result<Vec<Vec<LogLikelihood>>> {
    for (index, request) in questions.iter().flatten().enumerate() {
        check(model, index, request)?;
    }
    let max_len = model.config().max_position_embeddings;
    let mut scores = Scores::new(model, questions);
    let mut rows = Vec::with_capacity(questions.len());
    for (question, requests) in questions.iter().enumerate() {
        let inputs = Vec::from_iter(requests.iter().map(|request| request.input(max_len)));
        let Some(longest) = inputs.iter().map(Vec::len).max() else { continue };
        let shared = common_prefix(&inputs);
        rows.push(Row { question, inputs, shared, longest, cache: model.cache(kv_type, 1) });
    }
    while !rows.is_empty() {
        let (mut count, mut tokens) = (0, 0);
        while count < rows.len() && (count == 0 || tokens + rows[count].longest <= PASS_TOKENS) {
            tokens += rows[count].longest;
            count += 1;
        }
        let mut now = Vec::from_iter(rows.drain(..count));
        run_questions(&mut now, &mut scores)?;
    }
    Ok(scores.found)
}

/// A question on its way.
struct Row {
    question: usize,
    /// The tokens to run, of each answer with its question.
    inputs: Vec<Vec<u32>>,
    /// How many of the first tokens all of them have in common.
    shared: usize,
    /// Tokens of the longest of them.
    longest: usize,
    cache: KvCache,
}

/// Tokens that all begin with.
fn common_prefix(inputs: &[Vec<u32>]) -> usize {
    let Some((first, others)) = inputs.split_first() else { return 0 };
    let equal = |other: &Vec<u32>| first.iter().zip(other).take_while(|(a, b)| a == b).count();
    others.iter().map(equal).min().unwrap_or(first.len())
}

/// Runs what is common to each question's answers, then one answer of every question after the other.
fn run_questions(rows: &mut [Row], scores: &mut Scores<'_>) -> Result<()> {
    for row in &mut *rows {
        row.cache.reserve(row.longest)?;
    }
    run(rows, scores, |row| Some(0..row.shared), |row| 0..row.inputs.len())?;
    let most = rows.iter().map(|row| row.inputs.len()).max().unwrap_or(0);
    for answer in 0..most {
        let of = |row: &Row| Some(row.shared..row.inputs.get(answer)?.len());
        run(rows, scores, of, |_| answer..answer + 1)?;
    }
    Ok(())
}

/// Runs the tokens at the positions `of` each row of the first of `answers`, and scores what follows them in all of `answers`.
fn run(
    rows: &mut [Row],
    scores: &mut Scores<'_>,
    of: impl Fn(&Row) -> Option<std::ops::Range<usize>>,
    answers: impl Fn(&Row) -> std::ops::Range<usize>,
) -> Result<()> {
    let (mut sequences, mut asked, mut first) = (Vec::new(), BTreeMap::new(), 0);
    for row in rows {
        let Some(positions) = of(row).filter(|positions| !positions.is_empty()) else { continue };
        for answer in answers(row) {
            let inputs = row.inputs[answer].len();
            for (index, position) in scores.positions(row.question, answer, inputs).enumerate() {
                if positions.contains(&position) {
                    let wanted = asked.entry(first + position - positions.start);
                    wanted.or_insert_with(Vec::new).push((row.question, answer, index));
                }
            }
        }
        first += positions.len();
        row.cache.truncate(positions.start);
        let tokens = &row.inputs[answers(row).start][positions];
        sequences.push(Next { tokens, cache: &mut row.cache });
    }
    if sequences.is_empty() {
        return Ok(());
    }
    let hidden = scores.model.next_states(&mut sequences)?;
    scores.take(&hidden, &asked)
}

/// Which tokens of which answers follow a row of hidden states: question, answer, and the token's place in the answer.
type Asked = BTreeMap<usize, Vec<(usize, usize, usize)>>;

/// The scores as they come.
struct Scores<'a> {
    model: &'a Model,
    questions: &'a [Vec<ScoreRequest>],
    found: Vec<Vec<LogLikelihood>>,
}

impl<'a> Scores<'a> {
    /// None yet.
    fn new(model: &'a Model, questions: &'a [Vec<ScoreRequest>]) -> Self {
        let empty = |request: &ScoreRequest| LogLikelihood {
            token_logprobs: vec![0.; request.continuation.len()],
            is_greedy: true,
        };
        let found = questions.iter().map(|requests| requests.iter().map(empty).collect());
        Self { model, questions, found: found.collect() }
    }

    /// The positions among `inputs` tokens behind which the answer's tokens come, in order.
    fn positions(
        &self,
        question: usize,
        answer: usize,
        inputs: usize,
    ) -> impl Iterator<Item = usize> + use<> {
        inputs - self.questions[question][answer].continuation.len()..inputs
    }

    /// Scores the tokens that are asked of the rows of `hidden` (tokens, hidden_size).
    fn take(&mut self, hidden: &Tensor, asked: &Asked) -> Result<()> {
        let (model, vocab_size) = (self.model, self.model.config().vocab_size);
        for asked in Vec::from_iter(asked).chunks(LOGIT_ROWS) {
            let rows = Vec::from_iter(asked.iter().map(|(row, _)| **row as u32));
            let rows = hidden.index_select(&Tensor::new(rows, hidden.device())?, 0)?;
            with_slice::<f32, _>(&model.logits(&rows)?, |logits| {
                for (logits, (_, wanted)) in logits.chunks(vocab_size).zip(asked) {
                    for &(question, answer, index) in *wanted {
                        let target = self.questions[question][answer].continuation[index];
                        let (logprob, is_greedy) = token_logprob(logits, target as usize);
                        let score = &mut self.found[question][answer];
                        score.token_logprobs[index] = logprob;
                        score.is_greedy &= is_greedy;
                    }
                }
                Ok(())
            })?;
        }
        Ok(())
    }
}
