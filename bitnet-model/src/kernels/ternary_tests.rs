//! Ternary products of every kernel and tile format against naive code: equal integers.

use rand::Rng;
use rand_chacha::ChaCha8Rng;

use super::{
    tests::{rng, tested},
    tile::MAX_TILE_COLS,
    *,
};

/// Below, at and above the runs of tiles after which kernels widen their sums.
const TILE_COUNTS: [usize; 13] = [0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 37, 61];

fn set_code(format: TileFormat, tile: &mut Tile, row: usize, col: usize, code: u8) {
    let mut codes = format.row(tile, row);
    codes[col] = code;
    tile::set_row(tile, row, format.pack_row(&codes[..format.cols()]));
}

/// A row of tiles and the weights in it.
fn tile_row(rng: &mut ChaCha8Rng, format: TileFormat, tiles: usize) -> (Vec<Tile>, Vec<Vec<i32>>) {
    let cols = format.cols();
    let mut weights = vec![vec![0; tiles * cols]; ROWS];
    let mut packed = vec![format.empty(); tiles];
    for (row, weights) in weights.iter_mut().enumerate() {
        for (col, weight) in weights.iter_mut().enumerate() {
            let code = rng.random_range(0..3u8);
            *weight = i32::from(code) - 1;
            set_code(format, &mut packed[col / cols], row, col % cols, code);
        }
    }
    (packed, weights)
}

#[test]
fn tiles_hold_what_was_set() {
    let mut rng = rng();
    for format in TileFormat::ALL {
        let cols = format.cols();
        let (tiles, weights) = tile_row(&mut rng, format, 3);
        for (t, tile) in tiles.iter().enumerate() {
            let mut decoded = [[0.; MAX_TILE_COLS]; ROWS];
            format.decode(tile, &mut decoded);
            for row in 0..ROWS {
                for col in 0..cols {
                    let weight = weights[row][t * cols + col];
                    assert_eq!(i32::from(format.code(tile, row, col)) - 1, weight);
                    assert_eq!(decoded[row][col], weight as f32);
                }
            }
        }
        let mut decoded = [[1.; MAX_TILE_COLS]; ROWS];
        format.decode(&format.empty(), &mut decoded);
        assert!(decoded.iter().all(|row| row[..cols].iter().all(|weight| *weight == 0.)));
    }
    // The layout itself: row 5, column 14 is byte 4 · 5 + 2, lane 3.
    for (format, byte) in [(TileFormat::TwoBit, 2 << 6), (TileFormat::Trits, 2 * 27)] {
        let mut tile = [0; 64];
        set_code(format, &mut tile, 5, 14, 2);
        assert_eq!(tile[22], byte);
        assert_eq!(tile.iter().filter(|byte| **byte != 0).count(), 1);
    }
}

#[test]
fn ternary_products_equal_naive() {
    let mut rng = rng();
    for (format, tiles) in TileFormat::ALL.into_iter().flat_map(|f| TILE_COUNTS.map(|t| (f, t))) {
        for tokens in (0..=21).chain([40]) {
            let (packed, weights) = tile_row(&mut rng, format, tiles);
            let cols = tiles * format.cols();
            let mut x: Vec<i8> = (0..tokens * cols).map(|_| rng.random()).collect();
            let rows = x.chunks_mut(cols.max(1));
            for (row, extreme) in rows.zip([-128, 127]) {
                row.fill(extreme); // the largest sums there are
            }
            let row = |token: usize| &x[token * cols..][..cols];
            let sums: Vec<i32> =
                (0..tokens).map(|token| row(token).iter().map(|x| i32::from(*x)).sum()).collect();
            let expected: Vec<[i32; ROWS]> = (0..tokens)
                .map(|token| {
                    std::array::from_fn(|r| {
                        weights[r].iter().zip(row(token)).map(|(w, x)| w * i32::from(*x)).sum()
                    })
                })
                .collect();
            for kernel in tested() {
                let name = kernel.name();
                let mut out = vec![[7; ROWS]; tokens];
                kernel.ternary_dots(format, &packed, &x, &sums, &mut out);
                assert_eq!(out, expected, "{name}, {format:?}: {tiles} tiles, {tokens} tokens");
                for token in 0..tokens {
                    let mut out = [[7; ROWS]];
                    kernel.ternary_dots(format, &packed, row(token), &sums[token..][..1], &mut out);
                    assert_eq!(out[0], expected[token], "{name}, {format:?}: {tiles} tiles");
                }
            }
        }
    }
}

#[test]
fn extreme_codes_do_not_saturate() {
    let check = |format: TileFormat, (code, weight): (u8, i32), value: i8, tiles: usize, tokens| {
        // Every code of an empty tile is 1, and places add up without a carry.
        let tile = [code * format.empty()[0]; 64];
        let x = vec![value; tokens * tiles * format.cols()];
        let sum = (tiles * format.cols()) as i32 * i32::from(value);
        for kernel in tested() {
            let mut out = vec![[7; ROWS]; tokens];
            kernel.ternary_dots(format, &vec![tile; tiles], &x, &vec![sum; tokens], &mut out);
            let name = kernel.name();
            assert_eq!(
                out,
                vec![[weight * sum; ROWS]; tokens],
                "{name}, {format:?}: {tiles} tiles"
            );
        }
    };
    for format in TileFormat::ALL {
        for code in [(0, -1), (1, 0), (2, 1)] {
            for value in [-128, 127] {
                for tiles in TILE_COUNTS {
                    (1..=12).for_each(|tokens| check(format, code, value, tiles, tokens));
                }
            }
        }
        // The longest rows there may be.
        let tiles = format.max_cols() / format.cols();
        for tokens in [1, 2, 8, 13] {
            check(format, (2, 1), -128, tiles, tokens);
        }
    }
}
