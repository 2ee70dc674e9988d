// Attention of queries over cached keys and values, softmax(q·kᵀ/√d)·v, in blocks of keys (arXiv:2205.14135).
//
// A query's keys are cut into blocks of 256 from its own first one. `attention_block_*` computes for each block the largest
// score, Σ exp(score − max) and Σ exp(score − max)·v; `attention_merge` puts them together in the order of the blocks. Cut and
// orders are the CPU's (`ops/attention/forward.rs`): a score is sixteen partial sums over the head's dimension, Σ exp as well
// over the keys, and each element of Σ exp·v is one chain of fused products over the keys.
//
// A block of threads takes one query position, up to four heads that share their keys and values, and a block of keys: keys
// and values are read once for the four. For decoding; prefill is right but reads keys and values once a position.

#include "exp.cuh"
#include "floats.cuh"
#include "reduce.cuh"

constexpr unsigned ATTENTION_THREADS = 128;
/// Query heads of a block, one a warp while it has the scores.
constexpr unsigned ATTENTION_HEADS = ATTENTION_THREADS / WARP;
/// Keys of a block.
constexpr unsigned KEYS = 256;

/// −∞: the largest of no scores.
#define NO_SCORE __uint_as_float(0xff800000u)

struct AttentionShape {
    /// Queries are (batch, seq, heads, head_dim), dense: the last `seq` positions of the context.
    unsigned seq;
    unsigned heads;
    unsigned kv_heads;
    unsigned context;
    unsigned head_dim;
    /// Blocks of keys, context / 256 rounded up.
    unsigned blocks;
    /// 1 / √head_dim.
    float scale;
};

/// Where keys or values lie, in elements.
struct Strides {
    size_t batch;
    size_t head;
    size_t position;
};

/// int8, the f32 scale of a row behind its codes, at any address.
struct Int8 {
    using Stored = signed char;
    static constexpr bool SCALED = true;
    __device__ __forceinline__ static float widen(signed char x) { return float(x); }
    __device__ __forceinline__ static float scale(const signed char* row, unsigned head_dim) {
        unsigned bits = 0;
#pragma unroll
        for (unsigned i = 0; i < 4; i++) bits |= unsigned((unsigned char)row[head_dim + i]) << (8 * i);
        return __uint_as_float(bits);
    }
};

struct AttentionShared {
    float scores[ATTENTION_HEADS][KEYS];
};

/// What is known of a query and head after a block of keys.
struct Partial {
    float max;
    /// Σ exp(score − max).
    float sum;
};

template <class T>
__device__ __forceinline__ void attention_block(
    const AttentionShape& shape, const float* q, const typename T::Stored* k, const Strides& k_at,
    const typename T::Stored* v, const Strides& v_at, const unsigned* starts, Partial* partials, float* values,
    AttentionShared& shared) {
    unsigned query = blockIdx.x, block = blockIdx.z, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    unsigned row = query / shape.seq, end = shape.context - shape.seq + query % shape.seq + 1;
    unsigned first = (starts ? starts[query] : 0) + block * KEYS;
    unsigned keys = first < end ? min(KEYS, end - first) : 0;
    unsigned group = shape.heads / shape.kv_heads, parts = (group + ATTENTION_HEADS - 1) / ATTENTION_HEADS;
    unsigned kv_head = blockIdx.y / parts, part = blockIdx.y % parts;
    unsigned heads = min(ATTENTION_HEADS, group - part * ATTENTION_HEADS);
    size_t query_head = size_t(query) * shape.heads + kv_head * group + part * ATTENTION_HEADS;
    q += query_head * shape.head_dim;
    k += row * k_at.batch + kv_head * k_at.head + first * k_at.position;
    v += row * v_at.batch + kv_head * v_at.head + first * v_at.position;

    // Scores: half a warp a key.
    unsigned l = threadIdx.x % SUM_LANES, steps = (shape.head_dim + SUM_LANES - 1) / SUM_LANES;
    for (unsigned base = 0; base < keys; base += ATTENTION_THREADS / SUM_LANES) {
        unsigned key = base + threadIdx.x / SUM_LANES;
        const typename T::Stored* k_row = k + min(key, keys - 1) * k_at.position; // lanes without a key: any
        float sums[ATTENTION_HEADS] = {};
#pragma unroll 4
        for (unsigned step = 0; step < steps; step++) {
            unsigned d = step * SUM_LANES + l;
            bool inside = d < shape.head_dim;
            float k_value = inside ? T::widen(k_row[d]) : 0.f;
#pragma unroll
            for (unsigned h = 0; h < ATTENTION_HEADS; h++) {
                float q_value = inside && h < heads ? q[h * shape.head_dim + d] : 0.f;
                sums[h] = fmaf(q_value, k_value, sums[h]);
            }
        }
#pragma unroll
        for (unsigned h = 0; h < ATTENTION_HEADS; h++) {
            float score = sum_lanes(sums[h]);
            if constexpr (T::SCALED) score *= T::scale(k_row, shape.head_dim);
            if (l == h && key < keys) shared.scores[h][key] = score * shape.scale;
        }
    }
    __syncthreads();

    // The softmax without its denominator: a warp a head.
    if (warp < heads) {
        float* scores = shared.scores[warp];
        float max = NO_SCORE;
        for (unsigned i = lane; i < keys; i += WARP) max = Max::apply(scores[i], max);
        max = warp_reduce<Max>(max);
        for (unsigned i = lane; i < keys; i += WARP) scores[i] = exp_f32(scores[i] - max);
        __syncwarp();
        float sum = 0.f;
        if (lane < SUM_LANES) {
            for (unsigned i = lane; i < keys; i += SUM_LANES) sum += scores[i];
        }
        sum = sum_lanes(sum);
        __syncwarp();
        if constexpr (T::SCALED) {
            for (unsigned i = lane; i < keys; i += WARP) scores[i] *= T::scale(v + i * v_at.position, shape.head_dim);
        }
        if (lane == 0) partials[(query_head + warp) * shape.blocks + block] = {max, sum};
    }
    __syncthreads();

    // Weighted values: an element a thread.
    for (unsigned d = threadIdx.x; d < shape.head_dim; d += ATTENTION_THREADS) {
        float sums[ATTENTION_HEADS] = {};
#pragma unroll 8
        for (unsigned key = 0; key < keys; key++) {
            float value = T::widen(v[key * v_at.position + d]);
#pragma unroll
            for (unsigned h = 0; h < ATTENTION_HEADS; h++) sums[h] = fmaf(shared.scores[h][key], value, sums[h]);
        }
#pragma unroll
        for (unsigned h = 0; h < ATTENTION_HEADS; h++) {
            if (h < heads) values[((query_head + h) * shape.blocks + block) * shape.head_dim + d] = sums[h];
        }
    }
}

/// `partials` (queries, heads, blocks) and `values` (queries, heads, blocks, head_dim). `starts`: first position that each
/// query sees; none: 0. Grid: (queries, kv_heads · (heads of a group / 4 rounded up), blocks).
#define ATTENTION_BLOCK(NAME, TYPE)                                                                                    \
    extern "C" __global__ void __launch_bounds__(ATTENTION_THREADS, 4) NAME(                                           \
        const AttentionShape shape, const float* __restrict__ q, const TYPE::Stored* __restrict__ k,                   \
        const Strides k_at, const TYPE::Stored* __restrict__ v, const Strides v_at,                                    \
        const unsigned* __restrict__ starts, Partial* __restrict__ partials, float* __restrict__ values) {             \
        __shared__ AttentionShared shared;                                                                             \
        attention_block<TYPE>(shape, q, k, k_at, v, v_at, starts, partials, values, shared);                           \
    }

ATTENTION_BLOCK(attention_block_f32, F32)
ATTENTION_BLOCK(attention_block_f16, F16)
ATTENTION_BLOCK(attention_block_bf16, Bf16)
ATTENTION_BLOCK(attention_block_int8, Int8)

/// `out` (queries, heads, head_dim) of what the blocks gave; a query that saw no key gets zeros. Grid: (queries · heads),
/// any block.
extern "C" __global__ void attention_merge(
    const Partial* __restrict__ partials, const float* __restrict__ values, unsigned blocks, unsigned head_dim,
    float* __restrict__ out) {
    size_t query_head = blockIdx.x;
    partials += query_head * blocks;
    values += query_head * blocks * head_dim;
    for (unsigned d = threadIdx.x; d < head_dim; d += blockDim.x) {
        float max = NO_SCORE, sum = 0.f, value = 0.f;
        for (unsigned block = 0; block < blocks; block++) {
            Partial partial = partials[block];
            if (partial.max == NO_SCORE && partial.sum == 0.f) continue; // no key of the block was seen
            float higher = partial.max > max ? partial.max : max;
            float before = exp_f32(max - higher), now = exp_f32(partial.max - higher);
            max = higher;
            sum = sum * before + partial.sum * now;
            value = value * before + values[block * head_dim + d] * now;
        }
        out[query_head * head_dim + d] = value * (sum == 0.f ? 0.f : 1.f / sum);
    }
}
