//! I2_S of bitnet.cpp: 128 codes in 32 bytes, byte `j` holds those of weights j, 32 + j, 64 + j and 96 + j, high bits
//! first. Behind the last block of a tensor stand its scale, an f32, and 28 bytes that mean nothing.
//!
//! Builds of bitnet.cpp for ARM used to write blocks of 64 codes under the same number. Nothing in a file tells which it
//! has; the published ones are of 128.

pub(super) const WEIGHTS: usize = 128;
pub(super) const BYTES: usize = 32;
pub(super) const TAIL: usize = 32;

pub(super) fn codes(block: &[u8], codes: &mut [u8]) {
    for (group, codes) in codes.chunks_exact_mut(BYTES).enumerate() {
        for (code, byte) in codes.iter_mut().zip(block) {
            *code = byte >> (6 - 2 * group) & 3;
        }
    }
}

pub(super) fn pack(codes: &[u8], block: &mut [u8]) {
    for (j, byte) in block.iter_mut().enumerate() {
        *byte = codes[j] << 6 | codes[32 + j] << 4 | codes[64 + j] << 2 | codes[96 + j];
    }
}
