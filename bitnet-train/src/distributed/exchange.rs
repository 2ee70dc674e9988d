//! Gradients in buckets, summed over the ranks while the backward pass goes on.

use std::cmp::Ordering;

use candle_core::{Tensor, Var};

use super::Communicator;
use crate::{Error, Result};

/// Values that a bucket has at least, 4 MiB: enough that a message's latency does not count.
const BUCKET: usize = 1 << 20;

/// Sums the gradients of an update over all ranks.
///
/// How often a pass hands in each parameter's gradient is learned in the first pass: a tied embedding comes once with the
/// head and once at the end. In the last pass of a later update, a gradient is complete when it has come as often, and
/// its bucket leaves at once. The first update of a process sends everything at the end.
#[derive(Debug)]
pub struct Exchange {
    bucket: usize,
    /// How often a pass hands in each parameter, once a pass has ended.
    expected: Option<Vec<usize>>,
    arrived: Vec<usize>,
    is_last_pass: bool,
    /// The bucket that is being filled, and the parameters in it.
    values: Vec<f32>,
    filling: Vec<usize>,
    /// The parameters of the buckets that are under way.
    sent: Vec<Vec<usize>>,
}

impl Exchange {
    /// For the gradients of `parameters` parameters.
    pub fn new(parameters: usize) -> Self {
        Self::with_bucket(parameters, BUCKET)
    }

    /// With buckets of at least `bucket` values.
    pub(super) fn with_bucket(parameters: usize, bucket: usize) -> Self {
        Self {
            bucket,
            expected: None,
            arrived: vec![0; parameters],
            is_last_pass: false,
            values: Vec::new(),
            filling: Vec::new(),
            sent: Vec::new(),
        }
    }

    /// Begins a pass; after the last one of an update comes [`Exchange::finish`].
    pub fn begin_pass(&mut self, is_last: bool) {
        self.is_last_pass = is_last;
        let none_yet = vec![0; self.arrived.len()];
        let arrived = std::mem::replace(&mut self.arrived, none_yet);
        if arrived.iter().any(|&times| times > 0) {
            self.expected = Some(arrived);
        }
    }

    /// Notes that a gradient of `parameter` was handed in, and says whether it is complete.
    ///
    /// # Errors
    /// It was complete before.
    pub fn arrive(&mut self, parameter: usize) -> Result<bool> {
        self.arrived[parameter] += 1;
        let (true, Some(expected)) = (self.is_last_pass, &self.expected) else { return Ok(false) };
        match self.arrived[parameter].cmp(&expected[parameter]) {
            Ordering::Less => Ok(false),
            Ordering::Equal => Ok(true),
            Ordering::Greater => Err(Error::Distributed(format!(
                "a pass has handed in gradient {parameter} more often than the pass before"
            ))),
        }
    }

    /// Puts a complete gradient into the bucket, and the bucket on its way if it is full.
    pub fn send(
        &mut self,
        parameter: usize,
        gradient: &Tensor,
        communicator: &mut dyn Communicator,
    ) -> Result<()> {
        self.values.extend(gradient.flatten_all()?.to_vec1::<f32>()?);
        self.filling.push(parameter);
        match self.values.len() >= self.bucket {
            true => self.flush(communicator),
            false => Ok(()),
        }
    }

    fn flush(&mut self, communicator: &mut dyn Communicator) -> Result<()> {
        communicator.start_all_reduce(std::mem::take(&mut self.values))?;
        self.sent.push(std::mem::take(&mut self.filling));
        Ok(())
    }

    /// Sends the last bucket, waits for all, and returns the sum for each of `parameters`.
    ///
    /// # Errors
    /// A parameter that was not sent; a rank that is gone.
    pub fn finish(
        &mut self,
        parameters: &[(String, Var)],
        communicator: &mut dyn Communicator,
    ) -> Result<Vec<Tensor>> {
        if !self.filling.is_empty() {
            self.flush(communicator)?;
        }
        let mut sums: Vec<Option<Tensor>> = vec![None; parameters.len()];
        for bucket in std::mem::take(&mut self.sent) {
            let values = communicator.wait()?;
            let mut begin = 0;
            for parameter in bucket {
                let (_, var) = &parameters[parameter];
                let end = begin + var.elem_count();
                let sum = Tensor::from_slice(&values[begin..end], var.shape(), var.device())?;
                sums[parameter] = Some(sum);
                begin = end;
            }
        }
        let named = parameters.iter().zip(sums);
        named
            .map(|((name, _), sum)| sum.ok_or_else(|| Error::NoGradient { name: name.clone() }))
            .collect()
    }
}
