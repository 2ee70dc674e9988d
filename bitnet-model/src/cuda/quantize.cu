// Activations to integers, a row a block. Reads each value twice, the second time from a cache, and writes a byte for it, or a float.

#include "quantize.cuh"

/// `codes` (rows, padded) int8, `sums` and `factors` (rows) of `x`, rows of `width` values that begin `x_stride` values apart.
/// Grid: (rows).
extern "C" __global__ void __launch_bounds__(ROW_THREADS) quantize_rows(
    const float* __restrict__ x, size_t x_stride, unsigned width, unsigned padded, float levels, unsigned half_up,
    int* __restrict__ codes, int* __restrict__ sums, float* __restrict__ factors) {
    __shared__ QuantizeShared shared;
    size_t row = blockIdx.x;
    x += row * x_stride;
    auto value = [=](unsigned i) { return x[i]; };
    quantize_row(value, width, padded, levels, half_up, {codes + row * (padded / 4), sums + row, factors + row}, shared);
}

/// `y` (rows, width) of `x`, rows that begin `x_stride` values apart: x + `lambda` · (code / a − x), of 1 code / a itself. Grid:
/// (rows).
extern "C" __global__ void __launch_bounds__(ROW_THREADS) blend_rows(
    const float* __restrict__ x, size_t x_stride, unsigned width, float levels, unsigned half_up, float lambda,
    float* __restrict__ y) {
    __shared__ QuantizeShared shared;
    x += blockIdx.x * x_stride;
    y += size_t(blockIdx.x) * width;
    float a = row_factor([=](unsigned i) { return x[i]; }, width, levels, shared);
    for (unsigned i = threadIdx.x; i < width; i += ROW_THREADS) {
        float grid = float(quantize(x[i], a, half_up)) / a;
        y[i] = lambda == 1.f ? grid : x[i] + lambda * (grid - x[i]);
    }
}
