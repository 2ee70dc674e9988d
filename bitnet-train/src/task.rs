//! What the trainer trains: something that turns a batch into gradients, and into predictions of held-out text.

use std::collections::BTreeMap;

use candle_core::{Tensor, Var, backprop::GradStore};

use crate::{
    Error, Result,
    batch::Batch,
    distributed::{Communicator, Exchange},
    samples::Sample,
};

/// A network with its objective, as the trainer sees it.
pub trait Task {
    /// The task that this one is put around, which answers for it wherever it says nothing else.
    fn inner(&self) -> Option<&dyn Task> {
        None
    }

    /// Called before the passes of update `step`, counted from 0: schedules that live in the network follow it.
    fn begin(&self, step: usize) -> Result<()> {
        self.inner().map_or(Ok(()), |task| task.begin(step))
    }

    /// One forward and one backward pass: adds the gradients of the loss to `gradients` and returns the terms of the
    /// loss. Sums over tokens are divided by `items`, the labels that count in all batches of the update.
    fn pass(&self, batch: &Batch, items: usize, gradients: &mut Gradients) -> Result<Vec<Part>>;

    /// Called after an update with the terms of its loss, over all passes and all ranks, before weighting.
    fn end(&self, terms: &BTreeMap<String, f64>) {
        if let Some(task) = self.inner() {
            task.end(terms);
        }
    }

    /// The codes −1, 0 and 1 that parameter `name` is quantized to where it is used, if it is; `latent` holds its values.
    fn codes(&self, name: &str, latent: &[f32]) -> Option<Vec<i8>> {
        self.inner()?.codes(name, latent)
    }

    /// How much of the quantization is in force, from 0 (none) to 1, if it is warmed up.
    fn lambda(&self) -> Option<f64> {
        self.inner()?.lambda()
    }

    /// What the model makes of every label of `batch`, row by row; ignored ones are left out.
    fn evaluate(&self, batch: &Batch) -> Result<Vec<Prediction>>;

    /// What the model answers to the prompts it was given, if it was given any.
    fn samples(&self) -> Result<Vec<Sample>> {
        self.inner().map_or(Ok(Vec::new()), |task| task.samples())
    }
}

/// A term of the loss as it is logged.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Part {
    /// Its name in the metrics.
    pub name: &'static str,
    /// This batch's share of it, before weighting.
    pub value: f64,
    /// What it is multiplied by in the loss.
    pub weight: f64,
}

/// What a model made of one label.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Prediction {
    /// −log of the label's probability.
    pub nats: f32,
    /// The most probable token.
    pub token: u32,
}

/// The gradients of one update, summed over its passes.
#[derive(Debug)]
pub struct Gradients<'a> {
    parameters: &'a [(String, Var)],
    sums: Vec<Option<Tensor>>,
    /// Over the ranks of a job too, if there are several.
    job: Option<(&'a mut Exchange, &'a mut dyn Communicator)>,
}

impl<'a> Gradients<'a> {
    /// No gradient yet for any of `parameters`.
    pub fn new(parameters: &'a [(String, Var)]) -> Self {
        Self { parameters, sums: vec![None; parameters.len()], job: None }
    }

    /// The same, summed over the ranks of a job as soon as they are complete.
    pub fn over_ranks(
        self,
        exchange: &'a mut Exchange,
        communicator: &'a mut dyn Communicator,
    ) -> Self {
        Self { job: (communicator.size() > 1).then_some((exchange, communicator)), ..self }
    }

    /// Begins a pass; in the last one of the update gradients become complete.
    pub fn begin_pass(&mut self, is_last: bool) {
        if let Some((exchange, _)) = &mut self.job {
            exchange.begin_pass(is_last);
        }
    }

    /// Adds the parameters' gradients that are in `store`, and takes them out of it.
    pub fn collect(&mut self, store: &mut GradStore) -> Result<()> {
        for (index, ((_, var), sum)) in self.parameters.iter().zip(&mut self.sums).enumerate() {
            if let Some(gradient) = store.remove(var) {
                let total = match sum.take() {
                    Some(sum) => (sum + gradient)?,
                    None => gradient,
                };
                if let Some((exchange, communicator)) = &mut self.job
                    && exchange.arrive(index)?
                {
                    exchange.send(index, &total, *communicator)?;
                } else {
                    *sum = Some(total);
                }
            }
        }
        Ok(())
    }

    /// One gradient for each parameter, in order.
    ///
    /// # Errors
    /// A parameter that no gradient reached.
    pub fn finish(self) -> Result<Vec<Tensor>> {
        if let Some((exchange, communicator)) = self.job {
            for (index, sum) in self.sums.iter().enumerate() {
                if let Some(sum) = sum {
                    exchange.send(index, sum, communicator)?;
                }
            }
            return exchange.finish(self.parameters, communicator);
        }
        let pairs = self.parameters.iter().zip(self.sums);
        pairs
            .map(|((name, _), sum)| sum.ok_or_else(|| Error::NoGradient { name: name.clone() }))
            .collect()
    }
}
