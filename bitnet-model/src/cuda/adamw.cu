// AdamW (arXiv:1711.05101) in place, and the squares of gradients for their norm. Operations and their order are the CPU's
// (`optimizer/adamw.rs` and `optimizer/clip.rs` of bitnet-train). Bound by memory: 28 bytes a parameter for the update, 4 for the
// norm.

/// Elements of a block.
constexpr unsigned ADAMW_ELEMENTS = 1024;

/// `parameter`, `first` and `second` (count) become what they are after an update with `gradient` (count). Grid: (count / 1024
/// rounded up), any block.
extern "C" __global__ void
adamw(float* __restrict__ parameter, const float* __restrict__ gradient, float* __restrict__ first,
      float* __restrict__ second, size_t count, float grad_factor, float keep, float one_minus_beta1, float beta2,
      float one_minus_beta2, float bias2_root, float eps, float step_size) {
    size_t begin = size_t(blockIdx.x) * ADAMW_ELEMENTS, end = begin + ADAMW_ELEMENTS < count ? begin + ADAMW_ELEMENTS : count;
    for (size_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
        float g = gradient[i] * grad_factor;
        float m = first[i] + one_minus_beta1 * (g - first[i]);
        float v = beta2 * second[i] + one_minus_beta2 * g * g;
        float root = sqrtf(v) / bias2_root + eps;
        parameter[i] = parameter[i] * keep - step_size * m / root;
        first[i] = m;
        second[i] = v;
    }
}

constexpr unsigned SQUARES_THREADS = 256;
/// Values of a chunk, and its sums side by side.
constexpr unsigned SQUARES_CHUNK = 1 << 16;
constexpr unsigned SQUARES_SUMS = 8;
/// Chunks of a block.
constexpr unsigned SQUARES_CHUNKS = SQUARES_THREADS / SQUARES_SUMS;

/// `sums` (chunks): Σx² of each chunk of `count` values, in double precision, which holds a square exactly. What is left of
/// whole eights is added by itself. Grid: (chunks / 32 rounded up).
extern "C" __global__ void __launch_bounds__(SQUARES_THREADS)
squares(const float* __restrict__ x, size_t count, double* __restrict__ sums) {
    __shared__ double parts[SQUARES_THREADS];
    unsigned part = threadIdx.x % SQUARES_SUMS;
    size_t chunk = size_t(blockIdx.x) * SQUARES_CHUNKS + threadIdx.x / SQUARES_SUMS;
    size_t first = chunk * SQUARES_CHUNK, end = first + SQUARES_CHUNK < count ? first + SQUARES_CHUNK : count;
    size_t whole = first < end ? end - (end - first) % SQUARES_SUMS : first;
    double sum = 0.;
    for (size_t i = first + part; i < whole; i += SQUARES_SUMS) sum += double(x[i]) * double(x[i]);
    parts[threadIdx.x] = sum;
    __syncthreads();
    if (part == 0 && first < count) {
        double total = 0., rest = 0.;
        for (unsigned i = 0; i < SQUARES_SUMS; i++) total += parts[threadIdx.x + i];
        for (size_t i = whole; i < end; i++) rest += double(x[i]) * double(x[i]);
        sums[chunk] = total + rest;
    }
}
