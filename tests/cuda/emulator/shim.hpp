// CUDA's language for the host's compiler: what the kernels in `bitnet-model/src/cuda` use of it, included before each of them.
//
// Every thread of a block is a fiber (`fibers.cpp`). A fiber runs until it waits for others, at a barrier of its block or at
// an operation of its warp. Floats are what IEEE 754 says: compile without contraction, as the kernels are.

#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <utility>

#define BITNET_EMULATED 1

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
/// All shared memory lies in one section, which is filled with ones (NaN, −1) before each block. Only kernels declare any.
#define __shared__ static __attribute__((section("shared_memory")))

struct Index {
    unsigned x, y, z;
};

/// Of the fiber that runs.
extern Index threadIdx, blockIdx, blockDim, gridDim;

struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

template <class T> T __ldg(const T* at) { return *at; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }

inline unsigned __float_as_uint(float x) {
    unsigned bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
inline float __uint_as_float(unsigned bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
/// Half to even; 0 of NaN, and the nearest int of what is too large.
inline int __float2int_rn(float x) {
    float y = rintf(x);
    return y != y ? 0 : y >= 2147483648.f ? INT32_MAX : y <= -2147483648.f ? INT32_MIN : int(y);
}
/// c + Σ of four products of signed bytes.
inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; i++) c += int(int8_t(unsigned(a) >> (8 * i))) * int(int8_t(unsigned(b) >> (8 * i)));
    return c;
}

/// Waits for all threads of the block.
void __syncthreads();
/// Waits for all lanes of the warp.
void __syncwarp();

/// What lanes give to each other in one operation: words of all lanes.
constexpr unsigned EXCHANGED_WORDS = 6;
using Exchanged = uint32_t[32][EXCHANGED_WORDS];
/// Gives `count` words and waits for all lanes of the warp; what they gave is there until the operation after the next.
const Exchanged& exchange(const uint32_t* words, unsigned count);

template <class T> T __shfl_xor_sync(unsigned mask, T x, unsigned lanes) {
    static_assert(sizeof(T) == sizeof(uint32_t), "one word");
    if (mask != 0xffffffffu) __builtin_trap();
    uint32_t word;
    memcpy(&word, &x, sizeof word);
    const Exchanged& all = exchange(&word, 1);
    T other;
    memcpy(&other, &all[(threadIdx.x % 32) ^ lanes][0], sizeof other);
    return other;
}

// The matrix instructions, element by element from the tables of fragments in the PTX ISA (9.7.14.5): groupID = lane / 4,
// threadID_in_group = lane % 4.

inline int byte_of(uint32_t word, unsigned i) { return int8_t(word >> (8 * i)); }

/// m8n8k16, s8: A row groupID, col 4·threadID + i; B row 4·threadID + i, col groupID; C row groupID, col 2·threadID + i.
inline void mma_m8n8k16(int& c0, int& c1, unsigned a, unsigned b) {
    const uint32_t words[] = {a, b};
    const Exchanged& all = exchange(words, 2);
    unsigned lane = threadIdx.x % 32, row = lane / 4;
    for (unsigned i = 0; i < 2; i++) {
        unsigned col = lane % 4 * 2 + i;
        int sum = 0;
        for (unsigned k = 0; k < 16; k++)
            sum += byte_of(all[4 * row + k / 4][0], k % 4) * byte_of(all[4 * col + k / 4][1], k % 4);
        (i ? c1 : c0) += sum;
    }
}

/// m16n8k32, s8: element i of A is in row groupID (+ 8 for 4 ≤ i < 8 and 12 ≤ i), col 4·threadID + i % 4 (+ 16 for 8 ≤ i);
/// of B in row 4·threadID + i % 4 (+ 16 for 4 ≤ i), col groupID; of C in row groupID (+ 8 for 2 ≤ i), col 2·threadID + i % 2.
inline void mma_m16n8k32(int (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    const uint32_t words[] = {a[0], a[1], a[2], a[3], b0, b1};
    const Exchanged& all = exchange(words, 6);
    unsigned lane = threadIdx.x % 32;
    for (unsigned i = 0; i < 4; i++) {
        unsigned row = lane / 4 + (i >= 2 ? 8 : 0), col = lane % 4 * 2 + i % 2;
        int sum = 0;
        for (unsigned k = 0; k < 32; k++) {
            unsigned a_register = (row >= 8 ? 1 : 0) + (k >= 16 ? 2 : 0), b_register = 4 + (k >= 16 ? 1 : 0);
            unsigned a_lane = row % 8 * 4 + k % 16 / 4, b_lane = col * 4 + k % 16 / 4;
            sum += byte_of(all[a_lane][a_register], k % 4) * byte_of(all[b_lane][b_register], k % 4);
        }
        c[i] += sum;
    }
}

/// A kernel by its name, with its arguments by their addresses, as `cuLaunchKernel` takes them.
struct Kernel {
    const char* name;
    void (*call)(void** args);
};

template <class... Args, size_t... I>
void call_with(void (*kernel)(Args...), void** args, std::index_sequence<I...>) {
    kernel(*static_cast<Args*>(args[I])...);
}

template <class... Args> constexpr std::index_sequence_for<Args...> indices_of(void (*)(Args...)) { return {}; }

template <auto KERNEL> void call(void** args) { call_with(KERNEL, args, indices_of(KERNEL)); }

#define KERNEL(NAME) {#NAME, call<NAME>}
