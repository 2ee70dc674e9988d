//! Products of matrices in panels, for training: both factors are as large as the result, so that copying them into the
//! order in which they are read costs little.
//!
//! The left factor lies in panels of `R` rows, the right one in panels of `C` vectors of columns, and in both all values of
//! one depth are neighbours: a step loads `C` vectors, and every one of the `R` left values is multiplied with all of them.
//! Each output is one chain of fused products in the order of the depth, so its bits depend on its own operands alone.

use super::simd::{LANES, Simd};

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
    let (a, b) = (a.as_chunks::<R>().0, b.as_chunks::<LANES>().0.as_chunks::<C>().0);
    for (j, b) in b.chunks_exact(depth).take(cols.div_ceil(C * LANES)).enumerate() {
        for (i, a) in a.chunks_exact(depth).take(rows.div_ceil(R)).enumerate() {
            let mut acc = [[simd.splat(0.); C]; R];
            for (a, b) in a.iter().zip(b) {
                let mut lanes = [simd.splat(0.); C];
                for c in 0..C {
                    lanes[c] = simd.load(&b[c]);
                }
                for r in 0..R {
                    let x = simd.splat(a[r]);
                    for c in 0..C {
                        acc[r][c] = simd.mul_add(x, lanes[c], acc[r][c]);
                    }
                }
            }
            store(simd, &acc, product, (i * R, j * C * LANES), out);
        }
    }
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
}

impl PanelWidths {
    pub(super) const fn new(rows: usize, vectors: usize) -> Self {
        Self { rows, cols: vectors * LANES }
    }

    /// Whether panels of `a_len` and `b_len` values hold the factors of a product.
    pub(super) fn hold(self, (a_len, b_len): (usize, usize), product: PanelProduct) -> bool {
        let PanelProduct { rows, cols, depth, .. } = product;
        let needed = |count: usize, width: usize| {
            count.div_ceil(width).checked_mul(width).and_then(|count| count.checked_mul(depth))
        };
        depth > 0
            && needed(rows, self.rows).is_some_and(|len| len <= a_len)
            && needed(cols, self.cols).is_some_and(|len| len <= b_len)
    }
}
