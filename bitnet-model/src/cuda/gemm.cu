// Products of matrices of floats, out = scale · a·b: the gradients of training.
//
// The CPU's order (`ops/gemm`): of each output, one chain of fused products over 512 of the depth; the chains, scaled, are
// added in order. Bound by the float units: rows · cols · depth fused products.
//
// A block has 64 × 64 outputs, a thread 4 × 4; sixteen of the depth are in shared memory together. Factors have any strides,
// so either may lie with its indices or with its depth as neighbours.

#include "floats.cuh"
#include "reduce.cuh"

constexpr unsigned PRODUCT_THREADS = 256;
/// Rows and columns of a block, and of a thread.
constexpr unsigned PRODUCT_TILE = 64;
constexpr unsigned THREAD_TILE = 4;
/// Values of the depth that are in shared memory together; divides a chain.
constexpr unsigned PRODUCT_DEPTH = 16;

struct I8 {
    using Stored = signed char;
    __device__ __forceinline__ static float widen(signed char x) { return float(x); }
};

/// A factor: the value of index i at depth d is at i · index_stride + d · depth_stride.
struct Factor {
    const void* values;
    size_t index_stride;
    size_t depth_stride;
};

struct GemmShape {
    unsigned rows;
    unsigned cols;
    unsigned depth;
    float scale;
    /// Whether to add to what is there.
    unsigned add;
    /// Whether to round values of both factors to bfloat16.
    unsigned bf16;
    /// Elements between the rows of the result, and between the matrices of a batch: of factors and result.
    size_t stride;
    size_t a_batch;
    size_t b_batch;
    size_t out_batch;
};

/// Brings 16 of the depth of 64 indices into shared memory, 0 where there is nothing.
template <class T, class Value>
__device__ __forceinline__ void stage(
    const Factor& factor, const typename T::Stored* values, unsigned first, unsigned indices, unsigned depth0, unsigned depth,
    float (&shared)[PRODUCT_DEPTH][PRODUCT_TILE + 4], Value value) {
    bool index_inner = factor.index_stride == 1;
#pragma unroll
    for (unsigned k = 0; k < PRODUCT_DEPTH * PRODUCT_TILE / PRODUCT_THREADS; k++) {
        unsigned at = threadIdx.x + k * PRODUCT_THREADS;
        unsigned i = index_inner ? at % PRODUCT_TILE : at / PRODUCT_DEPTH;
        unsigned d = index_inner ? at / PRODUCT_TILE : at % PRODUCT_DEPTH;
        bool inside = first + i < indices && depth0 + d < depth;
        size_t place = (first + i) * factor.index_stride + (depth0 + d) * factor.depth_stride;
        shared[d][i] = inside ? value(T::widen(values[place]), depth0 + d) : 0.f;
    }
}

template <class T>
__device__ __forceinline__ void
gemm(const Factor& a, const float* divisors, const Factor& b, const GemmShape& shape, float* out) {
    // 4: neighbouring depths begin in other banks.
    __shared__ float left[PRODUCT_DEPTH][PRODUCT_TILE + 4], right[PRODUCT_DEPTH][PRODUCT_TILE + 4];
    const float* a_values = static_cast<const float*>(a.values) + blockIdx.z * shape.a_batch;
    const typename T::Stored* b_values = static_cast<const typename T::Stored*>(b.values) + blockIdx.z * shape.b_batch;
    out += blockIdx.z * shape.out_batch;
    unsigned row0 = blockIdx.y * PRODUCT_TILE, col0 = blockIdx.x * PRODUCT_TILE;
    constexpr unsigned ACROSS = PRODUCT_TILE / THREAD_TILE;
    unsigned i0 = threadIdx.x / ACROSS * THREAD_TILE, j0 = threadIdx.x % ACROSS * THREAD_TILE;
    float sums[THREAD_TILE][THREAD_TILE], chain[THREAD_TILE][THREAD_TILE];
#pragma unroll
    for (unsigned i = 0; i < THREAD_TILE; i++) {
#pragma unroll
        for (unsigned j = 0; j < THREAD_TILE; j++) {
            unsigned row = row0 + i0 + i, col = col0 + j0 + j;
            sums[i][j] = shape.add && row < shape.rows && col < shape.cols ? out[row * shape.stride + col] : 0.f;
            chain[i][j] = 0.f;
        }
    }
    for (unsigned depth0 = 0; depth0 < shape.depth; depth0 += PRODUCT_DEPTH) {
        auto scaled = [=](float x, unsigned d) {
            float y = divisors ? x * (1.f / divisors[d]) : x;
            return shape.bf16 ? round_bf16(y) : y;
        };
        stage<F32>(a, a_values, row0, shape.rows, depth0, shape.depth, left, scaled);
        auto rounded = [=](float x, unsigned) { return shape.bf16 ? round_bf16(x) : x; };
        stage<T>(b, b_values, col0, shape.cols, depth0, shape.depth, right, rounded);
        __syncthreads();
        unsigned count = min(PRODUCT_DEPTH, shape.depth - depth0);
#pragma unroll 4
        for (unsigned d = 0; d < count; d++) {
            float x[THREAD_TILE], y[THREAD_TILE];
#pragma unroll
            for (unsigned i = 0; i < THREAD_TILE; i++) x[i] = left[d][i0 + i], y[i] = right[d][j0 + i];
#pragma unroll
            for (unsigned i = 0; i < THREAD_TILE; i++) {
#pragma unroll
                for (unsigned j = 0; j < THREAD_TILE; j++) chain[i][j] = fmaf(x[i], y[j], chain[i][j]);
            }
        }
        if ((depth0 + PRODUCT_DEPTH) % CHAIN == 0 || depth0 + PRODUCT_DEPTH >= shape.depth) {
            bool first_chain = !shape.add && depth0 < CHAIN;
#pragma unroll
            for (unsigned i = 0; i < THREAD_TILE; i++) {
#pragma unroll
                for (unsigned j = 0; j < THREAD_TILE; j++) {
                    sums[i][j] = first_chain ? chain[i][j] * shape.scale : fmaf(chain[i][j], shape.scale, sums[i][j]);
                    chain[i][j] = 0.f;
                }
            }
        }
        __syncthreads(); // all have read: more of the depth may come
    }
#pragma unroll
    for (unsigned i = 0; i < THREAD_TILE; i++) {
#pragma unroll
        for (unsigned j = 0; j < THREAD_TILE; j++) {
            unsigned row = row0 + i0 + i, col = col0 + j0 + j;
            if (row < shape.rows && col < shape.cols) out[row * shape.stride + col] = sums[i][j];
        }
    }
}

/// `out` (rows, cols) of `a` (rows, depth) f32 and `b` (depth, cols). `divisors` (depth): the left factor's values are divided by
/// them; or none. Grid: (cols / 64, rows / 64), rounded up, and the matrices of the batch.
#define GEMM(NAME, TYPE)                                                                                               \
    extern "C" __global__ void __launch_bounds__(PRODUCT_THREADS, 2) NAME(                                             \
        const Factor a, const float* __restrict__ divisors, const Factor b, const GemmShape shape,                     \
        float* __restrict__ out) {                                                                                     \
        gemm<TYPE>(a, divisors, b, shape, out);                                                                        \
    }

GEMM(gemm_f32, F32)
GEMM(gemm_bf16, Bf16)
GEMM(gemm_i8, I8)
