//! Randomness of a training step: dropout and noise that follow from where they are, and from nothing else.
//!
//! A value is a hash of seed, update, micro-batch, place in the network, token and column. A block that is computed again
//! in the backward pass drops what it dropped before, a resumed run goes on as it would have, and the ranks of a job see
//! what one process would see, since a token is counted from the beginning of the whole micro-batch.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bitnet_model::{
    cuda::launch::Dropout,
    kernels::{Loop, vectorized},
    threads,
};

use super::kept::Kept;
use crate::fingerprint::{Fnv, place, scatter};

/// The step that is being made, shared by all places that need randomness; outside of one there is none.
#[derive(Clone, Debug)]
pub struct Step {
    seed: u64,
    now: Arc<Mutex<Option<(u64, u64)>>>,
    kept: Kept,
}

impl Step {
    /// Outside of a step; one keeps products of the forward pass in `kept`.
    pub fn new(seed: u64, kept: Kept) -> Self {
        Self { seed, now: Arc::default(), kept }
    }

    /// What the forward pass of this step has kept.
    pub fn kept(&self) -> Option<&Kept> {
        self.lock().is_some().then_some(&self.kept)
    }

    fn lock(&self) -> MutexGuard<'_, Option<(u64, u64)>> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins the pass over micro-batch `micro` of update `update`, of whose tokens this process has those from
    /// `first_token` on.
    pub fn begin(&self, update: usize, micro: usize, first_token: usize) {
        let key = scatter(place(self.seed, update as u64) ^ micro as u64);
        self.set(Some((key, first_token as u64)));
    }

    /// Ends the pass.
    pub fn end(&self) {
        self.set(None);
    }

    fn set(&self, now: Option<(u64, u64)>) {
        *self.lock() = now;
        self.kept.clear();
    }

    /// The randomness of the place `name` in this step.
    pub fn stream(&self, name: &str) -> Option<Stream> {
        let (key, first_token) = (*self.lock())?;
        Some(Stream { key: scatter(key ^ Fnv::of(name)), first_token })
    }
}

/// One random word for each token and column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream {
    key: u64,
    first_token: u64,
}

/// A word of a row: a bijection of 32 bits with little bias (`lowbias32` of Chris Wellons' hash prospector).
#[inline(always)]
fn word(row: u32, column: usize) -> u32 {
    let mut x = row.wrapping_add((column as u32).wrapping_mul(0x9e37_79b9));
    x ^= x >> 16;
    x = x.wrapping_mul(0x7feb_352d);
    x ^= x >> 15;
    x = x.wrapping_mul(0x846c_a68b);
    x ^ x >> 16
}

/// Words below the first are dropped, and what is left is multiplied by the second: at 2³² · rate of whole words.
fn drop_below(rate: f64) -> (u32, f32) {
    ((rate * 2f64.powi(32)) as u32, (1. / (1. - rate)) as f32)
}

impl Stream {
    fn row(self, token: usize) -> u32 {
        scatter(self.key ^ (self.first_token + token as u64)) as u32
    }

    /// Sets the part `rate` of `x`, rows of `width` values, to 0 and divides what is left by `1 − rate`.
    pub fn drop(self, rate: f64, width: usize, x: &mut [f32]) {
        let (below, scale) = drop_below(rate);
        threads::for_each_chunk(x, width.max(1), |token, x| {
            vectorized(Drop { x, row: self.row(token), below, scale });
        });
    }

    /// [`drop`](Self::drop) of `rows` rows, for a device.
    pub fn dropout(self, rate: f64, rows: usize) -> Dropout {
        let (below, scale) = drop_below(rate);
        Dropout { keys: (0..rows).map(|token| self.row(token)).collect(), below, scale }
    }

    /// Adds to `x`, rows of `width` values, noise that is uniform within `±size`.
    pub fn add_uniform(self, size: f32, width: usize, x: &mut [f32]) {
        threads::for_each_chunk(x, width.max(1), |token, x| {
            vectorized(Uniform { x, row: self.row(token), size });
        });
    }
}

struct Drop<'a> {
    x: &'a mut [f32],
    row: u32,
    below: u32,
    scale: f32,
}

impl Loop for Drop<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for (column, x) in self.x.iter_mut().enumerate() {
            *x = if word(self.row, column) < self.below { 0. } else { *x * self.scale };
        }
    }
}

struct Uniform<'a> {
    x: &'a mut [f32],
    row: u32,
    size: f32,
}

impl Loop for Uniform<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for (column, x) in self.x.iter_mut().enumerate() {
            // 24 bits, each value exact in f32.
            let uniform = (word(self.row, column) >> 8) as f32 * 2f32.powi(-23) - 1.;
            *x += uniform * self.size;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WIDTH: usize = 640;

    fn dropped(step: &Step, name: &str, tokens: usize) -> Option<Vec<f32>> {
        let mut x = vec![1f32; tokens * WIDTH];
        step.stream(name)?.drop(0.25, WIDTH, &mut x);
        Some(x)
    }

    #[test]
    fn a_place_drops_the_same_again_and_others_other_things() {
        let step = Step::new(3, Kept::new(0));
        assert_eq!(dropped(&step, "q", 4), None);
        step.begin(5, 1, 0);
        let x = dropped(&step, "q", 64).unwrap();
        assert_eq!(x, dropped(&step, "q", 64).unwrap());
        assert_ne!(x, dropped(&step, "k", 64).unwrap());
        // The ranks of a job see the whole micro-batch between them.
        step.begin(5, 1, 32);
        assert_eq!(x[32 * WIDTH..], dropped(&step, "q", 32).unwrap());
        for (update, micro) in [(5, 0), (6, 1)] {
            step.begin(update, micro, 0);
            assert_ne!(x, dropped(&step, "q", 64).unwrap());
        }
        step.end();
        assert_eq!(step.stream("q"), None);
        // 40 960 draws: five standard deviations of a share of a quarter are 0.011.
        let zeros = x.iter().filter(|&&x| x == 0.).count() as f64 / x.len() as f64;
        assert!((zeros - 0.25).abs() < 0.011, "{zeros}");
        assert!(x.iter().all(|&x| x == 0. || x == 1. / 0.75));
        // No column, and no token, is dropped far more often than others: 64 draws, 16 expected, σ = 3.5.
        for column in 0..WIDTH {
            let zeros = (0..64).filter(|token| x[token * WIDTH + column] == 0.).count();
            assert!((1..36).contains(&zeros), "column {column}: {zeros}");
        }
    }

    #[test]
    fn noise_is_uniform() {
        let step = Step::new(0, Kept::new(0));
        step.begin(0, 0, 0);
        let mut x = vec![0f32; 64 * WIDTH];
        step.stream("noise").unwrap().add_uniform(2., WIDTH, &mut x);
        let mean = |f: fn(f32) -> f32| x.iter().map(|&x| f(x)).sum::<f32>() / x.len() as f32;
        assert!(x.iter().all(|x| x.abs() <= 2.));
        // The variance is 4/3; five standard deviations of a mean of 40 960 are 0.029, of their squares also.
        assert!(mean(|x| x).abs() < 0.029, "{}", mean(|x| x));
        assert!((mean(|x| x * x) - 4. / 3.).abs() < 0.03, "{}", mean(|x| x * x));
    }
}
