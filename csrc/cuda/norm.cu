// norm.cu - RMSNorm and LayerNorm, and sums over rows.
//
//   xhat = (x - mean) rstd          dx = rstd (dxhat - mean(dxhat) - xhat mean(dxhat xhat))
//   y = xhat weight + bias          where dxhat = dy weight; RMSNorm is the same with mean = 0
//
// One warp per row, so that no barrier is needed: lane l takes the columns l, l + 32, ...
//
// Gradients of the weights are sums over rows. A tile of 32 columns by 8 warps walks down its share
// of the rows, joins its 8 sums in order, and leaves one row of partial sums; a second pass of the
// same kernel adds those up:
//
//        C                         columns ->
//     ┌──────┐    shares      ┌──────┐               Neighbouring lanes read neighbouring
//   N │ x    │  ──────────>   │      │  ──────> y    columns. How the rows are shared depends
//     └──────┘                └──────┘               on N alone, and so do the bits.
#include "device.cuh"

#define FOR_COLUMNS(c) for (i64 c = threadIdx.x % WARP; c < C; c += WARP)
DEVICE i64 warp_index() { return thread_index() / WARP; }
DEVICE bool first_lane() { return threadIdx.x % WARP == 0; }

KERNEL rms_norm_forward(const float* x, const float* weight, float eps, float* y, float* rstd,
                        i64 N, i64 C) {
    const i64 row = warp_index();
    if (row >= N) return;
    x += row * C, y += row * C;
    float squares = 0;
    FOR_COLUMNS(c) squares += x[c] * x[c];
    const float r = 1 / sqrtf(over_warp<Sum>(squares) / C + eps);
    FOR_COLUMNS(c) y[c] = x[c] * r * weight[c];
    if (first_lane()) rstd[row] = r;
}

KERNEL rms_norm_backward(const float* dy, const float* x, const float* weight, const float* rstd,
                         float* dx, i64 N, i64 C) {
    const i64 row = warp_index();
    if (row >= N) return;
    dy += row * C, x += row * C, dx += row * C;
    const float r = rstd[row];
    float along = 0;
    FOR_COLUMNS(c) along += dy[c] * weight[c] * x[c];
    along = over_warp<Sum>(along) / C * r * r;
    FOR_COLUMNS(c) dx[c] = r * (dy[c] * weight[c] - x[c] * along);
}

KERNEL layer_norm_forward(const float* x, const float* weight, const float* bias, float eps,
                          float* y, float* mean, float* rstd, i64 N, i64 C) {
    const i64 row = warp_index();
    if (row >= N) return;
    x += row * C, y += row * C;
    float sum = 0, squares = 0;
    FOR_COLUMNS(c) sum += x[c];
    const float m = over_warp<Sum>(sum) / C;
    FOR_COLUMNS(c) squares += (x[c] - m) * (x[c] - m);
    const float r = 1 / sqrtf(over_warp<Sum>(squares) / C + eps);
    FOR_COLUMNS(c) y[c] = (x[c] - m) * r * weight[c] + bias[c];
    if (first_lane()) mean[row] = m, rstd[row] = r;
}

KERNEL layer_norm_backward(const float* dy, const float* x, const float* weight, const float* mean,
                           const float* rstd, float* dx, i64 N, i64 C) {
    const i64 row = warp_index();
    if (row >= N) return;
    dy += row * C, x += row * C, dx += row * C;
    const float m = mean[row], r = rstd[row];
    float sum = 0, along = 0;
    FOR_COLUMNS(c) {
        sum += dy[c] * weight[c];
        along += dy[c] * weight[c] * (x[c] - m) * r;
    }
    sum = over_warp<Sum>(sum) / C, along = over_warp<Sum>(along) / C;
    FOR_COLUMNS(c) dx[c] = r * (dy[c] * weight[c] - sum - (x[c] - m) * r * along);
}

// ---- sums over rows ----------------------------------------------------------------------------

constexpr int SUM_WARPS = 8;

// y[share, c] = Σ term(row, c) over the rows of the share; grid (columns / 32, shares)
template <class Term>
DEVICE void sum_share(Term term, float* y, i64 N, i64 C) {
    __shared__ float of_warp[SUM_WARPS][WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const i64 c = (i64)blockIdx.x * WARP + lane;
    const i64 rows = (N + gridDim.y - 1) / gridDim.y, begin = blockIdx.y * rows;
    const i64 end = begin + rows < N ? begin + rows : N;
    float sum = 0;
    if (c < C)
        for (i64 row = begin + warp; row < end; row += SUM_WARPS) sum += term(row, c);
    of_warp[warp][lane] = sum;
    __syncthreads();
    if (warp > 0 || c >= C) return;
    for (int w = 1; w < SUM_WARPS; ++w) sum += of_warp[w][lane];
    y[blockIdx.y * C + c] = sum;
}

KERNEL sum_rows(const float* x, float* y, i64 N, i64 C) {
    sum_share([=](i64 row, i64 c) { return x[row * C + c]; }, y, N, C);
}

// dweight: Σ dy xhat; mean may be null, as it is for RMSNorm
KERNEL norm_dweight(const float* dy, const float* x, const float* mean, const float* rstd, float* y,
                    i64 N, i64 C) {
    sum_share(
        [=](i64 row, i64 c) {
            const float m = mean ? mean[row] : 0;
            return dy[row * C + c] * (x[row * C + c] - m) * rstd[row];
        },
        y, N, C);
}
