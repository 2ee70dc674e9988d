//! Several sequences continued together, which join and leave between tokens: continuous batching.
//!
//! A [`step`](Batch::step) runs one token of every sequence that is being continued, and some tokens of the prompts of those
//! that have just joined, in one pass over the weights. What a sequence comes to is what a [`Session`](crate::session::Session)
//! makes of it alone, bit for bit, whatever else is in the batch.
//!
//! Memory for keys and values is set aside when a sequence joins, for the longest text it can become, so that none that runs
//! ever fails for want of it. Sequences that have ended leave their keys and values to later ones that begin with the same
//! tokens, as long as nobody needs the memory.

use std::{collections::BTreeMap, sync::Arc};

use candle_core::Tensor;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use crate::{
    Error, Result,
    adapter::Adaptation,
    grammar::{Grammar, Matcher},
    kv_cache::KvCache,
    model::{Model, Next},
    nn::Need,
    ops::KvType,
    sampler::Sampler,
    score::{LOGIT_ROWS, TokenLogprobs},
    session::Finish,
};

/// What is to be continued, and how.
#[derive(Clone, Debug)]
pub struct Sequence {
    /// The text so far, at least one token.
    pub prompt: Vec<u32>,
    /// Chooses each token.
    pub sampler: Sampler,
    /// Of its random numbers.
    pub seed: u64,
    /// The most tokens to add.
    pub max_new_tokens: usize,
    /// Tokens that end the text; the one met is not part of it.
    pub eos_token_ids: Vec<u32>,
    /// The form that the new text is to have; the text ends where it is complete.
    pub grammar: Option<Grammar>,
    /// An adapter beside the model for this sequence alone.
    pub adapter: Option<Arc<Adaptation>>,
    /// How likely each token was and so many of the likeliest, if that is asked.
    pub logprobs: Option<usize>,
    /// Whether it is asked of the prompt's tokens, too.
    pub prompt_logprobs: bool,
    /// Whether the mean of the prompt's hidden states is asked, and no token.
    pub pooled: bool,
}

/// A sequence in the batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SequenceId(u64);

/// What became of a sequence in a step.
#[derive(Clone, Debug, PartialEq)]
pub enum Update {
    /// How likely the token of the prompt at this position was, from 1 on in ascending order.
    Prompt(usize, TokenLogprobs),
    /// The mean of the final norm's output (hidden_size) over the prompt.
    Pooled(Vec<f32>),
    /// A token was added.
    Token(u32, Option<TokenLogprobs>),
    /// It has ended and is no longer in the batch.
    End(Finish),
    /// It cannot go on and is no longer in the batch.
    Failed(String),
}

/// How much there may be at once.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Sequences.
    pub sequences: usize,
    /// Bytes of keys and values, those kept for later ones included.
    pub kv_bytes: usize,
    /// Tokens of prompts in a step, of all sequences together.
    pub prompt_tokens: usize,
    /// The same while other sequences are being continued: fewer hold these up less.
    pub prompt_tokens_beside: usize,
    /// How keys and values are stored.
    pub kv_type: KvType,
}

/// How the memory is used, and what there was so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Sequences in the batch.
    pub running: usize,
    /// Bytes of keys and values of these.
    pub running_bytes: usize,
    /// Bytes of what is kept of sequences that have ended.
    pub kept_bytes: usize,
    /// Sequences that joined.
    pub joined: u64,
    /// Of these, those that took over the beginning of an earlier one.
    pub prefix_hits: u64,
    /// Tokens of prompts that were taken over.
    pub prefix_tokens: u64,
    /// Tokens of prompts that were run.
    pub prompt_tokens: u64,
    /// Tokens added.
    pub new_tokens: u64,
    /// Steps that ran something.
    pub steps: u64,
}

/// The sequences, and the model that continues them.
pub struct Batch {
    model: Arc<Model>,
    limits: Limits,
    running: BTreeMap<SequenceId, Running>,
    /// Of sequences that have ended, those first that were of use longest ago.
    kept: Vec<Kept>,
    next_id: u64,
    /// Which sequence's prompt comes first in the next step.
    turn: u64,
    usage: Usage,
}

struct Running {
    sequence: Sequence,
    rng: ChaCha8Rng,
    matcher: Option<Matcher>,
    cache: KvCache,
    /// Of the hidden states of the prompt so far, if their mean is asked.
    sum: Vec<f64>,
    /// The tokens that the cache holds or will hold after the next steps: the prompt and what was added.
    tokens: Vec<u32>,
    bytes: usize,
}

/// What a sequence leaves.
struct Kept {
    cache: KvCache,
    tokens: Vec<u32>,
}

impl Running {
    /// Tokens of the prompt that have not been run.
    fn unread(&self) -> usize {
        self.sequence.prompt.len().saturating_sub(self.cache.len())
    }

    fn generated(&self) -> &[u32] {
        &self.tokens[self.sequence.prompt.len()..]
    }

    /// Chooses the token after these logits, if it is part of the text, and says whether the text ends.
    fn sample(&mut self, logits: &[f32]) -> Result<(Option<u32>, bool)> {
        let Sequence { sampler, prompt, eos_token_ids, .. } = &self.sequence;
        let generated = &self.tokens[prompt.len()..];
        let mut allowed = Vec::new();
        let logits = match &mut self.matcher {
            Some(matcher) => {
                allowed.extend(logits);
                matcher.allow(&mut allowed, eos_token_ids)?;
                &allowed
            }
            None => logits,
        };
        let token = sampler.sample(logits, prompt, generated, &mut self.rng)?;
        if eos_token_ids.contains(&token) {
            return Ok((None, true));
        }
        let Some(matcher) = &mut self.matcher else { return Ok((Some(token), false)) };
        matcher.accept(token)?;
        Ok((Some(token), matcher.is_finished()))
    }

    /// Adds up hidden states (tokens, hidden_size) in order, and returns the mean after the last one.
    fn pool(&mut self, hidden: &Tensor) -> Result<Option<Vec<f32>>> {
        self.sum.resize(hidden.dim(1)?, 0.);
        for state in hidden.to_vec2::<f32>()? {
            self.sum.iter_mut().zip(state).for_each(|(sum, x)| *sum += f64::from(x));
        }
        let count = self.sequence.prompt.len() as f64;
        let mean = || self.sum.iter().map(|sum| (sum / count) as f32).collect();
        Ok((self.unread() == 0).then(mean))
    }

    /// What is asked of the logits after the token at `position`.
    fn need(&self, position: usize) -> Option<Need> {
        let Sequence { sampler, prompt, logprobs, prompt_logprobs, pooled, .. } = &self.sequence;
        if *pooled {
            return None;
        }
        match (position + 1 == self.tokens.len(), logprobs) {
            (true, _) if logprobs.is_some() || self.matcher.is_some() => Some(Need::All),
            (true, _) => Some(sampler.need(prompt, self.generated())),
            (false, Some(_)) => prompt_logprobs.then_some(Need::All),
            (false, None) => None,
        }
    }
}

impl Batch {
    /// An empty batch.
    pub fn new(model: Arc<Model>, limits: Limits) -> Self {
        let (running, kept, usage) = Default::default();
        Self { model, limits, running, kept, next_id: 0, turn: 0, usage }
    }

    /// The network.
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// How the memory is used, and what there was so far.
    pub fn usage(&self) -> Usage {
        Usage {
            running: self.running.len(),
            running_bytes: self.running.values().map(|running| running.bytes).sum(),
            kept_bytes: self.kept.iter().map(|kept| kept.cache.bytes()).sum(),
            ..self.usage
        }
    }

    /// Whether no sequence is left.
    pub fn is_empty(&self) -> bool {
        self.running.is_empty()
    }

    /// Bytes of keys and values that are set aside for a sequence.
    pub fn bytes_for(&self, sequence: &Sequence) -> usize {
        KvCache::reserved_bytes(self.model.config(), self.limits.kv_type, self.room(sequence))
    }

    /// Tokens for which there must be room: the last one that is added is not run.
    fn room(&self, sequence: &Sequence) -> usize {
        let new = sequence.max_new_tokens.saturating_sub(1);
        let all = sequence.prompt.len().saturating_add(new);
        all.min(self.model.config().max_position_embeddings)
    }

    /// Takes a sequence into the batch, with the number of tokens of its prompt that need not be run; `None` if there is no
    /// room for it now.
    ///
    /// # Errors
    /// A sequence that can never run: an empty prompt, ids outside the vocabulary, more tokens than the model's context or
    /// than all memory for keys and values holds, an adapter for another model.
    pub fn admit(&mut self, sequence: Sequence) -> Result<Option<(SequenceId, usize)>> {
        self.check(&sequence)?;
        let bytes = self.bytes_for(&sequence);
        let taken: usize = self.running.values().map(|running| running.bytes).sum();
        if self.running.len() >= self.limits.sequences || taken + bytes > self.limits.kv_bytes {
            return Ok(None);
        }
        let (cache, reused) = self.cache_for(&sequence, self.limits.kv_bytes - taken - bytes)?;
        let id = SequenceId(self.next_id);
        self.next_id += 1;
        self.usage.joined += 1;
        self.usage.prefix_hits += u64::from(reused > 0);
        self.usage.prefix_tokens += reused as u64;
        let (rng, tokens) = (ChaCha8Rng::seed_from_u64(sequence.seed), sequence.prompt.clone());
        let matcher = sequence.grammar.as_ref().map(Grammar::matcher);
        let sum = Vec::new();
        self.running.insert(id, Running { sequence, rng, matcher, cache, sum, tokens, bytes });
        Ok(Some((id, reused)))
    }

    fn check(&self, sequence: &Sequence) -> Result<()> {
        let config = self.model.config();
        let (len, context) = (sequence.prompt.len(), config.max_position_embeddings);
        if len == 0 {
            return Err(Error::Input("the prompt has no tokens".into()));
        }
        if len > context {
            return Err(Error::Input(format!(
                "the prompt has {len} tokens, but the model's context holds {context}; shorten it"
            )));
        }
        if let Some(id) = sequence.prompt.iter().find(|&&id| id as usize >= config.vocab_size) {
            return Err(Error::Input(format!(
                "token id {id} is outside the model's vocabulary of {}",
                config.vocab_size
            )));
        }
        let (bytes, limit) = (self.bytes_for(sequence), self.limits.kv_bytes);
        if bytes > limit {
            return Err(Error::Input(format!(
                "{len} tokens of prompt and {} new ones take {bytes} bytes of keys and values, more than the {limit} there \
                 are in all; shorten the prompt or ask for fewer new tokens",
                sequence.max_new_tokens
            )));
        }
        Ok(())
    }

    /// A cache with room for the sequence, and how many tokens of the prompt it holds: as many as the sequence has in common
    /// with one that has ended or runs, under the same adapter. At least the last token is left to run. What is kept is
    /// forgotten until it takes no more than `kept_bytes`, this one last.
    fn cache_for(&mut self, sequence: &Sequence, kept_bytes: usize) -> Result<(KvCache, usize)> {
        let room = self.room(sequence);
        let must_run = sequence.prompt_logprobs || sequence.pooled;
        let most = if must_run { 0 } else { sequence.prompt.len() - 1 };
        let shared = |cache: &KvCache, tokens: &[u32]| {
            let adapter = sequence.adapter.as_ref();
            let held = tokens.iter().take(cache.len());
            let equal = held.zip(&sequence.prompt).take_while(|(a, b)| a == b).count();
            if is_same(cache.adapter(0), adapter) { equal.min(most) } else { 0 }
        };
        let running = self.running.values();
        let running =
            running.map(|running| (shared(&running.cache, &running.tokens), &running.cache));
        let mut best = running.max_by_key(|(len, _)| *len).filter(|(len, _)| *len > 0);
        let kept = self.kept.iter().map(|kept| shared(&kept.cache, &kept.tokens)).enumerate();
        let kept = kept.max_by_key(|(_, len)| *len);
        let kept = kept.filter(|(_, len)| *len > best.map_or(0, |(len, _)| len));
        if let Some((index, _)) = kept {
            let last = self.kept.remove(index);
            self.kept.push(last);
        }
        evict(&mut self.kept, kept_bytes);
        if let Some((_, len)) = kept {
            best = self.kept.last().map(|kept| (len, &kept.cache));
        }
        if let Some((len, cache)) = best {
            return Ok((cache.prefix(len, room)?, len));
        }
        let mut cache = self.model.cache(self.limits.kv_type, 1);
        cache.adapt(0, sequence.adapter.clone())?;
        cache.reserve(room)?;
        Ok((cache, 0))
    }

    /// Takes a sequence out of the batch; it is not heard of again.
    pub fn cancel(&mut self, id: SequenceId) {
        if let Some(running) = self.running.remove(&id) {
            self.keep(running);
        }
    }

    /// Leaves what a sequence has computed to later ones, instead of what is the beginning of it.
    fn keep(&mut self, Running { cache, mut tokens, .. }: Running) {
        tokens.truncate(cache.len());
        if tokens.is_empty() {
            return;
        }
        self.kept.retain(|kept| {
            !(is_same(kept.cache.adapter(0), cache.adapter(0)) && tokens.starts_with(&kept.tokens))
        });
        self.kept.push(Kept { cache, tokens });
        let running: usize = self.running.values().map(|running| running.bytes).sum();
        evict(&mut self.kept, self.limits.kv_bytes.saturating_sub(running));
    }

    /// Runs the next tokens, and says what became of each sequence of which there is something to say.
    ///
    /// # Errors
    /// If the pass fails. Its sequences then hold what they held before.
    pub fn step(&mut self) -> Result<Vec<(SequenceId, Update)>> {
        let plan = self.plan();
        let mut updates = Vec::new();
        if plan.is_empty() {
            return Ok(updates);
        }
        // The rows of the pass after which logits are asked.
        let (mut asked, mut row) = (Vec::new(), 0u32);
        for (&id, &count) in &plan {
            let running = &self.running[&id];
            for position in running.cache.len()..running.cache.len() + count {
                asked.extend(running.need(position).map(|need| (row, need, id, position)));
                row += 1;
            }
        }
        let hidden = self.run(&plan)?;
        self.usage.steps += 1;
        let mut first = 0;
        for (&id, &count) in &plan {
            let Some(running) = self.running.get_mut(&id) else { continue };
            if running.sequence.pooled
                && let Some(mean) = running.pool(&hidden.narrow(0, first, count)?)?
            {
                updates.push((id, Update::Pooled(mean)));
                self.end(id, Update::End(Finish::Length), &mut updates);
            }
            first += count;
        }
        for asked in asked.chunks(LOGIT_ROWS) {
            let rows = Vec::from_iter(asked.iter().map(|(row, ..)| *row));
            let needs = Vec::from_iter(asked.iter().map(|(_, need, ..)| need.clone()));
            let hidden = hidden.index_select(&Tensor::new(rows, hidden.device())?, 0)?;
            let logits = self.model.needed_logits(&hidden, &needs)?;
            for ((.., id, position), logits) in asked.iter().zip(logits) {
                self.take(*id, *position, &logits.values, &mut updates);
            }
        }
        Ok(updates)
    }

    /// How many tokens of each sequence run next. Prompts share what a step has for them in equal parts, one after the other
    /// first, so that a short one is not held up by a long one.
    fn plan(&mut self) -> BTreeMap<SequenceId, usize> {
        let mut plan = BTreeMap::new();
        let mut reading = Vec::new();
        for (&id, running) in &self.running {
            match running.unread() {
                0 => _ = plan.insert(id, running.tokens.len() - running.cache.len()),
                _ => reading.push(id),
            }
        }
        self.turn += 1;
        let len = reading.len().max(1);
        reading.rotate_left((self.turn % len as u64) as usize);
        let Limits { prompt_tokens, prompt_tokens_beside, .. } = self.limits;
        let mut left = if plan.is_empty() { prompt_tokens } else { prompt_tokens_beside }.max(1);
        for (index, id) in reading.iter().enumerate() {
            let share = left.div_ceil(reading.len() - index);
            let count = self.running[id].unread().min(share);
            left -= count;
            if count > 0 {
                plan.insert(*id, count);
                self.usage.prompt_tokens += count as u64;
            }
        }
        plan
    }

    /// Runs so many tokens of each sequence: the final norm's output, one sequence after the other.
    fn run(&mut self, plan: &BTreeMap<SequenceId, usize>) -> Result<Tensor> {
        let mut sequences = Vec::with_capacity(plan.len());
        for (id, running) in &mut self.running {
            let Some(count) = plan.get(id) else { continue };
            let first = running.cache.len();
            let tokens = &running.tokens[first..first + count];
            sequences.push(Next { tokens, cache: &mut running.cache });
        }
        Ok(self.model.next_states(&mut sequences)?)
    }

    /// Takes the logits after the token at `position` of a sequence.
    fn take(
        &mut self,
        id: SequenceId,
        position: usize,
        logits: &[f32],
        updates: &mut Vec<(SequenceId, Update)>,
    ) {
        let Some(running) = self.running.get_mut(&id) else { return };
        let Sequence { max_new_tokens, logprobs, .. } = running.sequence;
        let logprobs = |token| logprobs.map(|count| TokenLogprobs::of(logits, token, count));
        if let Some(&next) = running.tokens.get(position + 1) {
            let logprobs =
                logprobs(next).map(|logprobs| (id, Update::Prompt(position + 1, logprobs)));
            return updates.extend(logprobs);
        }
        if max_new_tokens == 0 {
            return self.end(id, Update::End(Finish::Length), updates);
        }
        let (token, is_complete) = match running.sample(logits) {
            Ok(sampled) => sampled,
            Err(error) => return self.end(id, Update::Failed(error.to_string()), updates),
        };
        if let Some(token) = token {
            updates.push((id, Update::Token(token, logprobs(token))));
            running.tokens.push(token);
            self.usage.new_tokens += 1;
        }
        if is_complete {
            self.end(id, Update::End(Finish::Eos), updates);
        } else if running.generated().len() == max_new_tokens {
            self.end(id, Update::End(Finish::Length), updates);
        } else if running.cache.len() == running.cache.max_len() {
            self.end(id, Update::End(Finish::Context), updates);
        }
    }

    fn end(&mut self, id: SequenceId, update: Update, updates: &mut Vec<(SequenceId, Update)>) {
        updates.push((id, update));
        self.cancel(id);
    }
}

/// Whether two sequences have the same adapter, or none.
fn is_same(a: Option<&Arc<Adaptation>>, b: Option<&Arc<Adaptation>>) -> bool {
    a.map(Arc::as_ptr) == b.map(Arc::as_ptr)
}

/// What is kept at most: each is looked at whenever a sequence joins.
const MOST_KEPT: usize = 256;

/// Forgets the first of `kept` until it takes no more than `bytes`.
fn evict(kept: &mut Vec<Kept>, bytes: usize) {
    let mut taken: usize = kept.iter().map(|kept| kept.cache.bytes()).sum();
    while (taken > bytes || kept.len() > MOST_KEPT) && !kept.is_empty() {
        taken -= kept.remove(0).cache.bytes();
    }
}
