//! Launches of the optimizer: the norm of gradients, and updates in place.

use super::{Address, Arg, Launch, ROW_THREADS};

/// `ADAMW_ELEMENTS`.
const ADAMW_ELEMENTS: usize = 1024;
/// `SQUARES_THREADS`, `SQUARES_CHUNK` and `SQUARES_CHUNKS`.
const SQUARES: (u32, usize, usize) = (256, 1 << 16, 32);

impl Launch {
    /// `parameter` and its two `moments`, each (count) f32, after an update with `gradient`. `coefficients`: what the gradient is
    /// multiplied by, 1 − lr·λ, 1 − β₁, β₂, 1 − β₂, √(1 − β₂ᵗ), ε, and lr / (1 − β₁ᵗ).
    pub fn adamw(
        parameter: Address,
        gradient: Address,
        moments: [Address; 2],
        count: usize,
        coefficients: [f32; 8],
    ) -> Self {
        let addresses = [parameter, gradient].into_iter().chain(moments).map(Arg::U64);
        let count_arg = Arg::U64(count as u64);
        let args = addresses.chain([count_arg]).chain(coefficients.map(Arg::F32)).collect();
        Self::new(("adamw", "adamw"), [count.div_ceil(ADAMW_ELEMENTS), 1, 1], ROW_THREADS, args)
    }

    /// How many sums [`squares`](Self::squares) of `count` values leaves.
    pub fn square_sums(count: usize) -> usize {
        count.div_ceil(SQUARES.1)
    }

    /// `sums` ([`square_sums`](Self::square_sums)) f64 of the squares of `count` values.
    pub fn squares(values: Address, count: usize, sums: Address) -> Self {
        let (threads, _, chunks) = SQUARES;
        let grid = [Self::square_sums(count).div_ceil(chunks), 1, 1];
        let args = vec![Arg::U64(values), Arg::U64(count as u64), Arg::U64(sums)];
        Self::new(("adamw", "squares"), grid, threads, args)
    }
}
