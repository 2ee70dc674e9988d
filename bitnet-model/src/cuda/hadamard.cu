// The orthonormal Hadamard transform of blocks of a row, as `quant/hadamard.rs` has it on the CPU: rounds of sums and
// differences, then one product. Bound by memory: each value is read and written once.

constexpr unsigned HADAMARD_THREADS = 256;
/// Values of the largest transform: 32 KiB of shared memory.
constexpr unsigned HADAMARD_MOST = 8192;

/// `y` of `x`: transforms of `size` values, a power of two, one behind another, times `norm`. Grid: (transforms).
extern "C" __global__ void __launch_bounds__(HADAMARD_THREADS)
hadamard(const float* __restrict__ x, unsigned size, float norm, float* __restrict__ y) {
    __shared__ float values[HADAMARD_MOST];
    x += size_t(blockIdx.x) * size;
    y += size_t(blockIdx.x) * size;
    for (unsigned i = threadIdx.x; i < size; i += HADAMARD_THREADS) values[i] = x[i];
    for (unsigned half = 1; half < size; half *= 2) {
        __syncthreads(); // all values of the round before are there
        for (unsigned i = threadIdx.x; i < size / 2; i += HADAMARD_THREADS) {
            unsigned at = i / half * 2 * half + i % half;
            float left = values[at], right = values[at + half];
            values[at] = left + right;
            values[at + half] = left - right;
        }
    }
    __syncthreads();
    for (unsigned i = threadIdx.x; i < size; i += HADAMARD_THREADS) y[i] = values[i] * norm;
}
