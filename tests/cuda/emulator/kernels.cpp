// All kernels, with the matrix instruction of sm_80 and later.

#include "shim.hpp"

#define BITNET_MMA_M16N8K32 1

namespace {
#include "adamw.cu"
#include "attention.cu"
#include "attention_backward.cu"
#include "dense.cu"
#include "dropout.cu"
#include "gated.cu"
#include "gemm.cu"
#include "hadamard.cu"
#include "head.cu"
#include "loss.cu"
#include "quantize.cu"
#include "rms_norm.cu"
#include "rope.cu"
#include "ternarize.cu"
#include "ternary_backward.cu"
#include "ternary_gemm.cu"
#include "ternary_gemv.cu"
} // namespace

extern const Kernel kernels[] = {
    KERNEL(absolute_mean),
    KERNEL(absolute_sums),
    KERNEL(adamw),
    KERNEL(attention_block_bf16),
    KERNEL(attention_block_f16),
    KERNEL(attention_block_f32),
    KERNEL(attention_block_int8),
    KERNEL(attention_merge),
    KERNEL(blend_rows),
    KERNEL(blend_weights),
    KERNEL(dense_product_bf16),
    KERNEL(dense_product_f16),
    KERNEL(dense_product_f32),
    KERNEL(dropout),
    KERNEL(exponential_sums),
    KERNEL(gated_relu2),
    KERNEL(gated_relu2_backward),
    KERNEL(gated_silu),
    KERNEL(gated_silu_backward),
    KERNEL(gather_rows_bf16),
    KERNEL(gather_rows_f16),
    KERNEL(gather_rows_f32),
    KERNEL(gemm_bf16),
    KERNEL(gemm_f32),
    KERNEL(gemm_i8),
    KERNEL(hadamard),
    KERNEL(head_q4),
    KERNEL(head_q6),
    KERNEL(head_q8),
    KERNEL(quantize_hidden),
    KERNEL(quantize_rows),
    KERNEL(rms_norm),
    KERNEL(rms_norm_backward),
    KERNEL(rms_norm_quantize),
    KERNEL(rms_norm_shares),
    KERNEL(rope),
    KERNEL(scatter_rows),
    KERNEL(softmax_backward),
    KERNEL(softmax_minus_onehot),
    KERNEL(squares),
    KERNEL(sum_rows),
    KERNEL(ternarize),
    KERNEL(ternary_backward),
    KERNEL(ternary_gemm),
    KERNEL(ternary_gemv),
    KERNEL(ternary_gemv_tokens),
    {nullptr, nullptr},
};
