//! One tensor of a file to write: of the checkpoint, in the file's order and type, a piece at a time.

use half::f16;

use super::{blocks::BlockType, view::RowOrder};
use crate::{
    checkpoint::{Checkpoint, export::ternary},
    config::{Config, Quantization},
    error::Result,
};

/// A tensor to write.
pub(super) struct Planned {
    /// Its name in the checkpoint.
    pub source: String,
    /// Its name in the file.
    pub name: String,
    /// Its dimensions, outermost first; the last is whole blocks.
    pub dims: Vec<usize>,
    pub block: BlockType,
    pub content: Content,
}

/// What it is.
pub(super) enum Content {
    /// The codes of a projection.
    Ternary { rows: usize, cols: usize },
    /// Floats that the checkpoint stores as this type.
    Floats { stored: BlockType },
}

impl Planned {
    /// Bytes in the file.
    pub fn bytes(&self) -> u64 {
        let (weights, bytes) = self.block.block();
        let elements: usize = self.dims.iter().product();
        (elements / weights * bytes + self.block.tail()) as u64
    }

    /// Hands the bytes to `put`, in order.
    ///
    /// # Errors
    /// What cannot be read, or be held by the type; and those of `put`.
    pub fn write(
        &self,
        config: &Config,
        checkpoint: &Checkpoint,
        quantization: Quantization,
        mut put: impl FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        match self.content {
            Content::Ternary { rows, cols } => {
                put(&self.codes(config, checkpoint, (rows, cols), quantization)?)
            }
            Content::Floats { stored } if stored == self.block => {
                checkpoint.bytes_in_pieces(&self.source, put)
            }
            Content::Floats { .. } => {
                let (weights, bytes) = self.block.block();
                let mut data = Vec::new();
                checkpoint.floats_in_pieces(&self.source, weights, |floats| {
                    data.resize(floats.len() / weights * bytes, 0);
                    let blocks = data.chunks_exact_mut(bytes);
                    for (floats, block) in floats.chunks_exact(weights).zip(blocks) {
                        let rounded = self.block.quantize(floats, block);
                        rounded.map_err(|reason| checkpoint.wrong(&self.source, reason))?;
                    }
                    put(&data)
                })
            }
        }
    }

    /// The blocks of a projection, its rows in the order of the file.
    fn codes(
        &self,
        config: &Config,
        checkpoint: &Checkpoint,
        (rows, cols): (usize, usize),
        quantization: Quantization,
    ) -> Result<Vec<u8>> {
        let wrong = |reason: String| checkpoint.wrong(&self.source, reason);
        let weight = ternary(checkpoint, &self.source, (rows, cols), quantization)?;
        let packed = weight.to_packed().map_err(|e| wrong(e.to_string()))?;
        let order = RowOrder::of_projection(&self.name, config);
        let (weights, bytes) = self.block.block();
        let mut data = vec![0; self.bytes() as usize];
        let mut codes = vec![0; cols];
        let halves = self.halves(weight.scale()).map_err(wrong)?;
        for row in 0..rows {
            let (field, byte) = (row / (rows / 4), row % (rows / 4));
            for (code, byte) in codes.iter_mut().zip(&packed[byte * cols..][..cols]) {
                *code = byte >> (2 * field) & 3;
            }
            let at = order.stored(row) * (cols / weights * bytes);
            let blocks = data[at..].chunks_exact_mut(bytes);
            for (codes, block) in codes.chunks_exact(weights).zip(blocks) {
                match halves {
                    Some(halves) => block.copy_from_slice(&halves[usize::from(codes[0])]),
                    None => self.block.pack(codes, weight.scale(), block).map_err(wrong)?,
                }
            }
        }
        if self.block == BlockType::I2S {
            let at = data.len() - self.block.tail();
            data[at..at + 4].copy_from_slice(&weight.scale().to_le_bytes());
        }
        Ok(data)
    }

    /// The bytes of the three weights where a code has no block of its own.
    fn halves(&self, scale: f32) -> Result<Option<[[u8; 2]; 3]>, String> {
        if self.block != BlockType::F16 {
            return Ok(None);
        }
        let scale = self.block.half_scale(scale)?;
        Ok(Some([-scale, f16::ZERO, scale].map(f16::to_le_bytes)))
    }
}
