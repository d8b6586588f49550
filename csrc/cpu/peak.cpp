// peak.cpp - the fastest that the chip can do: independent multiply-adds on registers, nothing
// else; one pass over memory; and how soon threads hear of each other. Every table of speeds prints
// them beside the kernels, since they drift with temperature and neighbours.
#include "simd.h"

namespace ISA {
constexpr int CHAINS = REGISTERS == 32 ? 16 : 12;  // enough to hide the latency of each

static float multiply_add(long n) {
    vf sums[CHAINS], a = splat(1e-9f);
    for (int i = 0; i < CHAINS; ++i) sums[i] = splat(i);  // or the compiler keeps one of them
    for (long k = 0; k < n; ++k) {
        UNROLL for (int i = 0; i < CHAINS; ++i) sums[i] += a * sums[(i + 1) % CHAINS];
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

static float read(const float* x, long n, int threads) {
    constexpr long CHUNK = 1 << 14, SUMS = 8;  // more sums than loads under way
    float total = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(+ : total)
    for (long c = 0; c < n; c += CHUNK) {
        vf sums[SUMS] = {};
        for (long i = c; i < min(n, c + CHUNK); i += SUMS * W) {
            UNROLL for (long j = 0; j < SUMS; ++j) {
                sums[j] += load_n(x + i + j * W, n - i - j * W);
            }
        }
        for (long j = 1; j < SUMS; ++j) sums[0] += sums[j];
        total += sum(sums[0]);
    }
    return total;
}

static void copy(const float* x, float* y, long n, int threads) {
    for_all_vectors(n, threads, [=](long i, long n) { store_n(y + i, load_n(x + i, n), n); });
}

static long barriers(int threads) {
    const long n = 20000;
#pragma omp parallel num_threads(threads)
    for (long i = 0; i < n; ++i) {
#pragma omp barrier
    }
    return n;
}
}  // namespace ISA
