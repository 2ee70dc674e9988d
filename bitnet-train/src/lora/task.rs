//! The step as dropout and noise see it, around any task.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::noise::Step;
use crate::{
    Result,
    batch::Batch,
    task::{Gradients, Part, Prediction, Task},
};

/// A task whose passes are counted, so that their randomness follows from update, micro-batch and token. Evaluations have
/// none.
pub struct LoraTask<T> {
    task: T,
    step: Step,
    /// Of a job; each has an equal part of every micro-batch.
    rank: usize,
    update: AtomicUsize,
    micro: AtomicUsize,
}

impl<T> LoraTask<T> {
    /// `step` is the one that the layers of `task` follow, on the process `rank` of a job.
    pub fn new(task: T, step: Step, rank: usize) -> Self {
        Self { task, step, rank, update: AtomicUsize::new(0), micro: AtomicUsize::new(0) }
    }
}

impl<T: Task> Task for LoraTask<T> {
    fn inner(&self) -> Option<&dyn Task> {
        Some(&self.task)
    }

    fn begin(&self, step: usize) -> Result<()> {
        self.update.store(step, Ordering::Relaxed);
        self.micro.store(0, Ordering::Relaxed);
        self.task.begin(step)
    }

    fn pass(&self, batch: &Batch, items: usize, gradients: &mut Gradients) -> Result<Vec<Part>> {
        let (update, first_token) =
            (self.update.load(Ordering::Relaxed), self.rank * batch.inputs.len());
        self.step.begin(update, self.micro.fetch_add(1, Ordering::Relaxed), first_token);
        let parts = self.task.pass(batch, items, gradients);
        self.step.end();
        parts
    }

    fn evaluate(&self, batch: &Batch) -> Result<Vec<Prediction>> {
        self.task.evaluate(batch)
    }
}
