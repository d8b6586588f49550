// activation.cpp - sums, SwiGLU and GELU, one pass over memory each; s and σ stand for the sigmoid.
//
// GELU's tanh form needs no tanh: (1 + tanh u) / 2 = σ(2u), which keeps its relative precision
// where tanh is near -1.
//
// GELU 105 / 97 % of the speed of copying memory, SwiGLU 114 / 89 % (forward / backward, Zen 4).
#include "simd.h"

namespace ISA {
static void add(const float* x, const float* y, float* sum, long n, int threads) {
    for_all_vectors(n, threads, [=](long i, long n) {
        store_n(sum + i, load_n(x + i, n) + load_n(y + i, n), n);
    });
}

static void swiglu_forward(const float* gate, const float* up, float* y, long n, int threads) {
    for_all_vectors(n, threads, [=](long i, long n) {
        const vf g = load_n(gate + i, n);
        store_n(y + i, g * sigmoid(g) * load_n(up + i, n), n);
    });
}
static void swiglu_backward(const float* dy, const float* gate, const float* up, float* dgate,
                            float* dup, long n, int threads) {
    for_all_vectors(n, threads, [=](long i, long n) {
        const vf g = load_n(gate + i, n), d = load_n(dy + i, n), s = sigmoid(g);
        store_n(dgate + i, d * load_n(up + i, n) * s * (1.0f + g * (1.0f - s)), n);
        store_n(dup + i, d * g * s, n);
    });
}

constexpr float CUBIC = 0.044715f, TWICE_SQRT_2_OVER_PI = 1.5957691216057308f;
INLINE vf twice_u(vf x) { return TWICE_SQRT_2_OVER_PI * x * (1.0f + CUBIC * x * x); }

static void gelu_forward(const float* x, float* y, long n, bool approximate, int threads) {
    const auto each = [=](auto share) {
        for_all_vectors(n, threads, [=](long i, long n) {
            const vf v = load_n(x + i, n);
            store_n(y + i, v * share(v), n);
        });
    };
    if (approximate)
        each([](vf v) { return sigmoid(twice_u(v)); });
    else
        each([](vf v) { return normal_cdf(v); });
}

static void gelu_backward(const float* dy, const float* x, float* dx, long n, bool approximate,
                          int threads) {
    const auto each = [=](auto slope) {
        for_all_vectors(n, threads, [=](long i, long n) {
            store_n(dx + i, load_n(dy + i, n) * slope(load_n(x + i, n)), n);
        });
    };
    if (approximate)
        each([](vf v) {
            const vf s = sigmoid(twice_u(v));
            const vf slope_u = TWICE_SQRT_2_OVER_PI * (1.0f + 3 * CUBIC * v * v);
            return s + v * (s * (1.0f - s)) * slope_u;
        });
    else
        each([](vf v) { return normal_cdf(v) + v * 0.3989422804f * exp(-0.5f * v * v); });
}
}  // namespace ISA
