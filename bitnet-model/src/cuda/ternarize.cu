// Ternary weights of latent ones: β = mean|w|, code = clip(round(w / β), −1, 1) + 1 (arXiv:2402.17764, eq. 1–3), as `quant` does it
// on the CPU, bit for bit, in the layout of `ternary.cuh`. Reads the latent twice, 8 bytes a weight: bound by memory.
//
// The mean has the CPU's order: chunks of 65536 weights, of each eight sums side by side in double precision, added in order;
// and then the chunks, in order.

#include "ternary.cuh"

constexpr unsigned TERNARIZE_THREADS = 256;
/// Weights of a chunk, and its sums.
constexpr unsigned MEAN_CHUNK = 1 << 16;
constexpr unsigned MEAN_SUMS = 8;
/// Chunks of a block.
constexpr unsigned MEAN_CHUNKS = TERNARIZE_THREADS / MEAN_SUMS;

/// `sums` (chunks): Σ|w| of each chunk of `count` weights. Grid: (chunks / 32 rounded up).
extern "C" __global__ void __launch_bounds__(TERNARIZE_THREADS)
absolute_sums(const float* __restrict__ latent, size_t count, double* __restrict__ sums) {
    __shared__ double parts[TERNARIZE_THREADS];
    unsigned part = threadIdx.x % MEAN_SUMS;
    size_t chunk = size_t(blockIdx.x) * MEAN_CHUNKS + threadIdx.x / MEAN_SUMS;
    size_t first = chunk * MEAN_CHUNK, end = first + MEAN_CHUNK < count ? first + MEAN_CHUNK : count;
    double sum = 0.;
    for (size_t i = first + part; i < end; i += MEAN_SUMS) sum += double(fabsf(latent[i]));
    parts[threadIdx.x] = sum;
    __syncthreads();
    if (part == 0 && first < count) {
        double total = 0.;
        for (unsigned i = 0; i < MEAN_SUMS; i++) total += parts[threadIdx.x + i];
        sums[chunk] = total;
    }
}

/// `scale`: β of the chunks' sums, at least 1e-5. Grid: one thread.
extern "C" __global__ void
absolute_mean(const double* __restrict__ sums, unsigned chunks, size_t count, float* __restrict__ scale) {
    double total = 0.;
    for (unsigned i = 0; i < chunks; i++) total += sums[i];
    float mean = float(total / double(count));
    *scale = mean > 1e-5f ? mean : 1e-5f;
}

/// The code, −1, 0 or 1, of a weight in units of β.
__device__ __forceinline__ int ternary_code(float x, bool half_up) {
    float y = x + 0.5f;
    bool above = half_up ? y >= 1.f : x > 0.5f, below = half_up ? y < 0.f : x < -0.5f;
    return int(above) - int(below);
}

/// Weights of a block.
constexpr unsigned BLEND_WEIGHTS = 1024;

/// `y` (count) of `latent`: w + `lambda` · (code · β − w), of 1 code · β itself. Grid: (count / 1024 rounded up), any block.
extern "C" __global__ void blend_weights(
    const float* __restrict__ latent, size_t count, unsigned half_up, const float* __restrict__ scale, float lambda,
    float* __restrict__ y) {
    float inverse = 1.f / *scale;
    size_t begin = size_t(blockIdx.x) * BLEND_WEIGHTS, end = begin + BLEND_WEIGHTS < count ? begin + BLEND_WEIGHTS : count;
    for (size_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
        float grid = float(ternary_code(latent[i] * inverse, half_up)) * *scale;
        y[i] = lambda == 1.f ? grid : latent[i] + lambda * (grid - latent[i]);
    }
}

/// `codes` (bands, chunks, 32 lanes) and `bands` of `latent` (rows, cols), dense. Grid: (chunks / 8 rounded up, bands).
extern "C" __global__ void __launch_bounds__(TERNARIZE_THREADS) ternarize(
    const float* __restrict__ latent, unsigned rows, unsigned cols, unsigned half_up, const float* __restrict__ scale,
    uint4* __restrict__ codes, Band* __restrict__ bands) {
    unsigned lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4, chunks = (cols + CHUNK - 1) / CHUNK;
    unsigned chunk = blockIdx.x * (TERNARIZE_THREADS / WARP) + threadIdx.x / WARP, band = blockIdx.y;
    if (blockIdx.x == 0 && threadIdx.x == 0) bands[band] = {*scale, band * BAND, min(BAND, rows - band * BAND)};
    if (chunk >= chunks) return;
    float inverse = 1.f / *scale;
    unsigned words[4];
#pragma unroll
    for (unsigned k = 0; k < 4; k++) {
        unsigned row = band * BAND + g + 8 * (k / 2), col = chunk * CHUNK + 16 * (t + 4 * (k % 2)), word = 0;
#pragma unroll
        for (unsigned c = 0; c < 16; c++) {
            unsigned code = 1;
            if (row < rows && col + c < cols) code += ternary_code(latent[size_t(row) * cols + col + c] * inverse, half_up);
            word |= code << (8 * (c % 4) + 2 * (c / 4));
        }
        words[k] = word;
    }
    codes[(size_t(band) * chunks + chunk) * WARP + lane] = make_uint4(words[0], words[1], words[2], words[3]);
}
