// The exponential function of `kernels/exp.rs`, operation for operation, so that attention has the CPU's bits:
// eˣ = 2ⁿ · eʳ with n = round(x / ln 2) and |r| ≤ ½ ln 2, off by less than 1.02 units in the last place.

#pragma once

/// eˣ; 0 below −104, ∞ above 88.73, NaN of NaN.
__device__ __forceinline__ float exp_f32(float x) {
    x = x < -105.f ? -105.f : x; // both keep a NaN
    x = x > 89.5f ? 89.5f : x;
    float n = rintf(x * 1.44269504f);
    float r = fmaf(n, -355.f / 512.f, x); // the first ten bits of ln 2: exact
    r = fmaf(n, 2.1219444e-4f, r);
    float p = 1.9875691e-4f;
    p = fmaf(p, r, 1.3981999e-3f);
    p = fmaf(p, r, 8.333452e-3f);
    p = fmaf(p, r, 4.1665796e-2f);
    p = fmaf(p, r, 1.6666665e-1f);
    p = fmaf(p, r, 0.5f);
    float e = fmaf(p, r * r, r) + 1.f;
    // Two factors, each a normal number; the first product is exact.
    int exponent = __float2int_rn(n), half = exponent >> 1;
    return e * __uint_as_float(unsigned(half + 127) << 23) * __uint_as_float(unsigned(exponent - half + 127) << 23);
}
