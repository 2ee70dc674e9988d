// Cross-entropy of rows of logits, and its gradient. Sums have the CPU's order (`kernels/exp.rs`, `kernels/dense.rs`).

#include "exp.cuh"
#include "reduce.cuh"

/// Values of a row that are in shared memory together: a multiple of the lanes.
constexpr unsigned LOSS_TILE = 4096;

struct LossShared {
    float tile[LOSS_TILE];
    float max[ROW_THREADS / WARP];
};

/// Of each row: its largest logit, Σ exp(logit − that), and the logit of its target: `out` (rows, 3). Grid: (rows).
extern "C" __global__ void __launch_bounds__(ROW_THREADS) exponential_sums(
    const float* __restrict__ logits, unsigned width, const unsigned* __restrict__ targets, float* __restrict__ out) {
    __shared__ LossShared shared;
    size_t row = blockIdx.x;
    logits += row * width;
    float max = __uint_as_float(0xff800000u); // −∞
    for (unsigned i = threadIdx.x; i < width; i += ROW_THREADS) max = Max::apply(logits[i], max);
    max = block_reduce<Max>(max, shared.max);
    float sum = 0.f;
    for (unsigned start = 0; start < width; start += LOSS_TILE) {
        unsigned count = min(LOSS_TILE, width - start);
        __syncthreads(); // the sums have read the tile before
        for (unsigned i = threadIdx.x; i < count; i += ROW_THREADS) shared.tile[i] = exp_f32(logits[start + i] - max);
        __syncthreads();
        if (threadIdx.x < SUM_LANES) {
            for (unsigned i = threadIdx.x; i < count; i += SUM_LANES) sum += shared.tile[i];
        }
    }
    if (threadIdx.x < WARP) {
        sum = sum_lanes(sum);
        if (threadIdx.x == 0) {
            out[3 * row] = max;
            out[3 * row + 1] = sum;
            out[3 * row + 2] = logits[targets[row]];
        }
    }
}

/// Elements of a block.
constexpr unsigned LOSS_ELEMENTS = 1024;

/// Logits become (exp(logit − log_sums[row]) − onehot(target)) · scale. Grid: (rows, width / 1024 rounded up), any block.
extern "C" __global__ void softmax_minus_onehot(
    float* __restrict__ logits, unsigned width, const unsigned* __restrict__ targets, const float* __restrict__ log_sums,
    float scale) {
    size_t row = blockIdx.x;
    unsigned end = min(width, (blockIdx.y + 1) * LOSS_ELEMENTS), target = targets[row];
    float log_sum = log_sums[row];
    logits += row * width;
    for (unsigned i = blockIdx.y * LOSS_ELEMENTS + threadIdx.x; i < end; i += blockDim.x) {
        float value = exp_f32(logits[i] - log_sum) * scale;
        logits[i] = i == target ? value - scale : value;
    }
}
