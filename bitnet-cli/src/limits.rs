//! What this machine can do at most, measured: reading memory, multiplying, and the ternary kernel on weights in the
//! cache.

use std::{
    hint::black_box,
    io,
    num::NonZeroUsize,
    path::Path,
    time::{Duration, Instant},
};

use bitnet_model::{
    kernels::{
        self, ROWS,
        tile::{Tile, TileFormat},
    },
    pages::{self, Arena},
    threads,
};
use serde::Serialize;

use crate::machine::last_level_cache;

/// The least bytes read to measure bandwidth.
const LEAST_BUFFER: usize = 64 << 20;

/// How many times the last-level cache they are at least: read in order, nothing of them is there the next time.
const CACHES: usize = 8;

/// Bytes of a task of reading.
const PART: usize = 1 << 20;

/// Bytes of weights for each thread that stay in its second-level cache.
const CACHED: usize = 256 << 10;

/// Trials of each measurement, of which the best counts: a limit is what is possible.
const TRIALS: usize = 8;

/// The time after which there are no more trials: of what takes so long, one is a good measurement.
const ENOUGH: Duration = Duration::from_millis(100);

/// The least time of a trial: a thousand times what starting it on all threads takes.
const TRIAL: Duration = Duration::from_millis(2);

/// The limits for one number of threads.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Limits {
    /// Threads.
    pub threads: usize,
    /// Bytes a second read from pages of 2 MiB, if the system grants them.
    pub read_large_pages: f64,
    /// Bytes a second read from pages of 4 KiB.
    pub read_small_pages: f64,
    /// Products of a code and an activation a second, in registers.
    pub multiply: f64,
    /// Ternary weights a second times one token, in the second-level cache.
    pub cached_ternary: f64,
    /// The same, read from pages of 2 MiB.
    pub streamed_ternary: f64,
}

/// Bytes read to measure bandwidth.
pub fn buffer_bytes() -> usize {
    let caches = CACHES * last_level_cache(Path::new("/")).unwrap_or(0);
    caches.next_multiple_of(PART).max(LEAST_BUFFER)
}

impl Limits {
    /// Of each of `counts` threads, for products of `in_features` columns and weights of `format`.
    ///
    /// # Errors
    /// No memory.
    pub fn measure(
        counts: &[usize],
        in_features: usize,
        format: TileFormat,
    ) -> io::Result<Vec<Self>> {
        let mut all = Vec::new();
        for &threads in counts {
            set_threads(threads);
            all.push(Self {
                threads,
                read_large_pages: 0.,
                read_small_pages: 0.,
                multiply: multiply(threads),
                cached_ternary: cached_ternary(threads, in_features, format),
                streamed_ternary: 0.,
            });
        }
        let mut large = Arena::default().zeroed(buffer_bytes())?;
        fill(&mut large);
        for limits in &mut all {
            set_threads(limits.threads);
            limits.read_large_pages = read(&large);
            limits.streamed_ternary = streamed_ternary(&large, in_features, format);
        }
        drop(large);
        let mut small = pages::small_pages(buffer_bytes())?;
        fill(&mut small);
        for limits in &mut all {
            set_threads(limits.threads);
            limits.read_small_pages = read(&small);
        }
        Ok(all)
    }

    /// The better of two measurements.
    pub fn max(self, other: Self) -> Self {
        Self {
            threads: self.threads,
            read_large_pages: self.read_large_pages.max(other.read_large_pages),
            read_small_pages: self.read_small_pages.max(other.read_small_pages),
            multiply: self.multiply.max(other.multiply),
            cached_ternary: self.cached_ternary.max(other.cached_ternary),
            streamed_ternary: self.streamed_ternary.max(other.streamed_ternary),
        }
    }
}

/// Computes on this many threads from now on.
pub fn set_threads(count: usize) {
    if let Some(count) = NonZeroUsize::new(count) {
        threads::set_count(count);
    }
}

/// The best rate of some trials, in units a second, of a `run` that does `units` a round.
fn best_rate(units: usize, mut run: impl FnMut(usize)) -> f64 {
    let mut seconds = |rounds: usize| {
        let start = Instant::now();
        run(rounds);
        start.elapsed().as_secs_f64()
    };
    let mut rounds = 1;
    let mut best = seconds(rounds);
    while best < TRIAL.as_secs_f64() {
        rounds *= 2;
        best = seconds(rounds);
    }
    let start = Instant::now();
    for _ in 0..TRIALS {
        best = best.min(seconds(rounds));
        if start.elapsed() > ENOUGH {
            break;
        }
    }
    (units * rounds) as f64 / best
}

/// Products a second of all threads together.
fn multiply(count: usize) -> f64 {
    let kernel = kernels::active();
    let products = count * kernel.multiply_in_registers(1);
    best_rate(products, |rounds| {
        threads::for_each(count, |_| _ = kernel.multiply_in_registers(rounds));
    })
}

/// Weights a second of all threads together, each with weights of its own.
fn cached_ternary(count: usize, in_features: usize, format: TileFormat) -> f64 {
    let token = Token::new(in_features, format);
    let bands = (CACHED / token.band_bytes()).max(1);
    let weights = vec![vec![format.empty(); bands * token.tiles]; count];
    best_rate(count * bands * token.band_weights(), |rounds| {
        threads::for_each(count, |thread| {
            (0..rounds).for_each(|_| token.multiply(&weights[thread]));
        });
    })
}

/// Weights a second of all threads together, from one end of `memory` to the other.
fn streamed_ternary(memory: &[u8], in_features: usize, format: TileFormat) -> f64 {
    let token = Token::new(in_features, format);
    let bands = (PART / token.band_bytes()).max(1);
    let part = bands * token.band_bytes();
    let parts = memory.len() / part;
    best_rate(parts * bands * token.band_weights(), |rounds| {
        for _ in 0..rounds {
            threads::for_each(parts, |index| {
                token.multiply(memory[index * part..][..part].as_chunks().0);
            });
        }
    })
}

/// One token's activations, for products with any weights.
struct Token {
    format: TileFormat,
    x: Vec<i8>,
    sum: i32,
    /// Tiles of sixteen rows.
    tiles: usize,
}

impl Token {
    fn new(in_features: usize, format: TileFormat) -> Self {
        let tiles = in_features.div_ceil(format.cols()).max(1);
        let x: Vec<i8> = (0..tiles * format.cols()).map(|i| (i % 255) as i8).collect();
        Self { format, sum: x.iter().map(|x| i32::from(*x)).sum(), x, tiles }
    }

    fn band_bytes(&self) -> usize {
        self.tiles * size_of::<Tile>()
    }

    fn band_weights(&self) -> usize {
        self.tiles * ROWS * self.format.cols()
    }

    /// Multiplies band after band.
    fn multiply(&self, weights: &[Tile]) {
        let kernel = kernels::active();
        for band in weights.chunks_exact(self.tiles) {
            let mut out = [[0; ROWS]];
            kernel.ternary_dots(self.format, band, &self.x, &[self.sum], &mut out);
            black_box(out);
        }
    }
}

/// Makes pages of `memory`, with codes of either format in them.
fn fill(memory: &mut [u8]) {
    threads::for_each_chunk(memory, PART, |_, bytes| bytes.fill(TileFormat::TwoBit.empty()[0]));
}

/// Bytes a second read from `memory` by all threads together.
fn read(memory: &[u8]) -> f64 {
    let parts = memory.len() / PART;
    best_rate(parts * PART, |rounds| {
        for _ in 0..rounds {
            threads::for_each(parts, |part| _ = black_box(sum(&memory[part * PART..][..PART])));
        }
    })
}

/// Reads all bytes; in a form that compilers make vector code of.
fn sum(bytes: &[u8]) -> u64 {
    /// Partial sums: enough that memory is waited for and not the additions.
    const LANES: usize = 16;
    let mut sums = [0u64; LANES];
    for line in bytes.as_chunks::<{ 8 * LANES }>().0 {
        for (sum, word) in sums.iter_mut().zip(line.as_chunks().0) {
            *sum = sum.wrapping_add(u64::from_le_bytes(*word));
        }
    }
    sums.into_iter().fold(0, u64::wrapping_add)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_units_by_time() {
        let pause = Duration::from_millis(3);
        let rate = best_rate(10, |rounds| std::thread::sleep(pause * rounds as u32));
        assert!(rate > 0. && rate <= 10. / pause.as_secs_f64(), "{rate}");
        assert_eq!(sum(&[1; 256]), 32 * 0x0101_0101_0101_0101);
    }

    #[test]
    fn the_better_measurement_counts() {
        let limits = |read, multiply| Limits {
            threads: 1,
            read_large_pages: read,
            read_small_pages: 1.,
            multiply,
            cached_ternary: 1.,
            streamed_ternary: 1.,
        };
        let best = limits(1., 4.).max(limits(2., 3.));
        assert_eq!((best.read_large_pages, best.multiply), (2., 4.));
    }
}
