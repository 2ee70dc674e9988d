// A row of activations to integers: a = levels / max(max|x|, 1e-5), code = round(x · a), with 127 levels (arXiv:2402.17764, eq.
// 4–5) or 7, as `quant` and `kernels/quantize.rs` do it on the CPU, bit for bit: one division, one product and one rounding for each.

#pragma once

#include "reduce.cuh"

/// Where the codes of a row go.
struct QuantizedRow {
    /// Padded with 0 to `padded` bytes, a multiple of 4.
    int* codes;
    /// Σ codes.
    int* sum;
    /// a; NaN for a row that is not finite, whose codes are 0.
    float* factor;
};

/// Room that a block needs to quantize a row.
struct QuantizeShared {
    unsigned absmax[ROW_THREADS / WARP];
    int sums[ROW_THREADS / WARP];
};

/// |y| < levels · 1.000001: a and x · a are each off by at most 2⁻²⁴ of themselves, so no code leaves [−levels, levels].
__device__ __forceinline__ int quantize(float x, float a, bool half_up) {
    float y = x * a;
    return __float2int_rn(half_up ? floorf(y + 0.5f) : y);
}

/// a of the values `value(0)` … `value(width − 1)`; NaN if one is not finite. By all of a block.
template <class Value>
__device__ __forceinline__ float row_factor(Value value, unsigned width, float levels, QuantizeShared& shared) {
    // Without the sign, the bits of floats are ordered as the floats are, infinity above them and NaN above that.
    unsigned bits = 0;
    for (unsigned i = threadIdx.x; i < width; i += ROW_THREADS)
        bits = Max::apply(bits, __float_as_uint(value(i)) & 0x7fffffffu);
    bits = block_reduce<Max>(bits, shared.absmax);
    return bits < 0x7f800000u ? levels / fmaxf(__uint_as_float(bits), 1e-5f) : __uint_as_float(0x7fc00000u);
}

/// Quantizes the values `value(0)` … `value(width − 1)`, which every thread may ask for more than once; by all of a block.
template <class Value>
__device__ __forceinline__ void quantize_row(
    Value value, unsigned width, unsigned padded, float levels, bool half_up, QuantizedRow out, QuantizeShared& shared) {
    float a = row_factor(value, width, levels, shared);
    bool finite = a == a;

    int sum = 0;
    for (unsigned word = threadIdx.x; word < padded / 4; word += ROW_THREADS) {
        unsigned codes = 0;
#pragma unroll
        for (unsigned j = 0; j < 4; j++) {
            unsigned i = 4 * word + j;
            int code = finite && i < width ? quantize(value(i), a, half_up) : 0;
            sum += code;
            codes |= (unsigned(code) & 0xffu) << (8 * j);
        }
        out.codes[word] = int(codes);
    }
    sum = block_reduce<Add>(sum, shared.sums);
    if (threadIdx.x == 0) {
        *out.sum = sum;
        *out.factor = a;
    }
}
