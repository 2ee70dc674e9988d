//! An exact output head that reads half of its bytes: 8-bit rows tell which tokens can matter, and only their rows are
//! multiplied as they are stored.
//!
//! For a row w, stored also as s·q with 8-bit q, and a hidden state h, rounded to h′, Cauchy–Schwarz gives
//!
//! ```text
//! |w·h − s·q·h′| ≤ |(w − s·q)·h| + |s·q·(h − h′)| ≤ ‖w − s·q‖ ‖h‖ + ‖s·q‖ ‖h − h′‖
//! ```
//!
//! The norms of rows are stored, rounded up; those of hidden states are taken in double precision. Both products are
//! rounded as well, with u = 2⁻²⁴: the exact one is sixteen chains of ⌈n/16⌉ fused products and a tree of four sums, so it
//! is off by at most γ ‖w‖ ‖h‖, γ = m·u / (1 − m·u), m = ⌈n/16⌉ + 4, ‖w‖ ≤ ‖w − s·q‖ + ‖s·q‖ (and 2⁻¹⁵⁰ for every product that
//! underflows); the approximate one is an exact integer rounded three times, 3 u ‖s·q‖ ‖h′‖ and a little.
//!
//! A token whose upper bound lies below what others reach for certain cannot be among the best. It gets −∞; all others
//! get the logit of the full product, bit for bit. The order of the work does not show in the result.

use std::{ops::Range, sync::Arc};

use candle_core::{Result, Tensor};

use super::{
    lm_head::{Changed, LmHead, Logits, NEGLIGIBLE, Need, check_needs, refuse_gradients},
    map_on,
};
use crate::{
    head_weights::{HeadWeights, QuantizedHidden},
    kernels::{self, Kernel, ROWS, head::HeadFormat},
    ops,
    rows::Table,
    storage::with_slice,
    threads,
};

/// A head of exact logits, screened in 8 bits.
#[derive(Debug)]
pub struct ScreenedHead {
    rows: Table,
    row_bytes: usize,
    screen: Arc<HeadWeights>,
}

/// Rows of which only the best bounds are kept: a group is skipped when none of it can matter.
const GROUP: usize = 4 * ROWS;
/// Groups of one task: some 10 µs.
const TASK_GROUPS: usize = 64;

/// Candidates, as a part of the vocabulary, from which reading all rows in order is faster than reading them one by one.
const FULL_PRODUCT: usize = 8;

impl ScreenedHead {
    /// Screens `rows` (vocab_size, hidden_size), all of which are read here.
    ///
    /// # Errors
    /// Rows that cannot be read, or no memory.
    pub fn new(rows: Table) -> Result<Self> {
        let screen = Arc::new(HeadWeights::quantize(rows.source(), HeadFormat::Q8)?);
        let mut row_bytes = 0;
        rows.source().with_rows(0..1, &mut |row| row_bytes = row.cols() * row.element_bytes())?;
        Ok(Self { rows, row_bytes, screen })
    }

    /// The logits of one hidden state (1, hidden_size): all, or those of some tokens.
    fn exact(&self, hidden: &Tensor, ids: Option<&[u32]>) -> Result<Vec<f32>> {
        ops::table_product(hidden, &self.rows, ids)?.squeeze(0)?.to_vec1()
    }

    /// One row of logits; `approximate` are those of the screen.
    fn screened(
        &self,
        hidden: &Tensor,
        approximate: &[f32],
        bound: Bound,
        need: &Need,
    ) -> Result<Logits> {
        let screened = Screened::new(&self.screen, approximate, bound, need);
        let candidates = match need {
            Need::All => None,
            Need::Top { k, .. } => screened.top(*k, |ids| self.exact(hidden, Some(ids)))?,
            Need::Mass { temperature, .. } => screened.mass(*temperature),
        };
        let vocab_size = approximate.len();
        let Some(ids) = candidates.filter(|ids| ids.len() <= vocab_size / FULL_PRODUCT) else {
            return Ok(Logits { values: self.exact(hidden, None)?, rescored: Some(vocab_size) });
        };
        let mut values = vec![f32::NEG_INFINITY; vocab_size];
        for (&id, logit) in ids.iter().zip(self.exact(hidden, Some(&ids))?) {
            values[id as usize] = logit;
        }
        Ok(Logits { values, rescored: Some(ids.len()) })
    }
}

impl LmHead for ScreenedHead {
    fn forward(&self, hidden: &Tensor) -> Result<Tensor> {
        refuse_gradients(hidden)?;
        ops::table_product(hidden, &self.rows, None)
    }

    fn bytes(&self) -> usize {
        self.screen.bytes()
    }

    fn rescored_row_bytes(&self) -> usize {
        self.row_bytes
    }

    fn logits(&self, hidden: &Tensor, needs: &[Need]) -> Result<Vec<Logits>> {
        check_needs(hidden, needs)?;
        refuse_gradients(hidden)?;
        let (quantized, bounds) = self.bounds(hidden, needs)?;
        if bounds.iter().all(Option::is_none) {
            // Nothing to screen: one pass over the rows for all tokens.
            let rows = ops::table_product(hidden, &self.rows, None)?.to_vec2()?;
            return Ok(rows.into_iter().map(|values| Logits { values, rescored: None }).collect());
        }
        let approximate = ops::quantized_head_product(hidden, quantized, &self.screen)?;
        with_slice::<f32, _>(&approximate, |approximate| {
            let approximate = approximate.chunks(self.rows.source().shape().0.max(1));
            let rows = approximate.zip(bounds).zip(needs).enumerate();
            let logits = |(row, ((approximate, bound), need))| {
                let hidden = hidden.narrow(0, row, 1)?;
                match bound {
                    Some(bound) => self.screened(&hidden, approximate, bound, need),
                    None => Ok(Logits { values: self.exact(&hidden, None)?, rescored: None }),
                }
            };
            map_on(hidden.device(), rows, logits)
        })
    }
}

impl ScreenedHead {
    /// `hidden` as the screen multiplies it, and the bound of each row; `None` for one that is not screened.
    fn bounds(
        &self,
        hidden: &Tensor,
        needs: &[Need],
    ) -> Result<(QuantizedHidden, Vec<Option<Bound>>)> {
        let (_, hidden_size) = hidden.dims2()?;
        with_slice::<f32, _>(hidden, |hidden| {
            let quantized = QuantizedHidden::new(hidden, hidden_size);
            let rows = hidden.chunks(hidden_size.max(1)).zip(needs).enumerate();
            let bounds = rows.map(|(token, (hidden, need))| match need {
                Need::All => None,
                _ => Bound::new(quantized.error_and_norm(token, hidden), hidden_size),
            });
            let bounds = bounds.collect();
            Ok((quantized, bounds))
        })
    }
}

/// The bound of a row's error for one hidden state: `‖w − s·q‖ · error + ‖s·q‖ · norm + constant`.
#[derive(Clone, Copy, Debug)]
struct Bound {
    error: f64,
    norm: f64,
    constant: f64,
}

impl Bound {
    /// From `‖h − h′‖` and `‖h‖`; `None` for a hidden state that is not finite.
    fn new((hidden_error, hidden_norm): (f64, f64), hidden_size: usize) -> Option<Self> {
        const U: f64 = 1. / (1 << 24) as f64;
        /// Covers the rounding of these expressions and of sums with the bound, in double precision.
        const SLACK: f64 = 1. + 1e-9;
        let roundings = (hidden_size.div_ceil(16) + 4) as f64 * U;
        let gamma = roundings / (1. - roundings);
        let bound = Self {
            error: SLACK * hidden_norm * (1. + gamma),
            // ‖h′‖ ≤ ‖h‖ + ‖h − h′‖; 4 u instead of 3 covers products of roundings and sums with the approximate logit.
            norm: SLACK
                * (hidden_error + gamma * hidden_norm + 4. * U * (hidden_norm + hidden_error)),
            // Products that underflow, in either sum.
            constant: (hidden_size + 16) as f64 * 2f64.powi(-148),
        };
        let is_finite = hidden_error.is_finite() && hidden_norm.is_finite() && roundings < 0.5;
        is_finite.then_some(bound)
    }
}

/// How a token takes part.
const PLAIN: u8 = 0;
/// Its upper bound counts, its lower bound does not.
const LOWERED: u8 = 1;
/// A candidate in every case.
const FREE: u8 = 2;

/// The approximate logits of one hidden state with their bounds.
struct Screened<'a> {
    screen: &'a HeadWeights,
    approximate: &'a [f32],
    bound: Bound,
    /// [`PLAIN`], [`LOWERED`] or [`FREE`].
    kinds: Vec<u8>,
    freely: Vec<u32>,
    /// Of each group of rows: the largest lower bound of plain ones, the largest upper bound of those that are not free.
    groups: Vec<(f64, f64)>,
}

impl<'a> Screened<'a> {
    fn new(screen: &'a HeadWeights, approximate: &'a [f32], bound: Bound, need: &Need) -> Self {
        let mut kinds = vec![PLAIN; approximate.len()];
        let none = Changed::default();
        let changed = match need {
            Need::Top { changed, .. } | Need::Mass { changed, .. } => changed,
            Need::All => &none,
        };
        for (ids, kind) in [(&changed.downwards, LOWERED), (&changed.freely, FREE)] {
            for &id in ids {
                if let Some(slot) = kinds.get_mut(id as usize) {
                    *slot = kind;
                }
            }
        }
        let mut freely = changed.freely.clone();
        freely.retain(|id| (*id as usize) < kinds.len());
        freely.sort_unstable();
        freely.dedup();
        let groups =
            vec![(f64::NEG_INFINITY, f64::NEG_INFINITY); approximate.len().div_ceil(GROUP)];
        let mut new = Self { screen, approximate, bound, kinds, freely, groups: Vec::new() };
        let mut groups = groups;
        threads::for_each_chunk(&mut groups, TASK_GROUPS, |task, groups| {
            for (i, group) in groups.iter_mut().enumerate() {
                *group = new.group(task * TASK_GROUPS + i);
            }
        });
        new.groups = groups;
        new
    }

    /// The tokens of a group.
    fn range(&self, group: usize) -> Range<usize> {
        group * GROUP..self.approximate.len().min((group + 1) * GROUP)
    }

    /// The bounds of a token's logit; NaN where its row is not finite.
    #[inline]
    fn bounds(&self, id: usize) -> (f64, f64) {
        let band = &self.screen.bounds()[id / ROWS];
        let (error, norm) = (f64::from(band.errors[id % ROWS]), f64::from(band.norms[id % ROWS]));
        let bound = error * self.bound.error + norm * self.bound.norm + self.bound.constant;
        let logit = f64::from(self.approximate[id]);
        (logit - bound, logit + bound)
    }

    fn group(&self, group: usize) -> (f64, f64) {
        let mut best = (f64::NEG_INFINITY, f64::NEG_INFINITY);
        for id in self.range(group) {
            let (lower, upper) = self.bounds(id);
            if self.kinds[id] == PLAIN && lower > best.0 {
                best.0 = lower;
            }
            // A bound that is NaN excludes nothing.
            let upper = if upper.is_nan() { f64::INFINITY } else { upper };
            if self.kinds[id] != FREE && upper > best.1 {
                best.1 = upper;
            }
        }
        best
    }

    /// Those tokens, other than the free ones, whose logits may be `threshold` or more.
    fn reaching(&self, threshold: f64) -> Vec<u32> {
        let mut ids = Vec::new();
        for (index, group) in self.groups.iter().enumerate() {
            if group.1 < threshold {
                continue;
            }
            let reaches = |id: &usize| {
                let below = self.bounds(*id).1 < threshold; // false for NaN
                self.kinds[*id] != FREE && !below
            };
            ids.extend(self.range(index).filter(reaches).map(|id| id as u32));
        }
        ids
    }

    /// Tokens among which are the free ones, the `k` best plain ones, those equal to them, and the lowered ones that
    /// are as good. `None` if these may be all.
    fn top(
        &self,
        k: usize,
        rescore: impl Fn(&[u32]) -> Result<Vec<f32>>,
    ) -> Result<Option<Vec<u32>>> {
        // The k-th best lower bound of groups belongs to k different tokens: the k best are no worse.
        let mut lower: Vec<f64> = self.groups.iter().map(|group| group.0).collect();
        if k == 0 || k > lower.len() {
            return Ok(None);
        }
        let (_, threshold, _) = lower.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a));
        let mut candidates = self.reaching(*threshold);
        if candidates.len() > self.approximate.len() / FULL_PRODUCT {
            return Ok(None);
        }
        // The exact logits of the seemingly best say more.
        let mut plain: Vec<u32> = candidates.clone();
        plain.retain(|id| self.kinds[*id as usize] == PLAIN);
        if plain.len() > k {
            let approximate = |id: &u32| self.approximate[*id as usize];
            plain.select_nth_unstable_by(k - 1, |a, b| approximate(b).total_cmp(&approximate(a)));
            plain.truncate(k);
            let exact = rescore(&plain)?;
            if exact.iter().all(|logit| logit.is_finite()) {
                let threshold = exact.into_iter().fold(f32::INFINITY, f32::min);
                candidates.retain(|id| {
                    let below = self.bounds(*id as usize).1 < f64::from(threshold);
                    !below // a bound that is NaN excludes nothing
                });
            }
        }
        candidates.extend(&self.freely);
        Ok(Some(candidates))
    }

    /// Tokens without which less than [`NEGLIGIBLE`] of the probability of plain tokens is missing. `None` if these may
    /// be all.
    fn mass(&self, temperature: f32) -> Option<Vec<u32>> {
        /// Weights are counted in bins by the first bits of their float: 2 a power of two.
        const BINS: usize = 512;
        const BIN_SHIFT: u32 = 22;
        /// Covers what exponentials of floats are off by: their argument, of at most 104, is rounded to a 2⁻²⁴ of itself.
        const SLACK: f64 = 1.001;
        let best = self.groups.iter().fold(f64::NEG_INFINITY, |best, group| best.max(group.0));
        if !best.is_finite() {
            return None;
        }
        let temperature = f64::from(temperature);
        let weight = |logit: f64| ((logit - best) / temperature) as f32;
        struct Counts {
            plain: f64,
            bins: Vec<f64>,
        }
        let tasks = self.groups.len().div_ceil(TASK_GROUPS);
        let mut counts: Vec<Counts> =
            (0..tasks).map(|_| Counts { plain: 0., bins: vec![0.; BINS] }).collect();
        let kernel = kernels::active();
        threads::for_each_chunk(&mut counts, 1, |task, counts| {
            let counts = &mut counts[0];
            for group in task * TASK_GROUPS..self.groups.len().min((task + 1) * TASK_GROUPS) {
                let range = self.range(group);
                let (lower, upper) = self.weights(kernel, range.clone(), weight);
                for ((id, lower), upper) in range.zip(lower).zip(upper) {
                    if self.kinds[id] == PLAIN && lower.is_finite() {
                        counts.plain += f64::from(lower);
                    }
                    if self.kinds[id] != FREE && !upper.is_nan() {
                        counts.bins[(upper.to_bits() >> BIN_SHIFT) as usize] += f64::from(upper);
                    }
                }
            }
        });
        let plain: f64 = counts.iter().map(|counts| counts.plain).sum();
        let budget = NEGLIGIBLE * plain / SLACK;
        let mut excluded = 0.;
        let kept = (0..BINS).find(|bin| {
            excluded += SLACK * counts.iter().map(|counts| counts.bins[*bin]).sum::<f64>();
            excluded >= budget
        });
        // Weights below that are left out.
        let kept = f32::from_bits((kept.unwrap_or(BINS - 1) as u32) << BIN_SHIFT);
        let mut ids = self.freely.clone();
        for group in 0..self.groups.len() {
            let range = self.range(group);
            let (_, upper) = self.weights(kernel, range.clone(), weight);
            let kept = range.zip(upper).filter(|(id, upper)| {
                let left_out = *upper < kept; // false for NaN
                self.kinds[*id] != FREE && !left_out
            });
            ids.extend(kept.map(|(id, _)| id as u32));
        }
        Some(ids)
    }

    /// `exp` of the scaled bounds of a group.
    fn weights(
        &self,
        kernel: &Kernel,
        range: Range<usize>,
        scale: impl Fn(f64) -> f32,
    ) -> ([f32; GROUP], [f32; GROUP]) {
        let (mut lower, mut upper) = ([0.; GROUP], [0.; GROUP]);
        for (i, id) in range.clone().enumerate() {
            let bounds = self.bounds(id);
            (lower[i], upper[i]) = (scale(bounds.0), scale(bounds.1));
        }
        kernel.exp(&mut lower[..range.len()]);
        kernel.exp(&mut upper[..range.len()]);
        (lower, upper)
    }
}
