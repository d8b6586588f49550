// softmax.cu - exp(x) / Σ exp(x) over rows, with the largest value taken off first.
//
// One block per row: its threads share the columns, and meet twice, for the maximum and the sum. A
// NaN may escape the maximum but not the sum. Rows are read three times, but only the first time
// from memory: the rest comes out of the cache.
#include "device.cuh"

KERNEL softmax_forward(const float* x, float* y, i64 C) {
    x += blockIdx.x * C, y += blockIdx.x * C;
    float top = -INF, total = 0;
    for (i64 c = threadIdx.x; c < C; c += blockDim.x) top = fmaxf(top, x[c]);
    top = finite(over_block<Max>(top));
    for (i64 c = threadIdx.x; c < C; c += blockDim.x) total += expf(x[c] - top);
    total = over_block<Sum>(total);
    const float scale = total == 0 ? 0 : 1 / total;
    for (i64 c = threadIdx.x; c < C; c += blockDim.x) y[c] = expf(x[c] - top) * scale;
}

// dx = y (dy - Σ dy y)
KERNEL softmax_backward(const float* dy, const float* y, float* dx, i64 C) {
    dy += blockIdx.x * C, y += blockIdx.x * C, dx += blockIdx.x * C;
    float along = 0;
    for (i64 c = threadIdx.x; c < C; c += blockDim.x) along += dy[c] * y[c];
    along = over_block<Sum>(along);
    for (i64 c = threadIdx.x; c < C; c += blockDim.x) dx[c] = y[c] * (dy[c] - along);
}
