// adamw.cu - the optimizer in one pass (reads p, g, m, v; writes p, m, v: 28 bytes a parameter),
// and the norm of all gradients that clipping needs.
#include "device.cuh"

// correction = 1 / (1 - beta^step); rest = 1 - beta
KERNEL adamw(float* param, const float* grad, float* m, float* v, i64 n, float lr, float beta1_rest,
             float beta2_rest, float correction1, float correction2, float eps, float weight_decay,
             float grad_scale) {
    const i64 i = thread_index();
    if (i >= n) return;
    const float g = grad[i] * grad_scale, p = param[i];
    const float mi = m[i] + beta1_rest * (g - m[i]), vi = v[i] + beta2_rest * (g * g - v[i]);
    const float update = mi * correction1 / (sqrtf(vi * correction2) + eps);
    param[i] = p - lr * (update + weight_decay * p);
    m[i] = mi;
    v[i] = vi;
}

// partial[b] = Σ x² over what block b reads, in double: squares of float32 neither overflow nor
// vanish there.
KERNEL sum_squares(const float* x, i64 n, double* partial) {
    double total = 0;
    for (i64 i = thread_index(); i < n; i += (i64)gridDim.x * blockDim.x)
        total += (double)x[i] * x[i];
    total = over_block<Sum>(total);
    if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

// norm = sqrt of the sum of all partial sums; one block
KERNEL square_root_of_sum(const double* partial, i64 n, double* norm) {
    double total = 0;
    for (i64 i = threadIdx.x; i < n; i += blockDim.x) total += partial[i];
    total = over_block<Sum>(total);
    if (threadIdx.x == 0) *norm = sqrt(total);
}
