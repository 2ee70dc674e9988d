//! Data-parallel training: the ranks of a job hold the same weights, each runs its share of an update's windows, and the
//! gradients are summed before every rank makes the same update.
//!
//! [`Communicator`] is all that the trainer knows of it. [`Single`] is a job of one rank; `mpi` (feature `mpi`) is
//! a job that `mpirun` started. [`Exchange`] cuts the gradients into buckets and sends each as soon as the backward pass
//! has completed it. A sum is made in the order of the ranks, whichever bucket a gradient is in, so that the ranks stay
//! equal bit for bit; [`Communicator::agree`] finds out if they do not.

mod exchange;
#[cfg(feature = "mpi")]
pub mod mpi;
#[cfg(test)]
pub(crate) mod threads;

use std::{collections::VecDeque, fmt::Debug};

use candle_core::{Storage, Var};

pub use exchange::Exchange;

use crate::{Error, Result};

/// A rank of a job. All ranks make the same calls in the same order.
pub trait Communicator: Debug + Send {
    /// The number of this process, from 0. Rank 0 writes the files.
    fn rank(&self) -> usize;

    /// Number of processes.
    fn size(&self) -> usize;

    /// Starts to sum `values` over all ranks, element by element and in the order of the ranks, and returns at once.
    ///
    /// # Errors
    /// A rank that is gone.
    fn start_all_reduce(&mut self, values: Vec<f32>) -> Result<()>;

    /// The sums of the oldest call of [`Communicator::start_all_reduce`] that has not been waited for.
    ///
    /// # Errors
    /// None was started; a rank that is gone.
    fn wait(&mut self) -> Result<Vec<f32>>;

    /// The `values` of every rank, in the order of the ranks; as many from each. No sum may be under way.
    ///
    /// # Errors
    /// A rank that is gone.
    fn all_gather(&mut self, values: &[u64]) -> Result<Vec<u64>>;

    /// Ends this rank's part when all ranks have come here. Without it, the rank has failed, and the job with it.
    fn leave(&mut self) -> Result<()> {
        self.barrier()
    }

    /// The sums of `values` over all ranks, in the order of the ranks.
    fn sum(&mut self, values: &[f64]) -> Result<Vec<f64>> {
        let bits: Vec<u64> = values.iter().map(|value| value.to_bits()).collect();
        let mut sums = vec![0.; values.len()];
        for of_rank in self.all_gather(&bits)?.chunks(values.len().max(1)) {
            for (sum, &bits) in sums.iter_mut().zip(of_rank) {
                *sum += f64::from_bits(bits);
            }
        }
        Ok(sums)
    }

    /// The sums of `counts` over all ranks.
    fn sum_counts(&mut self, counts: &[u64]) -> Result<Vec<u64>> {
        let mut sums = vec![0; counts.len()];
        for of_rank in self.all_gather(counts)?.chunks(counts.len().max(1)) {
            sums.iter_mut().zip(of_rank).for_each(|(sum, count)| *sum += count);
        }
        Ok(sums)
    }

    /// Whether `flag` is set on a rank.
    fn any(&mut self, flag: bool) -> Result<bool> {
        Ok(self.all_gather(&[flag.into()])?.contains(&1))
    }

    /// Waits until all ranks have come here.
    fn barrier(&mut self) -> Result<()> {
        self.all_gather(&[]).map(|_| ())
    }

    /// Makes sure that `hash`, of `what`, is the same on all ranks.
    ///
    /// # Errors
    /// One differs; all ranks return the same message.
    fn agree(&mut self, what: &'static str, hash: u64) -> Result<()> {
        let hashes = self.all_gather(&[hash])?;
        match hashes.iter().position(|&other| other != hashes[0]) {
            Some(rank) => Err(Error::Disagreement { what, rank }),
            None => Ok(()),
        }
    }
}

/// Calls `work` on rank 0 and, when that is done, on the others: what writes files that the others then find.
///
/// # Errors
/// That of `work`; a rank that is gone.
pub fn rank_zero_first<T>(
    communicator: &mut dyn Communicator,
    work: impl FnOnce() -> Result<T>,
) -> Result<T> {
    let is_first = communicator.rank() == 0;
    if !is_first {
        communicator.barrier()?;
    }
    let done = work()?;
    if is_first {
        communicator.barrier()?;
    }
    Ok(done)
}

/// The job that this process was started for: of one rank, unless `mpirun` started it.
///
/// # Errors
/// A job of several ranks that cannot be joined, or in a build without the feature `mpi`.
pub fn connect() -> Result<Box<dyn Communicator>> {
    match JOB_SIZES.iter().find_map(|name| std::env::var(name).ok()?.parse::<usize>().ok()) {
        None | Some(1) => Ok(Box::new(Single::default())),
        #[cfg(feature = "mpi")]
        Some(_) => Ok(Box::new(mpi::Mpi::connect()?)),
        #[cfg(not(feature = "mpi"))]
        Some(size) => Err(Error::Distributed(format!(
            "this is one of {size} ranks, but the program was built without MPI; build it with `--features mpi`"
        ))),
    }
}

/// Where Open MPI, and MPICH and its relatives, say how many ranks they have started.
const JOB_SIZES: [&str; 2] = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"];

/// A job of one process: sums are the values themselves.
#[derive(Debug, Default)]
pub struct Single {
    started: VecDeque<Vec<f32>>,
}

impl Communicator for Single {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn start_all_reduce(&mut self, values: Vec<f32>) -> Result<()> {
        self.started.push_back(values);
        Ok(())
    }

    fn wait(&mut self) -> Result<Vec<f32>> {
        self.started.pop_front().ok_or_else(nothing_started)
    }

    fn all_gather(&mut self, values: &[u64]) -> Result<Vec<u64>> {
        Ok(values.to_vec())
    }
}

fn nothing_started() -> Error {
    Error::Distributed("waiting for a sum that was not started".into())
}

/// Adds up `ranks`, the values of each rank, in their order.
#[cfg(any(test, feature = "mpi"))]
fn sum_in_order<'a>(ranks: impl Iterator<Item = &'a [f32]>) -> Vec<f32> {
    let mut sums = Vec::new();
    for values in ranks {
        if sums.is_empty() {
            sums = values.to_vec();
        } else {
            sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
        }
    }
    sums
}

const HASH_START: u64 = 0xcbf2_9ce4_8422_2325;
const HASH_FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;

fn mix(hash: u64, word: u64) -> u64 {
    (hash ^ word).wrapping_mul(HASH_FACTOR).rotate_left(29)
}

/// A hash of text, the same on every machine.
pub fn hash_text(text: &str) -> u64 {
    text.bytes().fold(HASH_START, |hash, byte| mix(hash, byte.into()))
}

/// A hash of the names and all bits of `parameters`, f32.
pub fn hash_parameters(parameters: &[(String, Var)]) -> Result<u64> {
    let mut hash = HASH_START;
    for (name, var) in parameters {
        hash = mix(hash, hash_text(name));
        let (storage, layout) = var.storage_and_layout();
        let (Storage::Cpu(storage), Some((start, end))) = (&*storage, layout.contiguous_offsets())
        else {
            return Err(Error::Input(format!("parameter `{name}` is not in main memory")));
        };
        let values = &storage.as_slice::<f32>()?[start..end];
        hash = values.iter().fold(hash, |hash, value| mix(hash, value.to_bits().into()));
    }
    Ok(hash)
}

#[cfg(test)]
mod tests {
    use std::thread;

    use candle_core::{Device, Tensor};

    use super::{threads::threads, *};
    use crate::task::Gradients;

    /// What every rank of a job of `size` makes of `f`.
    fn job<T: Send>(size: usize, f: impl Fn(&mut dyn Communicator) -> T + Sync) -> Vec<T> {
        thread::scope(|scope| {
            let f = &f;
            let ranks: Vec<_> = threads(size)
                .into_iter()
                .map(|mut rank| scope.spawn(move || f(&mut rank)))
                .collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        })
    }

    #[test]
    fn sums_are_in_the_order_of_the_ranks() {
        // (1 + 2⁻²⁴) + 2⁻²⁴ is 1, 1 + (2⁻²⁴ + 2⁻²⁴) is not.
        let sums = job(3, |rank| {
            let value = if rank.rank() == 0 { 1. } else { 2f32.powi(-24) };
            rank.start_all_reduce(vec![value, rank.rank() as f32]).unwrap();
            rank.start_all_reduce(vec![-value]).unwrap();
            let sums = [rank.wait().unwrap(), rank.wait().unwrap()].concat();
            assert!(rank.wait().is_err());
            let wide = rank.sum(&[f64::from(value)]).unwrap();
            rank.leave().unwrap();
            (sums, wide, rank.any(rank.rank() == 1).unwrap(), rank.any(false).unwrap())
        });
        assert_eq!(sums, vec![(vec![1., 3., -1.], vec![1. + 2f64.powi(-23)], true, false); 3]);
    }

    #[test]
    fn ranks_that_differ_are_told_apart() {
        let messages = job(3, |rank| {
            rank.agree("weights", 5).unwrap();
            rank.agree("weights", (rank.rank() / 2) as u64).unwrap_err().to_string()
        });
        for message in messages {
            assert!(message.starts_with("rank 2 and rank 0 have different weights"), "{message}");
        }
        let var = |values: &[f32]| Var::new(values, &Device::Cpu).unwrap();
        let hash = |name: &str, values| hash_parameters(&[(name.into(), var(values))]).unwrap();
        assert_eq!(hash("a", &[1., 2.]), hash("a", &[1., 2.]));
        assert_ne!(hash("a", &[1., 2.]), hash("a", &[2., 1.]));
        assert_ne!(hash("a", &[0.]), hash("a", &[-0.]));
        assert_ne!(hash("a", &[1.]), hash("b", &[1.]));
    }

    #[test]
    fn a_rank_that_is_gone_is_an_error() {
        let mut ranks = threads(2);
        drop(ranks.pop());
        let message = ranks[0].barrier().unwrap_err().to_string();
        assert_eq!(message, "distributed training: rank 1 has left the job");
    }

    #[test]
    fn one_process_is_a_job() {
        let mut single = Single::default();
        single.start_all_reduce(vec![1., 2.]).unwrap();
        assert_eq!(single.wait().unwrap(), [1., 2.]);
        assert!(single.wait().is_err());
        assert_eq!((single.sum(&[0.5]).unwrap(), single.any(true).unwrap()), (vec![0.5], true));
        single.agree("weights", 1).unwrap();
    }

    /// Gradients of one parameter that comes twice in a pass, as a tied embedding does, and of two that come once.
    fn hand_in(passes: usize, gradients: &mut Gradients, vars: &[(String, Var)], scale: f64) {
        for pass in 0..passes {
            gradients.begin_pass(pass + 1 == passes);
            for indices in [&[0, 2][..], &[1], &[0]] {
                let sums = indices.iter().map(|&index| {
                    let var = vars[index].1.as_tensor();
                    (var * (scale * (pass + index + 1) as f64)).unwrap().sum_all().unwrap()
                });
                let sum = sums.reduce(|sum, term| (sum + term).unwrap()).unwrap();
                gradients.collect(&mut sum.backward().unwrap()).unwrap();
            }
        }
    }

    #[test]
    fn gradients_are_summed_over_passes_and_ranks() {
        let vars = || -> Vec<(String, Var)> {
            let var = |length: usize| Var::ones(length, candle_core::DType::F32, &Device::Cpu);
            [7, 3, 5].map(|length| (format!("w{length}"), var(length).unwrap())).into()
        };
        let all = job(3, |rank| {
            let (vars, scale) = (vars(), (rank.rank() + 1) as f64);
            let mut exchange = Exchange::with_bucket(3, 4);
            let mut updates = Vec::new();
            for _ in 0..3 {
                let gradients = Gradients::new(&vars);
                let mut gradients = gradients.over_ranks(&mut exchange, rank);
                hand_in(2, &mut gradients, &vars, scale);
                let found = gradients.finish().unwrap();
                let first = |g: &Tensor| g.to_vec1::<f32>().unwrap()[0];
                assert_eq!(found.iter().map(|g| g.elem_count()).collect::<Vec<_>>(), [7, 3, 5]);
                updates.push(found.iter().map(first).collect::<Vec<f32>>());
            }
            updates
        });
        // Ranks: 1 + 2 + 3 = 6. Passes: parameter i gives i + 1 and i + 2; the first comes twice in each.
        assert_eq!(all, vec![vec![vec![36., 30., 42.]; 3]; 3]);
    }

    #[test]
    fn a_gradient_after_its_sum_left_is_an_error() {
        let vars = vec![("w".to_string(), Var::new(&[1f32], &Device::Cpu).unwrap())];
        let mut exchange = Exchange::new(1);
        let messages = job(2, |rank| {
            let mut exchange = Exchange::new(1);
            let pass = |gradients: &mut Gradients| {
                gradients.collect(&mut vars[0].1.sum_all().unwrap().backward().unwrap())
            };
            let mut gradients = Gradients::new(&vars).over_ranks(&mut exchange, rank);
            gradients.begin_pass(true);
            pass(&mut gradients).unwrap();
            gradients.finish().unwrap();
            let mut gradients = Gradients::new(&vars).over_ranks(&mut exchange, rank);
            gradients.begin_pass(true);
            pass(&mut gradients).unwrap();
            pass(&mut gradients).unwrap_err().to_string()
        });
        assert!(messages.iter().all(|message| message.contains("more often")), "{messages:?}");
        exchange.begin_pass(true);
        let single = &mut Single::default();
        assert!(exchange.finish(&vars, single).unwrap_err().to_string().contains("`w`"));
    }
}
