// The output head in 8, 6 or 4 bits a weight (`kernels/head`): hidden states as integers of 13 bits, x = 64·hi + lo, times rows of
// codes. Bound by memory: 1, ¾ or ½ byte a weight, and a scale of 16 bits a group in the latter two.
//
// Sixteen rows are a band, 32 columns a group, and two groups of a band are what a warp loads at once: lane 2·r + h has row r
// of the h-th group, all of it, so the group's sum is one lane's. A lane's words are those of the CPU's lines; of eight bits,
// codes are signed here, without the offset. Integers are exact in any order. With 6 and 4 bits a group has its own scale, and
// the groups are added in order, by fused multiply-add: lanes of a row exchange their sums and both add all of them.

#include "floats.cuh"
#include "reduce.cuh"

constexpr unsigned HEAD_THREADS = 256;
/// Rows of a band.
constexpr unsigned HEAD_BAND = 16;
/// Columns of a group.
constexpr unsigned GROUP = WARP;
/// Largest activation: 64 · 63 + 31.
constexpr float ACTIVATION_MAX = 4063.f;
/// Tokens of a block.
constexpr unsigned HEAD_TOKENS = 4;

/// Hidden states as `quantize_hidden` leaves them.
struct HeadActivations {
    /// (tokens, groups): 32 bytes of `hi`, then 32 of `lo`.
    int4* codes;
    /// (tokens, groups): Σ x.
    int* sums;
    /// (tokens).
    float* scales;
};

struct HeadWeights {
    /// (bands, pairs of groups, words of a lane in vectors, 32 lanes).
    const uint4* codes;
    /// (bands · 16) f32 of rows, or (bands, groups, 16) bfloat16.
    const void* scales;
    unsigned rows;
    /// Even.
    unsigned groups;
};

/// A row of hidden states, rows of `width` values that begin `x_stride` values apart, to integers; zeros behind it, and zeros
/// with a scale of NaN for one that is not finite. Grid: (tokens).
extern "C" __global__ void __launch_bounds__(ROW_THREADS) quantize_hidden(
    const float* __restrict__ x, size_t x_stride, unsigned width, unsigned groups, const HeadActivations to) {
    __shared__ unsigned absmax[ROW_THREADS / WARP];
    size_t token = blockIdx.x;
    unsigned lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    x += token * x_stride;
    // Without the sign, the bits of floats are ordered as the floats are, infinity above them and NaN above that.
    unsigned bits = 0;
    for (unsigned i = threadIdx.x; i < width; i += ROW_THREADS)
        bits = Max::apply(bits, __float_as_uint(x[i]) & 0x7fffffffu);
    bits = block_reduce<Max>(bits, absmax);
    bool finite = bits < 0x7f800000u;
    float largest = fmaxf(__uint_as_float(bits), 1e-30f), factor = ACTIVATION_MAX / largest;
    for (unsigned group = warp; group < groups; group += ROW_THREADS / WARP) {
        unsigned i = group * GROUP + lane;
        int value = finite && i < width ? __float2int_rn(x[i] * factor) : 0, hi = (value + 32) >> 6;
        signed char* codes = reinterpret_cast<signed char*>(to.codes) + (token * groups + group) * (2 * GROUP);
        codes[lane] = (signed char)hi;
        codes[GROUP + lane] = (signed char)(value - 64 * hi);
        int sum = warp_reduce<Add>(value);
        if (lane == 0) to.sums[token * groups + group] = sum;
    }
    if (threadIdx.x == 0) to.scales[token] = finite ? largest / ACTIVATION_MAX : __uint_as_float(0x7fc00000u);
}

/// What a lane has of a pair of groups: `quad(i)` are the codes of columns 4·i … 4·i + 3 of its group, a byte each.
struct Q8 {
    static constexpr unsigned BYTES = 2 * 16;
    uint4 words[2];
    __device__ __forceinline__ explicit Q8(const uint4* pair, unsigned lane)
        : words{__ldg(pair + lane), __ldg(pair + WARP + lane)} {}
    __device__ __forceinline__ unsigned quad(unsigned i) const {
        const unsigned all[8] = {words[0].x, words[0].y, words[0].z, words[0].w, words[1].x, words[1].y, words[1].z, words[1].w};
        return all[i];
    }
};

struct Q4 {
    static constexpr unsigned BYTES = 16;
    static constexpr int OFFSET = 8;
    uint4 words;
    __device__ __forceinline__ explicit Q4(const uint4* pair, unsigned lane) : words(__ldg(pair + lane)) {}
    __device__ __forceinline__ unsigned quad(unsigned i) const {
        const unsigned all[4] = {words.x, words.y, words.z, words.w};
        return (all[i / 2] >> (4 * (i % 2))) & 0x0f0f0f0fu;
    }
};

/// The low four bits as `Q4` has them, and the high two of sixteen columns a word.
struct Q6 {
    static constexpr unsigned BYTES = 16 + 8;
    static constexpr int OFFSET = 32;
    Q4 low;
    uint2 high;
    __device__ __forceinline__ explicit Q6(const uint4* pair, unsigned lane)
        : low(pair, lane), high(__ldg(reinterpret_cast<const uint2*>(pair + WARP) + lane)) {}
    __device__ __forceinline__ unsigned quad(unsigned i) const {
        unsigned word = i < 4 ? high.x : high.y;
        return low.quad(i) | ((word >> (2 * (i % 4))) & 0x03030303u) << 4;
    }
};

/// Adds Σ code·hi and Σ code·lo of a group.
template <class Codes> __device__ __forceinline__ void dot_group(const Codes& w, const int4* x, int& hi, int& lo) {
#pragma unroll
    for (unsigned part = 0; part < 2; part++) {
        int4 h = __ldg(x + part), l = __ldg(x + 2 + part);
        const int hs[4] = {h.x, h.y, h.z, h.w}, ls[4] = {l.x, l.y, l.z, l.w};
#pragma unroll
        for (unsigned i = 0; i < 4; i++) {
            int codes = int(w.quad(4 * part + i));
            hi = __dp4a(codes, hs[i], hi);
            lo = __dp4a(codes, ls[i], lo);
        }
    }
}

/// A warp's band, and a lane's row and group of it.
struct Place {
    unsigned band, row, half, first, count;
    bool writes;

    __device__ __forceinline__ Place(const HeadWeights& w, unsigned tokens) {
        unsigned bands = (w.rows + HEAD_BAND - 1) / HEAD_BAND, lane = threadIdx.x % WARP;
        unsigned own = blockIdx.y * (HEAD_THREADS / WARP) + threadIdx.x / WARP;
        band = min(own, bands - 1); // warps behind the last band compute it again
        row = lane / 2;
        half = lane % 2;
        first = blockIdx.x * HEAD_TOKENS;
        count = min(HEAD_TOKENS, tokens - first);
        writes = half == 0 && own * HEAD_BAND + row < w.rows;
    }
};

/// `y` (tokens, w.rows) of `x` (tokens). Grid: (tokens / 4, bands / 8), rounded up.
extern "C" __global__ void __launch_bounds__(HEAD_THREADS)
head_q8(const HeadWeights w, const HeadActivations x, unsigned tokens, float* __restrict__ y) {
    Place at(w, tokens);
    unsigned lane = threadIdx.x % WARP, pairs = w.groups / 2;
    const uint4* codes = w.codes + size_t(at.band) * pairs * (Q8::BYTES / 16 * WARP);
    const int4* hidden = x.codes + (size_t(at.first) * w.groups + at.half) * 4;
    int hi[HEAD_TOKENS] = {}, lo[HEAD_TOKENS] = {};
#pragma unroll 2
    for (unsigned pair = 0; pair < pairs; pair++) {
        Q8 words(codes + size_t(pair) * (Q8::BYTES / 16 * WARP), lane);
#pragma unroll
        for (unsigned t = 0; t < HEAD_TOKENS; t++) {
            if (t < at.count) dot_group(words, hidden + (size_t(t) * w.groups + 2 * pair) * 4, hi[t], lo[t]);
        }
    }
    float scale = static_cast<const float*>(w.scales)[at.band * HEAD_BAND + at.row];
#pragma unroll
    for (unsigned t = 0; t < HEAD_TOKENS; t++) {
        if (t >= at.count) break;
        int all_hi = hi[t] + __shfl_xor_sync(ALL_LANES, hi[t], 1), all_lo = lo[t] + __shfl_xor_sync(ALL_LANES, lo[t], 1);
        float sum = float(64 * (long long)(all_hi) + all_lo);
        if (at.writes) y[size_t(at.first + t) * w.rows + at.band * HEAD_BAND + at.row] = sum * scale * x.scales[at.first + t];
    }
}

template <class Codes>
__device__ __forceinline__ void head_groups(const HeadWeights& w, const HeadActivations& x, unsigned tokens, float* y) {
    Place at(w, tokens);
    constexpr unsigned UNITS = Codes::BYTES * WARP / 16;
    unsigned lane = threadIdx.x % WARP, pairs = w.groups / 2;
    const uint4* codes = w.codes + size_t(at.band) * pairs * UNITS;
    const unsigned short* scales = static_cast<const unsigned short*>(w.scales) + size_t(at.band) * w.groups * HEAD_BAND;
    float out[HEAD_TOKENS] = {};
#pragma unroll 2
    for (unsigned pair = 0; pair < pairs; pair++) {
        Codes words(codes + size_t(pair) * UNITS, lane);
        unsigned group = 2 * pair + at.half;
        float scale = Bf16::widen(__ldg(scales + group * HEAD_BAND + at.row));
        float other_scale = __shfl_xor_sync(ALL_LANES, scale, 1);
#pragma unroll
        for (unsigned t = 0; t < HEAD_TOKENS; t++) {
            if (t >= at.count) break;
            size_t place = size_t(at.first + t) * w.groups + group;
            int hi = 0, lo = 0;
            dot_group(words, x.codes + place * 4, hi, lo);
            float sum = float(64 * hi + lo - Codes::OFFSET * x.sums[place]);
            float other = __shfl_xor_sync(ALL_LANES, sum, 1);
            out[t] = at.half ? fmaf(other_scale, other, out[t]) : fmaf(scale, sum, out[t]);
            out[t] = at.half ? fmaf(scale, sum, out[t]) : fmaf(other_scale, other, out[t]);
        }
    }
#pragma unroll
    for (unsigned t = 0; t < HEAD_TOKENS; t++) {
        if (t < at.count && at.writes)
            y[size_t(at.first + t) * w.rows + at.band * HEAD_BAND + at.row] = out[t] * x.scales[at.first + t];
    }
}

/// As `head_q8`.
extern "C" __global__ void __launch_bounds__(HEAD_THREADS)
head_q6(const HeadWeights w, const HeadActivations x, unsigned tokens, float* __restrict__ y) {
    head_groups<Q6>(w, x, tokens, y);
}

/// As `head_q8`.
extern "C" __global__ void __launch_bounds__(HEAD_THREADS)
head_q4(const HeadWeights w, const HeadActivations x, unsigned tokens, float* __restrict__ y) {
    head_groups<Q4>(w, x, tokens, y);
}
