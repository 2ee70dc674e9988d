// Products with rows of floats, and rows by their numbers: the exact output head, projections of floats, the embedding.
//
// A sum has the CPU's order (`kernels/dense.rs`): sixteen chains of fused products, one a lane of half a warp, then a tree. So
// half a warp has a row, whose sixteen neighbouring columns it reads together: 32 bytes of bfloat16, a sector. It takes four
// rows and four tokens at once, each value for all it meets. Bound by memory for one token: 2 bytes a weight in bfloat16.
//
// Blocks of tokens come first in the grid: those that share rows run together and find them in the second-level cache.

#include "floats.cuh"
#include "reduce.cuh"

constexpr unsigned DENSE_THREADS = 256;
/// Rows of half a warp, and of a block.
constexpr unsigned LANE_ROWS = 4;
constexpr unsigned DENSE_ROWS = DENSE_THREADS / SUM_LANES * LANE_ROWS;
/// Tokens of a block.
constexpr unsigned DENSE_TOKENS = 4;
static_assert(LANE_ROWS * DENSE_TOKENS <= SUM_LANES, "a lane for each result");

/// Rows in memory, one behind another, or some of them.
struct DenseRows {
    const void* values;
    /// (rows): which; none: all in order.
    const unsigned* ids;
    unsigned rows;
    unsigned cols;
};

template <class T>
__device__ __forceinline__ void
dense_product(const float* x, size_t x_stride, unsigned tokens, const DenseRows& w, float* y) {
    unsigned l = threadIdx.x % SUM_LANES, first = blockIdx.x * DENSE_TOKENS;
    unsigned count = min(DENSE_TOKENS, tokens - first);
    unsigned row0 = blockIdx.y * DENSE_ROWS + threadIdx.x / SUM_LANES * LANE_ROWS;
    x += first * x_stride;
    const typename T::Stored* rows[LANE_ROWS];
#pragma unroll
    for (unsigned r = 0; r < LANE_ROWS; r++) {
        unsigned row = min(row0 + r, w.rows - 1); // rows behind the last one are computed as if they were it, and not written
        rows[r] = static_cast<const typename T::Stored*>(w.values) + size_t(w.ids ? w.ids[row] : row) * w.cols;
    }
    float sums[DENSE_TOKENS][LANE_ROWS] = {};
    unsigned steps = (w.cols + SUM_LANES - 1) / SUM_LANES;
#pragma unroll 4
    for (unsigned step = 0; step < steps; step++) {
        unsigned i = step * SUM_LANES + l;
        bool inside = i < w.cols;
        float values[LANE_ROWS];
#pragma unroll
        for (unsigned r = 0; r < LANE_ROWS; r++) values[r] = inside ? T::widen(rows[r][i]) : 0.f;
#pragma unroll
        for (unsigned t = 0; t < DENSE_TOKENS; t++) {
            if (t >= count) break;
            float value = inside ? x[t * x_stride + i] : 0.f;
#pragma unroll
            for (unsigned r = 0; r < LANE_ROWS; r++) sums[t][r] = fmaf(value, values[r], sums[t][r]);
        }
    }
#pragma unroll
    for (unsigned t = 0; t < DENSE_TOKENS; t++) {
        if (t >= count) break;
#pragma unroll
        for (unsigned r = 0; r < LANE_ROWS; r++) {
            float sum = sum_lanes(sums[t][r]);
            if (l == t * LANE_ROWS + r && row0 + r < w.rows) y[size_t(first + t) * w.rows + row0 + r] = sum;
        }
    }
}

/// `y` (ids, cols) f32: the rows `ids`; NaN for an id that is no row of the `count` there are.
template <class T>
__device__ __forceinline__ void
gather_row(const unsigned* ids, const typename T::Stored* values, unsigned count, unsigned cols, float* y) {
    unsigned id = ids[blockIdx.x];
    values += size_t(id) * cols;
    y += size_t(blockIdx.x) * cols;
    for (unsigned i = threadIdx.x; i < cols; i += blockDim.x)
        y[i] = id < count ? T::widen(values[i]) : __uint_as_float(0x7fc00000u);
}

/// Row `ids[i]` of `y` becomes row i of `x` (count, cols). Grid: (count), any block.
extern "C" __global__ void
scatter_rows(const unsigned* __restrict__ ids, const float* __restrict__ x, unsigned cols, float* __restrict__ y) {
    x += size_t(blockIdx.x) * cols;
    y += size_t(ids[blockIdx.x]) * cols;
    for (unsigned i = threadIdx.x; i < cols; i += blockDim.x) y[i] = x[i];
}

/// `dense_product_*`: `y` (tokens, w.rows) of `x`, rows that begin `x_stride` values apart. Grid: (tokens / 4, w.rows / 64),
/// rounded up. `gather_rows_*`: grid (ids), any block.
#define DENSE(NAME, TYPE)                                                                                              \
    extern "C" __global__ void __launch_bounds__(DENSE_THREADS) dense_product_##NAME(                                  \
        const float* __restrict__ x, size_t x_stride, unsigned tokens, const DenseRows w, float* __restrict__ y) {     \
        dense_product<TYPE>(x, x_stride, tokens, w, y);                                                                \
    }                                                                                                                  \
    extern "C" __global__ void gather_rows_##NAME(                                                                     \
        const unsigned* __restrict__ ids, const TYPE::Stored* __restrict__ values, unsigned count, unsigned cols,      \
        float* __restrict__ y) {                                                                                       \
        gather_row<TYPE>(ids, values, count, cols, y);                                                                 \
    }

DENSE(f32, F32)
DENSE(f16, F16)
DENSE(bf16, Bf16)
