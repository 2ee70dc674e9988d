//! A file's tensors as a Hub checkpoint has them, made as they are read.
//!
//! Ternary codes come in the Hub's packing, at 2 bits a weight, and go from there into tiles a few rows at a time; floats
//! come as stored; blocks of a few bits come as f32. Nothing of it stays in memory.

use std::{io, sync::Arc};

use super::blocks::{BlockType, MAX_BLOCK};
use crate::{
    checkpoint::{Dtype, header::Entry, source::Source, spans::Spans},
    config::{Config, Family},
};

/// Rows are read together up to this size.
const RUN_BYTES: usize = 256 << 10;

/// In which order rows lie in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RowOrder {
    /// As here.
    Same,
    /// Rotary embeddings turn rows i and i + head_dim / 2 of a head together; in the file these are neighbours.
    Interleaved { head_dim: usize },
}

impl RowOrder {
    /// That of the projection `name` of a model.
    pub fn of_projection(name: &str, config: &Config) -> Self {
        let turns = name.ends_with(".attn_q.weight") || name.ends_with(".attn_k.weight");
        match config.family == Family::Llama && turns {
            true => Self::Interleaved { head_dim: config.head_dim },
            false => Self::Same,
        }
    }

    /// Where row `row` lies.
    pub fn stored(self, row: usize) -> usize {
        match self {
            Self::Same => row,
            Self::Interleaved { head_dim } => {
                let (head, row) = (row / head_dim, row % head_dim);
                let (half, pair) = (row / (head_dim / 2), row % (head_dim / 2));
                head * head_dim + 2 * pair + half
            }
        }
    }
}

/// A matrix in the file.
#[derive(Clone, Debug)]
pub(super) struct Matrix {
    /// Its name in the file, for errors.
    pub name: String,
    /// The first byte, from the start of the file.
    pub start: u64,
    pub block: BlockType,
    /// Rows and columns; whole blocks.
    pub shape: (usize, usize),
    pub order: RowOrder,
    /// The scale that all blocks must have, or its negative, or 0; unless they have none. Floats that have one are codes: all of
    /// them are it, its negative or 0.
    pub scale: Option<f32>,
}

#[derive(Debug)]
enum Content {
    Number(f32),
    Matrix(Matrix),
}

/// All tensors, one after the other.
#[derive(Debug)]
pub(in crate::checkpoint) struct View {
    source: Arc<Source>,
    tensors: Spans<Content>,
    entries: Vec<(String, Entry)>,
}

impl View {
    pub(super) fn new(source: Arc<Source>) -> Self {
        Self { source, tensors: Spans::default(), entries: Vec::new() }
    }

    /// Adds the tensor `name` that is one f32.
    pub(super) fn push_number(&mut self, name: String, value: f32) -> Result<(), String> {
        self.push(name, Dtype::F32, vec![1], 4, Content::Number(value))
    }

    /// Adds the tensor `name` of these dimensions: packed codes if its type is ternary, else floats.
    ///
    /// # Errors
    /// A size that cannot be represented.
    pub(super) fn push_matrix(
        &mut self,
        name: String,
        dims: Vec<usize>,
        matrix: Matrix,
    ) -> Result<(), String> {
        let dtype = matrix.dtype();
        let dims = match (dtype, matrix.shape) {
            (Dtype::U8, (rows, cols)) if rows.is_multiple_of(4) => vec![rows / 4, cols],
            (Dtype::U8, (rows, _)) => {
                return Err(format!("has {rows} rows, and four of them make a packed one"));
            }
            _ => dims,
        };
        let bytes = super::super::header::data_bytes(dtype, &dims)
            .ok_or_else(|| format!("shape {dims:?} of {dtype} is not representable"))?;
        self.push(name, dtype, dims, bytes, Content::Matrix(matrix))
    }

    fn push(
        &mut self,
        name: String,
        dtype: Dtype,
        shape: Vec<usize>,
        bytes: usize,
        content: Content,
    ) -> Result<(), String> {
        let start = self.tensors.push(bytes as u64, content);
        let start = start.ok_or("the tensors are too many bytes")?;
        self.entries.push((name, Entry { dtype, shape, start, bytes }));
        Ok(())
    }

    /// Every tensor's place in this view.
    pub fn entries(&self) -> &[(String, Entry)] {
        &self.entries
    }

    /// Bytes in all.
    pub fn len(&self) -> u64 {
        self.tensors.len()
    }

    /// Fills `buffer` from the bytes at `offset`; fails when the view ends before.
    pub fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.tensors.read_exact_at(buffer, offset, |content, at, out| match content {
            Content::Number(value) => {
                out.copy_from_slice(&value.to_le_bytes()[at as usize..][..out.len()]);
                Ok(())
            }
            Content::Matrix(matrix) => matrix.fill(&self.source, at as usize, out),
        })
    }
}

impl Matrix {
    /// Whether its elements are codes here.
    fn is_codes(&self) -> bool {
        self.block.is_ternary() || self.scale.is_some()
    }

    /// What its elements are here.
    fn dtype(&self) -> Dtype {
        match self.block {
            _ if self.is_codes() => Dtype::U8,
            BlockType::F16 => Dtype::F16,
            BlockType::Bf16 => Dtype::BF16,
            _ => Dtype::F32,
        }
    }

    /// Bytes of a row here, of floats or of codes of four rows.
    fn width(&self) -> usize {
        self.shape.1 * self.dtype().bitsize() / 8
    }

    /// Bytes of a row in the file.
    fn stored_width(&self) -> usize {
        let (weights, bytes) = self.block.block();
        self.shape.1 / weights * bytes
    }

    /// Makes the bytes from `at` on.
    fn fill(&self, source: &Source, at: usize, out: &mut [u8]) -> io::Result<()> {
        let is_stored_so = self.block.is_float();
        if is_stored_so && !self.is_codes() && self.order == RowOrder::Same {
            return source.read_exact_at(out, self.start + at as u64);
        }
        let (width, stored_width) = (self.width(), self.stored_width());
        let fields = if self.is_codes() { 4 } else { 1 };
        let (first, end) = (at / width, (at + out.len()).div_ceil(width));
        let (mut stored, mut whole) = (Vec::new(), vec![0u8; width]);
        out.fill(0);
        for field in 0..fields {
            let place = |row: usize| self.order.stored(field * (self.shape.0 / fields) + row);
            let mut row = first;
            while row < end {
                let begin = place(row);
                let longest = (end - row).min((RUN_BYTES / stored_width).max(1));
                let run = (1..longest).find(|i| place(row + i) != begin + i).unwrap_or(longest);
                stored.resize(run * stored_width, 0);
                source.read_exact_at(&mut stored, self.start + (begin * stored_width) as u64)?;
                for (row, stored) in (row..).zip(stored.chunks_exact(stored_width)) {
                    self.decode(stored, &mut whole)?;
                    // The first and the last row may be wanted in part.
                    let from = at.saturating_sub(row * width);
                    let to = width.min(at + out.len() - row * width);
                    let out = &mut out[row * width + from - at..][..to - from];
                    for (out, byte) in out.iter_mut().zip(&whole[from..to]) {
                        *out |= byte << (2 * field);
                    }
                }
                row += run;
            }
        }
        Ok(())
    }

    /// One row of the file as floats, or as one code a byte.
    fn decode(&self, stored: &[u8], row: &mut [u8]) -> io::Result<()> {
        let (weights, bytes) = self.block.block();
        if self.block.is_ternary() {
            for (block, codes) in stored.chunks_exact(bytes).zip(row.chunks_exact_mut(weights)) {
                self.block.codes(block, codes);
                self.apply_scale(block, codes)?;
            }
        } else if let Some(scale) = self.scale {
            for (weight, code) in stored.chunks_exact(bytes).zip(row) {
                *code = match self.block.float(weight) {
                    0. => 1,
                    weight if weight == scale => 2,
                    weight if weight == -scale => 0,
                    weight => return Err(self.not_ternary("weights of the size", scale, weight)),
                };
            }
        } else if weights == 1 {
            row.copy_from_slice(stored);
        } else {
            let mut floats = [0f32; MAX_BLOCK];
            let floats = &mut floats[..weights];
            for (block, row) in stored.chunks_exact(bytes).zip(row.chunks_exact_mut(4 * weights)) {
                self.block.dequantize(block, floats);
                row.copy_from_slice(bytemuck::cast_slice(floats));
            }
        }
        Ok(())
    }

    /// Turns the codes of a block into those that go with the scale of the matrix.
    fn apply_scale(&self, block: &[u8], codes: &mut [u8]) -> io::Result<()> {
        let (Some(scale), Some(of_matrix)) = (self.block.scale(block), self.scale) else {
            return Ok(());
        };
        if scale == 0. {
            codes.fill(1); // of zeros only, llama.cpp writes no scale
        } else if scale.abs() != of_matrix {
            return Err(self.not_ternary("blocks of the scale", of_matrix, scale));
        } else if scale < 0. {
            codes.iter_mut().filter(|code| **code <= 2).for_each(|code| *code = 2 - *code);
        }
        Ok(())
    }

    /// An error about two numbers that no matrix of one scale has.
    fn not_ternary(&self, what: &str, first: f32, other: f32) -> io::Error {
        io::Error::new(
            io::ErrorKind::InvalidData,
            format!(
                "`{}` of the file has {what} {first} and of {other}: it was no ternary matrix with one scale before it \
                 became {}",
                self.name,
                self.block.name()
            ),
        )
    }

    /// The scale of the matrix: in the tail, or that of its blocks.
    ///
    /// # Errors
    /// One that is no positive number.
    pub fn read_scale(&self, source: &Source) -> Result<f32, String> {
        let blocks = (self.shape.0 * self.stored_width()) as u64;
        let (_, bytes) = self.block.block();
        let unreadable = |e: io::Error| format!("cannot be read: {e}");
        let scale = if self.block == BlockType::I2S {
            let mut scale = [0; 4];
            source.read_exact_at(&mut scale, self.start + blocks).map_err(unreadable)?;
            f32::from_le_bytes(scale)
        } else {
            let mut buffer = vec![0; self.stored_width()];
            // All zeros have no scale; any will do.
            let mut found = 1.;
            for row in 0..self.shape.0 {
                let at = self.start + (row * self.stored_width()) as u64;
                source.read_exact_at(&mut buffer, at).map_err(unreadable)?;
                let scales = buffer.chunks_exact(bytes).filter_map(|block| {
                    self.block
                        .scale(block)
                        .or_else(|| self.block.is_float().then(|| self.block.float(block)))
                });
                if let Some(scale) = scales.map(f32::abs).find(|scale| *scale != 0.) {
                    found = scale;
                    break;
                }
            }
            found
        };
        match scale.is_finite() && scale > 0. {
            true => Ok(scale),
            false => Err(format!("has the scale {scale}; it must be a positive number")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interleaved_rows_are_found() {
        let order = RowOrder::Interleaved { head_dim: 6 };
        let stored: Vec<usize> = (0..12).map(|row| order.stored(row)).collect();
        assert_eq!(stored, [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]);
    }
}
