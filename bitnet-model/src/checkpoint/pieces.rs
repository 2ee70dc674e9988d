//! A tensor in pieces: what is too large to be in memory at once is copied, converted and quantized so.

use half::{
    bf16, f16,
    slice::{HalfBitsSliceExt, HalfFloatSliceExt},
};

use super::{Checkpoint, Dtype, is_float};
use crate::error::Result;

/// Bytes of a piece, as stored: 4 MiB keep a disk busy.
const PIECE_BYTES: usize = 4 << 20;

impl Checkpoint {
    /// Calls `visit` with the bytes of the tensor `name`, as stored, one piece after another.
    ///
    /// # Errors
    /// No such tensor, a file that cannot be read, and those of `visit`.
    pub(crate) fn bytes_in_pieces(
        &self,
        name: &str,
        visit: impl FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        self.pieces(name, 1, visit)
    }

    /// Calls `visit` with the elements of the float tensor `name` as f32, so many at a time that they are whole `groups`;
    /// widening is exact.
    ///
    /// # Errors
    /// No such tensor, not one of floats, no whole groups, a file that cannot be read, and those of `visit`.
    pub(crate) fn floats_in_pieces(
        &self,
        name: &str,
        group: usize,
        mut visit: impl FnMut(&[f32]) -> Result<()>,
    ) -> Result<()> {
        let dtype = self.find(name)?.1.dtype;
        if !is_float(dtype) {
            return Err(self.wrong(name, format!("expected floats, found {dtype}")));
        }
        let mut floats = Vec::new();
        self.pieces(name, group * (dtype.bitsize() / 8), |bytes| {
            if dtype == Dtype::F32 {
                return visit(bytemuck::cast_slice(bytes));
            }
            let halves: &[u16] = bytemuck::cast_slice(bytes);
            floats.resize(halves.len(), 0.);
            match dtype {
                Dtype::F16 => halves.reinterpret_cast::<f16>().convert_to_f32_slice(&mut floats),
                _ => halves.reinterpret_cast::<bf16>().convert_to_f32_slice(&mut floats),
            }
            visit(&floats)
        })
    }

    /// Pieces whose bytes are multiples of `unit`.
    fn pieces(
        &self,
        name: &str,
        unit: usize,
        mut visit: impl FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let (shard, entry) = self.find(name)?;
        if !entry.bytes.is_multiple_of(unit) {
            let reason = format!("its {} bytes are no whole groups of {unit}", entry.bytes);
            return Err(self.wrong(name, reason));
        }
        let piece = (PIECE_BYTES / unit).max(1).saturating_mul(unit).min(entry.bytes);
        // As numbers of 8 bytes, so that floats are aligned.
        let mut buffer = vec![0u64; piece.div_ceil(8)];
        for start in (0..entry.bytes).step_by(piece.max(1)) {
            let len = piece.min(entry.bytes - start);
            let bytes = &mut bytemuck::cast_slice_mut(&mut buffer)[..len];
            self.shards[*shard]
                .1
                .read_exact_at(bytes, entry.start + start as u64)
                .map_err(|e| self.wrong(name, format!("cannot be read: {e}")))?;
            visit(bytes)?;
        }
        Ok(())
    }
}
