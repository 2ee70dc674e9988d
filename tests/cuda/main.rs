//! The CUDA kernels, compiled for the host, against the CPU's ops, bit for bit.
//!
//! Each launch is the one that a device gets. It runs several times, with the threads taking turns in other orders; a barrier
//! that is missing shows as a result that depends on the order. Buffers end where memory ends.
//!
//! `BITNET_CUDA_PTX=FOLDER` takes the kernels from nvcc's PTX instead, and executes that (`scripts/cuda_check.sh`).

#![cfg(cuda_emulator)]
#![allow(clippy::unwrap_used)] // test code

mod attention;
mod elementwise;
mod emulator;
mod interpreter;
mod optimizer;
mod ternary;
mod training;
mod vocabulary;

/// A reproducible sequence of values from −1 to 1.
fn values(len: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9) | 1;
    let next = move || {
        // xorshift32 (G. Marsaglia, 2003)
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        (state >> 8) as f32 / (1 << 23) as f32 - 1.
    };
    std::iter::repeat_with(next).take(len).collect()
}

/// Rows of `width` values, `stride` apart, as a view into a longer buffer has them; between them is NaN.
fn spread(rows: &[f32], width: usize, stride: usize) -> Vec<f32> {
    let mut spread = vec![f32::NAN; (rows.len() / width).max(1) * stride];
    for (row, out) in rows.chunks(width).zip(spread.chunks_mut(stride)) {
        out[..width].copy_from_slice(row);
    }
    spread.truncate(spread.len() - (stride - width));
    spread
}

/// The same bits, or NaN in both.
fn assert_same(found: &[f32], expected: &[f32], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        let same = found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan();
        assert!(same, "{what}: {found:e} is not {expected:e} at {i}");
    }
}
