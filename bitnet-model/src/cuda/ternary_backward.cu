// The gradient of the input of a product with ternary weights, dx = scale · dy·W, with the weights decoded a band at a time.
//
// The CPU's order (`ops/gemm`): of each output, one chain of fused products over 512 rows of W; the chains, scaled, are
// added in order. A product with −1, 0 or 1 is exact, but an addition is not: the order is what gives the CPU's bits.
// Bound by the float units: tokens · rows · cols fused products.

#include "floats.cuh"
#include "ternary.cuh"

constexpr unsigned BACKWARD_THREADS = 256;
/// Tokens and columns of a block.
constexpr unsigned BACKWARD_TOKENS = 64;
/// Tokens and columns of a thread.
constexpr unsigned THREAD_TOKENS = 8;
constexpr unsigned THREAD_COLS = 4;

/// One matrix of a stack.
struct BackwardMatrix {
    /// (bands, chunks, 32 lanes), from its first band on.
    const uint4* codes;
    /// From its first band on.
    const Band* bands;
    unsigned rows;
    unsigned cols;
    unsigned chunks;
};

/// `dx` (tokens, cols) of `dy`, `w.rows` columns of rows that begin `dy_stride` values apart; `add`s to what is there.
/// `bf16`: rounds dy to bfloat16 before. Grid: (chunks, tokens / 64 rounded up).
extern "C" __global__ void __launch_bounds__(BACKWARD_THREADS)
ternary_backward(const BackwardMatrix w, const float* __restrict__ dy, size_t dy_stride, unsigned tokens, unsigned add,
                 unsigned bf16, float* __restrict__ dx) {
    __shared__ float weights[BAND][CHUNK];
    __shared__ float gradients[BAND][BACKWARD_TOKENS + 4]; // 4: neighbouring rows begin in other banks
    unsigned lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    unsigned first = blockIdx.y * BACKWARD_TOKENS, chunk = blockIdx.x;
    // A warp's lanes have neighbouring columns of the same tokens.
    unsigned token0 = warp * THREAD_TOKENS, col0 = lane * THREAD_COLS;

    float scale = w.bands->scale;
    float out[THREAD_TOKENS][THREAD_COLS], chain[THREAD_TOKENS][THREAD_COLS];
#pragma unroll
    for (unsigned i = 0; i < THREAD_TOKENS; i++) {
#pragma unroll
        for (unsigned j = 0; j < THREAD_COLS; j++) {
            unsigned token = first + token0 + i, col = chunk * CHUNK + col0 + j;
            out[i][j] = add && token < tokens && col < w.cols ? dx[size_t(token) * w.cols + col] : 0.f;
            chain[i][j] = 0.f;
        }
    }
    for (unsigned row0 = 0; row0 < w.rows; row0 += BAND) {
        // Thread 8·l + k decodes columns 2·k, 2·k + 1 of each of the four words of lane l.
        unsigned source = threadIdx.x / 8, k = threadIdx.x % 8;
        uint4 codes = __ldg(w.codes + (size_t(row0 / BAND) * w.chunks + chunk) * WARP + source);
        const unsigned words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
        for (unsigned i = 0; i < 4; i++) {
            unsigned row = source / 4 + i / 2 * 8, col = 16 * (source % 4 + i % 2 * 4) + 2 * k;
            unsigned pair = codes_of(words[i], k / 2) >> (k % 2 * 16);
            weights[row][col] = float(int(pair & 0xffu) - 1);
            weights[row][col + 1] = float(int(pair >> 8 & 0xffu) - 1);
        }
#pragma unroll
        for (unsigned i = threadIdx.x; i < BAND * BACKWARD_TOKENS; i += BACKWARD_THREADS) {
            unsigned token = i / BAND, row = i % BAND;
            float value = 0.f;
            if (first + token < tokens && row0 + row < w.rows) value = dy[(first + token) * dy_stride + row0 + row];
            gradients[row][token] = bf16 ? round_bf16(value) : value;
        }
        __syncthreads();
        unsigned rows = min(BAND, w.rows - row0);
#pragma unroll 4
        for (unsigned row = 0; row < rows; row++) {
            float a[THREAD_TOKENS], b[THREAD_COLS];
#pragma unroll
            for (unsigned i = 0; i < THREAD_TOKENS; i++) a[i] = gradients[row][token0 + i];
#pragma unroll
            for (unsigned j = 0; j < THREAD_COLS; j++) b[j] = weights[row][col0 + j];
#pragma unroll
            for (unsigned i = 0; i < THREAD_TOKENS; i++) {
#pragma unroll
                for (unsigned j = 0; j < THREAD_COLS; j++) chain[i][j] = fmaf(a[i], b[j], chain[i][j]);
            }
        }
        bool ends = (row0 + BAND) % CHAIN == 0 || row0 + BAND >= w.rows;
        if (ends) {
            bool first_chain = !add && row0 < CHAIN;
#pragma unroll
            for (unsigned i = 0; i < THREAD_TOKENS; i++) {
#pragma unroll
                for (unsigned j = 0; j < THREAD_COLS; j++) {
                    out[i][j] = first_chain ? chain[i][j] * scale : fmaf(chain[i][j], scale, out[i][j]);
                    chain[i][j] = 0.f;
                }
            }
        }
        __syncthreads(); // all have read: the next band may come
    }
#pragma unroll
    for (unsigned i = 0; i < THREAD_TOKENS; i++) {
#pragma unroll
        for (unsigned j = 0; j < THREAD_COLS; j++) {
            unsigned token = first + token0 + i, col = chunk * CHUNK + col0 + j;
            if (token < tokens && col < w.cols) dx[size_t(token) * w.cols + col] = out[i][j];
        }
    }
}
