// The gate of the feed-forward layer, act(gate) · up. relu² has the CPU's bits. SiLU has its formula, g / (1 + e⁻ᵍ), but
// another exponential function: see `exp.cuh`.

#include "exp.cuh"

/// relu² of the gate; a NaN stays one.
__device__ __forceinline__ float relu2(float x) {
    float positive = x < 0.f ? 0.f : x;
    return positive * positive;
}

__device__ __forceinline__ float silu(float x) { return x / (1.f + exp_f32(-x)); }

/// Elements of a block.
constexpr unsigned GATED = 1024;

template <class Act>
__device__ __forceinline__ void
gated(Act act, const float* gate, size_t gate_stride, const float* up, size_t up_stride, unsigned width, float* y) {
    size_t row = blockIdx.x;
    unsigned end = min(width, (blockIdx.y + 1) * GATED);
    gate += row * gate_stride;
    up += row * up_stride;
    y += row * width;
    for (unsigned i = blockIdx.y * GATED + threadIdx.x; i < end; i += blockDim.x) y[i] = act(gate[i]) * up[i];
}

/// `y` (rows, width), dense, of `gate` and `up`, whose rows begin `gate_stride` and `up_stride` values apart.
/// Grid: (rows, width / 1024 rounded up), any block.
extern "C" __global__ void gated_relu2(
    const float* __restrict__ gate, size_t gate_stride, const float* __restrict__ up, size_t up_stride, unsigned width,
    float* __restrict__ y) {
    gated(relu2, gate, gate_stride, up, up_stride, width, y);
}

/// As `gated_relu2`, with SiLU.
extern "C" __global__ void gated_silu(
    const float* __restrict__ gate, size_t gate_stride, const float* __restrict__ up, size_t up_stride, unsigned width,
    float* __restrict__ y) {
    gated(silu, gate, gate_stride, up, up_stride, width, y);
}

struct Slope {
    float value;
    float derivative;
};

__device__ __forceinline__ Slope relu2_slope(float x) {
    float positive = x < 0.f ? 0.f : x;
    return {positive * positive, 2.f * positive};
}

/// σ(x)·(1 + x·(1 − σ(x))).
__device__ __forceinline__ Slope silu_slope(float x) {
    float denominator = 1.f + exp_f32(-x), sigmoid = 1.f / denominator;
    return {x / denominator, sigmoid * (1.f + x * (1.f - sigmoid))};
}

template <class Act>
__device__ __forceinline__ void
gated_backward(Act act, const float* gate, const float* up, const float* dy, size_t count, float* dgate, float* dup) {
    size_t i = size_t(blockIdx.x) * GATED + threadIdx.x, end = (size_t(blockIdx.x) + 1) * GATED;
    if (end > count) end = count;
    for (; i < end; i += blockDim.x) {
        Slope slope = act(gate[i]);
        dgate[i] = dy[i] * up[i] * slope.derivative;
        dup[i] = dy[i] * slope.value;
    }
}

/// The gradients of `count` values of gate and up, all dense. Grid: (count / 1024 rounded up), any block.
extern "C" __global__ void gated_relu2_backward(
    const float* __restrict__ gate, const float* __restrict__ up, const float* __restrict__ dy, size_t count,
    float* __restrict__ dgate, float* __restrict__ dup) {
    gated_backward(relu2_slope, gate, up, dy, count, dgate, dup);
}

/// As `gated_relu2_backward`, with SiLU.
extern "C" __global__ void gated_silu_backward(
    const float* __restrict__ gate, const float* __restrict__ up, const float* __restrict__ dy, size_t count,
    float* __restrict__ dgate, float* __restrict__ dup) {
    gated_backward(silu_slope, gate, up, dy, count, dgate, dup);
}
