// Dropout whose randomness is a hash of token and column, as `lora/noise.rs` of bitnet-train has it on the CPU. Bound by memory.

/// Columns of a block.
constexpr unsigned DROPOUT_COLUMNS = 1024;

/// A word of a row: a bijection of 32 bits with little bias (`lowbias32` of Chris Wellons' hash prospector).
__device__ __forceinline__ unsigned dropout_word(unsigned row, unsigned column) {
    unsigned x = row + column * 0x9e3779b9u;
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    return x ^ x >> 16;
}

/// `y` (rows, width) of dense rows `x`: 0 where the word of row's `keys` and column is below `below`, else x · `scale`. Grid:
/// (rows, width / 1024 rounded up), any block.
extern "C" __global__ void dropout(
    const float* __restrict__ x, unsigned width, const unsigned* __restrict__ keys, unsigned below, float scale,
    float* __restrict__ y) {
    size_t row = blockIdx.x;
    unsigned end = min(width, (blockIdx.y + 1) * DROPOUT_COLUMNS), key = keys[row];
    x += row * width;
    y += row * width;
    for (unsigned i = blockIdx.y * DROPOUT_COLUMNS + threadIdx.x; i < end; i += blockDim.x)
        y[i] = dropout_word(key, i) < below ? 0.f : x[i] * scale;
}
