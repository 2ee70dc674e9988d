// All kernels, with the matrix instruction of sm_80 and later.

#include "shim.hpp"

#define BITNET_MMA_M16N8K32 1

namespace {
#include "attention.cu"
#include "gated.cu"
#include "quantize.cu"
#include "rms_norm.cu"
#include "rope.cu"
#include "ternary_backward.cu"
#include "ternary_gemm.cu"
#include "ternary_gemv.cu"
} // namespace

extern const Kernel kernels[] = {
    KERNEL(attention_block_bf16),
    KERNEL(attention_block_f16),
    KERNEL(attention_block_f32),
    KERNEL(attention_block_int8),
    KERNEL(attention_merge),
    KERNEL(gated_relu2),
    KERNEL(gated_silu),
    KERNEL(quantize_rows),
    KERNEL(rms_norm),
    KERNEL(rms_norm_quantize),
    KERNEL(rope),
    KERNEL(ternary_backward),
    KERNEL(ternary_gemm),
    KERNEL(ternary_gemv),
    KERNEL(ternary_gemv_tokens),
    {nullptr, nullptr},
};
