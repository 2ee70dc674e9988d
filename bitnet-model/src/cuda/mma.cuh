// The integer matrix instruction: c (16 × 8) += a (16 × 32) · b (32 × 8), int8 to int32, by all lanes of a warp.
//
// With lane = 4·g + t, register a[r + 2·h] holds four values of row g + 8·r at depths 16·h + 4·t …, b[h] those of column g,
// and c[2·r + s] is row g + 8·r, column 2·t + s. m8n8k16 of sm_75 takes the same registers, a quarter at a time. All depths
// are added up, so which column of the weights is called which depth does not matter, as long as both operands agree.

#pragma once

#if !defined(BITNET_EMULATED) // the emulation brings its own two instructions
#define BITNET_MMA_M16N8K32 (__CUDA_ARCH__ >= 800)

__device__ __forceinline__ void mma_m16n8k32(int (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_m8n8k16(int& c0, int& c1, unsigned a, unsigned b) {
    asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
        : "+r"(c0), "+r"(c1)
        : "r"(a), "r"(b));
}
#endif

__device__ __forceinline__ void mma(int (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
#if BITNET_MMA_M16N8K32
    mma_m16n8k32(c, a, b0, b1);
#else
    mma_m8n8k16(c[0], c[1], a[0], b0);
    mma_m8n8k16(c[2], c[3], a[1], b0);
    mma_m8n8k16(c[0], c[1], a[2], b1);
    mma_m8n8k16(c[2], c[3], a[3], b1);
#endif
}

/// The left operands of a chunk of a band, four steps of 32 columns: step 2·h + k takes columns 16·(t + 4·h) + 8·k … + 7 of
/// every t, which are words 2·k and 2·k + 1 of the activations there.
struct ChunkOperands {
    unsigned a[4][4];

    __device__ __forceinline__ explicit ChunkOperands(uint4 codes) {
        const unsigned words[2][2] = {{codes.x, codes.y}, {codes.z, codes.w}}; // [row][half of the chunk]
#pragma unroll
        for (unsigned step = 0; step < 4; step++) {
#pragma unroll
            for (unsigned i = 0; i < 4; i++) a[step][i] = codes_of(words[i % 2][step / 2], 2 * (step % 2) + i / 2);
        }
    }

    /// c += the chunk's product with the activations at t and at t + 4.
    __device__ __forceinline__ void multiply(int (&c)[4], int4 low, int4 high) const {
        mma(c, a[0], unsigned(low.x), unsigned(low.y));
        mma(c, a[1], unsigned(low.z), unsigned(low.w));
        mma(c, a[2], unsigned(high.x), unsigned(high.y));
        mma(c, a[3], unsigned(high.z), unsigned(high.w));
    }
};
