// Ternary weights on the device: one layout for products with vectors and with matrices.
//
// Matrices with the same inputs are stacked, each padded to bands of 16 rows, and columns to chunks of 128. The 512 bytes
// of a chunk of a band are one 16-byte load of a warp: with lane = 4·g + t, word (r, h) of a lane, r and h in {0, 1}, holds
// the codes of row g + 8·r in columns 16·(t + 4·h) … + 15 of the chunk. Within a word it is the CPU's tile (`kernels/tile.rs`):
// bits 2·i of byte j are the code, weight + 1, of column 4·i + j. So `(word >> 2·i) & 0x03030303` are four codes that meet
// four neighbouring activations, which is an operand of dp4a as well as of mma.
//
// A code is not negative, and Σ weight·x = Σ code·x − Σx: Σx is taken away once, at the end. What is between is bounded by
// 2·128·cols and fits an int for cols < 2²³. Padding has code 1, and the activations there are 0.

#pragma once

#include "reduce.cuh"

/// Rows of a band.
constexpr unsigned BAND = 16;
/// Columns of a chunk.
constexpr unsigned CHUNK = 128;

/// What a band of rows belongs to.
struct Band {
    /// Of its matrix; multiplies.
    float scale;
    /// Column of its first row in the product with the whole stack.
    unsigned first;
    /// Rows that are not padding.
    unsigned rows;
};

/// Rows of activations as `quantize_rows` leaves them.
struct Activations {
    /// (tokens, chunks · 128) int8.
    const int4* codes;
    const int* sums;
    const float* factors;
};

/// A run of bands of a stack.
struct Weights {
    /// (bands, chunks, 32 lanes), from the run's first band on.
    const uint4* codes;
    const Band* bands;
    unsigned count;
    unsigned chunks;
    /// `first` of the run's first band: column 0 of the result.
    unsigned first;
};

/// Codes of columns 4·i … 4·i + 3 of a word, a byte each.
__device__ __forceinline__ unsigned codes_of(unsigned word, unsigned i) { return (word >> (2 * i)) & 0x03030303u; }

/// `weight_scale / a · Σ`, in the CPU's order of operations.
__device__ __forceinline__ float rescale(int sum, float weight_scale, float factor) {
    return float(sum) * (weight_scale / factor);
}
