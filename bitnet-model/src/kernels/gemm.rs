//! Products of matrices in panels, for training: both factors are as large as the result, so that copying them into the
//! order in which they are read costs little.
//!
//! The left factor lies in panels of `R` rows, the right one in panels of `C` vectors of columns. A step, one depth, loads
//! `C` vectors, and every one of the `R` left values is multiplied with all of them. Of the right factor all values of one
//! depth are neighbours; of the left one these or those of a row ([`Order`]), whichever takes less to bring about.
//! Each output is one chain of fused products in the order of the depth, so its bits depend on its own operands alone.

use super::simd::{LANES, Simd};

/// Depths of a panel: a left one then fits the first-level cache. In [`Order::Rows`] so many are from one row to the next
/// whatever the depth, since the places of rows that are constant are parts of the instructions.
pub const PANEL_DEPTH: usize = 512;

/// How the values of a panel of the left factor lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// All rows of a depth, then those of the next.
    Depths,
    /// All depths of a row, then those of the next, which begins [`PANEL_DEPTH`] later.
    Rows,
}

/// The shape of a product of panels, and what becomes of it.
#[derive(Clone, Copy, Debug)]
pub struct PanelProduct {
    /// Rows of the result.
    pub rows: usize,
    /// Columns of the result.
    pub cols: usize,
    /// Values that are multiplied for each output.
    pub depth: usize,
    /// Multiplies the sums.
    pub scale: f32,
    /// Whether the result is added to what is there.
    pub add: bool,
    /// Of the left factor's panels.
    pub order: Order,
}

/// A panel of `R` rows of the left factor.
pub(super) trait LeftPanel<T> {
    /// The value of a row at a depth.
    fn value(&self, depth: usize, row: usize) -> T;
}

impl<T: Copy, const R: usize> LeftPanel<T> for [[T; R]] {
    #[inline(always)]
    fn value(&self, depth: usize, row: usize) -> T {
        self[depth][row]
    }
}

impl<T: Copy, const R: usize, const L: usize> LeftPanel<T> for [[T; L]; R] {
    #[inline(always)]
    fn value(&self, depth: usize, row: usize) -> T {
        self[row][depth]
    }
}

/// `out[i · cols + j] (+)= scale · Σ_d a[d][i] · b[d][j]` for panels of `R` rows and `C` vectors of columns; panels are
/// padded.
#[inline(always)]
pub(super) fn multiply<S: Simd, const R: usize, const C: usize>(
    simd: S,
    a: &[f32],
    b: &[f32],
    product: PanelProduct,
    out: &mut [f32],
) {
    let PanelProduct { rows, cols, depth, .. } = product;
    let b = b.as_chunks::<LANES>().0.as_chunks::<C>().0;
    for (j, b) in b.chunks_exact(depth).take(cols.div_ceil(C * LANES)).enumerate() {
        for i in 0..rows.div_ceil(R) {
            let acc = match product.order {
                Order::Depths => {
                    let a = &a.as_chunks::<R>().0[i * depth..][..depth];
                    sums::<S, _, R, C>(simd, a, b)
                }
                Order::Rows => {
                    let a = &a.as_chunks::<PANEL_DEPTH>().0.as_chunks::<R>().0[i];
                    sums::<S, _, R, C>(simd, a, &b[..depth.min(PANEL_DEPTH)])
                }
            };
            store(simd, &acc, product, (i * R, j * C * LANES), out);
        }
    }
}

/// The sums of a panel's rows and a panel's columns.
#[inline(always)]
fn sums<S: Simd, A: LeftPanel<f32> + ?Sized, const R: usize, const C: usize>(
    simd: S,
    a: &A,
    b: &[[[f32; LANES]; C]],
) -> [[S::F32; C]; R] {
    let mut acc = [[simd.splat(0.); C]; R];
    for (depth, b) in b.iter().enumerate() {
        let mut lanes = [simd.splat(0.); C];
        for c in 0..C {
            lanes[c] = simd.load(&b[c]);
        }
        for (r, acc) in acc.iter_mut().enumerate() {
            let x = simd.splat(a.value(depth, r));
            for c in 0..C {
                acc[c] = simd.mul_add(x, lanes[c], acc[c]);
            }
        }
    }
    acc
}

/// Scales a block of sums and puts or adds those that are inside the result, from `(row, col)` on.
#[inline(always)]
pub(super) fn store<S: Simd, const R: usize, const C: usize>(
    simd: S,
    acc: &[[S::F32; C]; R],
    product: PanelProduct,
    (row, col): (usize, usize),
    out: &mut [f32],
) {
    let PanelProduct { rows, cols, scale, add, .. } = product;
    let scale = simd.splat(scale);
    for (r, acc) in acc.iter().enumerate().take(rows - row) {
        let out = &mut out[(row + r) * cols..][..cols][col..];
        for c in 0..C.min((cols - col).div_ceil(LANES)) {
            let out = &mut out[c * LANES..];
            match out.first_chunk_mut::<LANES>() {
                Some(out) if add => simd.store(simd.mul_add(acc[c], scale, simd.load(out)), out),
                Some(out) => simd.store(simd.mul(acc[c], scale), out),
                None => {
                    let mut lanes = [0.; LANES];
                    lanes[..out.len()].copy_from_slice(out);
                    let sum = if add { simd.load(&lanes) } else { simd.splat(0.) };
                    simd.store(simd.mul_add(acc[c], scale, sum), &mut lanes);
                    out.copy_from_slice(&lanes[..out.len()]);
                }
            }
        }
    }
}

/// Rows of a left panel and columns of a right one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PanelWidths {
    /// Rows of a panel of the left factor.
    pub rows: usize,
    /// Columns of a panel of the right factor.
    pub cols: usize,
    /// Values of [`PANEL_DEPTH`] depths of a row or column.
    pub full: usize,
}

impl PanelWidths {
    /// Panels of `rows` rows and `vectors` vectors of columns; a value is `pair` depths.
    pub(super) const fn new(rows: usize, vectors: usize, pair: usize) -> Self {
        Self { rows, cols: vectors * LANES, full: PANEL_DEPTH / pair }
    }

    /// Values of a left panel of so many values a row.
    pub fn left_len(self, order: Order, depth: usize) -> usize {
        match order {
            Order::Depths => self.rows * depth,
            Order::Rows => self.rows * self.full,
        }
    }

    /// Whether panels of `a_len` and `b_len` values hold the factors of a product.
    pub(super) fn hold(self, (a_len, b_len): (usize, usize), product: PanelProduct) -> bool {
        let PanelProduct { rows, cols, depth, order, .. } = product;
        let needed = |count: usize, width: usize, depth: usize| {
            count.div_ceil(width).checked_mul(width).and_then(|count| count.checked_mul(depth))
        };
        let a_depth = if order == Order::Rows { self.full } else { depth };
        (1..=a_depth).contains(&depth)
            && needed(rows, self.rows, a_depth).is_some_and(|len| len <= a_len)
            && needed(cols, self.cols, depth).is_some_and(|len| len <= b_len)
    }
}
