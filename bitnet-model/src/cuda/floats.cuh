// Stored floats, widened exactly.

#pragma once

struct F32 {
    using Stored = float;
    static constexpr bool SCALED = false;
    __device__ __forceinline__ static float widen(float x) { return x; }
};

struct Bf16 {
    using Stored = unsigned short;
    static constexpr bool SCALED = false;
    __device__ __forceinline__ static float widen(unsigned short bits) { return __uint_as_float(unsigned(bits) << 16); }
};

struct F16 {
    using Stored = unsigned short;
    static constexpr bool SCALED = false;
    /// Shifted into place the exponent is 112 too small, which a product mends, for subnormals as well; infinity and NaN keep
    /// all exponent bits.
    __device__ __forceinline__ static float widen(unsigned short bits) {
        unsigned magnitude = (bits & 0x7fffu) << 13, sign = (bits & 0x8000u) << 16;
        float finite = __uint_as_float(magnitude) * __uint_as_float((127u + 112u) << 23);
        unsigned value = (bits & 0x7c00u) == 0x7c00u ? magnitude | 0x7f800000u : __float_as_uint(finite);
        return __uint_as_float(value | sign);
    }
};

/// A float's nearest bfloat16, half to even, as a float. NaN stays one.
__device__ __forceinline__ float round_bf16(float x) {
    unsigned bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return x;
    return __uint_as_float((bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u);
}
