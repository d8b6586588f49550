// muon.cpp - the optimizer of matrices: momentum, then four steps of Newton and Schulz towards the
// nearest orthogonal matrix, which is what moves the weights.
//
// A small matrix is one thread's from its gradient to its weights, so that it stays in that core's
// cache where it fits; a large one is all threads'. Every pass rounds for itself, as NumPy's do.
#include "simd.h"

namespace ISA {
static void scale(const float* x, float factor, float* y, long n, int threads) {
    for_all_vectors(n, threads,
                    [=](long i, long n) { store_n(y + i, load_n(x + i, n) * factor, n); });
}
static void divide(float* x, float divisor, long n, int threads) {
    for_all_vectors(n, threads,
                    [=](long i, long n) { store_n(x + i, load_n(x + i, n) / divisor, n); });
}

static void muon_matrix(const Muon& s, const MuonMatrix& w, int threads) {
    const bool tall = w.M > w.N;
    const long size = w.M * w.N, side = min(w.M, w.N), square = side * side;
    Scratch update(size), other(size), gram_(square), mixed_(square);
    float *x = update.data, *y = other.data, *gram = gram_.data, *mixed = mixed_.data;

    scale(w.grad, s.grad_scale, y, size, threads);
    scale(w.m, s.beta1, w.m, size, threads);
    add(w.m, y, w.m, size, threads);
    scale(w.m, s.beta1, x, size, threads);
    add(x, y, x, size, threads);

    for (int step = 0; step < 4; ++step) {
        matmul({tall, !tall, side, side, tall ? w.M : w.N, x, w.N, x, w.N, gram, side}, threads);
        if (step == 0) {
            const double norm = __builtin_sqrt(sum_squares(gram, square, threads));
            const double largest = __builtin_sqrt(norm) + 1e-15;
            divide(x, largest, size, threads);
            divide(gram, largest * largest, square, threads);
        }
        matmul({false, false, side, side, side, gram, side, gram, side, mixed, side}, threads);
        scale(mixed, 2.0315f, mixed, square, threads);
        scale(gram, -4.7750f, gram, square, threads);
        add(mixed, gram, mixed, square, threads);
        const float *a = tall ? x : mixed, *b = tall ? mixed : x;
        matmul({false, false, w.M, w.N, side, a, side, b, w.N, y, w.N}, threads);
        scale(x, 3.4445f, x, size, threads);
        add(x, y, x, size, threads);
    }
    scale(x, -s.lr * 0.2 * __builtin_sqrt(max(w.M, w.N)), x, size, threads);
    scale(w.param, 1 - s.lr * s.weight_decay, w.param, size, threads);
    add(w.param, x, w.param, size, threads);
}

static void muon(const Muon& step, const MuonMatrix* matrices, long n, int threads) {
    constexpr long LARGE = 1 << 20;  // numbers: 4 MB
    const auto small = [](const MuonMatrix& w) { return w.M * w.N < LARGE; };
    bool full = false;  // the memory: an exception that leaves a parallel region ends the process
#pragma omp parallel for schedule(dynamic) num_threads(threads) reduction(|| : full)
    for (long i = 0; i < n; ++i) {
        try {
            if (small(matrices[i])) muon_matrix(step, matrices[i], 1);
        } catch (...) {
            full = true;
        }
    }
    if (full) out_of_memory();
    for (long i = 0; i < n; ++i)
        if (!small(matrices[i])) muon_matrix(step, matrices[i], threads);
}
}  // namespace ISA
