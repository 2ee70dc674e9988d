// Rotary position embedding, rotate-half form: the pair (x[i], x[i + d/2]) turns by an angle whose cosine and sine are given.
// Four values are read and two written for two products each: bound by memory.

/// `y` (tokens, heads · 2 · half), dense, of `x`, rows that begin `x_stride` values apart; token t turns by row
/// t mod angle_rows of `cos` and `sin` (angle_rows, half). Grid: (tokens), any block.
extern "C" __global__ void rope(
    const float* __restrict__ x, size_t x_stride, const float* __restrict__ cos, const float* __restrict__ sin,
    unsigned angle_rows, unsigned heads, unsigned half, float* __restrict__ y) {
    size_t token = blockIdx.x;
    size_t angle = token % angle_rows * half;
    x += token * x_stride;
    y += token * heads * half * 2;
    for (unsigned pair = threadIdx.x; pair < heads * half; pair += blockDim.x) {
        unsigned i = pair % half, at = pair / half * 2 * half + i;
        float c = cos[angle + i], s = sin[angle + i], x1 = x[at], x2 = x[at + half];
        y[at] = x1 * c - x2 * s;
        y[at + half] = x2 * c + x1 * s;
    }
}
