//! A job whose ranks are threads of one process, for tests.

use std::sync::{
    Arc,
    mpsc::{Receiver, Sender, channel},
};

use super::{Communicator, nothing_started, sum_in_order};
use crate::{Error, Result};

/// A rank that is a thread. Dropping it is leaving the job.
#[derive(Debug)]
pub(crate) struct Threads {
    rank: usize,
    to: Vec<Sender<Arc<Vec<u64>>>>,
    from: Vec<Receiver<Arc<Vec<u64>>>>,
    started: usize,
}

/// A job of `size` ranks.
pub(crate) fn threads(size: usize) -> Vec<Threads> {
    let mut ranks: Vec<Threads> = (0..size)
        .map(|rank| Threads { rank, to: Vec::new(), from: Vec::new(), started: 0 })
        .collect();
    for from in 0..size {
        for to in 0..size {
            let (sender, receiver) = channel();
            ranks[from].to.push(sender);
            ranks[to].from.push(receiver);
        }
    }
    ranks
}

impl Threads {
    fn send(&self, values: Vec<u64>) -> Result<()> {
        let values = Arc::new(values);
        let mut each = self.to.iter().enumerate();
        each.try_for_each(|(rank, to)| to.send(values.clone()).map_err(|_| gone(rank)))
    }

    fn receive(&self) -> Result<Vec<Arc<Vec<u64>>>> {
        let each = self.from.iter().enumerate();
        each.map(|(rank, from)| from.recv().map_err(|_| gone(rank))).collect()
    }
}

fn gone(rank: usize) -> Error {
    Error::Distributed(format!("rank {rank} has left the job"))
}

impl Communicator for Threads {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.to.len()
    }

    fn start_all_reduce(&mut self, values: Vec<f32>) -> Result<()> {
        self.started += 1;
        self.send(values.iter().map(|value| value.to_bits().into()).collect())
    }

    fn wait(&mut self) -> Result<Vec<f32>> {
        self.started = self.started.checked_sub(1).ok_or_else(nothing_started)?;
        let of_rank = |bits: &Arc<Vec<u64>>| -> Vec<f32> {
            bits.iter().map(|&bits| f32::from_bits(bits as u32)).collect()
        };
        let ranks: Vec<Vec<f32>> = self.receive()?.iter().map(of_rank).collect();
        Ok(sum_in_order(ranks.iter().map(Vec::as_slice)))
    }

    fn all_gather(&mut self, values: &[u64]) -> Result<Vec<u64>> {
        assert_eq!(self.started, 0, "a sum is under way");
        self.send(values.to_vec())?;
        Ok(self.receive()?.iter().flat_map(|values| values.iter().copied()).collect())
    }
}
