//! `TernaryWeight`: one ternary matrix in memory, and the only owner of packed data.
//!
//! Files keep the Hub's order; here the codes lie in [`Tile`]s, made once at load, in the order in
//! which the kernels read them: all tiles of sixteen output rows, then the next sixteen. Shapes that
//! are not multiples of the tile are padded with code 1 (weight 0), here and nowhere else.

use std::{io, ops::Deref};

use rayon::prelude::*;

#[cfg(feature = "cuda")]
use crate::cuda::resident::{Resident, StackCopy};
use crate::{
    activations::QuantizedActivations,
    kernels::{
        self, Kernel, Loop,
        tile::{self, MAX_TILE_COLS, ROWS, Tile, TileFormat},
        vectorized,
    },
    packed::{self, PackedError, PackedSource},
    pages::{Arena, Pages},
    quant::{ActivationCodes, WeightCodes, WeightQuantizer},
    threads::{self, Unwritten},
};

/// A ternary matrix (out_features, in_features): codes in the tiles of a [`TileFormat`], and one scale.
#[derive(Debug)]
pub struct TernaryWeight {
    /// Row of tiles after row of tiles.
    tiles: Tiles,
    format: TileFormat,
    out_features: usize,
    in_features: usize,
    /// Multiplies: `W = scale · code − scale`.
    scale: f32,
    /// Of the stack that this matrix begins.
    #[cfg(feature = "cuda")]
    resident: Resident<StackCopy>,
}

/// Tiles by themselves, or beside others in large pages.
#[derive(Debug)]
enum Tiles {
    Heap(Vec<Tile>),
    Paged(Pages),
}

impl Deref for Tiles {
    type Target = [Tile];

    fn deref(&self) -> &[Tile] {
        match self {
            Self::Heap(tiles) => tiles,
            Self::Paged(bytes) => bytes.as_chunks().0,
        }
    }
}

/// The same matrix: shape, codes and scale.
impl PartialEq for TernaryWeight {
    fn eq(&self, other: &Self) -> bool {
        self.has_codes_of(other) && self.scale == other.scale
    }
}

impl TernaryWeight {
    /// Quantizes float weights (out_features, in_features); a [`Rounding`](crate::quant::Rounding) stands for ternary by
    /// absolute mean.
    ///
    /// # Panics
    /// If `weights` does not have `out_features · in_features` elements.
    pub fn from_latent(
        weights: &[f32],
        (out_features, in_features): (usize, usize),
        quantizer: impl Into<WeightQuantizer>,
        format: TileFormat,
    ) -> Self {
        Self::from_codes(
            weights,
            (out_features, in_features),
            quantizer.into().codes(weights),
            format,
        )
    }

    /// As [`from_latent`](Self::from_latent), by the codes that `rule` gives.
    ///
    /// # Panics
    /// As there.
    pub fn from_codes(
        weights: &[f32],
        (out_features, in_features): (usize, usize),
        rule: WeightCodes,
        format: TileFormat,
    ) -> Self {
        assert_eq!(weights.len(), out_features * in_features, "shape does not match the data");
        Self::from_rows((out_features, in_features), rule.scale, format, |format, row, col| {
            let weights = &weights[row * in_features..][..in_features][col..];
            let mut codes = [1; MAX_TILE_COLS];
            for (code, &weight) in codes.iter_mut().zip(weights) {
                *code = (rule.code(weight) + 1) as u8;
            }
            format.pack_row(&codes[..format.cols()])
        })
    }

    /// Reads the Hub's packing: byte (r, c) holds rows r, R + r, 2R + r, 3R + r of column c, low
    /// bits first, R = out_features / 4.
    ///
    /// # Errors
    /// A wrong length, rows not divisible by four, or a code 3.
    pub fn from_packed(
        bytes: &[u8],
        (out_features, in_features): (usize, usize),
        scale: f32,
        format: TileFormat,
    ) -> Result<Self, PackedError> {
        packed::check_len(out_features, in_features, bytes.len())?;
        if packed::has_whole_bands(out_features, in_features) {
            let format = format.for_cols(in_features);
            let width = in_features.div_ceil(format.cols());
            let mut tiles = vec![format.empty(); out_features / ROWS * width];
            packed::fill_tiles(format, (out_features, in_features), &mut tiles, |offset, out| {
                out.copy_from_slice(&bytes[offset..][..out.len()]);
                Ok(())
            })?;
            return Ok(Self::of(Tiles::Heap(tiles), format, (out_features, in_features), scale));
        }
        let quarter = out_features / 4;
        packed::check_codes(bytes, in_features, |field, row| field * quarter + row)?;
        Ok(Self::from_rows((out_features, in_features), scale, format, |format, row, col| {
            let field = row / quarter;
            let bytes = &bytes[row % quarter * in_features..][..in_features][col..];
            match bytes.get(..format.cols()) {
                Some(bytes) => format.pack_field(bytes, field),
                None => {
                    let mut padded = [tile::PACKED_ZEROS; MAX_TILE_COLS];
                    padded[..bytes.len()].copy_from_slice(bytes);
                    format.pack_field(&padded[..format.cols()], field)
                }
            }
        }))
    }

    /// As [`from_packed`](Self::from_packed), of the matrix `name` of `source`, into large pages beside others of `arena`.
    ///
    /// # Errors
    /// As there; bytes that cannot be read, or no memory.
    pub fn read_packed(
        (source, name): (&dyn PackedSource, &str),
        (out_features, in_features): (usize, usize),
        scale: f32,
        format: TileFormat,
        arena: &Arena,
    ) -> Result<Self, PackedError> {
        let len = packed::check_len(out_features, in_features, source.packed_len(name)?)?;
        if !packed::has_whole_bands(out_features, in_features) {
            let mut bytes = vec![0; len];
            source.read_packed(name, 0, &mut bytes)?;
            let weight = Self::from_packed(&bytes, (out_features, in_features), scale, format)?;
            return weight.into_pages(arena).map_err(no_memory);
        }
        let format = format.for_cols(in_features);
        let bytes = Self::size((out_features, in_features), format);
        let mut pages = arena.zeroed(bytes).map_err(no_memory)?;
        let read = |offset, out: &mut [u8]| source.read_packed(name, offset, out);
        packed::fill_tiles(format, (out_features, in_features), pages.as_chunks_mut().0, read)?;
        Ok(Self::of(Tiles::Paged(pages), format, (out_features, in_features), scale))
    }

    /// `row_bytes(format, row, col)` gives a tile's row, the codes of `weight[row][col..]`.
    fn from_rows(
        (out_features, in_features): (usize, usize),
        scale: f32,
        format: TileFormat,
        row_bytes: impl Fn(TileFormat, usize, usize) -> [u8; 4] + Send + Sync,
    ) -> Self {
        let format = format.for_cols(in_features);
        let width = in_features.div_ceil(format.cols());
        let mut tiles = vec![format.empty(); out_features.div_ceil(ROWS) * width];
        threads::for_each_chunk(&mut tiles, width.max(1), |band, tiles| {
            for row in 0..ROWS.min(out_features - band * ROWS) {
                for (i, tile) in tiles.iter_mut().enumerate() {
                    let bytes = row_bytes(format, band * ROWS + row, i * format.cols());
                    tile::set_row(tile, row, bytes);
                }
            }
        });
        Self::of(Tiles::Heap(tiles), format, (out_features, in_features), scale)
    }

    fn of(
        tiles: Tiles,
        format: TileFormat,
        (out_features, in_features): (usize, usize),
        scale: f32,
    ) -> Self {
        Self {
            tiles,
            format,
            out_features,
            in_features,
            scale,
            #[cfg(feature = "cuda")]
            resident: Default::default(),
        }
    }

    /// The same matrix in large pages, beside others of `arena`.
    ///
    /// # Errors
    /// The system has no more memory.
    pub fn into_pages(self, arena: &Arena) -> io::Result<Self> {
        let mut pages = arena.zeroed(self.bytes())?;
        pages
            .par_chunks_mut(1 << 20)
            .zip(self.tiles.as_flattened().par_chunks(1 << 20))
            .for_each(|(pages, tiles)| pages.copy_from_slice(tiles));
        Ok(Self { tiles: Tiles::Paged(pages), ..self })
    }

    /// The Hub's packing of the codes: (out_features / 4, in_features) bytes, row-major.
    ///
    /// # Errors
    /// Rows not divisible by four.
    pub fn to_packed(&self) -> Result<Vec<u8>, PackedError> {
        if !self.out_features.is_multiple_of(4) {
            return Err(PackedError::Rows { out_features: self.out_features });
        }
        let quarter = self.out_features / 4;
        let mut bytes = vec![0u8; quarter * self.in_features];
        bytes.par_chunks_mut(self.in_features.max(1)).enumerate().for_each(|(r, bytes)| {
            for field in 0..4 {
                let row = field * quarter + r;
                let tiles = self.band(row / ROWS);
                for (bytes, tile) in bytes.chunks_mut(self.format.cols()).zip(tiles) {
                    let codes = self.format.row(tile, row % ROWS);
                    bytes.iter_mut().zip(codes).for_each(|(byte, c)| *byte |= c << (2 * field));
                }
            }
        });
        Ok(bytes)
    }

    /// The code, weight + 1, at (row, col).
    pub fn code(&self, row: usize, col: usize) -> u8 {
        let cols = self.format.cols();
        self.format.code(&self.band(row / ROWS)[col / cols], row % ROWS, col % cols)
    }

    /// Whether all codes are those of `other`; the scales may differ.
    pub fn has_codes_of(&self, other: &Self) -> bool {
        let shape = |weight: &Self| (weight.out_features, weight.in_features);
        let codes = |row: usize| {
            (0..self.in_features).all(|col| self.code(row, col) == other.code(row, col))
        };
        shape(self) == shape(other)
            && match self.format == other.format {
                true => *self.tiles == *other.tiles,
                false => (0..self.out_features).all(codes),
            }
    }

    /// How the tiles hold codes.
    pub fn format(&self) -> TileFormat {
        self.format
    }

    /// The tiles of output rows `16·index ..`.
    pub(crate) fn band(&self, index: usize) -> &[Tile] {
        let width = self.in_features.div_ceil(self.format.cols());
        &self.tiles[index * width..][..width]
    }

    /// Rows of the matrix.
    pub fn out_features(&self) -> usize {
        self.out_features
    }

    /// Columns of the matrix.
    pub fn in_features(&self) -> usize {
        self.in_features
    }

    /// The absmean scale; it multiplies.
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// The copy of the stack that this matrix begins on a device.
    #[cfg(feature = "cuda")]
    pub(crate) fn resident(&self) -> &Resident<StackCopy> {
        &self.resident
    }

    /// The bytes that a matrix (out_features, in_features) takes in `format`.
    pub fn size((out_features, in_features): (usize, usize), format: TileFormat) -> usize {
        let cols = format.for_cols(in_features).cols();
        out_features.div_ceil(ROWS) * in_features.div_ceil(cols) * size_of::<Tile>()
    }

    /// Bytes at rest.
    pub fn bytes(&self) -> usize {
        self.tiles.len() * size_of::<Tile>()
    }

    /// The weights `scale · (code − 1)` as f32 (out_features, in_features), for gradients and export.
    pub fn dequantize(&self) -> Vec<f32> {
        let mut weights = vec![0f32; self.out_features * self.in_features];
        let band_elements = (ROWS * self.in_features).max(1);
        weights.par_chunks_mut(band_elements).enumerate().for_each(|(band, out)| {
            self.decode_band(band, out);
        });
        weights
    }

    /// `out[row][col] = weight · scale` for up to sixteen rows.
    pub(crate) fn decode_band(&self, band: usize, out: &mut [f32]) {
        let cols = self.format.cols();
        let mut block = [[0f32; MAX_TILE_COLS]; ROWS];
        for (i, tile) in self.band(band).iter().enumerate() {
            self.format.decode(tile, &mut block);
            let width = cols.min(self.in_features - i * cols);
            for (out, block) in out.chunks_mut(self.in_features).zip(&block) {
                for (out, weight) in out[i * cols..][..width].iter_mut().zip(block) {
                    *out = weight * self.scale;
                }
            }
        }
    }
}

fn no_memory(error: io::Error) -> PackedError {
    candle_core::Error::wrap(error).into()
}

/// `y = x·Wᵀ` (tokens, Σ out_features) with the kernel given, for matrices of the same inputs stacked on one another:
/// `y[token][row] = weight_scale / a[token] · Σ`. The integer sum is exact, so every kernel gives the same bits.
pub(crate) fn matmul(
    kernel: &Kernel,
    x: &QuantizedActivations,
    weights: &[TernaryWeight],
) -> Vec<f32> {
    let (cuts, parts) = cut(weights, x.tokens());
    threads::written_blocks(x.tokens(), TOKEN_BLOCK, &cuts, |(first, j), y| {
        let (weight, first_band) = parts[j];
        let tokens = first..first + y.rows();
        let mut sums = [[0i32; ROWS]; TOKEN_BLOCK];
        let mut scales = [0f32; TOKEN_BLOCK];
        let (sums, scales) = (&mut sums[..tokens.len()], &mut scales[..tokens.len()]);
        for (scale, factor) in scales.iter_mut().zip(&x.factors()[tokens.clone()]) {
            *scale = weight.scale / factor;
        }
        let (x, x_sums) = (x.rows(&tokens), &x.sums()[tokens]);
        for row in (0..cuts[j + 1] - cuts[j]).step_by(ROWS) {
            let tiles = weight.band(first_band + row / ROWS);
            kernel.ternary_dots(weight.format, tiles, x, x_sums, sums);
            let rows = ROWS.min(cuts[j + 1] - cuts[j] - row);
            vectorized(Rescale { sums, scales, rows, y });
        }
    })
}

/// The next columns of `y`, `rows` of them, from the sums of each token.
struct Rescale<'a, 'b> {
    sums: &'a [[i32; ROWS]],
    scales: &'a [f32],
    rows: usize,
    y: &'a mut Unwritten<'b, f32>,
}

impl Loop for Rescale<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for (token, (sums, scale)) in self.sums.iter().zip(self.scales).enumerate() {
            self.y.extend(token, &sums[..self.rows], |sum| *sum as f32 * scale);
        }
    }
}

/// Cuts stacked matrices into tasks: the columns of `y` at which they begin, and the matrix and first band of each.
fn cut(weights: &[TernaryWeight], tokens: usize) -> (Vec<usize>, Vec<(&TernaryWeight, usize)>) {
    let (mut cuts, mut parts, mut end) = (vec![0], Vec::new(), 0);
    let codes = |weight: &TernaryWeight| weight.out_features * weight.in_features;
    let mut left: usize = weights.iter().map(codes).sum();
    for weight in weights {
        let (bands, band_codes) = (weight.out_features.div_ceil(ROWS), ROWS * weight.in_features);
        let mut first = 0;
        while first < bands {
            parts.push((weight, first));
            // What is left of the matrix, in equal tasks.
            let tasks = ((bands - first) * band_codes).div_ceil(codes_of_a_task(left, tokens));
            let step = (bands - first).div_ceil(tasks.max(1));
            left = left.saturating_sub(step * band_codes);
            first += step;
            cuts.push(end + weight.out_features.min(first * ROWS));
        }
        end += weight.out_features;
    }
    (cuts, parts)
}

/// Codes for the next task, of `left` that have none yet.
fn codes_of_a_task(left: usize, tokens: usize) -> usize {
    /// Products that take some microseconds, beside which handing out a task costs nothing.
    const PRODUCTS: usize = 1 << 19;
    /// 128 KiB of tiles, which stay in the second-level cache while the tokens pass.
    const CACHED: usize = 1 << 19;
    /// A thread's tasks, if all were as large as its first. Memory is fastest when it is read in long runs, and threads finish
    /// together when the last tasks are short.
    const TASKS: usize = 2;
    match tokens <= TOKEN_BLOCK {
        true => (left / (threads::count() * TASKS)).max(PRODUCTS / tokens.max(1)),
        false => CACHED,
    }
}

/// Tokens that pass over a band of tiles together.
const TOKEN_BLOCK: usize = 64;

/// Quantizes `x` (tokens, in_features) and multiplies it by matrices of `in_features` columns each, stacked on one
/// another and of one format, with the kernel chosen for this machine: (tokens, Σ out_features).
pub fn ternary_product(
    x: &[f32],
    weights: &[TernaryWeight],
    quantizer: impl Into<ActivationCodes>,
) -> Vec<f32> {
    let (in_features, format) =
        weights.first().map_or_else(Default::default, |weight| (weight.in_features, weight.format));
    let x = QuantizedActivations::new(x, in_features, quantizer, format);
    matmul(kernels::active(), &x, weights)
}

impl TernaryWeight {
    /// `x`, quantized for weights of this format, times the transpose of this matrix: (tokens, out_features).
    ///
    /// # Panics
    /// If `x` has not as many columns as the matrix in its format.
    pub fn product(&self, x: &QuantizedActivations) -> Vec<f32> {
        matmul(kernels::active(), x, std::slice::from_ref(self))
    }
}
