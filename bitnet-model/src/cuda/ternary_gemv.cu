// Ternary weights times few rows of activations: decoding. Every code is read once and used once (or up to eight times), so
// the bandwidth of the memory is the limit: cols/4 bytes a row.
//
// A block takes a band of 16 rows, and its eight warps take the chunks in turn: chunk c is warp c mod 8's. Each lane has
// one 16-byte load a chunk, four of them under way. The warps' integers are added up in shared memory, in any order.

#include "ternary.cuh"

#include "mma.cuh"

constexpr unsigned GEMV_WARPS = 8;
constexpr unsigned GEMV_THREADS = GEMV_WARPS * WARP;
/// Loads of codes that are under way together: all of a warp's for 4096 columns.
constexpr unsigned UNDER_WAY = 4;
/// Tokens of a block of `ternary_gemv_tokens`: columns of mma.
constexpr unsigned GEMV_TOKENS = 8;

/// Calls `take` with the codes of every chunk of a warp, and the activations of `row` at t and at t + 4 there.
template <class Take> __device__ __forceinline__ void for_chunks(const Weights& w, const int4* row, Take take) {
    unsigned lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const uint4* codes = w.codes + size_t(blockIdx.x) * w.chunks * WARP + lane;
    for (unsigned base = warp; base < w.chunks; base += UNDER_WAY * GEMV_WARPS) {
        uint4 words[UNDER_WAY];
#pragma unroll
        for (unsigned i = 0; i < UNDER_WAY; i++) {
            unsigned chunk = base + i * GEMV_WARPS;
            words[i] = make_uint4(0, 0, 0, 0); // behind the last chunk: codes that add nothing
            if (chunk < w.chunks) words[i] = __ldg(codes + size_t(chunk) * WARP);
        }
#pragma unroll
        for (unsigned i = 0; i < UNDER_WAY; i++) {
            const int4* x = row + min(base + i * GEMV_WARPS, w.chunks - 1) * (CHUNK / 16) + lane % 4;
            take(words[i], __ldg(x), __ldg(x + 4));
        }
    }
}

/// Σ code·x over the 16 columns of a word.
__device__ __forceinline__ int dot_word(unsigned word, int4 x, int sum) {
    sum = __dp4a(int(codes_of(word, 0)), x.x, sum);
    sum = __dp4a(int(codes_of(word, 1)), x.y, sum);
    sum = __dp4a(int(codes_of(word, 2)), x.z, sum);
    return __dp4a(int(codes_of(word, 3)), x.w, sum);
}

/// `y` (tokens, y_stride) of `x` (tokens). For one token, or very few. Grid: (bands, tokens).
extern "C" __global__ void __launch_bounds__(GEMV_THREADS)
ternary_gemv(const Weights w, const Activations x, unsigned y_stride, float* __restrict__ y) {
    __shared__ int sums[GEMV_WARPS][BAND];
    unsigned lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, t = lane % 4;
    size_t token = blockIdx.y;
    int low = 0, high = 0; // rows g and g + 8
    for_chunks(w, x.codes + token * w.chunks * (CHUNK / 16), [&](uint4 word, int4 x0, int4 x1) {
        low = dot_word(word.y, x1, dot_word(word.x, x0, low));
        high = dot_word(word.w, x1, dot_word(word.z, x0, high));
    });
#pragma unroll
    for (unsigned step = 2; step > 0; step /= 2) { // the four lanes of a row
        low += __shfl_xor_sync(ALL_LANES, low, step);
        high += __shfl_xor_sync(ALL_LANES, high, step);
    }
    if (t == 0) {
        sums[warp][lane / 4] = low;
        sums[warp][lane / 4 + 8] = high;
    }
    __syncthreads();
    Band band = w.bands[blockIdx.x];
    if (threadIdx.x < band.rows) {
        int sum = -x.sums[token];
#pragma unroll
        for (unsigned i = 0; i < GEMV_WARPS; i++) sum += sums[i][threadIdx.x];
        y[token * y_stride + (band.first - w.first) + threadIdx.x] = rescale(sum, band.scale, x.factors[token]);
    }
}

/// As `ternary_gemv`, eight tokens a block: what is loaded of the weights meets all of them. For sequences that are decoded
/// together. Grid: (bands, tokens / 8 rounded up).
extern "C" __global__ void __launch_bounds__(GEMV_THREADS)
ternary_gemv_tokens(const Weights w, const Activations x, unsigned tokens, unsigned y_stride, float* __restrict__ y) {
    __shared__ int sums[GEMV_WARPS][GEMV_TOKENS][BAND];
    unsigned lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
    unsigned first = blockIdx.y * GEMV_TOKENS;
    // Lanes without a token read the last one's activations: their columns of the product are not written.
    const int4* row = x.codes + size_t(min(first + g, tokens - 1)) * w.chunks * (CHUNK / 16);
    int c[4] = {0, 0, 0, 0};
    for_chunks(w, row, [&](uint4 word, int4 x0, int4 x1) { ChunkOperands(word).multiply(c, x0, x1); });
#pragma unroll
    for (unsigned i = 0; i < 4; i++) sums[warp][2 * t + i % 2][g + 8 * (i / 2)] = c[i];
    __syncthreads();
    Band band = w.bands[blockIdx.x];
    unsigned r = threadIdx.x % BAND, token = threadIdx.x / BAND;
    if (token < GEMV_TOKENS && first + token < tokens && r < band.rows) {
        int sum = -x.sums[first + token];
#pragma unroll
        for (unsigned i = 0; i < GEMV_WARPS; i++) sum += sums[i][token][r];
        y[size_t(first + token) * y_stride + (band.first - w.first) + r] =
            rescale(sum, band.scale, x.factors[first + token]);
    }
}
