//! What the engine's thread does: lets sequences in, steps, and tells what came of it.

use std::{
    collections::BTreeMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, mpsc},
    time::Instant,
};

use bitnet_model::{
    batch::{Batch, Limits, SequenceId, Update, Usage},
    model::Model,
};

use super::{Command, Event, Job, Observer, Shared, State, queue::Queue};

/// The batch, and the jobs in it and before it.
pub struct Work<O> {
    model: Arc<Model>,
    limits: Limits,
    batch: Batch,
    /// Of batches that failed.
    before: Usage,
    waiting: Queue<Job>,
    running: BTreeMap<SequenceId, Running>,
    shared: Arc<Shared>,
    observer: O,
}

struct Running {
    job: Job,
    last_token: Option<Instant>,
}

impl<O: Observer> Work<O> {
    pub fn new(model: Arc<Model>, limits: Limits, shared: Arc<Shared>, observer: O) -> Self {
        let batch = Batch::new(model.clone(), limits);
        let (before, waiting, running) = Default::default();
        Self { model, limits, batch, before, waiting, running, shared, observer }
    }

    /// Works until no handle is left.
    pub fn run(mut self, commands: &mpsc::Receiver<Command>) {
        loop {
            let is_idle = self.running.is_empty() && self.waiting.len() == 0;
            if is_idle {
                match commands.recv() {
                    Ok(command) => self.take(command),
                    Err(mpsc::RecvError) => return,
                }
            }
            while let Ok(command) = commands.try_recv() {
                self.take(command);
            }
            self.leave();
            self.admit();
            self.step();
            self.publish();
        }
    }

    fn take(&mut self, Command { client, jobs }: Command) {
        jobs.into_iter().for_each(|job| self.waiting.push(&client, job));
    }

    /// Takes out what was cancelled or has no time left.
    fn leave(&mut self) {
        let now = Instant::now();
        let goes = |job: &Job| job.is_cancelled() || job.deadline <= now;
        let gone = self.waiting.remove_if(goes);
        let ids = self.running.iter().filter(|(_, running)| goes(&running.job));
        let ids = Vec::from_iter(ids.map(|(id, _)| *id));
        ids.iter().for_each(|id| self.batch.cancel(*id));
        let running = ids.iter().filter_map(|id| self.running.remove(id));
        for job in gone.into_iter().chain(running.map(|running| running.job)) {
            if !job.is_cancelled() {
                job.tell(Event::Expired);
            }
        }
    }

    /// Lets in what there is room for, in turn.
    fn admit(&mut self) {
        while let Some(job) = self.waiting.front() {
            let sequence = job.sequence.clone();
            let admitted = catch(|| self.batch.admit(sequence));
            if matches!(admitted, Ok(Ok(None))) {
                return;
            }
            let Some(job) = self.waiting.pop() else { return };
            match admitted {
                Ok(Ok(Some((id, reused)))) => {
                    self.observer.joined(job.sequence.prompt.len(), reused);
                    job.tell(Event::Joined(reused));
                    self.running.insert(id, Running { job, last_token: None });
                }
                Ok(Ok(None)) => {}
                Ok(Err(error)) => job.tell(Event::Refused(error.to_string())),
                Err(reason) => {
                    job.tell(Event::Broken(reason.clone()));
                    self.begin_anew(&reason);
                }
            }
        }
    }

    /// Adds a token to every sequence.
    fn step(&mut self) {
        if self.running.is_empty() {
            return;
        }
        self.observer.step(self.running.len());
        let stepped = catch(|| self.batch.step());
        match stepped.and_then(|updates| updates.map_err(|error| error.to_string())) {
            Ok(updates) => {
                let now = Instant::now();
                updates.into_iter().for_each(|(id, update)| self.update(id, update, now));
            }
            Err(reason) => self.begin_anew(&reason),
        }
    }

    /// A batch that fails takes its sequences with it, and a new one takes its place.
    fn begin_anew(&mut self, reason: &str) {
        tracing::error!(reason, sequences = self.running.len(), "the batch failed");
        for running in std::mem::take(&mut self.running).into_values() {
            running.job.tell(Event::Broken(reason.to_owned()));
        }
        self.before = self.usage();
        self.batch = Batch::new(self.model.clone(), self.limits);
    }

    fn update(&mut self, id: SequenceId, update: Update, now: Instant) {
        let Some(running) = self.running.get_mut(&id) else { return };
        if matches!(update, Update::Token(..)) {
            match running.last_token.replace(now) {
                None => self.observer.first_token(now - running.job.submitted),
                Some(last) => self.observer.next_token(now - last),
            }
        }
        let is_last = matches!(update, Update::End(_) | Update::Failed(_));
        running.job.tell(Event::Update(update));
        if is_last {
            self.running.remove(&id);
        }
    }

    /// Of this batch and those before.
    fn usage(&self) -> Usage {
        let (now, before) = (self.batch.usage(), self.before);
        Usage {
            joined: before.joined + now.joined,
            prefix_hits: before.prefix_hits + now.prefix_hits,
            prefix_tokens: before.prefix_tokens + now.prefix_tokens,
            prompt_tokens: before.prompt_tokens + now.prompt_tokens,
            new_tokens: before.new_tokens + now.new_tokens,
            steps: before.steps + now.steps,
            ..now
        }
    }

    fn publish(&self) {
        let state = State { usage: self.usage(), queued: self.waiting.len() };
        self.shared.state.send_replace(state);
    }
}

/// Does what must not end the thread.
fn catch<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(work)).map_err(|_| "the engine failed on it".to_owned())
}
