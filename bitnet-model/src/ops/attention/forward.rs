//! Attention in blocks of keys ([`KEYS`]), with the softmax put together from the blocks' maxima and sums
//! (arXiv:2205.14135). Memory does not grow with the context, and a block of keys and values in cache meets all queries
//! of a tile.
//!
//! Blocks are counted from a query's own first key and merged in that order, so a query's bits do not depend on how the
//! prompt was cut, on padding, on documents packed before its own, or on which thread took which block.

use std::ops::Range;

use super::{Dims, KeyValues};
use crate::{
    kernels::{Kernel, Matrix},
    threads,
};

/// Keys of a block: half-precision keys of 128 elements take 64 KiB.
const KEYS: usize = 256;
/// Queries that meet a block together, those of a group of heads at each position.
const QUERIES: usize = 32;
/// Tasks a thread should have, for all to finish together.
const TASKS: usize = 4;

/// One run over all queries.
pub(super) struct Forward<'a> {
    pub dims: Dims,
    /// First visible position of every query, (batch, seq) row-major; empty: 0.
    pub starts: &'a [usize],
    pub q: &'a [f32],
    pub k: KeyValues<'a>,
    pub v: KeyValues<'a>,
    pub kernel: &'static Kernel,
}

/// Queries of one row of the batch and one key/value head.
struct Tile {
    row: usize,
    kv_head: usize,
    positions: Range<usize>,
}

/// What a query knows after some blocks of keys: their softmax without its denominator.
#[derive(Clone)]
struct Partial {
    /// Largest score.
    max: f32,
    /// `Σ exp(score − max)`.
    sum: f32,
    /// `Σ exp(score − max) · v` (head_dim).
    values: Vec<f32>,
}

impl Forward<'_> {
    /// (batch, seq, heads, head_dim).
    pub fn run(&self) -> Vec<f32> {
        let Dims { batch, seq, heads, kv_heads, context, head_dim } = self.dims;
        let mut out = vec![0f32; self.q.len()];
        let width = heads * head_dim;
        let cuts: Vec<usize> = (0..=kv_heads).map(|head| head * (width / kv_heads)).collect();
        let blocks = context.div_ceil(KEYS);
        let positions = (QUERIES / (heads / kv_heads)).max(1);
        let tiles = batch * kv_heads * seq.div_ceil(positions);
        if blocks > 1 && tiles < TASKS * threads::count() {
            // Few queries: every block is a task.
            let tile = |index: usize| self.tile(index, positions);
            let mut partials: Vec<Vec<Partial>> = vec![Vec::new(); tiles * blocks];
            threads::for_each_chunk(&mut partials, 1, |index, partial| {
                partial[0] = self.attend(&tile(index / blocks), index % blocks);
            });
            for (index, partials) in partials.chunks(blocks).enumerate() {
                let Tile { row, kv_head, positions } = tile(index);
                let mut states = vec![Partial::new(head_dim); positions.len() * heads / kv_heads];
                partials.iter().for_each(|partials| self.merge(&mut states, partials));
                for (i, states) in positions.zip(states.chunks(heads / kv_heads)) {
                    let out = &mut out[(row * seq + i) * width..][cuts[kv_head]..cuts[kv_head + 1]];
                    finish(states, out);
                }
            }
            return out;
        }
        for (row, out) in out.chunks_mut((seq * width).max(1)).enumerate() {
            threads::for_each_block(out, positions, &cuts, |(first, kv_head), mut out| {
                let tile = Tile { row, kv_head, positions: first..first + out.rows() };
                let mut states = vec![Partial::new(head_dim); out.rows() * heads / kv_heads];
                for block in 0..blocks {
                    self.merge(&mut states, &self.attend(&tile, block));
                }
                for (i, states) in states.chunks(heads / kv_heads).enumerate() {
                    finish(states, out.row(i));
                }
            });
        }
        out
    }

    /// Tile `index` of all, rows first, then heads.
    fn tile(&self, index: usize, positions: usize) -> Tile {
        let Dims { seq, kv_heads, .. } = self.dims;
        let across = seq.div_ceil(positions);
        let first = index % across * positions;
        Tile {
            row: index / across / kv_heads,
            kv_head: index / across % kv_heads,
            positions: first..seq.min(first + positions),
        }
    }

    /// First position that query `i` of `row` may see.
    fn start(&self, row: usize, i: usize) -> usize {
        self.starts.get(row * self.dims.seq + i).copied().unwrap_or(0)
    }

    /// The parts of a tile whose queries start at the same key: one, unless documents are packed into the row.
    fn runs(&self, tile: &Tile) -> Vec<Tile> {
        let Tile { row, kv_head, ref positions } = *tile;
        let mut runs: Vec<Tile> = Vec::new();
        for i in positions.clone() {
            match runs.last_mut() {
                Some(run) if self.start(row, run.positions.start) == self.start(row, i) => {
                    run.positions.end = i + 1;
                }
                _ => runs.push(Tile { row, kv_head, positions: i..i + 1 }),
            }
        }
        runs
    }

    /// Keys of a block, which begins at `first`, that query `i` sees: those before context − seq + i + 1.
    fn seen(&self, first: usize, i: usize) -> usize {
        (self.dims.context - self.dims.seq + i + 1).saturating_sub(first).min(KEYS)
    }

    /// What the queries of a tile learn from a block of keys, counted from each one's start; nothing if they see none
    /// of them.
    fn attend(&self, tile: &Tile, block: usize) -> Vec<Partial> {
        let runs = self.runs(tile);
        let first = |run: &Tile| self.start(run.row, run.positions.start) + block * KEYS;
        if runs.iter().all(|run| self.seen(first(run), run.positions.end - 1) == 0) {
            return Vec::new();
        }
        runs.iter().flat_map(|run| self.attend_run(run, first(run))).collect()
    }

    /// What queries learn from the block of keys that begins at `first`.
    fn attend_run(&self, tile: &Tile, first: usize) -> Vec<Partial> {
        let Dims { seq, heads, kv_heads, head_dim, .. } = self.dims;
        let group = heads / kv_heads;
        let head = (tile.row, tile.kv_head);
        let count = tile.positions.len() * group;
        let mut partials = vec![Partial::new(head_dim); count];
        let keys = self.seen(first, tile.positions.end - 1);
        if keys == 0 {
            return partials;
        }
        let mut queries = Vec::with_capacity(tile.positions.len() * group * head_dim);
        for i in tile.positions.clone() {
            let at = ((tile.row * seq + i) * heads + tile.kv_head * group) * head_dim;
            queries.extend_from_slice(&self.q[at..][..group * head_dim]);
        }
        let mut scores = vec![0f32; count * keys];
        let x = Matrix::new(&queries, count, head_dim);
        self.kernel.matmul_nt(x, self.k.rows(head, first, keys, head_dim), &mut scores, keys);
        let scale = self.dims.scale();
        let mut sums = vec![0f32; group * head_dim];
        let rows = scores.chunks_mut(group * keys).zip(partials.chunks_mut(group));
        for (i, (scores, partials)) in tile.positions.clone().zip(rows) {
            let seen = self.seen(first, i);
            if seen == 0 {
                continue;
            }
            for (scores, partial) in scores.chunks_mut(keys).zip(partials.iter_mut()) {
                let scores = &mut scores[..seen];
                self.k.scale(head, first, head_dim, scores);
                scores.iter_mut().for_each(|score| *score *= scale);
                partial.max = self.kernel.max(scores);
                scores.iter_mut().for_each(|score| *score -= partial.max);
                self.kernel.exp(scores);
                partial.sum = self.kernel.sum(scores);
                self.v.scale(head, first, head_dim, scores);
            }
            let p = Matrix::strided(scores, group, seen, keys);
            self.kernel.weighted_sums(p, self.v.rows(head, first, seen, head_dim), &mut sums);
            for (partial, sums) in partials.iter_mut().zip(sums.chunks(head_dim)) {
                partial.values.copy_from_slice(sums);
            }
        }
        partials
    }

    /// Adds the next block's partials to what is known.
    fn merge(&self, states: &mut [Partial], partials: &[Partial]) {
        for (state, partial) in states.iter_mut().zip(partials) {
            if partial.max == f32::NEG_INFINITY && partial.sum == 0. {
                continue; // no key of the block was seen
            }
            let max = if partial.max > state.max { partial.max } else { state.max };
            let mut factors = [state.max - max, partial.max - max];
            self.kernel.exp(&mut factors);
            let [old, new] = factors;
            state.max = max;
            state.sum = state.sum * old + partial.sum * new;
            for (value, partial) in state.values.iter_mut().zip(&partial.values) {
                *value = *value * old + partial * new;
            }
        }
    }
}

impl Partial {
    fn new(head_dim: usize) -> Self {
        Self { max: f32::NEG_INFINITY, sum: 0., values: vec![0.; head_dim] }
    }
}

/// Divides by the denominators; a query that saw no key gets zeros.
fn finish(states: &[Partial], out: &mut [f32]) {
    for (state, out) in states.iter().zip(out.chunks_mut(state_width(states))) {
        let inverse = if state.sum == 0. { 0. } else { 1. / state.sum };
        out.iter_mut().zip(&state.values).for_each(|(out, value)| *out = value * inverse);
    }
}

fn state_width(states: &[Partial]) -> usize {
    states.first().map_or(1, |state| state.values.len().max(1))
}
