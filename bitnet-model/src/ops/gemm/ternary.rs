//! A ternary matrix as the right factor of a product, decoded from its tiles into panels.

use std::ops::Range;

use super::{Operand, Part, panels::Panels};
use crate::{
    kernels::tile::{ROWS, Tile, TileFormat},
    weights::TernaryWeight,
};

/// The weights −1, 0 and 1 of a matrix (out_features, in_features), without its scale: depths are its rows, indices its
/// columns, as in `dx = dy·W`.
#[derive(Clone, Copy, Debug)]
pub struct TernaryRows<'a>(pub &'a TernaryWeight);

impl Operand for TernaryRows<'_> {
    #[inline(always)]
    fn pack<P: Panels>(&self, panels: &P, part: &Part, out: &mut [P::Value]) {
        for (indices, out) in part.panels(out) {
            self.panel(panels, (indices, &part.depth, part.width), out);
        }
    }
}

impl TernaryRows<'_> {
    #[inline(always)]
    fn panel<P: Panels>(
        &self,
        panels: &P,
        (indices, depth, width): (Range<usize>, &Range<usize>, usize),
        out: &mut [P::Value],
    ) {
        let (weight, format) = (self.0, self.0.format());
        let cols = format.cols();
        let tiles = indices.start / cols..indices.end.div_ceil(cols);
        // A block of the depth begins with a band of sixteen rows.
        for (band, out) in (depth.start / ROWS..).zip(out.chunks_mut(ROWS / P::PAIR * width)) {
            let band = &weight.band(band)[tiles.clone()];
            for (tile, index) in band.iter().zip(tiles.clone()) {
                let first = index * cols;
                match format {
                    TileFormat::TwoBit if first + cols <= indices.start + width => {
                        two_bit(panels, tile, width, &mut out[first - indices.start..]);
                    }
                    _ => any(panels, format, tile, (first, &indices, width), out),
                }
            }
        }
    }
}

/// The rows of a tile of two-bit codes, to every `width`-th place.
#[inline(always)]
fn two_bit<P: Panels>(panels: &P, tile: &Tile, width: usize, out: &mut [P::Value]) {
    const COLS: usize = TileFormat::TwoBit.cols();
    // Column 4·lane + j is in byte j, from bit 2·lane on.
    const SHIFTS: [u32; COLS] = {
        let (mut shifts, mut col) = ([0; COLS], 0);
        while col < COLS {
            shifts[col] = (8 * (col % 4) + 2 * (col / 4)) as u32;
            col += 1;
        }
        shifts
    };
    let rows = tile.as_chunks::<4>().0.chunks_exact(P::PAIR);
    for (rows, out) in rows.zip(out.chunks_mut(width)) {
        let Some(out) = out.first_chunk_mut::<COLS>() else { return };
        let [low, high] = [rows[0], rows[P::PAIR - 1]].map(u32::from_le_bytes);
        for (out, shift) in out.iter_mut().zip(SHIFTS) {
            *out = panels.join_codes(low >> shift & 3, high >> shift & 3);
        }
    }
}

/// The rows of a tile of any format, which begins at column `first`, as far as they are in the panel.
#[inline(always)]
fn any<P: Panels>(
    panels: &P,
    format: TileFormat,
    tile: &Tile,
    (first, indices, width): (usize, &Range<usize>, usize),
    out: &mut [P::Value],
) {
    let columns = first.max(indices.start)..indices.end.min(first + format.cols());
    for (row, out) in (0..ROWS).step_by(P::PAIR).zip(out.chunks_mut(width)) {
        let (low, high) = (format.row(tile, row), format.row(tile, row + P::PAIR - 1));
        for col in columns.clone() {
            let code = |row: &[u8]| u32::from(row[col - first]);
            out[col - indices.start] = panels.join_codes(code(&low), code(&high));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ops::gemm::{Factor, Precision, gemm, plain},
        quant::Rounding,
    };

    /// Every format and precision, and shapes that end inside tiles, panels and blocks.
    #[test]
    fn products_with_tiles_have_the_bits_of_products_with_their_values() {
        for (tokens, rows, cols) in [(1, 4, 3), (13, 17, 40), (50, 530, 33), (7, 48, 100)] {
            let wave =
                |len: usize, step: f32| Vec::from_iter((0..len).map(|i| (i as f32 * step).sin()));
            let (dy, latent) = (wave(tokens * rows, 0.37), wave(rows * cols, 0.91));
            for format in TileFormat::ALL {
                let weight =
                    TernaryWeight::from_latent(&latent, (rows, cols), Rounding::HalfEven, format);
                let codes: Vec<f32> =
                    weight.dequantize().into_iter().map(|w| (w / weight.scale()).round()).collect();
                for precision in [Precision::F32, Precision::Bf16] {
                    let a = Factor::depth_inner(rows, &dy, plain);
                    let mut found = vec![f32::NAN; tokens * cols];
                    let mut expected = found.clone();
                    let shape = (tokens, cols, rows);
                    gemm(shape, a, TernaryRows(&weight), 0.7, precision, &mut found);
                    let b = Factor::index_inner(cols, &codes, plain);
                    gemm(shape, a, b, 0.7, precision, &mut expected);
                    assert!(
                        found == expected,
                        "{tokens} × {rows} × {cols}, {format:?}, {precision:?}"
                    );
                }
            }
        }
    }
}
