// Reductions of a warp and of a block.
//
// Sums of floats have the order of the CPU's kernels (`kernels/dense.rs`): sixteen partial sums, lane l taking the terms
// l, l + 16, l + 32, …, and then lane l takes lane l + 8, l + 4, l + 2 and l + 1. Integers and maxima have no order.

#pragma once

constexpr unsigned WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffff;
/// Partial sums of a sum of floats.
constexpr unsigned SUM_LANES = 16;
/// Terms of a chain of fused products, of which the products of training add up several (`DEPTH` in `ops/gemm`).
constexpr unsigned CHAIN = 512;
/// Threads of a block of the kernels that take a row each.
constexpr unsigned ROW_THREADS = 256;

/// The sum of the sixteen lanes of each half of a warp, in all of its lanes: addition commutes, so a butterfly adds as the tree
/// does.
__device__ __forceinline__ float sum_lanes(float x) {
#pragma unroll
    for (unsigned step = SUM_LANES / 2; step > 0; step /= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
    return x;
}

struct Add {
    template <class T> __device__ __forceinline__ static T apply(T a, T b) { return a + b; }
};

struct Max {
    /// `b` where `a` is NaN.
    template <class T> __device__ __forceinline__ static T apply(T a, T b) { return a > b ? a : b; }
};

/// All lanes of a warp together, in every lane.
template <class Op, class T> __device__ __forceinline__ T warp_reduce(T x) {
#pragma unroll
    for (unsigned step = WARP / 2; step > 0; step /= 2) x = Op::apply(x, __shfl_xor_sync(ALL_LANES, x, step));
    return x;
}

/// All threads of a block of `ROW_THREADS` together, in every thread. `warps` has a place for each warp and is free for
/// another use behind the next barrier.
template <class Op, class T> __device__ __forceinline__ T block_reduce(T x, T* warps) {
    x = warp_reduce<Op>(x);
    if (threadIdx.x % WARP == 0) warps[threadIdx.x / WARP] = x;
    __syncthreads();
    x = warps[0];
#pragma unroll
    for (unsigned warp = 1; warp < ROW_THREADS / WARP; warp++) x = Op::apply(x, warps[warp]);
    return x;
}
