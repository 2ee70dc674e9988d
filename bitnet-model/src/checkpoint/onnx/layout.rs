//! How the codes of a projection lie in the file, and how they are multiplied.

use rayon::prelude::*;

use super::graph::ElementType;
use crate::weights::TernaryWeight;

/// How ternary weights are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnnxWeights {
    /// Four codes a byte, in blocks for ONNX Runtime's `MatMulNBits`: 2.02 bits a weight, and less than 0.1 more for scales.
    #[default]
    Int2,
    /// A byte a weight, for ONNX's own `MatMulInteger`.
    Int8,
}

/// Codes of a block, the last of which is 0 and meets an activation code of [`TOP`].
///
/// At `accuracy_level` 4 `MatMulNBits` quantizes its input anew, to `round(x · 127 / max|x|)` of each block. Where each block
/// has a [`TOP`], and nothing larger, that factor is 1 and the codes stay what they are.
pub(super) const BLOCK: usize = 128;
/// Weights of a block.
pub(super) const BLOCK_WEIGHTS: usize = BLOCK - 1;
/// The largest activation code.
pub(super) const TOP: f32 = 127.;

/// The most inputs a projection may have: `MatMulNBits` sums `(weight + 2) · code`, at most 3 · 127 each, in f32, which
/// holds integers to 2²⁴.
const MAX_INPUTS: usize = (1 << 24) / (3 * 127) / BLOCK * BLOCK_WEIGHTS;

/// Blocks of a row of `in_features` weights.
pub(super) fn blocks(in_features: usize) -> usize {
    in_features.div_ceil(BLOCK_WEIGHTS)
}

impl OnnxWeights {
    /// Why a projection of `in_features` inputs would not be exact.
    pub(super) fn check(self, in_features: usize) -> Result<(), String> {
        match self {
            Self::Int2 if in_features > MAX_INPUTS => Err(format!(
                "has {in_features} inputs, and sums of more than {MAX_INPUTS} are not exact in f32: write int8"
            )),
            _ => Ok(()),
        }
    }

    /// Element type and shape of a projection (out_features, in_features).
    pub(super) fn tensor(
        self,
        (out_features, in_features): (usize, usize),
    ) -> (ElementType, Vec<usize>) {
        match self {
            Self::Int2 => (ElementType::Uint8, vec![out_features, blocks(in_features), BLOCK / 4]),
            // The right operand of a product: inputs are its rows.
            Self::Int8 => (ElementType::Int8, vec![in_features, out_features]),
        }
    }

    /// The bytes of that tensor.
    pub(super) fn encode(self, weight: &TernaryWeight) -> Vec<u8> {
        let (rows, cols) = (weight.out_features(), weight.in_features());
        match self {
            Self::Int2 => {
                let row_bytes = blocks(cols) * BLOCK / 4;
                let mut bytes = vec![0xaa; rows * row_bytes]; // weights 0, as below
                bytes.par_chunks_mut(row_bytes).enumerate().for_each(|(row, bytes)| {
                    for col in 0..cols {
                        let (byte, shift) = place(col);
                        // weight + 2: 2 is the zero point that the operator assumes. The code is weight + 1.
                        let code = weight.code(row, col) + 1;
                        bytes[byte] = bytes[byte] & !(3 << shift) | code << shift;
                    }
                });
                bytes
            }
            Self::Int8 => {
                let mut bytes = vec![0; rows * cols];
                bytes.par_chunks_mut(rows).enumerate().for_each(|(col, bytes)| {
                    for (row, byte) in bytes.iter_mut().enumerate() {
                        *byte = weight.code(row, col).wrapping_sub(1);
                    }
                });
                bytes
            }
        }
    }

    /// Whether `bytes` are the codes of `weight`, and what is between them is 0.
    pub(super) fn holds(self, bytes: &[u8], weight: &TernaryWeight) -> bool {
        let (rows, cols) = (weight.out_features(), weight.in_features());
        match self {
            Self::Int2 => {
                let row_bytes = blocks(cols) * BLOCK / 4;
                let is_row = |(row, bytes): (usize, &[u8])| {
                    let stored = bytes.iter().flat_map(|byte| {
                        [0, 2, 4, 6].map(|shift| i16::from(byte >> shift & 3) - 2)
                    });
                    stored.enumerate().all(|(at, found)| {
                        let col = at / BLOCK * BLOCK_WEIGHTS + at % BLOCK;
                        let is_weight = at % BLOCK < BLOCK_WEIGHTS && col < cols;
                        found == if is_weight { i16::from(weight.code(row, col)) - 1 } else { 0 }
                    })
                };
                bytes.len() == rows * row_bytes
                    && bytes.par_chunks(row_bytes).enumerate().all(is_row)
            }
            Self::Int8 => {
                let is_col = |(col, bytes): (usize, &[u8])| {
                    let stored = bytes.iter().map(|&byte| i16::from(byte as i8));
                    stored.enumerate().all(|(row, w)| w == i16::from(weight.code(row, col)) - 1)
                };
                bytes.len() == rows * cols && bytes.par_chunks(rows).enumerate().all(is_col)
            }
        }
    }
}

/// Byte and shift of the weight at `col` in its row.
fn place(col: usize) -> (usize, usize) {
    let at = col / BLOCK_WEIGHTS * BLOCK + col % BLOCK_WEIGHTS;
    (at / 4, at % 4 * 2)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{kernels::TileFormat, quant::Rounding};

    fn weight(rows: usize, cols: usize) -> TernaryWeight {
        let values: Vec<f32> = (0..rows * cols).map(|i| (i * i % 7 % 3) as f32 - 1.).collect();
        TernaryWeight::from_latent(&values, (rows, cols), Rounding::HalfEven, TileFormat::TwoBit)
    }

    #[test]
    fn blocks_have_room_for_their_top() {
        let weight = weight(4, 130);
        let bytes = OnnxWeights::Int2.encode(&weight);
        let (_, shape) = OnnxWeights::Int2.tensor((4, 130));
        assert_eq!(shape, [4, 2, 32]);
        assert_eq!(bytes.len(), 4 * 2 * 32);
        let code = |row: usize, at: usize| bytes[row * 64 + at / 4] >> (at % 4 * 2) & 3;
        for row in 0..4 {
            for col in 0..127 {
                assert_eq!(code(row, col), weight.code(row, col) + 1);
            }
            assert_eq!(code(row, 127), 2); // the top's weight is 0
            for col in 127..130 {
                assert_eq!(code(row, col + 1), weight.code(row, col) + 1);
            }
            assert!((131..256).all(|at| code(row, at) == 2));
        }
    }

    #[test]
    fn bytes_are_transposed_weights() {
        let weight = weight(4, 5);
        let bytes = OnnxWeights::Int8.encode(&weight);
        for (row, col) in (0..4).flat_map(|row| (0..5).map(move |col| (row, col))) {
            assert_eq!(bytes[col * 4 + row] as i8, weight.code(row, col) as i8 - 1);
        }
    }

    #[test]
    fn a_changed_byte_is_found() {
        let weight = weight(8, 130);
        for layout in [OnnxWeights::Int2, OnnxWeights::Int8] {
            let mut bytes = layout.encode(&weight);
            assert!(layout.holds(&bytes, &weight));
            assert!(!layout.holds(&bytes[1..], &weight));
            for at in [0, 31, 32, bytes.len() - 1] {
                bytes[at] ^= 1 << 6;
                assert!(!layout.holds(&bytes, &weight), "{layout:?} {at}");
                bytes[at] ^= 1 << 6;
            }
        }
    }

    #[test]
    fn sums_that_f32_cannot_hold_are_refused() {
        // 344 blocks: 3 · 127 · 344 · 128 < 2²⁴ < 3 · 127 · 345 · 128.
        assert!(OnnxWeights::Int2.check(344 * 127).is_ok());
        assert!(OnnxWeights::Int2.check(344 * 127 + 1).is_err());
        assert!(OnnxWeights::Int8.check(344 * 127 + 1).is_ok());
    }
}
