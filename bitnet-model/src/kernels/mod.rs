//! Compute kernels over plain slices: one tile row, one matrix, one vector. No tensors, allocation or threads.
//!
//! A [`Kernel`] is one instruction set's version of every routine. All versions give equal results, bit for bit:
//! integer sums are exact, and a sum of floats over `i` is sixteen partial sums, the one numbered `l` taking
//! `i = l, l + 16, l + 32, …` in order by fused multiply-add, which are then added in a fixed tree. So a value depends on
//! its own operands alone, and not on the instruction set, the rows beside it or the blocking.

#![allow(unsafe_code)] // the only module with intrinsics; every block states what it relies on

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512bf16;
#[cfg(target_arch = "x86_64")]
mod avx512vbmi;
#[cfg(target_arch = "x86_64")]
mod avx512vnni;
#[cfg(target_arch = "x86_64")]
mod avxvnni;
mod choice;
mod dense;
mod exp;
mod gemm;
pub mod head;
mod instructions;
#[cfg(target_arch = "aarch64")]
mod neondot;
mod peak;
mod prefetch;
mod quantize;
mod scalar;
mod simd;
#[cfg(test)]
mod ternary_tests;
#[cfg(test)]
mod tests;
pub mod tile;
mod vectorized;

use std::fmt;

pub(crate) use self::prefetch::prefetch;
pub use self::{
    choice::{ChoiceError, KERNEL_VARIABLE, active, choose},
    dense::{DenseWeights, Matrix},
    gemm::{Order, PANEL_DEPTH, PanelProduct, PanelWidths},
    instructions::{InstructionSet, instruction_sets},
    tile::{ROWS, Tile, TileFormat},
    vectorized::{Loop, vectorized},
};
use self::{instructions::Requirement, simd::Routines};

/// One instruction set's routines. Only this module makes kernels and only [`available`] hands them out, so a
/// reference is the proof that the processor has the instructions.
pub struct Kernel {
    name: &'static str,
    requires: &'static [Requirement],
    accumulate: Accumulate,
    accumulate_trits: Accumulate,
    routines: Routines,
    head: head::HeadRoutines,
    peak: peak::Peak,
}

/// `acc[token][row] += Σ code[row][col] · x[token][col]` over one row of tiles.
type Accumulate = unsafe fn(tiles: &[Tile], x: &[i8], acc: &mut [[i32; ROWS]]);

/// Fastest first. An instruction set is one file, one `mod` line and one line here.
static KERNELS: &[&Kernel] = &[
    #[cfg(target_arch = "x86_64")]
    &avx512vbmi::KERNEL,
    #[cfg(target_arch = "x86_64")]
    &avx512vnni::KERNEL,
    #[cfg(target_arch = "x86_64")]
    &avxvnni::KERNEL,
    #[cfg(target_arch = "x86_64")]
    &avx2::KERNEL,
    #[cfg(target_arch = "aarch64")]
    &neondot::KERNEL,
    &scalar::KERNEL,
];

/// The kernels this processor can run, fastest first.
pub fn available() -> impl Iterator<Item = &'static Kernel> {
    KERNELS.iter().copied().filter(|kernel| kernel.is_available())
}

/// The kernel with this [name](Kernel::name), if the processor can run it.
pub fn by_name(name: &str) -> Option<&'static Kernel> {
    available().find(|kernel| kernel.name == name)
}

impl fmt::Debug for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Kernel").field(&self.name).finish()
    }
}

impl Kernel {
    /// The instruction set: such as `avx512vnni` or `scalar`.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// `out[token][row] = Σ weight[row][·] · x[token][·]` for one row of tiles and every row of `x` (tokens × cols), decoding
    /// each tile once for a block of tokens; `x_sums` are `Σ x[token][·]`.
    ///
    /// # Panics
    /// Unless `x_sums` and `out` have one value a token and `x` has [`TileFormat::cols`] values a token and tile, at most
    /// [`TileFormat::max_cols`] a token.
    pub fn ternary_dots(
        &self,
        format: TileFormat,
        tiles: &[Tile],
        x: &[i8],
        x_sums: &[i32],
        out: &mut [[i32; ROWS]],
    ) {
        let cols = tiles.len() * format.cols();
        assert!(cols <= format.max_cols(), "too many columns for 32-bit sums");
        assert_eq!(x.len(), out.len() * cols, "activations do not match the tiles");
        assert_eq!(x_sums.len(), out.len(), "one sum of activations a token");
        for (acc, x_sum) in out.iter_mut().zip(x_sums) {
            *acc = [-x_sum; ROWS]; // codes are weight + 1: take Σx away once
        }
        let accumulate = match format {
            TileFormat::TwoBit => self.accumulate,
            TileFormat::Trits => self.accumulate_trits,
        };
        // SAFETY: `self` came from `available`, which checked the processor; the lengths are checked above.
        unsafe { accumulate(tiles, x, out) }
    }

    /// One row of activations to int8: `a = 127 / max(max|x|, 1e-5)` and `codes[i] = round(x[i] · a)`, a half going to
    /// the even neighbour, or upwards (`floor(y + 0.5)`) if `half_up`. Codes behind the row are set to 0.
    /// Returns `a` and `Σ codes`.
    ///
    /// A row that holds NaN or an infinity has no codes: they are 0 and `a` is NaN, so that what is computed from them
    /// is NaN as well.
    ///
    /// # Panics
    /// If there are fewer codes than values.
    pub fn quantize_row(&self, x: &[f32], half_up: bool, codes: &mut [i8]) -> (f32, i32) {
        assert!(codes.len() >= x.len(), "{} codes for {} values", codes.len(), x.len());
        // SAFETY: `self` came from `available`, which checked the processor.
        unsafe { (self.routines.quantize_row)(x, half_up, codes) }
    }

    /// `y[i · y_stride + j] = Σ x[i][·] · w[j][·]`: x times the transpose of w.
    ///
    /// # Panics
    /// If `x` and `w` differ in columns or `y` cannot hold the result.
    pub fn matmul_nt(
        &self,
        x: Matrix<'_, f32>,
        w: DenseWeights<'_>,
        y: &mut [f32],
        y_stride: usize,
    ) {
        assert_eq!(x.cols(), w.cols(), "inner dimensions of a product");
        assert!(dense::fits(y.len(), x.rows(), w.rows(), y_stride), "product outside its slice");
        // SAFETY: `self` came from `available`, which checked the processor.
        unsafe { (self.routines.matmul_nt)(x, w, y, y_stride) }
    }

    /// `Σ x`.
    pub fn sum(&self, x: &[f32]) -> f32 {
        // SAFETY: `self` came from `available`, which checked the processor.
        unsafe { (self.routines.sum)(x) }
    }

    /// `Σ x²`.
    pub fn sum_squares(&self, x: &[f32]) -> f32 {
        // SAFETY: `self` came from `available`, which checked the processor.
        unsafe { (self.routines.sum_squares)(x) }
    }

    /// The largest value, passing over NaN; −∞ if there is none.
    pub fn max(&self, x: &[f32]) -> f32 {
        // SAFETY: `self` came from `available`, which checked the processor.
        unsafe { (self.routines.max)(x) }
    }

    /// How many rows and columns the panels of [`multiply_panels`](Self::multiply_panels) have.
    pub fn panel_widths(&self) -> PanelWidths {
        self.routines.panel_widths
    }

    /// `out[i · cols + j] = scale · Σ_d a[d][i] · b[d][j]`, or that added to what is there: the product of a panel's rows
    /// and a panel's columns, [so many](Self::panel_widths) at a time. All values of one depth of a panel are neighbours,
    /// depth after depth, panel after panel, but for a left factor of [`Order::Rows`]; the last panels are padded with
    /// anything.
    ///
    /// # Panics
    /// If the depth is 0, or beyond [`PANEL_DEPTH`] with [`Order::Rows`], the panels hold less, or `out` is not of `rows` by `cols`.
    pub fn multiply_panels(&self, a: &[f32], b: &[f32], product: PanelProduct, out: &mut [f32]) {
        assert!(self.panel_widths().hold((a.len(), b.len()), product), "panels of another shape");
        assert_eq!(out.len(), product.rows * product.cols, "product outside its slice");
        // SAFETY: `self` came from `available`, which checked the processor.
        unsafe { (self.routines.multiply_panels)(a, b, product, out) }
    }

    /// `out[r][d] = Σⱼ p[r][j] · v[j][d]`, fused, in the order of `j`: p times v.
    ///
    /// # Panics
    /// If `p` has not one column a row of `v`, or `out` not one value a row of `p` and column of `v`.
    pub fn weighted_sums(&self, p: Matrix<'_, f32>, v: DenseWeights<'_>, out: &mut [f32]) {
        assert_eq!(p.cols(), v.rows(), "inner dimensions of a product");
        assert_eq!(out.len(), p.rows() * v.cols(), "product outside its slice");
        // SAFETY: `self` came from `available`, which checked the processor.
        unsafe { (self.routines.weighted_sums)(p, v, out) }
    }

    /// `y[d] = a · x[d] + y[d]`, fused.
    ///
    /// # Panics
    /// If `x` and `y` differ in length.
    pub fn axpy(&self, a: f32, x: &[f32], y: &mut [f32]) {
        assert_eq!(x.len(), y.len(), "vectors of different length");
        // SAFETY: `self` came from `available`, which checked the processor.
        unsafe { (self.routines.axpy)(a, x, y) }
    }

    /// `eˣ` in place, off by less than 1.02 units in the last place (3 in 100 values are not the nearest float); 0 below
    /// −104, ∞ above 88.73.
    pub fn exp(&self, x: &mut [f32]) {
        // SAFETY: `self` came from `available`, which checked the processor.
        unsafe { (self.routines.exp)(x) }
    }

    /// `exp(s − max) / Σ exp(s − max)` in place. A score of −∞ becomes 0; if all are −∞, or one is NaN or ∞, the result
    /// is NaN.
    pub fn softmax(&self, scores: &mut [f32]) {
        // SAFETY: `self` came from `available`, which checked the processor.
        unsafe { (self.routines.softmax)(scores) }
    }
}

/// Products of panels of bfloat16, where the processor has instructions for them.
#[derive(Clone, Copy, Debug)]
pub struct Bf16Panels(());

impl Bf16Panels {
    /// The proof that the processor can, or nothing.
    pub fn new() -> Option<Self> {
        #[cfg(target_arch = "x86_64")]
        return avx512bf16::is_available().then_some(Self(()));
        #[cfg(not(target_arch = "x86_64"))]
        None
    }

    /// How many rows and columns a panel has.
    pub fn widths(self) -> PanelWidths {
        #[cfg(target_arch = "x86_64")]
        return avx512bf16::WIDTHS;
        #[cfg(not(target_arch = "x86_64"))]
        unreachable!("there is no value of this type")
    }

    /// As [`Kernel::multiply_panels`], of pairs of bfloat16 at neighbouring depths, the lower depth in the lower half;
    /// `product.depth` counts pairs. Denormals count as zero.
    ///
    /// # Panics
    /// As there.
    pub fn multiply(self, a: &[u32], b: &[u32], product: PanelProduct, out: &mut [f32]) {
        assert!(self.widths().hold((a.len(), b.len()), product), "panels of another shape");
        assert_eq!(out.len(), product.rows * product.cols, "product outside its slice");
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `new` checked the processor.
        unsafe {
            avx512bf16::multiply(a, b, product, out)
        }
    }
}
