// peak.cpp - the fastest that the chip can do: independent multiply-adds on registers, nothing
// else. Every table of speeds prints it beside the kernels, since it drifts with temperature and
// neighbours.
#include "simd.h"

namespace ISA {
constexpr int CHAINS = LANES == 16 ? 16 : 12;  // enough to hide the latency of each

static float multiply_add(long n) {
    vf sums[CHAINS], a = splat(0.9999f), b = splat(1e-6f);
    for (int i = 0; i < CHAINS; ++i) sums[i] = splat(i);  // or the compiler keeps one of them
    for (long k = 0; k < n; ++k) {
        UNROLL for (int i = 0; i < CHAINS; ++i) sums[i] = sums[i] * a + b;
    }
    for (int i = 1; i < CHAINS; ++i) sums[0] += sums[i];
    return sum(sums[0]);
}

static double peak(int threads) {
    const long n = 2000000;
    float total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
    total += multiply_add(n);
    return 2.0 * n * W * CHAINS * threads + (total == 12345.0f);  // the result is looked at
}
}  // namespace ISA
