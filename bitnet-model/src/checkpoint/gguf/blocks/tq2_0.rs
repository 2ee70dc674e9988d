//! TQ2_0: 256 codes in 64 bytes and an f16 scale. Byte `j` of a half holds the codes of weights j, 32 + j, 64 + j and
//! 96 + j of that half, low bits first.

pub(super) const WEIGHTS: usize = 256;
pub(super) const BYTES: usize = 66;
pub(super) const SCALE: usize = 64;

pub(super) fn codes(block: &[u8], codes: &mut [u8]) {
    for (half, codes) in block[..SCALE].chunks_exact(32).zip(codes.chunks_exact_mut(128)) {
        for (field, codes) in codes.chunks_exact_mut(32).enumerate() {
            for (code, byte) in codes.iter_mut().zip(half) {
                *code = byte >> (2 * field) & 3;
            }
        }
    }
}

pub(super) fn pack(codes: &[u8], bytes: &mut [u8]) {
    for (half, codes) in bytes.chunks_exact_mut(32).zip(codes.chunks_exact(128)) {
        for (j, byte) in half.iter_mut().enumerate() {
            *byte = codes[j] | codes[32 + j] << 2 | codes[64 + j] << 4 | codes[96 + j] << 6;
        }
    }
}
