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

/// The code of `weight[row][col]`.
#[inline]
pub fn code(tile: &Tile, row: usize, col: usize) -> u8 {
    let (byte, shift) = position(row, col);
    tile[byte] >> shift & 3
}

/// Sets the four bytes of a row, as [`row_of`] and [`packed_row`] make them.
#[inline]
pub fn set_row(tile: &mut Tile, row: usize, bytes: [u8; 4]) {
    tile[4 * row..4 * row + 4].copy_from_slice(&bytes);
}

/// The four bytes of a row with these codes.
#[inline]
pub fn row_of(codes: &[u8; COLS]) -> [u8; 4] {
    debug_assert!(codes.iter().all(|&code| code <= 2), "{codes:?} are not ternary codes");
    packed_row(codes, 0)
}

/// A byte of the Hub's packing whose four rows have weight 0.
pub const PACKED_ZEROS: u8 = 0b01_01_01_01;

/// The four bytes of a row whose codes are bits `2·field..2·field + 2` of sixteen bytes of the Hub's packing.
#[inline]
pub fn packed_row(bytes: &[u8; COLS], field: usize) -> [u8; 4] {
    // Four codes a word: word `lane` holds columns 4·lane .. 4·lane + 4, and goes to bits 2·lane.
    let words = bytes.as_chunks::<4>().0.iter().enumerate();
    let word = words.fold(0, |word, (lane, &bytes)| {
        word | (u32::from_le_bytes(bytes) >> (2 * field) & 0x0303_0303) << (2 * lane)
    });
    word.to_le_bytes()
}

/// Sixteen rows and columns of the Hub's packing to the tiles of its four fields; `false` if there is a code 3 among them,
/// which no tile may have.
#[inline]
pub fn unpack(bytes: &[[u8; COLS]; ROWS], tiles: [&mut Tile; 4]) -> bool {
    // Of a row, word `lane` holds columns 4·lane .. 4·lane + 4 and its bits 2·field.. one field of each. In a tile it is
    // the other way round: this transposes lanes and fields, in blocks of two by two and within them.
    let mut words = [[0u32; ROWS]; 4];
    for (row, bytes) in bytes.iter().enumerate() {
        for (words, bytes) in words.iter_mut().zip(bytes.as_chunks().0) {
            words[row] = u32::from_le_bytes(*bytes);
        }
    }
    let [a, b, c, d] = &mut words;
    let mut invalid = 0;
    for row in 0..ROWS {
        for word in [a[row], b[row], c[row], d[row]] {
            invalid |= word & (word >> 1);
        }
        swap_bits(&mut a[row], &mut c[row], 4, 0x0f0f_0f0f);
        swap_bits(&mut b[row], &mut d[row], 4, 0x0f0f_0f0f);
        swap_bits(&mut a[row], &mut b[row], 2, 0x3333_3333);
        swap_bits(&mut c[row], &mut d[row], 2, 0x3333_3333);
    }
    for (tile, words) in tiles.into_iter().zip(&words) {
        for (bytes, word) in tile.as_chunks_mut().0.iter_mut().zip(words) {
            *bytes = word.to_le_bytes();
        }
    }
    invalid & 0x5555_5555 == 0
}

/// Exchanges the bits `mask << shift` of `a` with the bits `mask` of `b`.
#[inline(always)]
fn swap_bits(a: &mut u32, b: &mut u32, shift: u32, mask: u32) {
    let differing = (*a >> shift ^ *b) & mask;
    *b ^= differing;
    *a ^= differing << shift;
}

/// The sixteen codes of a row.
#[inline]
pub fn row(tile: &Tile, row: usize) -> [u8; COLS] {
    let mut codes = [0; COLS];
    let bytes = &tile[4 * row..4 * row + 4];
    for (lane, codes) in codes.as_chunks_mut::<4>().0.iter_mut().enumerate() {
        codes.iter_mut().zip(bytes).for_each(|(code, byte)| *code = byte >> (2 * lane) & 3);
    }
    codes
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
