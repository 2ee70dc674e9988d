// Activations to int8, a row a block. Reads each value twice, the second time from a cache, and writes a byte for it.

#include "quantize.cuh"

/// `codes` (rows, padded) int8, `sums` and `factors` (rows) of `x`, rows of `width` values that begin `x_stride` values apart.
/// Grid: (rows).
extern "C" __global__ void __launch_bounds__(ROW_THREADS) quantize_rows(
    const float* __restrict__ x, size_t x_stride, unsigned width, unsigned padded, unsigned half_up,
    int* __restrict__ codes, int* __restrict__ sums, float* __restrict__ factors) {
    __shared__ QuantizeShared shared;
    size_t row = blockIdx.x;
    x += row * x_stride;
    auto value = [=](unsigned i) { return x[i]; };
    quantize_row(value, width, padded, half_up, {codes + row * (padded / 4), sums + row, factors + row}, shared);
}
