//! Ternary weights in memory: tiles of 16 output rows, one cache line and one AVX-512 register each, in two formats.
//!
//! A code is `weight + 1`, so it is 0, 1 or 2 and can be the unsigned operand of a byte product:
//! `Σ weight·x = Σ code·x − Σ x`. With int8 activations every partial result is bounded by
//! `|−Σx| + |Σ code·x| ≤ 128·cols + 2·128·cols = 384·cols`, which fits an i32 for `cols < 2²²`.

/// Output rows of a tile.
pub const ROWS: usize = 16;

/// Inputs of the widest tile.
pub const MAX_TILE_COLS: usize = 20;

/// 16 rows of codes: bytes `4·row..4·row + 4` belong to a row, one 32-bit lane of a register. No alignment is demanded.
pub type Tile = [u8; 64];

/// How a tile holds codes: byte `4·row + j` is `Σ code(row, 4·lane + j) · baseˡᵃⁿᵉ`, so that what is unpacked of one lane
/// are, for each row, the four codes that meet `x[4·lane..4·lane + 4]`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum TileFormat {
    /// Base 4: four codes of 2 bits a byte, 16 × 16 weights a tile, unpacked by shifting and masking.
    #[default]
    TwoBit,
    /// Base 3: five codes a byte, 16 × 20 weights a tile. A fifth fewer bytes, more instructions.
    Trits,
}

impl TileFormat {
    /// Every format.
    pub const ALL: [Self; 2] = [Self::TwoBit, Self::Trits];

    /// Its name, the bits of a weight: `2bit` or `1.6bit`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::TwoBit => "2bit",
            Self::Trits => "1.6bit",
        }
    }

    /// Codes of a byte.
    pub const fn lanes(self) -> usize {
        match self {
            Self::TwoBit => 4,
            Self::Trits => 5,
        }
    }

    /// Inputs of a tile.
    pub const fn cols(self) -> usize {
        4 * self.lanes()
    }

    /// The most inputs a product may have, rounded up to whole tiles: 384 · 2²² < 2³¹. Kernels sum lane 3 of base 3 as
    /// 64 · code, `64 · 2 · 128 · cols / 5 < 2³¹`.
    pub const fn max_cols(self) -> usize {
        match self {
            Self::TwoBit => 1 << 22,
            Self::Trits => 1 << 19,
        }
    }

    /// This format, or the one for rows as long as that.
    pub const fn for_cols(self, cols: usize) -> Self {
        match cols <= self.max_cols() {
            true => self,
            false => Self::TwoBit,
        }
    }

    const fn base(self) -> u32 {
        match self {
            Self::TwoBit => 4,
            Self::Trits => 3,
        }
    }

    /// The tile of zero weights (code 1): padding that adds nothing to a product.
    pub const fn empty(self) -> Tile {
        match self {
            Self::TwoBit => [1 + 4 + 16 + 64; 64],
            Self::Trits => [1 + 3 + 9 + 27 + 81; 64],
        }
    }

    /// The code of `weight[row][col]`.
    ///
    /// # Panics
    /// If the tile has no such row or column.
    #[inline]
    pub fn code(self, tile: &Tile, row: usize, col: usize) -> u8 {
        assert!(row < ROWS && col < self.cols(), "no code at row {row}, column {col} of a tile");
        self.row(tile, row)[col]
    }

    /// The four bytes of a row with these codes, one a column of the tile.
    #[inline]
    pub fn pack_row(self, codes: &[u8]) -> [u8; 4] {
        debug_assert!(codes.iter().all(|&code| code <= 2), "{codes:?} are not ternary codes");
        self.pack_field(codes, 0)
    }

    /// The four bytes of a row whose codes are bits `2·field..2·field + 2` of bytes of the Hub's packing, one a column of
    /// the tile.
    #[inline]
    pub fn pack_field(self, bytes: &[u8], field: usize) -> [u8; 4] {
        debug_assert_eq!(bytes.len(), self.cols(), "one byte a column");
        // Four codes a word: word `lane` holds columns 4·lane .. 4·lane + 4. No byte of the sum exceeds 255.
        let words = bytes.as_chunks::<4>().0.iter().rev();
        let word = words.fold(0, |word, &bytes| {
            word * self.base() + (u32::from_le_bytes(bytes) >> (2 * field) & 0x0303_0303)
        });
        word.to_le_bytes()
    }

    /// Sixteen rows of the Hub's packing, of which [`cols`](Self::cols) count, to the tiles of their four fields; `false` if
    /// there is a code 3 among them, which no tile may have.
    #[inline]
    pub fn unpack(self, bytes: &[[u8; MAX_TILE_COLS]; ROWS], tiles: [&mut Tile; 4]) -> bool {
        // Of a row, word `lane` holds columns 4·lane .. 4·lane + 4, four fields of each.
        let mut words = [[0u32; ROWS]; MAX_TILE_COLS / 4];
        for (row, bytes) in bytes.iter().enumerate() {
            for (words, bytes) in words.iter_mut().zip(bytes.as_chunks().0) {
                words[row] = u32::from_le_bytes(*bytes);
            }
        }
        let invalid = words[..self.lanes()].as_flattened().iter();
        let invalid = invalid.fold(0, |invalid, word| invalid | word & (word >> 1));
        let fields = match self {
            Self::TwoBit => transpose([words[0], words[1], words[2], words[3]]),
            Self::Trits => std::array::from_fn(|field| base_3(&words, field)),
        };
        for (tile, words) in tiles.into_iter().zip(&fields) {
            for (bytes, word) in tile.as_chunks_mut().0.iter_mut().zip(words) {
                *bytes = word.to_le_bytes();
            }
        }
        invalid & 0x5555_5555 == 0
    }

    /// The codes of a row; those behind [`cols`](Self::cols) mean nothing.
    #[inline]
    pub fn row(self, tile: &Tile, row: usize) -> [u8; MAX_TILE_COLS] {
        let bytes = &tile.as_chunks().0[row];
        match self {
            Self::TwoBit => digits::<4, 4>(bytes),
            Self::Trits => digits::<3, 5>(bytes),
        }
    }

    /// The weights −1, 0, 1 of a tile, row by row; those behind [`cols`](Self::cols) mean nothing.
    #[inline]
    pub fn decode(self, tile: &Tile, out: &mut [[f32; MAX_TILE_COLS]; ROWS]) {
        for (row, out) in out.iter_mut().enumerate() {
            *out = self.row(tile, row).map(|code| f32::from(code) - 1.);
        }
    }
}

/// The digits of four bytes, those of one lane after the other.
#[inline(always)]
fn digits<const BASE: u8, const LANES: usize>(bytes: &[u8; 4]) -> [u8; MAX_TILE_COLS] {
    let (mut codes, mut rest) = ([0; MAX_TILE_COLS], *bytes);
    for codes in &mut codes.as_chunks_mut::<4>().0[..LANES] {
        *codes = rest.map(|byte| byte % BASE);
        rest = rest.map(|byte| byte / BASE);
    }
    codes
}

/// A byte of the Hub's packing whose four rows have weight 0.
pub const PACKED_ZEROS: u8 = 0b01_01_01_01;

/// Sets the four bytes of a row, as [`TileFormat::pack_row`] makes them.
#[inline]
pub fn set_row(tile: &mut Tile, row: usize, bytes: [u8; 4]) {
    tile[4 * row..4 * row + 4].copy_from_slice(&bytes);
}

/// The codes d₀ … d₃ of `r = d₀ + 3d₁ + 9d₂ + 27d₃` in two bits each, for r up to 80: what is left of a byte of base 3 without
/// its fifth code.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(super) const TRIT_CODES: [u8; 128] = {
    let mut codes = [0; 128];
    let mut r = 0;
    while r < 81 {
        codes[r] = (r % 3 + r / 3 % 3 * 4 + r / 9 % 3 * 16 + r / 27 * 64) as u8;
        r += 1;
    }
    codes
};

/// In words of lanes, bits 2·field.. are those of a field; in words of fields, bits 2·lane.. those of a lane. This transposes
/// them, in blocks of two by two and within these.
#[inline(always)]
fn transpose(mut lanes: [[u32; ROWS]; 4]) -> [[u32; ROWS]; 4] {
    let [a, b, c, d] = &mut lanes;
    for row in 0..ROWS {
        swap_bits(&mut a[row], &mut c[row], 4, 0x0f0f_0f0f);
        swap_bits(&mut b[row], &mut d[row], 4, 0x0f0f_0f0f);
        swap_bits(&mut a[row], &mut b[row], 2, 0x3333_3333);
        swap_bits(&mut c[row], &mut d[row], 2, 0x3333_3333);
    }
    lanes
}

/// Exchanges the bits `mask << shift` of `a` with the bits `mask` of `b`.
#[inline(always)]
fn swap_bits(a: &mut u32, b: &mut u32, shift: u32, mask: u32) {
    let differing = (*a >> shift ^ *b) & mask;
    *b ^= differing;
    *a ^= differing << shift;
}

/// `Σ code(lane) · 3ˡᵃⁿᵉ` of a field, four codes a word.
#[inline(always)]
fn base_3(lanes: &[[u32; ROWS]; 5], field: usize) -> [u32; ROWS] {
    let mut sums = [0u32; ROWS];
    for words in lanes.iter().rev() {
        for (sum, word) in sums.iter_mut().zip(words) {
            // At most 242 in each byte; more, and wrapped around, if there is a code 3.
            *sum = sum.wrapping_mul(3).wrapping_add(word >> (2 * field) & 0x0303_0303);
        }
    }
    sums
}
