// adamw.cu - the optimizer in one pass (reads p, g, m, v; writes p, m, v: 28 bytes a parameter),
// and the norm of all gradients that clipping needs.
#include "device.cuh"

// correction = 1 / (1 - beta^step); rest = 1 - beta
struct AdamW {
    float lr, beta1_rest, beta2_rest, correction1, correction2, eps, weight_decay, grad_scale;
};

DEVICE void move(i64 i, float* param, const float* grad, float* m, float* v, const AdamW& s) {
    const float g = grad[i] * s.grad_scale, p = param[i];
    const float mi = m[i] + s.beta1_rest * (g - m[i]), vi = v[i] + s.beta2_rest * (g * g - v[i]);
    const float update = mi * s.correction1 / (sqrtf(vi * s.correction2) + s.eps);
    param[i] = p - s.lr * (update + s.weight_decay * p);
    m[i] = mi;
    v[i] = vi;
}

KERNEL adamw(float* param, const float* grad, float* m, float* v, i64 n, float lr, float beta1_rest,
             float beta2_rest, float correction1, float correction2, float eps, float weight_decay,
             float grad_scale) {
    const i64 i = thread_index();
    if (i < n)
        move(i, param, grad, m, v,
             {lr, beta1_rest, beta2_rest, correction1, correction2, eps, weight_decay, grad_scale});
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

// the square root of the sum of all partial sums, in every thread of a block
DEVICE double root_of_sum(const double* partial, i64 n) {
    double total = 0;
    for (i64 i = threadIdx.x; i < n; i += blockDim.x) total += partial[i];
    return sqrt(over_block<Sum>(total));
}

KERNEL __launch_bounds__(1024) square_root_of_sum(const double* partial, i64 n, double* norm) {
    const double root = root_of_sum(partial, n);
    if (threadIdx.x == 0) *norm = root;
}

// ---- all parameters at once, without asking the host -------------------------------------------
//
// A step that waits for the host, which looks at the norm before it asks for the update, leaves the
// device idle meanwhile. So the norm stays here, and the device judges it as the host would:
//
//     put_pointers                  where each tensor's param, grad, m and v lie
//     sum_squares_of_pieces         one block for each piece of a tensor
//     judge                         norm, verdict, and what AdamW multiplies by
//     adamw_of_pieces               which does nothing where the update was refused
//
// A piece is three integers: its tensor, its first number, and the one after its last.

// Pointers come as arguments, so that nothing is copied from the host's memory. One thread.
KERNEL put_pointers(i64* to, float* p0, float* p1, float* p2, float* p3, float* p4, float* p5,
                    float* p6, float* p7, float* p8, float* p9, float* p10, float* p11, float* p12,
                    float* p13, float* p14, float* p15) {
    float* all[] = {p0, p1, p2, p3, p4, p5, p6, p7, p8, p9, p10, p11, p12, p13, p14, p15};
    if (threadIdx.x == 0)
#pragma unroll
        for (int i = 0; i < 16; ++i) to[i] = (i64)all[i];
}

struct Tensor {
    float *param, *grad, *m, *v;  // grad is null where there is none
};

KERNEL sum_squares_of_pieces(const i64* table, const i64* pieces, double* partial) {
    const i64* piece = pieces + 3 * blockIdx.x;
    const float* grad = ((const Tensor*)table)[piece[0]].grad;
    double total = 0;
    for (i64 i = piece[1] + threadIdx.x; grad && i < piece[2]; i += blockDim.x)
        total += (double)grad[i] * grad[i];
    total = over_block<Sum>(total);
    if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

// In the order of operations, and with the rounding, of Guard.reason in tinylm/train.py.
//
//   settings   beta1, beta2, the largest norm (0: any)
//   guard      running mean of the norm, how many it has seen, how many updates were made
//   told       for the host: loss, norm, updates made, and the three numbers of fault
//   plan       for AdamW: whether to update, grad_scale, correction1, correction2
KERNEL __launch_bounds__(1024)
    judge(const double* partial, i64 n, const double* loss, const double* settings,
          const i64* fault, double* guard, double* told, float* plan) {
    const double norm = root_of_sum(partial, n);
    if (threadIdx.x > 0) return;
    const double limit = __dmul_rn(10, guard[0]), clip = settings[2];
    const bool finite = norm - norm == 0 && *loss - *loss == 0;
    const bool spike = finite && guard[1] >= 50 && norm > limit;
    const bool go = finite && !spike && fault[0] == 0;
    if (finite) {
        guard[1] += 1;
        const double weight = fmax(1 / guard[1], 0.02), more = (spike ? limit : norm) - guard[0];
        guard[0] = __dadd_rn(guard[0], __dmul_rn(weight, more));
    }
    guard[2] += go;
    plan[0] = go;
    plan[1] = clip > 0 ? fmin(1.0, clip / (norm + 1e-6)) : 1;
    plan[2] = 1 / (1 - pow(settings[0], guard[2]));
    plan[3] = 1 / (1 - pow(settings[1], guard[2]));
    told[0] = *loss, told[1] = norm, told[2] = guard[2];
    for (int i = 0; i < 3; ++i) told[3 + i] = fault[i];
}

KERNEL adamw_of_pieces(const i64* table, const i64* pieces, const float* decays, const float* plan,
                       const float* lr, float beta1_rest, float beta2_rest, float eps) {
    const i64* piece = pieces + 3 * blockIdx.x;
    const Tensor t = ((const Tensor*)table)[piece[0]];
    if (plan[0] == 0 || !t.grad) return;
    const float decay = decays[piece[0]];
    const AdamW s = {*lr, beta1_rest, beta2_rest, plan[2], plan[3], eps, decay, plan[1]};
    for (i64 i = piece[1] + threadIdx.x; i < piece[2]; i += blockDim.x)
        move(i, t.param, t.grad, t.m, t.v, s);
}
