// cross_entropy.cu - the loss of a language model, alone or after its last linear layer.
//
//   loss = lse - logits[target]          dlogits = dloss (exp(logits - lse) - onehot(target))
//
// One block per row of logits. The linear layer is not here: linear_cross_entropy in launch.py
// makes the logits of some rows, calls these kernels on them, and multiplies on; so (N, V) logits
// never exist at once, and dlogits are written over logits.
#include "device.cuh"

// The logarithm of Σ exp(row) over V columns
DEVICE float log_sum_exp(const float* row, i64 V) {
    float top = -INF, total = 0;
    for (i64 c = threadIdx.x; c < V; c += blockDim.x) top = fmaxf(top, row[c]);
    top = over_block<Max>(top);
    for (i64 c = threadIdx.x; c < V; c += blockDim.x) total += expf(row[c] - top);
    return top + logf(over_block<Sum>(total));
}

// d = scale (exp(row - lse) - onehot(target)); d may be the row itself
DEVICE void write_gradient(const float* row, float* d, i64 V, i64 target, float lse, float scale) {
    for (i64 c = threadIdx.x; c < V; c += blockDim.x)
        d[c] = scale * (expf(row[c] - lse) - (c == target));
}

// Where the target is -1 the loss is 0; so is lse, where `masked` asks for it.
KERNEL cross_entropy_forward(const float* logits, const int* targets, float* loss, float* lse,
                             i64 V, i64 masked, i64* fault, i64 check) {
    const float* row = logits + blockIdx.x * V;
    const int target = checked(targets[blockIdx.x], -1, V, fault, check);
    const float total = log_sum_exp(row, V);
    if (threadIdx.x > 0) return;
    loss[blockIdx.x] = target < 0 ? 0 : total - row[target];
    lse[blockIdx.x] = target < 0 && masked ? 0 : total;
}

KERNEL cross_entropy_backward(const float* dloss, const float* logits, const int* targets,
                              const float* lse, float* dlogits, i64 V, i64* fault, i64 check) {
    const i64 r = blockIdx.x, target = checked(targets[r], -1, V, fault, check);
    if (target < 0)
        for (i64 c = threadIdx.x; c < V; c += blockDim.x) dlogits[r * V + c] = 0;
    else
        write_gradient(logits + r * V, dlogits + r * V, V, target, lse[r], dloss[r]);
}

// Loss and lse of each row, whose logits become the gradient of the mean: *scale is 1 / (how many
// rows count). Rows whose target is -1 leave 0 everywhere.
KERNEL cross_entropy_with_gradients(float* logits, const int* targets, const float* scale,
                                    float* loss, float* lse, i64 V, i64* fault, i64 check) {
    const i64 r = blockIdx.x, target = checked(targets[r], -1, V, fault, check);
    float* row = logits + r * V;
    const float total = target < 0 ? 0 : log_sum_exp(row, V);
    if (threadIdx.x == 0) {
        loss[r] = target < 0 ? 0 : total - row[target];
        lse[r] = total;
    }
    __syncthreads();  // row[target] has been read
    write_gradient(row, row, V, target, total, *scale);
    if (target >= 0) return;
    for (i64 c = threadIdx.x; c < V; c += blockDim.x) row[c] = 0;
}

// *scale: what the gradient of the mean is multiplied by to be that of the sum of dloss * loss,
// where dloss is the same for all of the N targets that count. Where it is not, that is noted. One
// block.
KERNEL __launch_bounds__(1024)
    even_scale(const float* dloss, const int* targets, i64 N, float* scale, i64* fault, i64 check) {
    float counted = 0, total = 0, most = -INF, least = -INF;  // least: of -dloss
    for (i64 n = threadIdx.x; n < N; n += blockDim.x)
        if (targets[n] >= 0) {
            counted += 1, total += dloss[n];
            most = fmaxf(most, dloss[n]), least = fmaxf(least, -dloss[n]);
        }
    counted = over_block<Sum>(counted), total = over_block<Sum>(total);
    most = over_block<Max>(most), least = over_block<Max>(least);
    if (threadIdx.x > 0) return;
    if (most > -least) note(fault, check, 0, 0);
    *scale = counted == 0 ? 1 : total == total ? most / (1 / counted) : total;
}

KERNEL multiply_by(float* x, const float* scale, i64 n) {
    const i64 i = thread_index();
    if (i < n && *scale != 1) x[i] *= *scale;
}

// scale = 1 / (how many of the N targets count); one block
KERNEL __launch_bounds__(1024) one_over_counted(const int* targets, i64 N, float* scale) {
    float counted = 0;  // exact up to 16 million
    for (i64 n = threadIdx.x; n < N; n += blockDim.x) counted += targets[n] >= 0;
    counted = over_block<Sum>(counted);
    if (threadIdx.x == 0) *scale = 1 / fmaxf(1, counted);
}
