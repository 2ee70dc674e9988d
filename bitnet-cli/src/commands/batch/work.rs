//! Requests on their way to answers.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use bitnet_model::{
    batch::{Batch, Limits, Sequence, SequenceId, Update},
    model::Model,
};

use super::files::{Output, Request};
use crate::openai::{Asked, Choice, Reader, Refusal, answer, now, unique};

/// The requests that run or wait.
pub struct Work<'a> {
    reader: &'a Reader<'a>,
    batch: Batch,
    limit: usize,
    jobs: BTreeMap<usize, Job>,
    next_job: usize,
    /// Sequences without room yet, with their job and the number of their choice.
    waiting: VecDeque<(usize, usize, Sequence)>,
    running: BTreeMap<SequenceId, (usize, usize)>,
}

/// A request that is being answered.
struct Job {
    custom_id: String,
    asked: Asked,
    choices: Vec<Choice>,
}

impl<'a> Work<'a> {
    /// Nothing to do yet.
    pub fn new(model: Arc<Model>, limits: Limits, reader: &'a Reader<'a>) -> Self {
        let batch = Batch::new(model, limits);
        let (jobs, next_job, waiting, running) = Default::default();
        Self { reader, batch, limit: limits.sequences, jobs, next_job, waiting, running }
    }

    /// Whether there is enough to do for now.
    pub fn is_full(&self) -> bool {
        self.running.len() + self.waiting.len() >= 2 * self.limit
    }

    /// Whether all requests are answered.
    pub fn is_done(&self) -> bool {
        self.jobs.is_empty()
    }

    /// Takes a request; one that cannot be answered is refused at once.
    pub fn take(&mut self, request: Request, output: &mut Output) -> anyhow::Result<()> {
        let Request { custom_id, route, body } = request;
        let asked = match self.reader.read(route, &body) {
            Ok(asked) => asked,
            Err(refusal) => return output.write(&custom_id, &unique(), Err(refusal)),
        };
        if asked.stream.is_some() {
            let refusal =
                Refusal::of("stream", "`stream` is not supported in a file: leave it out");
            return output.write(&custom_id, &unique(), Err(refusal));
        }
        let (job, tokenizer) = (self.next_job, self.reader.tokenizer);
        self.next_job += 1;
        let each = asked.sequences.iter();
        let choices = each.map(|sequence| Choice::new(&asked, sequence, tokenizer));
        let choices = choices.collect::<anyhow::Result<_>>()?;
        let sequences = asked.sequences.iter().cloned().enumerate();
        self.waiting.extend(sequences.map(|(choice, sequence)| (job, choice, sequence)));
        self.jobs.insert(job, Job { custom_id, asked, choices });
        Ok(())
    }

    /// Lets in what there is room for, in order, and adds a token to every sequence.
    pub fn step(&mut self, output: &mut Output) -> anyhow::Result<()> {
        while let Some((job, choice, sequence)) = self.waiting.pop_front() {
            if !self.jobs.contains_key(&job) {
                continue; // refused on account of another choice
            }
            match self.batch.admit(sequence.clone()) {
                Ok(Some((id, reused))) => {
                    self.running.insert(id, (job, choice));
                    let job = self.jobs.get_mut(&job);
                    if let Some(choice) = job.and_then(|job| job.choices.get_mut(choice)) {
                        choice.join(reused);
                    }
                }
                Ok(None) => {
                    self.waiting.push_front((job, choice, sequence));
                    break;
                }
                Err(error) => self.refuse(job, error.to_string(), output)?,
            }
        }
        for (id, update) in self.batch.step()? {
            self.update(id, update, output)?;
        }
        Ok(())
    }

    fn update(
        &mut self,
        id: SequenceId,
        update: Update,
        output: &mut Output,
    ) -> anyhow::Result<()> {
        let Some(&(job, index)) = self.running.get(&id) else { return Ok(()) };
        let Some(choice) = self.jobs.get_mut(&job).and_then(|job| job.choices.get_mut(index))
        else {
            return Ok(());
        };
        match update {
            Update::Prompt(_, logprobs) => choice.push_prompt(logprobs),
            Update::Token(token, logprobs) => {
                if choice.push(token, logprobs)?.is_break() {
                    self.batch.cancel(id);
                }
            }
            Update::End(finish) => choice.end(finish)?,
            Update::Pooled(_) => {}
            Update::Failed(reason) => return self.refuse(job, reason, output),
        }
        if choice.is_ended() {
            self.running.remove(&id);
            self.answer_if_ended(job, output)?;
        }
        Ok(())
    }

    fn answer_if_ended(&mut self, number: usize, output: &mut Output) -> anyhow::Result<()> {
        let is_ended = |job: &Job| job.choices.iter().all(Choice::is_ended);
        if !self.jobs.get(&number).is_some_and(is_ended) {
            return Ok(());
        }
        let Some(Job { custom_id, asked, choices }) = self.jobs.remove(&number) else {
            return Ok(());
        };
        let id = unique();
        let answer = answer(&asked, &choices, self.reader.tokenizer, (&id, now()))?;
        output.write(&custom_id, &id, Ok(answer))
    }

    /// Answers a request with the reason why it cannot be, and takes its sequences out.
    fn refuse(&mut self, job: usize, reason: String, output: &mut Output) -> anyhow::Result<()> {
        self.running.retain(|id, (of, _)| {
            let stays = *of != job;
            if !stays {
                self.batch.cancel(*id);
            }
            stays
        });
        let Some(Job { custom_id, .. }) = self.jobs.remove(&job) else { return Ok(()) };
        output.write(&custom_id, &unique(), Err(Refusal { message: reason, param: None }))
    }
}
