//! Ternary weights in memory: 2-bit codes in tiles of 16 output rows by 16 inputs, one layout for every ISA.
//!
//! A code is `weight + 1`, so it is 0, 1 or 2 and can be the unsigned operand of a byte product:
//! `Σ weight·x = Σ code·x − Σ x`. With int8 activations every partial result is bounded by
//! `|−Σx| + |Σ code·x| ≤ 128·cols + 2·128·cols = 384·cols`, which fits an i32 for `cols < 2²²` ([`MAX_COLS`]).

/// Output rows of a tile.
pub const ROWS: usize = 16;

/// Inputs of a tile.
pub const COLS: usize = 16;

/// The most inputs a product may have, rounded up to whole tiles: 384 · 2²² < 2³¹.
pub const MAX_COLS: usize = 1 << 22;

/// 16 × 16 codes: byte `4·row + j`, bits `2·lane..2·lane + 2`, is the code of `weight[row][4·lane + j]`.
///
/// One cache line and one AVX-512 register, in which shifting by `2·lane` and masking leaves, for each row, the
/// four codes that meet `x[4·lane..4·lane + 4]`. No alignment is demanded.
pub type Tile = [u8; 64];

/// The tile of sixteen by sixteen zero weights (code 1): padding that adds nothing to a product.
pub const EMPTY: Tile = [0b01_01_01_01; 64];

/// Byte of the tile and shift within it.
#[inline(always)]
fn position(row: usize, col: usize) -> (usize, u32) {
    assert!(row < ROWS && col < COLS, "no code at row {row}, column {col} of a tile");
    (4 * row + col % 4, 2 * (col / 4) as u32)
}

/// Sets the code of `weight[row][col]`; `code` is `weight + 1`.
#[inline]
pub fn set_code(tile: &mut Tile, row: usize, col: usize, code: u8) {
    debug_assert!(code <= 2, "{code} is not a ternary code");
    let (byte, shift) = position(row, col);
    tile[byte] = tile[byte] & !(3 << shift) | (code & 3) << shift;
}

/// The code of `weight[row][col]`.
#[inline]
pub fn code(tile: &Tile, row: usize, col: usize) -> u8 {
    let (byte, shift) = position(row, col);
    tile[byte] >> shift & 3
}

/// The weights −1, 0, 1 of a tile, row by row.
#[inline]
pub fn decode(tile: &Tile, out: &mut [[f32; COLS]; ROWS]) {
    for (bytes, row) in tile.as_chunks::<4>().0.iter().zip(out) {
        for (lane, weights) in row.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            for (weight, byte) in weights.iter_mut().zip(bytes) {
                *weight = f32::from(byte >> (2 * lane) & 3) - 1.;
            }
        }
    }
}
