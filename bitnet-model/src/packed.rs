//! The Hub's packing of ternary matrices, and its way into tiles.
//!
//! Of R = out_features / 4, byte (r, c) holds the codes of column c in rows r, R + r, 2R + r and 3R + r, low bits first.
//! Sixteen rows of bytes are a band of tiles in each quarter of the matrix, so these are read together, into a buffer that
//! the cache holds, and each tile is written once.

use std::fmt::Debug;

use rayon::prelude::*;

use crate::kernels::tile::{self, MAX_TILE_COLS, ROWS, Tile, TileFormat};

/// Where packed matrices are stored.
pub trait PackedSource: Debug + Send + Sync {
    /// Bytes of the matrix `name`.
    ///
    /// # Errors
    /// There is no such tensor of bytes.
    fn packed_len(&self, name: &str) -> candle_core::Result<usize>;

    /// Fills `out` with the bytes of the matrix `name` from `offset` on.
    ///
    /// # Errors
    /// As [`packed_len`](Self::packed_len), and bytes that cannot be read.
    fn read_packed(&self, name: &str, offset: usize, out: &mut [u8]) -> candle_core::Result<()>;
}

/// What is wrong with packed data.
#[derive(Debug, thiserror::Error)]
pub enum PackedError {
    /// The byte count does not belong to the shape.
    #[error(
        "{found} bytes of packed codes, but {out_features} × {in_features} weights take {expected}"
    )]
    Length {
        /// Rows of the matrix.
        out_features: usize,
        /// Columns of the matrix.
        in_features: usize,
        /// `out_features / 4 · in_features`.
        expected: usize,
        /// Bytes given.
        found: usize,
    },
    /// Four rows share a byte.
    #[error("{out_features} output features are not divisible by 4, so they cannot be packed")]
    Rows {
        /// Rows of the matrix.
        out_features: usize,
    },
    /// Codes are 0, 1 and 2.
    #[error("row {row}, column {col} holds code 3, which is no ternary value: the file is damaged")]
    Code {
        /// Output row of the first bad code.
        row: usize,
        /// Input column of the first bad code.
        col: usize,
    },
    /// The bytes cannot be read.
    #[error(transparent)]
    Read(#[from] candle_core::Error),
}

/// Bytes of a packed matrix, which `found` must be.
pub(crate) fn check_len(
    out_features: usize,
    in_features: usize,
    found: usize,
) -> Result<usize, PackedError> {
    if !out_features.is_multiple_of(4) {
        return Err(PackedError::Rows { out_features });
    }
    let expected = out_features / 4 * in_features;
    match found == expected {
        true => Ok(expected),
        false => Err(PackedError::Length { out_features, in_features, expected, found }),
    }
}

/// Whether each quarter of a matrix is whole bands, so that [`fill_tiles`] can make its tiles.
pub(crate) fn has_whole_bands(out_features: usize, in_features: usize) -> bool {
    out_features.is_multiple_of(4 * ROWS) && in_features > 0
}

/// Makes the tiles of a matrix from its packed bytes, which `read` hands out from an offset on.
///
/// # Errors
/// A code 3, or bytes that cannot be read.
///
/// # Panics
/// Unless the matrix has whole bands and these tiles.
pub(crate) fn fill_tiles(
    format: TileFormat,
    (out_features, in_features): (usize, usize),
    tiles: &mut [Tile],
    read: impl Fn(usize, &mut [u8]) -> candle_core::Result<()> + Sync,
) -> Result<(), PackedError> {
    assert!(has_whole_bands(out_features, in_features), "a quarter of {out_features} rows");
    let width = in_features.div_ceil(format.cols());
    assert_eq!(tiles.len(), out_features / ROWS * width, "tiles of the matrix");
    let quarter = out_features / 4;
    let (first, second) = tiles.split_at_mut(tiles.len() / 2);
    let (first, second) =
        (first.split_at_mut(first.len() / 2), second.split_at_mut(second.len() / 2));
    let bands = (
        first.0.par_chunks_exact_mut(width),
        first.1.par_chunks_exact_mut(width),
        second.0.par_chunks_exact_mut(width),
        second.1.par_chunks_exact_mut(width),
    );
    bands.into_par_iter().enumerate().try_for_each_init(
        || vec![0; ROWS * in_features],
        |bytes, (band, bands)| {
            let first_row = band * ROWS;
            read(first_row * in_features, bytes)?;
            if fill_bands(format, bytes, in_features, bands.into()) {
                return Ok(());
            }
            check_codes(bytes, in_features, |field, row| field * quarter + first_row + row)
        },
    )
}

/// Finds a code 3 in rows of bytes; `output_row(field, row)` tells whose code it is.
///
/// # Errors
/// The first.
pub(crate) fn check_codes(
    bytes: &[u8],
    in_features: usize,
    output_row: impl Fn(usize, usize) -> usize,
) -> Result<(), PackedError> {
    let invalid_fields = |byte: u8| byte & (byte >> 1) & 0b01_01_01_01;
    let Some(at) = bytes.iter().position(|&byte| invalid_fields(byte) != 0) else { return Ok(()) };
    let field = invalid_fields(bytes[at]).trailing_zeros() as usize / 2;
    Err(PackedError::Code { row: output_row(field, at / in_features), col: at % in_features })
}

/// Sixteen rows of bytes into a band of each quarter; `false` if there is a code 3 among them.
fn fill_bands(
    format: TileFormat,
    bytes: &[u8],
    in_features: usize,
    mut bands: [&mut [Tile]; 4],
) -> bool {
    let width = format.cols();
    let mut valid = true;
    for index in 0..bands[0].len() {
        let mut block = [[tile::PACKED_ZEROS; MAX_TILE_COLS]; ROWS];
        let cols = width.min(in_features - index * width);
        for (block, row) in block.iter_mut().zip(bytes.chunks_exact(in_features)) {
            // The tile behind is read as well where there is one: a copy of constant length is faster.
            match row[index * width..].first_chunk() {
                Some(row) => *block = *row,
                None => block[..cols].copy_from_slice(&row[index * width..][..cols]),
            }
        }
        let bands = bands.each_mut().map(|band| &mut band[index]);
        valid &= format.unpack(&block, bands);
    }
    valid
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{pages::Arena, weights::TernaryWeight};

    /// One matrix of bytes.
    #[derive(Debug)]
    struct Stored(Vec<u8>);

    impl PackedSource for Stored {
        fn packed_len(&self, _: &str) -> candle_core::Result<usize> {
            Ok(self.0.len())
        }

        fn read_packed(
            &self,
            name: &str,
            offset: usize,
            out: &mut [u8],
        ) -> candle_core::Result<()> {
            if name != "w" {
                candle_core::bail!("there is no `{name}`");
            }
            out.copy_from_slice(&self.0[offset..][..out.len()]);
            Ok(())
        }
    }

    /// Shapes with whole bands, and others.
    const SHAPES: [(usize, usize); 6] =
        [(64, 16), (128, 37), (192, 5), (64, 100), (48, 33), (4, 1)];

    fn cases() -> impl Iterator<Item = (TileFormat, (usize, usize))> {
        TileFormat::ALL.into_iter().flat_map(|format| SHAPES.map(|shape| (format, shape)))
    }

    fn stored((out_features, in_features): (usize, usize)) -> Stored {
        let codes =
            |i: usize| (0..4).fold(0, |byte, field| 4 * byte + (i * 7 + field * 5 + i / 3) % 3);
        Stored((0..out_features / 4 * in_features).map(|i| codes(i) as u8).collect())
    }

    fn read(
        source: &Stored,
        name: &str,
        shape: (usize, usize),
        format: TileFormat,
    ) -> Result<TernaryWeight, PackedError> {
        TernaryWeight::read_packed((source, name), shape, 0.5, format, &Arena::default())
    }

    #[test]
    fn codes_are_those_of_the_bytes() {
        for (format, shape @ (out_features, in_features)) in cases() {
            let source = stored(shape);
            let weight = read(&source, "w", shape, format).unwrap();
            let quarter = out_features / 4;
            for (row, col) in (0..out_features).flat_map(|r| (0..in_features).map(move |c| (r, c)))
            {
                let byte = source.0[row % quarter * in_features + col];
                assert_eq!(weight.code(row, col), byte >> (2 * (row / quarter)) & 3, "{shape:?}");
            }
            assert_eq!(weight.to_packed().unwrap(), source.0);
            assert_eq!(weight.bytes(), TernaryWeight::size(shape, format));
            assert_eq!(weight, TernaryWeight::from_packed(&source.0, shape, 0.5, format).unwrap());
        }
    }

    #[test]
    fn damage_is_found_wherever_it_is() {
        for (format, shape @ (out_features, in_features)) in cases() {
            for at in [0, in_features / 2, out_features / 4 * in_features - 1] {
                let mut source = stored(shape);
                for field in (0..4).rev() {
                    source.0[at] |= 3 << (2 * field);
                    let error = read(&source, "w", shape, format).unwrap_err().to_string();
                    let row = field * (out_features / 4) + at / in_features;
                    let position = format!("row {row}, column {} holds", at % in_features);
                    assert!(error.starts_with(&position), "{error}: {position}");
                }
            }
            let mut short = stored(shape);
            short.0.pop();
            let error = read(&short, "w", shape, format).unwrap_err().to_string();
            assert!(error.contains("bytes of packed codes"), "{error}");
            let error = read(&stored(shape), "v", shape, format).unwrap_err().to_string();
            assert!(error.contains("there is no `v`"), "{error}");
        }
    }
}
