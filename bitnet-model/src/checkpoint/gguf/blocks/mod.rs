//! How a tensor's elements lie in a file, one module a block type. The layouts are those of ggml's quantizers
//! (`ggml-quants.c`), and for I2_S of bitnet.cpp's (`ggml-bitnet-mad.cpp`).

mod i2_s;
mod q4_0;
mod q4_k;
mod q6_k;
mod q8_0;
mod tq1_0;
mod tq2_0;

use half::{bf16, f16};

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

    /// Whether it is one float.
    pub const fn is_float(self) -> bool {
        matches!(self, Self::F32 | Self::F16 | Self::Bf16)
    }

    /// The float that is in the bytes of one.
    pub fn float(self, block: &[u8]) -> f32 {
        match (self, block) {
            (Self::F32, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]),
            (Self::Bf16, &[a, b]) => bf16::from_le_bytes([a, b]).to_f32(),
            (Self::F16, &[a, b]) => f16::from_le_bytes([a, b]).to_f32(),
            _ => unreachable!("{} is no float", self.name()),
        }
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
        block[at..at + 2].copy_from_slice(&self.half_scale(scale)?.to_le_bytes());
        Ok(())
    }

    /// A scale as the f16 that stands for it in the file.
    ///
    /// # Errors
    /// One that rounds to 0, to a number of fewer bits, or to infinity.
    pub fn half_scale(self, scale: f32) -> Result<f16, String> {
        let half = f16::from_f32(scale);
        match half.is_normal() {
            true => Ok(half),
            false => {
                Err(format!("has the scale {scale}, which the f16 of {} cannot hold", self.name()))
            }
        }
    }

    /// Rounds weights to a block of floats or of a few bits.
    ///
    /// # Errors
    /// A weight that is not finite, or that the block cannot hold.
    pub fn quantize(self, weights: &[f32], block: &mut [u8]) -> Result<(), String> {
        let limit = match self {
            Self::F32 => f32::MAX,
            Self::Bf16 => bf16::MAX.to_f32(),
            Self::F16 => f16::MAX.to_f32(),
            Self::Q8_0 => 127. * f16::MAX.to_f32(),
            Self::Q6K => 31. * 128. * f16::MAX.to_f32(),
            _ => unreachable!("{} is not written", self.name()),
        };
        let is_beyond = |weight: &&f32| weight.is_nan() || weight.abs() > limit;
        if let Some(weight) = weights.iter().find(is_beyond) {
            return Err(format!("has the value {weight}, which {} cannot hold", self.name()));
        }
        match (self, weights) {
            (Self::F32, &[weight]) => block.copy_from_slice(&weight.to_le_bytes()),
            (Self::F16, &[weight]) => {
                block.copy_from_slice(&f16::from_f32(weight).to_le_bytes());
            }
            (Self::Bf16, &[weight]) => {
                block.copy_from_slice(&bf16::from_f32(weight).to_le_bytes());
            }
            (Self::Q8_0, _) => q8_0::quantize(weights, block),
            _ => q6_k::quantize(weights, block),
        }
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

    /// What `ggml_quantize_chunk` of llama.cpp makes of [`weights`], in hexadecimal digits.
    const Q8_0: &str = "4d1e81fbac95b60f9f68689f0fb695acfb81403563c8663a478b08bba7cb26b984860c1ebe35dbbbd62aae776f96039e7f84ce52\
            05f31a7c0dd8de1d8c4022408c1dded80c1e0d7c1af30552ce847f9e03966f77ae2a000000000000000000000000000000004d1e\
            66c863354081fbac95b60f9f68689f0fb695acfb81403563c8663a478b08bba72c12ca27b78184bf34dcbdd729b0756d9803a07c\
            86cf5005f31a7a0dd9de1d8e3e222c123e8e1dded90d7a1af30550cf867ca003986d75b029d7bddc34bf8481b727caa54d12bb08\
            8b473a66c863354081fbac95b60f000000000000000000000000000000002c12498908baa5ca27b78184bf34dcbdd729b0756d98\
            03a07c86cf5005f31a7a0dd9";
    const Q6_K: &str = "d02fab35fdc4c8ea1a88f4ad553b4f60000e09020a0f0202020e09020a0e0001902399d10a06f4b355ea4f88a1ae8c4cdf53b9f1\
            0d0ae9992da0f7202d29f99af32a3e21f1902d97df060afcbd5be74109000f0d0b0f0309000d0a09090e0007203e29f9aa3da0e9\
            131f0bdd7ff069af473b5d9cfa861fe7cdc0f131ae2ad3aadc45d8acd8066c33033c963cc0cc3990070a074107ca8bc44ec484c5\
            0e840808c52e843828759235283542984f034ca6c30c0fc248c502c588054282410b458181837e7b7f008082f00f0ff0f000f010\
            4b8a";

    /// 256 weights without a rounding, of two magnitudes, with two groups of zeros.
    fn weights() -> Vec<f32> {
        let weight = |i: i32| {
            let magnitude = if i < 128 { 1. } else { 0.125 };
            let is_zero = i / 16 % 8 == 5;
            let digits = (i * 37 + i * i * 11) % 101 - 50;
            if is_zero { 0. } else { digits as f32 / 64. * magnitude }
        };
        (0..256).map(weight).collect()
    }

    #[test]
    fn blocks_are_those_of_ggml() {
        for (kind, expected) in [(BlockType::Q8_0, Q8_0), (BlockType::Q6K, Q6_K)] {
            let (len, bytes) = kind.block();
            let mut blocks = vec![0xff; 256 / len * bytes];
            for (weights, block) in weights().chunks(len).zip(blocks.chunks_mut(bytes)) {
                kind.quantize(weights, block).unwrap();
            }
            let digits: String = blocks.iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(digits, expected, "{}", kind.name());
        }
    }

    #[test]
    fn numbers_that_no_block_holds_are_refused() {
        for kind in
            [BlockType::F32, BlockType::F16, BlockType::Bf16, BlockType::Q8_0, BlockType::Q6K]
        {
            let (len, bytes) = kind.block();
            let mut block = vec![0xff; bytes];
            for weight in [f32::NAN, f32::INFINITY] {
                let error = kind.quantize(&vec![weight; len], &mut block).unwrap_err();
                assert!(error.contains(kind.name()), "{error}");
            }
            kind.quantize(&vec![0.; len], &mut block).unwrap();
            let mut found = vec![1.; len];
            match kind.is_float() {
                true => found[0] = kind.float(&block),
                false => kind.dequantize(&block, &mut found),
            }
            assert_eq!(found, vec![0.; len], "{}", kind.name());
        }
        assert!(BlockType::F16.quantize(&[65536.], &mut [0; 2]).is_err());
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
