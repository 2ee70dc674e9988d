//! `TernaryWeight`: one ternary matrix in memory, and the only owner of packed data.
//!
//! Files keep the Hub's order; here the codes lie in [`Tile`]s, made once at load, in the order in
//! which the kernels read them: all tiles of sixteen output rows, then the next sixteen. Shapes that
//! are not multiples of the tile are padded with code 1 (weight 0), here and nowhere else.

use std::{io, ops::Deref};

use rayon::prelude::*;

use crate::{
    kernels::{
        self, Kernel,
        tile::{self, COLS, ROWS, Tile},
    },
    packed::{self, PackedError, PackedSource},
    pages::{Arena, Pages},
    quant::{self, Rounding},
    threads,
};

/// A ternary matrix (out_features, in_features): 2 bits a weight and one scale.
#[derive(Debug)]
pub struct TernaryWeight {
    /// Row of tiles after row of tiles.
    tiles: Tiles,
    out_features: usize,
    in_features: usize,
    /// Multiplies: `W = scale · code − scale`.
    scale: f32,
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
    /// Ternarizes float weights (out_features, in_features) by absolute mean
    /// ([`quant`]).
    ///
    /// # Panics
    /// If `weights` does not have `out_features · in_features` elements.
    pub fn from_latent(
        weights: &[f32],
        out_features: usize,
        in_features: usize,
        rounding: Rounding,
    ) -> Self {
        assert_eq!(weights.len(), out_features * in_features, "shape does not match the data");
        let scale = quant::weight_scale(weights);
        let inverse = 1. / scale;
        Self::from_rows(out_features, in_features, scale, |row, col| {
            let weights = &weights[row * in_features..][..in_features][col..];
            let mut codes = [1; COLS];
            for (code, &weight) in codes.iter_mut().zip(weights) {
                *code = (quant::ternary(weight, inverse, rounding) + 1) as u8;
            }
            tile::row_of(&codes)
        })
    }

    /// Reads the Hub's packing: byte (r, c) holds rows r, R + r, 2R + r, 3R + r of column c, low
    /// bits first, R = out_features / 4.
    ///
    /// # Errors
    /// A wrong length, rows not divisible by four, or a code 3.
    pub fn from_packed(
        bytes: &[u8],
        out_features: usize,
        in_features: usize,
        scale: f32,
    ) -> Result<Self, PackedError> {
        packed::check_len(out_features, in_features, bytes.len())?;
        if packed::has_whole_bands(out_features, in_features) {
            let mut tiles = vec![tile::EMPTY; out_features / ROWS * in_features.div_ceil(COLS)];
            packed::fill_tiles((out_features, in_features), &mut tiles, |offset, out| {
                out.copy_from_slice(&bytes[offset..][..out.len()]);
                Ok(())
            })?;
            return Ok(Self { tiles: Tiles::Heap(tiles), out_features, in_features, scale });
        }
        let quarter = out_features / 4;
        packed::check_codes(bytes, in_features, |field, row| field * quarter + row)?;
        Ok(Self::from_rows(out_features, in_features, scale, |row, col| {
            let field = row / quarter;
            let bytes = &bytes[row % quarter * in_features..][..in_features][col..];
            match bytes.first_chunk() {
                Some(bytes) => tile::packed_row(bytes, field),
                None => {
                    let mut padded = [tile::PACKED_ZEROS; COLS];
                    padded[..bytes.len()].copy_from_slice(bytes);
                    tile::packed_row(&padded, field)
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
        arena: &Arena,
    ) -> Result<Self, PackedError> {
        let len = packed::check_len(out_features, in_features, source.packed_len(name)?)?;
        if !packed::has_whole_bands(out_features, in_features) {
            let mut bytes = vec![0; len];
            source.read_packed(name, 0, &mut bytes)?;
            let weight = Self::from_packed(&bytes, out_features, in_features, scale)?;
            return weight.into_pages(arena).map_err(no_memory);
        }
        let tiles = out_features / ROWS * in_features.div_ceil(COLS);
        let mut pages = arena.zeroed(tiles * size_of::<Tile>()).map_err(no_memory)?;
        let read = |offset, out: &mut [u8]| source.read_packed(name, offset, out);
        packed::fill_tiles((out_features, in_features), pages.as_chunks_mut().0, read)?;
        Ok(Self { tiles: Tiles::Paged(pages), out_features, in_features, scale })
    }

    /// `row_codes(row, col)` gives the codes of `weight[row][col..]`, a tile's row.
    fn from_rows(
        out_features: usize,
        in_features: usize,
        scale: f32,
        row_codes: impl Fn(usize, usize) -> [u8; 4] + Send + Sync,
    ) -> Self {
        let width = in_features.div_ceil(COLS);
        let mut tiles = vec![tile::EMPTY; out_features.div_ceil(ROWS) * width];
        tiles.par_chunks_mut(width.max(1)).enumerate().for_each(|(band, tiles)| {
            for row in 0..ROWS.min(out_features - band * ROWS) {
                for (i, tile) in tiles.iter_mut().enumerate() {
                    tile::set_row(tile, row, row_codes(band * ROWS + row, i * COLS));
                }
            }
        });
        Self { tiles: Tiles::Heap(tiles), out_features, in_features, scale }
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
                for (bytes, tile) in bytes.chunks_mut(COLS).zip(tiles) {
                    let codes = tile::row(tile, row % ROWS);
                    bytes.iter_mut().zip(codes).for_each(|(byte, c)| *byte |= c << (2 * field));
                }
            }
        });
        Ok(bytes)
    }

    /// The code, weight + 1, at (row, col).
    pub fn code(&self, row: usize, col: usize) -> u8 {
        let tile = &self.band(row / ROWS)[col / COLS];
        tile::code(tile, row % ROWS, col % COLS)
    }

    /// Whether all codes are those of `other`; the scales may differ.
    pub fn has_codes_of(&self, other: &Self) -> bool {
        let shape = |weight: &Self| (weight.out_features, weight.in_features);
        shape(self) == shape(other) && *self.tiles == *other.tiles
    }

    /// The tiles of output rows `16·index ..`.
    fn band(&self, index: usize) -> &[Tile] {
        let width = self.in_features.div_ceil(COLS);
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
        let mut block = [[0f32; COLS]; ROWS];
        for (i, tile) in self.band(band).iter().enumerate() {
            tile::decode(tile, &mut block);
            let width = COLS.min(self.in_features - i * COLS);
            for (out, block) in out.chunks_mut(self.in_features).zip(&block) {
                for (out, weight) in out[i * COLS..][..width].iter_mut().zip(block) {
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
pub(crate) fn matmul(kernel: &Kernel, x: &QuantizedRows, weights: &[TernaryWeight], y: &mut [f32]) {
    let (cuts, parts) = cut(weights, x.tokens());
    threads::for_each_block(y, TOKEN_BLOCK, &cuts, |(first, j), mut y| {
        let (weight, first_band) = parts[j];
        let tokens = first..first + y.rows();
        let mut sums = [[0i32; ROWS]; TOKEN_BLOCK];
        let mut scales = [0f32; TOKEN_BLOCK];
        let (sums, scales) = (&mut sums[..tokens.len()], &mut scales[..tokens.len()]);
        for (scale, factor) in scales.iter_mut().zip(&x.factors[tokens.clone()]) {
            *scale = weight.scale / factor;
        }
        for band in 0..(cuts[j + 1] - cuts[j]).div_ceil(ROWS) {
            let tiles = weight.band(first_band + band);
            kernel.ternary_dots(tiles, x.rows(&tokens), &x.sums[tokens.clone()], sums);
            for (token, (sums, scale)) in sums.iter().zip(scales.iter()).enumerate() {
                let y = y.row(token)[band * ROWS..].iter_mut();
                y.zip(sums).for_each(|(y, sum)| *y = *sum as f32 * scale);
            }
        }
    });
}

/// Cuts stacked matrices into tasks: the columns of `y` at which they begin, and the matrix and first band of each.
fn cut(weights: &[TernaryWeight], tokens: usize) -> (Vec<usize>, Vec<(&TernaryWeight, usize)>) {
    let (mut cuts, mut parts, mut end) = (vec![0], Vec::new(), 0);
    for weight in weights {
        let bands = bands_of_a_task(weight.in_features, tokens);
        for first in (0..weight.out_features.div_ceil(ROWS)).step_by(bands) {
            parts.push((weight, first));
            cuts.push(end + weight.out_features.min((first + bands) * ROWS));
        }
        end += weight.out_features;
    }
    (cuts, parts)
}

/// Bands of tiles for one task: enough that handing it out costs nothing, few enough that all threads finish together
/// and that the tiles stay in the second-level cache while the tokens pass.
fn bands_of_a_task(in_features: usize, tokens: usize) -> usize {
    /// Products of a task: 2 µs and more.
    const PRODUCTS: usize = 1 << 19;
    /// Codes of a task: 128 KiB of tiles.
    const CODES: usize = 1 << 19;
    let codes = (ROWS * in_features).max(1);
    let bands = PRODUCTS.div_ceil(codes * tokens.clamp(1, TOKEN_BLOCK));
    bands.max(if tokens > TOKEN_BLOCK { CODES / codes } else { 1 })
}

/// Tokens that pass over a band of tiles together.
const TOKEN_BLOCK: usize = 64;

/// Rows of activations as int8 codes, each with its sum and its factor `a`.
pub(crate) struct QuantizedRows {
    /// (tokens, columns padded to whole tiles); the padding is 0.
    codes: Vec<i8>,
    /// Σ codes of each row.
    sums: Vec<i32>,
    /// `a` of each row: a code is `round(x · a)`.
    factors: Vec<f32>,
    padded: usize,
}

impl QuantizedRows {
    /// Quantizes rows of `in_features` values.
    pub(crate) fn new(kernel: &Kernel, x: &[f32], in_features: usize, rounding: Rounding) -> Self {
        let tokens = x.len().checked_div(in_features).unwrap_or(0);
        let padded = in_features.next_multiple_of(COLS);
        let mut codes = vec![0i8; tokens * padded];
        let mut rows = vec![(0f32, 0i32); tokens];
        let block = match tokens {
            0..8 => tokens.max(1), // a few microseconds
            _ => 4,
        };
        let half_up = rounding == Rounding::HalfUp;
        let pair = ((&mut codes[..], (block * padded).max(1)), (&mut rows[..], block));
        threads::for_each_chunk_pair(pair.0, pair.1, |index, codes, rows| {
            let x = x[index * block * in_features..].chunks(in_features.max(1));
            for ((codes, row), x) in codes.chunks_mut(padded.max(1)).zip(rows).zip(x) {
                *row = kernel.quantize_row(x, half_up, codes);
            }
        });
        let (factors, sums) = rows.into_iter().unzip();
        Self { codes, sums, factors, padded }
    }

    fn tokens(&self) -> usize {
        self.sums.len()
    }

    fn rows(&self, tokens: &std::ops::Range<usize>) -> &[i8] {
        &self.codes[tokens.start * self.padded..tokens.end * self.padded]
    }
}

/// `x` (tokens, in_features) as the product sees it, `code / a`: what
/// [`quant::fake_quantize_activation`] defines, with the kernel chosen for this machine.
pub fn quantized_activations(x: &[f32], in_features: usize, rounding: Rounding) -> Vec<f32> {
    let kernel = kernels::active();
    let mut y = vec![0f32; x.len()];
    let rows = x.par_chunks(in_features.max(1)).zip(y.par_chunks_mut(in_features.max(1)));
    rows.for_each_init(
        || vec![0i8; in_features],
        |codes, (x, y)| {
            let (factor, _) = kernel.quantize_row(x, rounding == Rounding::HalfUp, codes);
            y.iter_mut().zip(codes.iter()).for_each(|(y, &code)| *y = f32::from(code) / factor);
        },
    );
    y
}

/// Quantizes `x` (tokens, in_features) and multiplies it by matrices of `in_features` columns each, stacked on one another,
/// with the kernel chosen for this machine: (tokens, Σ out_features).
pub fn ternary_product(x: &[f32], weights: &[TernaryWeight], rounding: Rounding) -> Vec<f32> {
    let kernel = kernels::active();
    let in_features = weights.first().map_or(0, |weight| weight.in_features);
    let x = QuantizedRows::new(kernel, x, in_features, rounding);
    let out_features: usize = weights.iter().map(|weight| weight.out_features).sum();
    let mut y = vec![0f32; x.tokens() * out_features];
    matmul(kernel, &x, weights, &mut y);
    y
}
