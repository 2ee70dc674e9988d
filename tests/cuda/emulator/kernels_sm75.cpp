// The kernels with a matrix instruction as sm_75 has it.

#include "shim.hpp"

#define BITNET_MMA_M16N8K32 0

// Functions of the language C have one name in a program, whatever namespace they are in.
#define ternary_gemm ternary_gemm_sm75
#define ternary_gemv ternary_gemv_sm75
#define ternary_gemv_tokens ternary_gemv_tokens_sm75

namespace {
#include "ternary_gemm.cu"
#include "ternary_gemv.cu"
} // namespace

extern const Kernel kernels_sm75[] = {
    KERNEL(ternary_gemm),
    KERNEL(ternary_gemv),
    KERNEL(ternary_gemv_tokens),
    {nullptr, nullptr},
};
