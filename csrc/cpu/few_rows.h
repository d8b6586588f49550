// few_rows.h - products of few rows, as in generation, where packing would cost more than it
// brings: B is read once and as it lies, so that memory is all that they wait for.
#pragma once
#include "simd.h"

namespace ISA {
// B stored (N, K): each of its rows is a dot product with those of A.
template <int R, int V>
static void dot_tile(const Product& p, long m, long n) {
    const float *a = p.A + m * p.lda, *b = p.B + n * p.ldb;
    vf sums[R][V] = {};
    for_vectors(0, p.K, [&](long k, long left) {
        vf ak[R];
        UNROLL for (int i = 0; i < R; ++i) ak[i] = load_n(a + i * p.lda + k, left);
        UNROLL for (int j = 0; j < V; ++j) {
            __builtin_prefetch(b + (V + j) * p.ldb + k, 0, 2);  // the next tile's, into L2
            const vf bk = load_n(b + j * p.ldb + k, left);
            UNROLL for (int i = 0; i < R; ++i) sums[i][j] += ak[i] * bk;
        }
    });
    for (int i = 0; i < R; ++i)
        for (int j = 0; j < V; ++j) {
            float* c = p.C + (m + i) * p.ldc + n + j;
            *c = sum(sums[i][j]) + (p.add ? *c : 0) + (p.bias ? p.bias[n + j] : 0);
        }
}

static void few_rows_by_dots(const Product& p, int threads) {
    constexpr int V = 4;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long n = 0; n < p.N; n += V) {
        long m = 0;
        if (n + V <= p.N) {
            for (; m + 4 <= p.M; m += 4) dot_tile<4, V>(p, m, n);
            for (; m < p.M; ++m) dot_tile<1, V>(p, m, n);
        }
        for (; m < p.M; ++m)
            for (long last = n; last < p.N; ++last) dot_tile<1, 1>(p, m, last);
    }
}

// B stored (K, N): its rows are added up, each times a number of A.
template <int R, int DEPTH>
static void add_rows(const Product& p, long m, long k, long n, long end) {
    const float *a = p.A + m * p.lda + k, *b = p.B + k * p.ldb;
    for_vectors(n, end, [&](long at, long left) {
        vf bk[DEPTH];
        UNROLL for (int j = 0; j < DEPTH; ++j)
            __builtin_prefetch(b + (DEPTH + j) * p.ldb + at, 0, 2);
        UNROLL for (int j = 0; j < DEPTH; ++j) bk[j] = load_n(b + j * p.ldb + at, left);
        UNROLL for (int i = 0; i < R; ++i) {
            float* c = p.C + (m + i) * p.ldc + at;
            vf sum = load_n(c, left);
            UNROLL for (int j = 0; j < DEPTH; ++j) sum += a[i * p.lda + j] * bk[j];
            store_n(c, sum, left);
        }
    });
}

template <int DEPTH>
static void add_depth(const Product& p, long k, long n, long end) {
    long m = 0;
    for (; m + 4 <= p.M; m += 4) add_rows<4, DEPTH>(p, m, k, n, end);
    for (; m < p.M; ++m) add_rows<1, DEPTH>(p, m, k, n, end);
}

static void few_rows_by_sums(const Product& p, int threads) {
    constexpr int DEPTH = 8;
    const long share = round_up(up(max(p.N, 1), threads), LINE);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long n = 0; n < p.N; n += share) {
        const long end = min(n + share, p.N);
        for (long m = 0; m < p.M; ++m)
            for_vectors(n, end, [&](long at, long left) {
                float* c = p.C + m * p.ldc + at;
                const vf before = p.add ? load_n(c, left) : vf{};
                store_n(c, p.bias ? before + load_n(p.bias + at, left) : before, left);
            });
        long k = 0;
        for (; k + DEPTH <= p.K; k += DEPTH) add_depth<DEPTH>(p, k, n, end);
        for (; k < p.K; ++k) add_depth<1>(p, k, n, end);
    }
}
}  // namespace ISA
