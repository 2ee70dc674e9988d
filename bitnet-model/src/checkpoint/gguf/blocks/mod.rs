//! How a tensor's elements lie in a file, one module a block type. The layouts are those of ggml's quantizers
//! (`ggml-quants.c`), and for I2_S of bitnet.cpp's (`ggml-bitnet-mad.cpp`).

mod i2_s;
mod q4_0;
mod q4_k;
mod q6_k;
mod q8_0;
mod tq1_0;
mod tq2_0;

use half::f16;

/// An element type: so many weights in so many bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BlockType {
    F32,
    F16,
    Bf16,
    Q4_0,
    Q8_0,
    Q4K,
    Q6K,
    I2S,
    Tq1_0,
    Tq2_0,
}

/// The most weights of a block.
pub(super) const MAX_BLOCK: usize = 256;

impl BlockType {
    const ALL: [Self; 10] = [
        Self::F32,
        Self::F16,
        Self::Bf16,
        Self::Q4_0,
        Self::Q8_0,
        Self::Q4K,
        Self::Q6K,
        Self::I2S,
        Self::Tq1_0,
        Self::Tq2_0,
    ];

    /// The type of this number. Numbers from 36 on mean different things in different programs: what the bytes of a
    /// tensor are then, its length must confirm.
    pub fn of(number: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|block| block.number() == number)
    }

    /// The number of the type.
    pub const fn number(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q8_0 => 8,
            Self::Q4K => 12,
            Self::Q6K => 14,
            Self::Bf16 => 30,
            Self::Tq1_0 => 34,
            Self::Tq2_0 => 35,
            Self::I2S => 36,
        }
    }

    /// Its name in other programs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::Q4_0 => "Q4_0",
            Self::Q8_0 => "Q8_0",
            Self::Q4K => "Q4_K",
            Self::Q6K => "Q6_K",
            Self::I2S => "I2_S",
            Self::Tq1_0 => "TQ1_0",
            Self::Tq2_0 => "TQ2_0",
        }
    }

    /// The names of all types.
    pub fn names() -> String {
        Self::ALL.map(Self::name).join(", ")
    }

    /// Weights and bytes of a block.
    pub const fn block(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::Bf16 => (1, 2),
            Self::Q4_0 => (q4_0::WEIGHTS, q4_0::BYTES),
            Self::Q8_0 => (q8_0::WEIGHTS, q8_0::BYTES),
            Self::Q4K => (q4_k::WEIGHTS, q4_k::BYTES),
            Self::Q6K => (q6_k::WEIGHTS, q6_k::BYTES),
            Self::I2S => (i2_s::WEIGHTS, i2_s::BYTES),
            Self::Tq1_0 => (tq1_0::WEIGHTS, tq1_0::BYTES),
            Self::Tq2_0 => (tq2_0::WEIGHTS, tq2_0::BYTES),
        }
    }

    /// Bytes behind the blocks of a tensor.
    pub const fn tail(self) -> usize {
        match self {
            Self::I2S => i2_s::TAIL,
            _ => 0,
        }
    }

    /// Whether it holds three values.
    pub const fn is_ternary(self) -> bool {
        matches!(self, Self::I2S | Self::Tq1_0 | Self::Tq2_0)
    }

    /// The codes, weight + 1, of a ternary block. A code 3, which is none, stays what it is.
    pub fn codes(self, block: &[u8], codes: &mut [u8]) {
        match self {
            Self::I2S => i2_s::codes(block, codes),
            Self::Tq1_0 => tq1_0::codes(block, codes),
            Self::Tq2_0 => tq2_0::codes(block, codes),
            _ => unreachable!("{} has no codes", self.name()),
        }
    }

    /// Where a ternary block has its scale, an f16, if every block has one.
    const fn scale_at(self) -> Option<usize> {
        match self {
            Self::Tq1_0 => Some(tq1_0::SCALE),
            Self::Tq2_0 => Some(tq2_0::SCALE),
            _ => None,
        }
    }

    /// The scale that stands in a ternary block, if every block has one.
    pub fn scale(self, block: &[u8]) -> Option<f32> {
        self.scale_at().map(|at| half(block, at))
    }

    /// Packs the codes of a ternary block.
    ///
    /// # Errors
    /// A scale that the block cannot hold.
    pub fn pack(self, codes: &[u8], scale: f32, block: &mut [u8]) -> Result<(), String> {
        match self {
            Self::I2S => i2_s::pack(codes, block),
            Self::Tq1_0 => tq1_0::pack(codes, &mut block[..tq1_0::SCALE]),
            Self::Tq2_0 => tq2_0::pack(codes, &mut block[..tq2_0::SCALE]),
            _ => unreachable!("{} has no codes", self.name()),
        }
        let Some(at) = self.scale_at() else { return Ok(()) };
        let half = f16::from_f32(scale);
        if !half.is_normal() {
            return Err(format!(
                "has the scale {scale}, which the f16 of {} cannot hold",
                self.name()
            ));
        }
        block[at..at + 2].copy_from_slice(&half.to_le_bytes());
        Ok(())
    }

    /// The weights of a block of a few bits.
    pub fn dequantize(self, block: &[u8], weights: &mut [f32]) {
        match self {
            Self::Q4_0 => q4_0::dequantize(block, weights),
            Self::Q8_0 => q8_0::dequantize(block, weights),
            Self::Q4K => q4_k::dequantize(block, weights),
            Self::Q6K => q6_k::dequantize(block, weights),
            _ => unreachable!("{} is no float block", self.name()),
        }
    }
}

/// The f16 at byte `at`.
fn half(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packed_codes_come_back() {
        for block in BlockType::ALL.into_iter().filter(|block| block.is_ternary()) {
            let (weights, bytes) = block.block();
            let codes: Vec<u8> = (0..weights).map(|i| ((i * i + i / 7) % 3) as u8).collect();
            let (mut packed, mut found) = (vec![0xff; bytes], vec![9; weights]);
            block.pack(&codes, 0.375, &mut packed).unwrap();
            block.codes(&packed, &mut found);
            assert_eq!(found, codes, "{}", block.name());
            assert!(block.scale(&packed).is_none_or(|scale| scale == 0.375));
        }
        assert!(BlockType::Tq2_0.pack(&[1; 256], 1e-9, &mut [0; 66]).is_err());
    }

    #[test]
    fn types_are_found_by_their_numbers() {
        for block in BlockType::ALL {
            assert_eq!(BlockType::of(block.number()), Some(block));
            let (weights, bytes) = block.block();
            assert!(weights <= MAX_BLOCK && bytes > 0);
        }
        assert_eq!(BlockType::of(39), None);
    }
}
