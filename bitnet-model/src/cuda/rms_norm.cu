// Root-mean-square norm, y = weight · (x · rsqrt(mean(x²) + ε)), a row a block; alone, or quantized on the way.
//
// The sum of squares has the CPU's order, and so its bits: sixteen chains of fused products. The row comes into shared
// memory with all threads; the chains, of width/16 steps of four cycles each, are then what takes time: 0.4 µs for 2560
// values at 1.7 GHz, 1 µs for 6912. That buys results that do not differ from the CPU's, where one bit can flip an int8 code.

#include "quantize.cuh"

/// Values of a row that are in shared memory together: a multiple of the lanes.
constexpr unsigned TILE = 4096;

struct NormShared {
    float tile[TILE];
    float inverse_rms;
};

/// rsqrt(mean(x²) + ε) in every thread of a block.
__device__ __forceinline__ float inverse_rms(const float* __restrict__ x, unsigned width, float eps, NormShared& shared) {
    float sum = 0.f;
    for (unsigned start = 0; start < width; start += TILE) {
        unsigned count = min(TILE, width - start);
        __syncthreads(); // the chains have read the tile before
        for (unsigned i = threadIdx.x; i < count; i += ROW_THREADS) shared.tile[i] = x[start + i];
        __syncthreads();
        if (threadIdx.x < SUM_LANES) {
#pragma unroll 16
            for (unsigned i = threadIdx.x; i < count; i += SUM_LANES) sum = fmaf(shared.tile[i], shared.tile[i], sum);
        }
    }
    if (threadIdx.x < WARP) {
        sum = sum_lanes(sum);
        if (threadIdx.x == 0) shared.inverse_rms = 1.f / sqrtf(sum / float(width) + eps);
    }
    __syncthreads();
    return shared.inverse_rms;
}

/// `y` (rows, width), dense, of `x`, rows that begin `x_stride` values apart. Grid: (rows).
extern "C" __global__ void __launch_bounds__(ROW_THREADS) rms_norm(
    const float* __restrict__ x, size_t x_stride, const float* __restrict__ weight, unsigned width, float eps,
    float* __restrict__ y) {
    __shared__ NormShared shared;
    size_t row = blockIdx.x;
    x += row * x_stride;
    y += row * width;
    float r = inverse_rms(x, width, eps, shared);
    for (unsigned i = threadIdx.x; i < width; i += ROW_THREADS) y[i] = weight[i] * (x[i] * r);
}

/// What `quantize_rows` makes of the result of `rms_norm`, which is not written. Grid: (rows).
extern "C" __global__ void __launch_bounds__(ROW_THREADS) rms_norm_quantize(
    const float* __restrict__ x, size_t x_stride, const float* __restrict__ weight, unsigned width, float eps,
    unsigned padded, float levels, unsigned half_up, int* __restrict__ codes, int* __restrict__ sums,
    float* __restrict__ factors) {
    __shared__ NormShared norm;
    __shared__ QuantizeShared shared;
    size_t row = blockIdx.x;
    x += row * x_stride;
    float r = inverse_rms(x, width, eps, norm);
    auto value = [=](unsigned i) { return weight[i] * (x[i] * r); };
    quantize_row(value, width, padded, levels, half_up, {codes + row * (padded / 4), sums + row, factors + row}, shared);
}

/// The gradient of the norm's input: with u = dy·weight and r the inverse root, dx = r·u − x·r³·mean(u·x). `inverses` (rows) are
/// the r. All rows are dense. Grid: (rows).
extern "C" __global__ void __launch_bounds__(ROW_THREADS) rms_norm_backward(
    const float* __restrict__ x, const float* __restrict__ weight, const float* __restrict__ dy, unsigned width, float eps,
    float* __restrict__ dx, float* __restrict__ inverses) {
    __shared__ NormShared shared;
    __shared__ float shrink;
    size_t row = blockIdx.x;
    x += row * width;
    dy += row * width;
    dx += row * width;
    float r = inverse_rms(x, width, eps, shared);
    if (threadIdx.x < WARP) {
        // Both halves of the warp have the same sum.
        float sum = 0.f;
        for (unsigned i = threadIdx.x % SUM_LANES; i < width; i += SUM_LANES) sum = fmaf(dy[i] * weight[i], x[i], sum);
        float mean = sum_lanes(sum) / float(width);
        if (threadIdx.x == 0) {
            shrink = mean * r * r * r;
            inverses[row] = r;
        }
    }
    __syncthreads();
    float s = shrink;
    for (unsigned i = threadIdx.x; i < width; i += ROW_THREADS) dx[i] = r * (dy[i] * weight[i]) - x[i] * s;
}

/// Rows whose shares are added up one after another: `ROWS` in `ops/rms_norm.rs`.
constexpr unsigned SHARE_ROWS = 64;

/// What 64 rows give of the gradient of the norm's weight, Σ dy·x·r: `shares` (rows / 64 rounded up, width). Grid: (width / 256
/// rounded up, shares).
extern "C" __global__ void __launch_bounds__(ROW_THREADS) rms_norm_shares(
    const float* __restrict__ x, const float* __restrict__ dy, const float* __restrict__ inverses, unsigned rows,
    unsigned width, float* __restrict__ shares) {
    unsigned col = blockIdx.x * ROW_THREADS + threadIdx.x, first = blockIdx.y * SHARE_ROWS;
    if (col >= width) return;
    float sum = 0.f;
    for (unsigned row = first; row < min(rows, first + SHARE_ROWS); row++)
        sum += dy[size_t(row) * width + col] * x[size_t(row) * width + col] * inverses[row];
    shares[size_t(blockIdx.y) * width + col] = sum;
}

/// `sums` (width): the sum of `rows` rows, one after another. Grid: (width / 256 rounded up).
extern "C" __global__ void __launch_bounds__(ROW_THREADS)
sum_rows(const float* __restrict__ x, unsigned rows, unsigned width, float* __restrict__ sums) {
    unsigned col = blockIdx.x * ROW_THREADS + threadIdx.x;
    if (col >= width) return;
    float sum = 0.f;
    for (unsigned row = 0; row < rows; row++) sum += x[size_t(row) * width + col];
    sums[col] = sum;
}
