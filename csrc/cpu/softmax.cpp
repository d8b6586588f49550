// softmax.cpp - exp(x) / Σ exp(x) over rows, with the largest value taken off first.
//
// A NaN may escape the maximum (every comparison with it is false) but not the sum.
//
// 72 / 79 % of the speed of copying memory, forward / backward (Zen 4).
#include "simd.h"

namespace ISA {
INLINE float row_max(const float* x, long C) {
    vf top = splat(-INF);
    for_vectors(0, C,
                [&](long i, long n) { top = maximum(first_n(load_n(x + i, n), n, -INF), top); });
    return largest(top);
}
INLINE float finite(float x) { return x == -INF ? 0 : x; }  // so that no -inf - -inf appears

static void softmax_forward(const float* x, float* y, long N, long C, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long r = 0; r < N; ++r) {
        const float top = finite(row_max(x + r * C, C));
        vf sums = {};
        for_vectors(0, C, [&](long i, long n) {
            const vf e = exp(load_n(x + r * C + i, n) - top);
            store_n(y + r * C + i, e, n);
            sums += first_n(e, n);
        });
        const float total = sum(sums), scale = total == 0 ? 0 : 1 / total;
        for_vectors(0, C, [&](long i, long n) {
            store_n(y + r * C + i, load_n(y + r * C + i, n) * scale, n);
        });
    }
}

// dx = y (dy - Σ dy y)
static void softmax_backward(const float* dy, const float* y, float* dx, long N, long C,
                             int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long r = 0; r < N; ++r) {
        vf sums = {};
        for_vectors(r * C, (r + 1) * C,
                    [&](long i, long n) { sums += load_n(dy + i, n) * load_n(y + i, n); });
        const float along = sum(sums);
        for_vectors(r * C, (r + 1) * C, [&](long i, long n) {
            store_n(dx + i, load_n(y + i, n) * (load_n(dy + i, n) - along), n);
        });
    }
}
}  // namespace ISA
