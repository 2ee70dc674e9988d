// Ternary weights times many rows of activations: prefill and training. Bound by the tensor cores.
//
// A block of four warps takes 128 rows (8 bands) × 64 tokens, a warp 32 rows of it: 64 accumulators a lane. Of a chunk of
// 128 columns a lane loads 32 bytes of codes, straight into the registers that mma takes once they are unpacked, and finds
// the activations, 8 KiB for the block, in shared memory. What the next chunk needs is under way in registers meanwhile.
// For 32 columns × 32 rows × 64 tokens of a warp: 16 mma, and 4 reads of 512 bytes of shared memory.

#include "ternary.cuh"

#include "mma.cuh"

constexpr unsigned GEMM_WARPS = 4;
constexpr unsigned GEMM_THREADS = GEMM_WARPS * WARP;
/// Bands of a warp.
constexpr unsigned WARP_BANDS = 2;
/// Bands of a block.
constexpr unsigned GEMM_BANDS = GEMM_WARPS * WARP_BANDS;
/// Tokens of a block.
constexpr unsigned GEMM_TOKENS = 64;
/// Columns of mma in a block.
constexpr unsigned COLUMN_TILES = GEMM_TOKENS / 8;
/// 16-byte units of a token's chunk.
constexpr unsigned UNITS = CHUNK / 16;
/// Units of activations that a thread brings into shared memory.
constexpr unsigned STAGED = GEMM_TOKENS * UNITS / GEMM_THREADS;

/// Where unit `unit` of a token lies. Eight lanes read at once units 0–3 or 4–7 of two neighbouring tokens: in odd tokens the
/// halves are exchanged, so that they take all 32 banks.
__device__ __forceinline__ unsigned place(unsigned token, unsigned unit) {
    return token * UNITS + (unit ^ (token % 2 * 4));
}

/// The activations of a chunk that a thread is to bring; 0 for tokens that are not there.
struct Stage {
    int4 units[STAGED];

    __device__ __forceinline__ void load(const int4* codes, unsigned chunk, unsigned chunks, unsigned first, unsigned tokens) {
#pragma unroll
        for (unsigned i = 0; i < STAGED; i++) {
            unsigned at = threadIdx.x + i * GEMM_THREADS, token = first + at / UNITS;
            units[i] = make_int4(0, 0, 0, 0);
            if (token < tokens) units[i] = __ldg(codes + (size_t(token) * chunks + chunk) * UNITS + at % UNITS);
        }
    }

    __device__ __forceinline__ void store(int4* shared) const {
#pragma unroll
        for (unsigned i = 0; i < STAGED; i++) {
            unsigned at = threadIdx.x + i * GEMM_THREADS;
            shared[place(at / UNITS, at % UNITS)] = units[i];
        }
    }
};

/// `y` (tokens, y_stride) of `x` (tokens). Grid: (bands / 8, tokens / 64), rounded up.
extern "C" __global__ void __launch_bounds__(GEMM_THREADS)
ternary_gemm(const Weights w, const Activations x, unsigned tokens, unsigned y_stride, float* __restrict__ y) {
    __shared__ int4 shared[GEMM_TOKENS * UNITS];
    unsigned lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    unsigned first_band = blockIdx.x * GEMM_BANDS + threadIdx.x / WARP * WARP_BANDS;
    unsigned first = blockIdx.y * GEMM_TOKENS;
    // Bands behind the last one are computed as if they were it, and not written.
    const uint4* codes[WARP_BANDS];
#pragma unroll
    for (unsigned b = 0; b < WARP_BANDS; b++)
        codes[b] = w.codes + size_t(min(first_band + b, w.count - 1)) * w.chunks * WARP + lane;

    int c[WARP_BANDS][COLUMN_TILES][4] = {};
    uint4 words[WARP_BANDS];
    Stage stage;
    stage.load(x.codes, 0, w.chunks, first, tokens);
#pragma unroll
    for (unsigned b = 0; b < WARP_BANDS; b++) words[b] = __ldg(codes[b]);
    for (unsigned chunk = 0; chunk < w.chunks; chunk++) {
        stage.store(shared);
        __syncthreads();
        const ChunkOperands operands[WARP_BANDS] = {ChunkOperands(words[0]), ChunkOperands(words[1])};
        if (chunk + 1 < w.chunks) {
            stage.load(x.codes, chunk + 1, w.chunks, first, tokens);
#pragma unroll
            for (unsigned b = 0; b < WARP_BANDS; b++) words[b] = __ldg(codes[b] + size_t(chunk + 1) * WARP);
        }
#pragma unroll
        for (unsigned tile = 0; tile < COLUMN_TILES; tile++) {
            int4 low = shared[place(8 * tile + g, t)], high = shared[place(8 * tile + g, t + 4)];
#pragma unroll
            for (unsigned b = 0; b < WARP_BANDS; b++) operands[b].multiply(c[b][tile], low, high);
        }
        __syncthreads(); // all have read: the next chunk may come
    }

#pragma unroll
    for (unsigned b = 0; b < WARP_BANDS; b++) {
        if (first_band + b >= w.count) break;
        Band band = w.bands[first_band + b];
#pragma unroll
        for (unsigned tile = 0; tile < COLUMN_TILES; tile++) {
#pragma unroll
            for (unsigned i = 0; i < 4; i++) {
                unsigned token = first + 8 * tile + 2 * t + i % 2, r = g + 8 * (i / 2);
                if (token < tokens && r < band.rows) {
                    y[size_t(token) * y_stride + (band.first - w.first) + r] =
                        rescale(c[b][tile][i] - x.sums[token], band.scale, x.factors[token]);
                }
            }
        }
    }
}
