//! Which [`TileFormat`] decodes faster on this machine: fewer bytes or fewer instructions, by a measurement of some 20 ms.
//!
//! Where cores outrun the memory, base 3 wins by its fifth fewer bytes; where they do not, or have no fast way to unpack
//! it, 2-bit codes win. Results do not depend on the choice.

use std::time::{Duration, Instant};

use crate::{
    kernels::{self, ROWS, Tile, TileFormat},
    pages::Arena,
    threads,
};

/// Bytes to read: more than the caches of most processors hold.
const BYTES: usize = 64 << 20;
/// Tiles of a row of tiles: 2560 or 3200 inputs.
const WIDTH: usize = 160;
/// Readings of each format.
const ROUNDS: usize = 3;

/// The format that takes the most weights a second from memory for one token, on the threads operations run on. For fewer
/// `weights` than would leave the cache it is [`TileFormat::TwoBit`].
pub fn fastest_format(weights: usize) -> TileFormat {
    if weights < 4 * BYTES {
        return TileFormat::TwoBit;
    }
    let Ok(mut pages) = Arena::default().zeroed(BYTES) else { return TileFormat::TwoBit };
    // Any byte will do: speed does not depend on the codes. Memory is there once it is written.
    threads::for_each_chunk(&mut pages, 2 << 20, |_, pages| pages.fill(0x55));
    let tiles = pages.as_chunks().0;
    let mut best = [Duration::MAX; TileFormat::ALL.len()];
    for _ in 0..ROUNDS {
        for (best, format) in best.iter_mut().zip(TileFormat::ALL) {
            *best = read(format, tiles).min(*best);
        }
    }
    let time_of_a_weight =
        |(best, format): &(Duration, TileFormat)| best.as_secs_f64() / format.cols() as f64;
    let formats = best.into_iter().zip(TileFormat::ALL);
    let fastest = formats.min_by(|a, b| time_of_a_weight(a).total_cmp(&time_of_a_weight(b)));
    let format = fastest.map_or(TileFormat::TwoBit, |(_, format)| format);
    tracing::debug!("weights lie in memory as {}: {best:?} for {BYTES} bytes", format.name());
    format
}

/// The time to multiply all tiles by one token's activations.
fn read(format: TileFormat, tiles: &[Tile]) -> Duration {
    let kernel = kernels::active();
    let x = vec![1; WIDTH * format.cols()];
    let start = Instant::now();
    let mut sums = vec![[0; ROWS]; tiles.len() / WIDTH];
    threads::for_each_chunk(&mut sums, 16, |task, sums| {
        for (i, sums) in sums.iter_mut().enumerate() {
            let tiles = &tiles[(task * 16 + i) * WIDTH..][..WIDTH];
            kernel.ternary_dots(format, tiles, &x, &[0], std::slice::from_mut(sums));
        }
    });
    std::hint::black_box(&sums);
    start.elapsed()
}
