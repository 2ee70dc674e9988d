//! Ternary weights in the order in which a warp reads them: `ternary.cuh` describes it.
//!
//! The words are those of the CPU's tiles of two-bit codes, sixteen columns of a row each; only their order is another.

use std::iter;

use crate::{
    kernels::tile::{ROWS, Tile, TileFormat},
    threads,
    weights::TernaryWeight,
};

/// Columns of a chunk: of a band of sixteen rows, one 16-byte load of a warp.
pub const CHUNK: usize = 128;
/// Columns of a word.
const WORD: usize = 16;
/// Words of a chunk of a band.
const CHUNK_WORDS: usize = ROWS * CHUNK / WORD;

/// A band of sixteen rows of a [`Stack`].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Band {
    /// Of its matrix; multiplies.
    pub scale: f32,
    /// Column of its first row in the product with the whole stack.
    pub first: u32,
    /// Rows that are not padding.
    pub rows: u32,
}

/// Matrices with the same inputs in the device's order, each padded to whole bands and all to whole chunks.
#[derive(Debug)]
pub struct Stack {
    /// (bands, chunks, 32 lanes, 4).
    pub words: Vec<u32>,
    /// Of all matrices, in order.
    pub bands: Vec<Band>,
    /// Chunks of a row.
    pub chunks: usize,
}

impl Stack {
    /// Brings matrices with the same number of columns into the device's order.
    pub fn new(weights: &[TernaryWeight]) -> Self {
        let cols = weights.first().map_or(0, TernaryWeight::in_features);
        let chunks = cols.div_ceil(CHUNK);
        let (mut bands, mut sources, mut first) = (Vec::new(), Vec::new(), 0);
        for weight in weights {
            for band in 0..bands_of(weight) {
                let rows = ROWS.min(weight.out_features() - band * ROWS);
                let at = first + band * ROWS;
                bands.push(Band { scale: weight.scale(), first: at as u32, rows: rows as u32 });
                sources.push((weight, band));
            }
            first += weight.out_features();
        }
        let size = chunks * CHUNK_WORDS;
        let mut words = vec![0; bands.len() * size];
        threads::for_each_chunk(&mut words, size.max(1), |index, words| {
            let (weight, band) = sources[index];
            fill_band(weight.format(), weight.band(band), words);
        });
        Self { words, bands, chunks }
    }
}

/// Bands of a matrix.
pub fn bands_of(weight: &TernaryWeight) -> usize {
    weight.out_features().div_ceil(ROWS)
}

/// The words of a band, (chunks, 32 lanes, 4), from its tiles.
fn fill_band(format: TileFormat, tiles: &[Tile], out: &mut [u32]) {
    let zeros = u32::from_le_bytes(TileFormat::TwoBit.pack_row(&[1; WORD]));
    for row in 0..ROWS {
        let words = words_of(format, tiles, row);
        let mut words = words.into_iter().chain(iter::repeat(zeros));
        for chunk in out.chunks_mut(CHUNK_WORDS) {
            for (i, word) in words.by_ref().take(CHUNK / WORD).enumerate() {
                // Lane 4·g + t holds rows g and g + 8, words t and t + 4.
                let lane = 4 * (row % 8) + i % 4;
                chunk[4 * lane + 2 * (row / 8) + i / 4] = word;
            }
        }
    }
}

/// The words of a row of a band.
fn words_of(format: TileFormat, tiles: &[Tile], row: usize) -> Vec<u32> {
    match format {
        TileFormat::TwoBit => {
            let words = tiles.iter().map(|tile| u32::from_le_bytes(tile.as_chunks().0[row]));
            words.collect()
        }
        TileFormat::Trits => {
            let codes = tiles.iter().flat_map(|tile| format.row(tile, row));
            let mut codes: Vec<u8> = codes.collect();
            codes.resize(codes.len().next_multiple_of(WORD), 1);
            let words = codes.chunks(WORD).map(|codes| TileFormat::TwoBit.pack_row(codes));
            words.map(u32::from_le_bytes).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::Rounding;

    /// The code of a stack at a row of a band, by the description in `ternary.cuh`.
    fn code(stack: &Stack, band: usize, row: usize, col: usize) -> u32 {
        let (chunk, col) = (col / CHUNK, col % CHUNK);
        let (unit, at) = (col / 16, col % 16);
        let (lane, word) = (4 * (row % 8) + unit % 4, 2 * (row / 8) + unit / 4);
        let word = stack.words[((band * stack.chunks + chunk) * 32 + lane) * 4 + word];
        word >> (8 * (at % 4) + 2 * (at / 4)) & 3
    }

    #[test]
    fn a_stack_holds_the_codes_of_its_matrices_and_padding() {
        for format in TileFormat::ALL {
            for cols in [1, 20, 127, 128, 130, 400] {
                let weights = [3, 16, 37].map(|rows| {
                    let latent = Vec::from_iter((0..rows * cols).map(|i| (i as f32 * 0.7).sin()));
                    TernaryWeight::from_latent(&latent, (rows, cols), Rounding::HalfEven, format)
                });
                let stack = Stack::new(&weights);
                assert_eq!(stack.chunks, cols.div_ceil(CHUNK));
                assert_eq!(stack.bands.iter().map(|band| band.rows).sum::<u32>(), 3 + 16 + 37);
                let (mut index, mut first) = (0, 0);
                for weight in &weights {
                    for band in 0..bands_of(weight) {
                        assert_eq!(stack.bands[index].first as usize, first + band * ROWS);
                        assert_eq!(stack.bands[index].scale, weight.scale());
                        for (row, col) in (0..ROWS)
                            .flat_map(|row| (0..stack.chunks * CHUNK).map(move |col| (row, col)))
                        {
                            let inside = band * ROWS + row < weight.out_features() && col < cols;
                            let expected =
                                if inside { weight.code(band * ROWS + row, col) } else { 1 };
                            let found = code(&stack, index, row, col);
                            assert_eq!(found, u32::from(expected), "{format:?} {band} {row} {col}");
                        }
                        index += 1;
                    }
                    first += weight.out_features();
                }
            }
        }
    }
}
