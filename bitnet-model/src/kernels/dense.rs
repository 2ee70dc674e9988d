//! Full-precision products and reductions in a fixed order.
//!
//! Every sum over `i` is sixteen partial sums, lane `l` taking `i = l, l + 16, l + 32, …` in that order, and then the
//! tree of [`Simd::sum4`]; a ragged end is padded with zeros. Only [`weighted_sums`] and [`axpy`], whose lanes are
//! separate outputs, take their terms one by one.

use std::{array, ops::Range};

use super::{
    prefetch, scalar,
    simd::{LANES, Simd},
};

/// A row-major matrix whose rows of `cols` values begin `stride` values apart.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a, T> {
    data: &'a [T],
    rows: usize,
    cols: usize,
    stride: usize,
}

impl<'a, T> Matrix<'a, T> {
    /// `rows` rows of `cols` values, one behind the other.
    ///
    /// # Panics
    /// If `data` is shorter than that.
    pub fn new(data: &'a [T], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// `rows` rows of `cols` values, row `i` at `data[i · stride..]`.
    ///
    /// # Panics
    /// If `data` is shorter than that, or the rows overlap.
    pub fn strided(data: &'a [T], rows: usize, cols: usize, stride: usize) -> Self {
        assert!(fits(data.len(), rows, cols, stride), "{rows} × {cols} matrix outside its slice");
        Self { data, rows, cols, stride }
    }

    /// Rows of the matrix.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns of the matrix.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// All values, if rows lie one behind another.
    pub fn dense(&self) -> Option<&'a [T]> {
        (self.stride == self.cols).then(|| &self.data[..self.rows * self.cols])
    }

    #[inline(always)]
    fn row(&self, row: usize) -> &'a [T] {
        &self.data[row * self.stride..][..self.cols]
    }

    /// The rows from `first` on.
    #[inline(always)]
    fn tail(&self, first: usize) -> Self {
        Self { data: &self.data[first * self.stride..], rows: self.rows - first, ..*self }
    }
}

/// Whether `len` values hold `rows` rows of `cols` values, `stride` apart.
pub(super) fn fits(len: usize, rows: usize, cols: usize, stride: usize) -> bool {
    let Some(last) = rows.checked_sub(1) else { return true };
    let end = last.checked_mul(stride).and_then(|start| start.checked_add(cols));
    cols <= stride && end.is_some_and(|end| end <= len)
}

/// The right-hand side of [`Kernel::matmul_nt`](super::Kernel::matmul_nt), one output a row.
#[derive(Clone, Copy, Debug)]
pub enum DenseWeights<'a> {
    /// Single precision.
    F32(Matrix<'a, f32>),
    /// The bits of bfloat16 values, widened exactly.
    Bf16(Matrix<'a, u16>),
    /// The bits of half-precision values, widened exactly.
    F16(Matrix<'a, u16>),
    /// Integers.
    I8(Matrix<'a, i8>),
}

impl DenseWeights<'_> {
    /// Rows of the matrix: outputs of the product.
    pub fn rows(&self) -> usize {
        match self {
            Self::F32(w) => w.rows,
            Self::Bf16(w) | Self::F16(w) => w.rows,
            Self::I8(w) => w.rows,
        }
    }

    /// Columns of the matrix: inputs of the product.
    pub fn cols(&self) -> usize {
        match self {
            Self::F32(w) => w.cols,
            Self::Bf16(w) | Self::F16(w) => w.cols,
            Self::I8(w) => w.cols,
        }
    }

    /// Bytes of a stored element.
    pub fn element_bytes(&self) -> usize {
        match self {
            Self::F32(_) => 4,
            Self::Bf16(_) | Self::F16(_) => 2,
            Self::I8(_) => 1,
        }
    }

    /// A row as f32, exactly.
    ///
    /// # Panics
    /// If there is no such row or `out` differs from it in length.
    pub fn widen_row(&self, row: usize, out: &mut [f32]) {
        fn convert<T: Copy>(row: &[T], out: &mut [f32], widen: impl Fn(T) -> f32) {
            assert_eq!(row.len(), out.len(), "a row of another length");
            out.iter_mut().zip(row).for_each(|(out, x)| *out = widen(*x));
        }
        match self {
            Self::F32(w) => out.copy_from_slice(w.row(row)),
            Self::Bf16(w) => convert(w.row(row), out, |x| f32::from_bits(u32::from(x) << 16)),
            Self::F16(w) => convert(w.row(row), out, scalar::widen_f16),
            Self::I8(w) => convert(w.row(row), out, f32::from),
        }
    }
}

/// A kind of stored element that widens to f32.
trait Element {
    type Stored: Copy + Default;
    fn load<S: Simd>(simd: S, x: &[Self::Stored; LANES]) -> S::F32;
}

enum F32 {}
enum Bf16 {}
enum F16 {}
enum I8 {}

impl Element for F32 {
    type Stored = f32;
    #[inline(always)]
    fn load<S: Simd>(simd: S, x: &[f32; LANES]) -> S::F32 {
        simd.load(x)
    }
}

impl Element for Bf16 {
    type Stored = u16;
    #[inline(always)]
    fn load<S: Simd>(simd: S, x: &[u16; LANES]) -> S::F32 {
        simd.load_bf16(x)
    }
}

impl Element for F16 {
    type Stored = u16;
    #[inline(always)]
    fn load<S: Simd>(simd: S, x: &[u16; LANES]) -> S::F32 {
        simd.load_f16(x)
    }
}

impl Element for I8 {
    type Stored = i8;
    #[inline(always)]
    fn load<S: Simd>(simd: S, x: &[i8; LANES]) -> S::F32 {
        simd.load_i8(x)
    }
}

/// `x` and then `fill`, to sixteen lanes.
#[inline(always)]
pub(super) fn pad<T: Copy>(x: &[T], fill: T) -> [T; LANES] {
    let mut lanes = [fill; LANES];
    lanes[..x.len()].copy_from_slice(x);
    lanes
}

/// The groups of sixteen of `x`, and the last one padded with `fill` if it is ragged.
#[inline(always)]
fn groups(x: &[f32], fill: f32) -> (&[[f32; LANES]], Option<[f32; LANES]>) {
    let (groups, tail) = x.as_chunks::<LANES>();
    (groups, (!tail.is_empty()).then(|| pad(tail, fill)))
}

/// The tree of [`Simd::sum4`] for one vector.
#[inline(always)]
fn sum_lanes<S: Simd>(simd: S, x: S::F32) -> f32 {
    simd.sum4([x; 4])[0]
}

#[inline(always)]
pub(super) fn sum<S: Simd>(simd: S, x: &[f32]) -> f32 {
    let (groups, last) = groups(x, 0.);
    let mut acc = simd.splat(0.);
    for group in groups.iter().chain(&last) {
        acc = simd.add(acc, simd.load(group));
    }
    sum_lanes(simd, acc)
}

#[inline(always)]
pub(super) fn sum_squares<S: Simd>(simd: S, x: &[f32]) -> f32 {
    let (groups, last) = groups(x, 0.);
    let mut acc = simd.splat(0.);
    for group in groups.iter().chain(&last) {
        let x = simd.load(group);
        acc = simd.mul_add(x, x, acc);
    }
    sum_lanes(simd, acc)
}

#[inline(always)]
pub(super) fn max<S: Simd>(simd: S, x: &[f32]) -> f32 {
    let (groups, last) = groups(x, f32::NEG_INFINITY);
    let mut acc = simd.splat(f32::NEG_INFINITY);
    for group in groups.iter().chain(&last) {
        acc = simd.max(simd.load(group), acc); // acc where the group holds NaN
    }
    let mut lanes = [0.; LANES];
    simd.store(acc, &mut lanes);
    lanes.into_iter().fold(f32::NEG_INFINITY, |acc, x| if x > acc { x } else { acc })
}

/// Rows that are prefetched before their turn: the processor's own prefetching stops at the end of a page.
const AHEAD: usize = 32;

/// `y[i · y_stride + j] = Σ x[i][·] · w[j][·]`, `R` × `C` accumulators at a time.
#[inline(always)]
pub(super) fn matmul_nt<S: Simd, const R: usize, const C: usize>(
    simd: S,
    x: Matrix<'_, f32>,
    w: DenseWeights<'_>,
    y: &mut [f32],
    y_stride: usize,
) {
    match w {
        DenseWeights::F32(w) => Product::<S, F32> { simd, x, w, y, y_stride }.run::<R, C>(),
        DenseWeights::Bf16(w) => Product::<S, Bf16> { simd, x, w, y, y_stride }.run::<R, C>(),
        DenseWeights::F16(w) => Product::<S, F16> { simd, x, w, y, y_stride }.run::<R, C>(),
        DenseWeights::I8(w) => Product::<S, I8> { simd, x, w, y, y_stride }.run::<R, C>(),
    }
}

struct Product<'a, S, T: Element> {
    simd: S,
    x: Matrix<'a, f32>,
    w: Matrix<'a, T::Stored>,
    y: &'a mut [f32],
    y_stride: usize,
}

impl<S: Simd, T: Element> Product<'_, S, T> {
    #[inline(always)]
    fn run<const R: usize, const C: usize>(&mut self) {
        // As many rows of x as half a MiB of second-level cache holds: they meet every row of w before they leave.
        let panel = ((1 << 17) / self.x.cols.max(1)).next_multiple_of(R).max(R);
        for start in (0..self.x.rows).step_by(panel) {
            let end = self.x.rows.min(start + panel);
            let whole = self.w.rows - self.w.rows % C;
            for j in (0..whole).step_by(C) {
                self.column_block::<R, C>(start, end, j);
            }
            for j in whole..self.w.rows {
                self.column_block::<R, 1>(start, end, j);
            }
        }
    }

    #[inline(always)]
    fn column_block<const R: usize, const C: usize>(&mut self, start: usize, end: usize, j: usize) {
        let whole = end - (end - start) % R;
        for i in (start..whole).step_by(R) {
            self.block::<R, C>(i, j);
        }
        for i in whole..end {
            self.block::<1, C>(i, j);
        }
    }

    /// `R` rows of x by `C` rows of w.
    #[inline(always)]
    fn block<const R: usize, const C: usize>(&mut self, i: usize, j: usize) {
        let simd = self.simd;
        let x: [_; R] = array::from_fn(|r| self.x.row(i + r).as_chunks::<LANES>());
        let w: [_; C] = array::from_fn(|c| self.w.row(j + c).as_chunks::<LANES>());
        let mut acc = [[simd.splat(0.); C]; R];
        let groups = self.x.cols / LANES;
        let ahead = AHEAD * self.w.stride;
        for g in 0..groups {
            let mut w_lanes = [simd.splat(0.); C];
            for c in 0..C {
                prefetch(w[c].0.as_ptr().wrapping_add(g).cast::<T::Stored>().wrapping_add(ahead));
                w_lanes[c] = T::load(simd, &w[c].0[g]);
            }
            for r in 0..R {
                let x_lanes = simd.load(&x[r].0[g]);
                for c in 0..C {
                    acc[r][c] = simd.mul_add(x_lanes, w_lanes[c], acc[r][c]);
                }
            }
        }
        if !x[0].1.is_empty() {
            for r in 0..R {
                let x_lanes = simd.load(&pad(x[r].1, 0.));
                for c in 0..C {
                    let w_lanes = T::load(simd, &pad(w[c].1, T::Stored::default()));
                    acc[r][c] = simd.mul_add(x_lanes, w_lanes, acc[r][c]);
                }
            }
        }
        const { assert!(0 < C && C <= 4) }
        for (r, acc) in acc.into_iter().enumerate() {
            let four = [acc[0], acc[1 % C], acc[2 % C], acc[3 % C]];
            let y = &mut self.y[(i + r) * self.y_stride + j..][..C];
            y.copy_from_slice(&simd.sum4(four)[..C]);
        }
    }
}

/// `out[r · dims + d] = Σⱼ p[r][j] · v[j][d]`, each `r` and `d` one chain of fused products in the order of `j`. `R` rows
/// share what is loaded of `v`, `W` vectors at a time.
#[inline(always)]
pub(super) fn weighted_sums<S: Simd, const R: usize, const W: usize>(
    simd: S,
    p: Matrix<'_, f32>,
    v: DenseWeights<'_>,
    out: &mut [f32],
) {
    match v {
        DenseWeights::F32(v) => weighted::<S, F32, R, W>(simd, p, v, out),
        DenseWeights::Bf16(v) => weighted::<S, Bf16, R, W>(simd, p, v, out),
        DenseWeights::F16(v) => weighted::<S, F16, R, W>(simd, p, v, out),
        DenseWeights::I8(v) => weighted::<S, I8, R, W>(simd, p, v, out),
    }
}

/// Rows of v whose values stay in the first-level cache while all vectors of columns and all rows of p pass.
const NEAR: usize = 32;

#[inline(always)]
fn weighted<S: Simd, T: Element, const R: usize, const W: usize>(
    simd: S,
    p: Matrix<'_, f32>,
    v: Matrix<'_, T::Stored>,
    out: &mut [f32],
) {
    out.fill(0.);
    let whole = p.rows - p.rows % R;
    for start in (0..v.rows).step_by(NEAR) {
        let near = start..v.rows.min(start + NEAR);
        for r in (0..whole).step_by(R) {
            weighted_rows::<S, T, R, W>(simd, (p, r), v, near.clone(), &mut out[r * v.cols..]);
        }
        for r in whole..p.rows {
            weighted_rows::<S, T, 1, 4>(simd, (p, r), v, near.clone(), &mut out[r * v.cols..]);
        }
    }
}

/// Adds what `near`, some rows of v, give to `R` rows of [`weighted_sums`] from `first` on, `W` vectors of columns at a time:
/// enough chains to hide the latency.
#[inline(always)]
fn weighted_rows<S: Simd, T: Element, const R: usize, const W: usize>(
    simd: S,
    (p, first): (Matrix<'_, f32>, usize),
    v: Matrix<'_, T::Stored>,
    near: Range<usize>,
    out: &mut [f32],
) {
    // Of a row of v all factors side by side.
    let mut factors = [[0.; R]; NEAR];
    for r in 0..R {
        for (factors, p) in factors.iter_mut().zip(&p.row(first + r)[near.clone()]) {
            factors[r] = *p;
        }
    }
    let (factors, v) = (&factors[..near.len()], v.tail(near.start));
    let (dims, groups) = (v.cols, v.cols / LANES);
    let wide = groups - groups % W;
    for group in (0..wide).step_by(W) {
        weighted_block::<S, T, R, W>(simd, factors, v, group * LANES, out);
    }
    for group in wide..groups {
        weighted_block::<S, T, R, 1>(simd, factors, v, group * LANES, out);
    }
    let start = groups * LANES;
    if start < dims {
        for r in 0..R {
            let out = &mut out[r * dims + start..][..dims - start];
            let mut acc = simd.load(&pad(out, 0.));
            for (j, factors) in factors.iter().enumerate() {
                let v = T::load(simd, &pad(&v.row(j)[start..], T::Stored::default()));
                acc = simd.mul_add(simd.splat(factors[r]), v, acc);
            }
            let mut lanes = [0.; LANES];
            simd.store(acc, &mut lanes);
            out.copy_from_slice(&lanes[..dims - start]);
        }
    }
}

/// The `W` vectors of columns that begin at `start`.
#[inline(always)]
fn weighted_block<S: Simd, T: Element, const R: usize, const W: usize>(
    simd: S,
    factors: &[[f32; R]],
    v: Matrix<'_, T::Stored>,
    start: usize,
    out: &mut [f32],
) {
    let mut acc = [[simd.splat(0.); W]; R];
    for r in 0..R {
        let out = out[r * v.cols + start..][..W * LANES].as_chunks::<LANES>().0;
        for w in 0..W {
            acc[r][w] = simd.load(&out[w]);
        }
    }
    let ahead = AHEAD * v.stride;
    for (factors, row) in factors.iter().zip(v.data.chunks(v.stride)) {
        let row = row[start..][..W * LANES].as_chunks::<LANES>().0;
        let mut lanes = [simd.splat(0.); W];
        for w in 0..W {
            prefetch(row[w].as_ptr().wrapping_add(ahead));
            lanes[w] = T::load(simd, &row[w]);
        }
        for r in 0..R {
            let factor = simd.splat(factors[r]);
            for w in 0..W {
                acc[r][w] = simd.mul_add(factor, lanes[w], acc[r][w]);
            }
        }
    }
    for r in 0..R {
        let out = out[r * v.cols + start..][..W * LANES].as_chunks_mut::<LANES>().0;
        for w in 0..W {
            simd.store(acc[r][w], &mut out[w]);
        }
    }
}

/// `y[d] = a · x[d] + y[d]`, fused.
#[inline(always)]
pub(super) fn axpy(a: f32, x: &[f32], y: &mut [f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y = a.mul_add(*x, *y);
    }
}
