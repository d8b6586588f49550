// norm.cpp - RMSNorm and LayerNorm, and sums over rows.
//
// A row is read from memory once and stays in L1 for the passes after. Gradients of the weights are
// sums over rows: each block of ROWS rows has its own partial sum, whichever thread computes it,
// and the partial sums are added in the order of the blocks.
//
//   xhat = (x - mean) rstd          dx = rstd (dxhat - mean(dxhat) - xhat mean(dxhat xhat))
//   y = xhat weight + bias          where dxhat = dy weight; RMSNorm is the same with mean = 0
//
// Layer norm 91 / 98 % of the speed of copying memory, RMS norm 101 / 73 % (Zen 4).
#include "simd.h"

namespace ISA {
constexpr long ROWS = 32;

// out (C) = the sum of the rows of partial (blocks, C), in order
static void add_blocks(const float* partial, long blocks, long C, float* out, int threads) {
    constexpr long COLUMNS = 256;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long c = 0; c < C; c += COLUMNS)
        for_vectors(c, min(C, c + COLUMNS), [=](long i, long n) {
            vf total = {};
            for (long b = 0; b < blocks; ++b) total += load_n(partial + b * C + i, n);
            store_n(out + i, total, n);
        });
}

// f(row, partial) for every row; partial (sums, C) belongs to the row's block and begins at zero.
// Afterwards out[s] (C) holds the sum of partial s over all blocks.
template <int SUMS, class F>
INLINE void for_rows_with_sums(long N, long C, float* const (&out)[SUMS], int threads, F f) {
    const long blocks = up(N, ROWS);
    Scratch partial(SUMS * blocks * C);
    float* const sums = partial.data;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long b = 0; b < blocks; ++b) {
        for (int s = 0; s < SUMS; ++s) memset(sums + (s * blocks + b) * C, 0, C * sizeof(float));
        for (long r = b * ROWS; r < min(N, (b + 1) * ROWS); ++r) f(r, sums + b * C, blocks * C);
    }
    for (int s = 0; s < SUMS; ++s) add_blocks(sums + s * blocks * C, blocks, C, out[s], threads);
}

static void sum_rows(const float* x, float* y, long N, long C, int threads) {
    for_rows_with_sums<1>(N, C, {y}, threads, [=](long r, float* total, long) {
        for_vectors(0, C, [=](long i, long n) {
            store_n(total + i, load_n(total + i, n) + load_n(x + r * C + i, n), n);
        });
    });
}

template <bool LAYER>
INLINE void norm_forward(const float* x, const float* weight, const float* bias, float eps,
                         float* y, float* mean, float* rstd, long N, long C, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long r = 0; r < N; ++r) {
        const float* row = x + r * C;
        vf total = {}, squares = {};
        if (LAYER) for_vectors(0, C, [&](long i, long n) { total += load_n(row + i, n); });
        const float centre = LAYER ? sum(total) / C : 0;
        for_vectors(0, C, [&](long i, long n) {
            const vf d = first_n(load_n(row + i, n) - centre, n);  // 0 beyond the row
            squares += d * d;
        });
        const float scale = 1 / __builtin_sqrtf(sum(squares) / C + eps);
        for_vectors(0, C, [&](long i, long n) {
            const vf xhat = (load_n(row + i, n) - centre) * scale;
            const vf shift = LAYER ? load_n(bias + i, n) : vf{};
            store_n(y + r * C + i, xhat * load_n(weight + i, n) + shift, n);
        });
        rstd[r] = scale;
        if (LAYER) mean[r] = centre;
    }
}

template <bool LAYER>
INLINE void norm_backward(const float* dy, const float* x, const float* weight, const float* mean,
                          const float* rstd, float* dx, float* const (&dparams)[LAYER ? 2 : 1],
                          long N, long C, int threads) {
    for_rows_with_sums<LAYER ? 2 : 1>(N, C, dparams, threads, [=](long r, float* dw, long next) {
        const float *row = x + r * C, *drow = dy + r * C;
        const float centre = LAYER ? mean[r] : 0, scale = rstd[r];
        vf total = {}, projection = {};
        for_vectors(0, C, [&](long i, long n) {
            const vf g = load_n(drow + i, n), dxhat = g * load_n(weight + i, n);
            const vf xhat = (load_n(row + i, n) - centre) * scale;
            store_n(dw + i, load_n(dw + i, n) + g * xhat, n);
            if (LAYER) store_n(dw + next + i, load_n(dw + next + i, n) + g, n);
            total += dxhat;
            projection += dxhat * xhat;  // lanes beyond n hold 0: dxhat is 0 there
        });
        const float mean_dxhat = LAYER ? sum(total) / C : 0, along = sum(projection) / C;
        for_vectors(0, C, [&](long i, long n) {
            const vf dxhat = load_n(drow + i, n) * load_n(weight + i, n);
            const vf xhat = (load_n(row + i, n) - centre) * scale;
            store_n(dx + r * C + i, (dxhat - mean_dxhat - xhat * along) * scale, n);
        });
    });
}

static void rms_norm_forward(const float* x, const float* weight, float eps, float* y, float* rstd,
                             long N, long C, int threads) {
    norm_forward<false>(x, weight, nullptr, eps, y, nullptr, rstd, N, C, threads);
}
static void rms_norm_backward(const float* dy, const float* x, const float* weight,
                              const float* rstd, float* dx, float* dweight, long N, long C,
                              int threads) {
    norm_backward<false>(dy, x, weight, nullptr, rstd, dx, {dweight}, N, C, threads);
}
static void layer_norm_forward(const float* x, const float* weight, const float* bias, float eps,
                               float* y, float* mean, float* rstd, long N, long C, int threads) {
    norm_forward<true>(x, weight, bias, eps, y, mean, rstd, N, C, threads);
}
static void layer_norm_backward(const float* dy, const float* x, const float* weight,
                                const float* mean, const float* rstd, float* dx, float* dweight,
                                float* dbias, long N, long C, int threads) {
    norm_backward<true>(dy, x, weight, mean, rstd, dx, {dweight, dbias}, N, C, threads);
}
}  // namespace ISA
