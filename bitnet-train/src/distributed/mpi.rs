//! A job that `mpirun` started, over any MPI library that rsmpi builds against.
//!
//! MPI is called from one thread of its own: sums go on there while the backward pass computes, in the order in which they
//! were started. That thread sleeps between looks at a message that is under way, where MPI libraries would spin on a
//! processor that the training needs.
//!
//! A sum is an all-to-all of slices, a sum of each slice on one rank, and an all-gather: the traffic of a ring, in
//! the order of the ranks whichever algorithm the library prefers.

use std::{
    sync::mpsc::{Receiver, Sender, channel},
    thread::{self, JoinHandle},
    time::Duration,
};

use mpi::{
    Threading,
    request::{Request, Scope, scope},
    topology::{Communicator as _, SimpleCommunicator},
    traits::CommunicatorCollectives,
};

use super::{Communicator, nothing_started, sum_in_order};
use crate::{Error, Result};

/// Between two looks at a message.
const NAP: Duration = Duration::from_micros(20);

/// A rank of an MPI job. Dropped without [`Communicator::leave`], it does not take part in the end of the job, which
/// `mpirun` then ends as failed.
#[derive(Debug)]
pub struct Mpi {
    rank: usize,
    size: usize,
    calls: Sender<Call>,
    sums: Receiver<Vec<f32>>,
    gathered: Receiver<Vec<u64>>,
    started: usize,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
enum Call {
    Sum(Vec<f32>),
    Gather(Vec<u64>),
    Leave,
}

impl Mpi {
    /// Joins the job that `mpirun` started this process for.
    ///
    /// # Errors
    /// MPI was initialized before, or does not support threads.
    pub fn connect() -> Result<Self> {
        let (calls, received) = channel();
        let (sums_out, sums) = channel();
        let (gathered_out, gathered) = channel();
        let (joined_out, joined) = channel();
        let serve = move || {
            // Only this thread calls MPI, and it is the one that initializes it.
            let initialized = mpi::initialize_with_threading(Threading::Funneled);
            let Some((universe, Threading::Funneled | Threading::Serialized | Threading::Multiple)) =
                initialized
            else {
                return;
            };
            let world = universe.world();
            let _ = joined_out.send((world.rank() as usize, world.size() as usize));
            for call in received {
                match call {
                    Call::Sum(values) => {
                        let _ = sums_out.send(sum(&world, values));
                    }
                    Call::Gather(values) => {
                        let _ = gathered_out.send(gather(&world, &values));
                    }
                    Call::Leave => return, // dropping the universe waits for the other ranks
                }
            }
            // This rank gives up. To finalize would wait for the others, who wait for this one.
            std::mem::forget(universe);
        };
        let thread = thread::Builder::new().name("mpi".into()).spawn(serve);
        let thread = thread
            .map_err(|error| Error::Distributed(format!("no thread for communication: {error}")))?;
        let (rank, size) = joined.recv().map_err(|_| {
            Error::Distributed("MPI cannot be initialized with support for threads".into())
        })?;
        Ok(Self { rank, size, calls, sums, gathered, started: 0, thread: Some(thread) })
    }
}

fn ended() -> Error {
    Error::Distributed("the communication with the other ranks has ended".into())
}

impl Communicator for Mpi {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn start_all_reduce(&mut self, values: Vec<f32>) -> Result<()> {
        self.started += 1;
        self.calls.send(Call::Sum(values)).map_err(|_| ended())
    }

    fn wait(&mut self) -> Result<Vec<f32>> {
        self.started = self.started.checked_sub(1).ok_or_else(nothing_started)?;
        self.sums.recv().map_err(|_| ended())
    }

    fn all_gather(&mut self, values: &[u64]) -> Result<Vec<u64>> {
        self.calls.send(Call::Gather(values.to_vec())).map_err(|_| ended())?;
        self.gathered.recv().map_err(|_| ended())
    }

    fn leave(&mut self) -> Result<()> {
        self.calls.send(Call::Leave).map_err(|_| ended())?;
        self.thread.take().map_or(Ok(()), |thread| thread.join().map_err(|_| ended()))
    }
}

fn sum(world: &SimpleCommunicator, mut values: Vec<f32>) -> Vec<f32> {
    let (length, size) = (values.len(), world.size() as usize);
    values.resize(length.next_multiple_of(size), 0.);
    let mut slices = vec![0.; values.len()];
    scope(|scope| {
        sleep_until(world.immediate_all_to_all_into(scope, &values[..], &mut slices[..]))
    });
    let slice = sum_in_order(slices.chunks((values.len() / size).max(1)));
    scope(|scope| sleep_until(world.immediate_all_gather_into(scope, &slice[..], &mut values[..])));
    values.truncate(length);
    values
}

fn gather(world: &SimpleCommunicator, values: &[u64]) -> Vec<u64> {
    // A message of nothing would not wait for anyone: one word more, and taken away again.
    let padded = [values, &[0]].concat();
    let mut all = vec![0; padded.len() * world.size() as usize];
    scope(|scope| sleep_until(world.immediate_all_gather_into(scope, &padded[..], &mut all[..])));
    all.chunks(padded.len()).flat_map(|of_rank| &of_rank[..values.len()]).copied().collect()
}

fn sleep_until<'a, D: ?Sized, S: Scope<'a>>(mut request: Request<'a, D, S>) {
    while let Err(pending) = request.test() {
        request = pending;
        thread::sleep(NAP);
    }
}
