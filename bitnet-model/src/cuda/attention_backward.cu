// The softmax of attention backward: ds = p·(dp − Σ p·dp)·scale, of scores that become p on the way. Products of matrices around
// it are `gemm.cu`'s.

#include "exp.cuh"
#include "reduce.cuh"

/// `scores` and `gradients` (heads, queries, keys), which hold s and dp, become p and ds; 0 where a query does not see the key.
/// `visible` (queries): the first position that each sees, and the one behind its last; key 0 is position `begin`.
/// Grid: (queries, heads).
extern "C" __global__ void __launch_bounds__(ROW_THREADS) softmax_backward(
    float* __restrict__ scores, float* __restrict__ gradients, const uint2* __restrict__ visible, unsigned begin,
    unsigned keys, float scale) {
    __shared__ float warps[ROW_THREADS / WARP];
    __shared__ float sums[2];
    uint2 seen = visible[blockIdx.x];
    unsigned first = seen.x - begin, count = seen.y - seen.x;
    size_t row = (size_t(blockIdx.y) * gridDim.x + blockIdx.x) * keys;
    float *p = scores + row + first, *ds = gradients + row + first;
    float max = __uint_as_float(0xff800000u); // −∞
    for (unsigned i = threadIdx.x; i < count; i += ROW_THREADS) max = Max::apply(p[i], max);
    max = block_reduce<Max>(max, warps);
    for (unsigned i = threadIdx.x; i < count; i += ROW_THREADS) p[i] = exp_f32(p[i] - max);
    __syncthreads();
    if (threadIdx.x < WARP) {
        float sum = 0.f; // both halves of the warp have the same
        for (unsigned i = threadIdx.x % SUM_LANES; i < count; i += SUM_LANES) sum += p[i];
        sum = sum_lanes(sum);
        if (threadIdx.x == 0) sums[0] = sum;
    }
    __syncthreads();
    for (unsigned i = threadIdx.x; i < count; i += ROW_THREADS) p[i] = p[i] / sums[0];
    __syncthreads();
    if (threadIdx.x < WARP) {
        float sum = 0.f;
        for (unsigned i = threadIdx.x % SUM_LANES; i < count; i += SUM_LANES) sum = fmaf(p[i], ds[i], sum);
        sum = sum_lanes(sum);
        if (threadIdx.x == 0) sums[1] = sum;
    }
    __syncthreads();
    for (unsigned key = threadIdx.x; key < keys; key += ROW_THREADS) {
        bool inside = key >= first && key < first + count;
        float value = inside ? scores[row + key] * (gradients[row + key] - sums[1]) * scale : 0.f;
        if (!inside) scores[row + key] = 0.f;
        gradients[row + key] = value;
    }
}
