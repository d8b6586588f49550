// simd.h - one vector type for every instruction set, by GCC's vector extensions.
//
// Included only by files that are compiled once per instruction set, each time with another ISA
// (the name of the namespace). Everything here is in that namespace, and nothing comes from the C++
// standard library: an inline function that two such objects share by name would be merged by the
// linker, and an old CPU could be handed the AVX-512 copy.
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#define THREAD_INDEX omp_get_thread_num()
#define THREAD_COUNT omp_get_num_threads()
#else
#define THREAD_INDEX 0
#define THREAD_COUNT 1
#endif
#include "kernels.h"

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif
#if LANES == 16 || defined(__aarch64__)
#define REGISTERS 32  // of vectors
#else
#define REGISTERS 16
#endif

#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

namespace ISA {
constexpr long W = LANES;
typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
constexpr float INF = __builtin_inff();
constexpr long LINE = 16;  // floats to a line of the cache

INLINE long min(long a, long b) { return a < b ? a : b; }
INLINE long max(long a, long b) { return a > b ? a : b; }
INLINE long up(long a, long b) { return (a + b - 1) / b; }     // a / b, rounded up
INLINE long round_up(long a, long b) { return up(a, b) * b; }  // a, up to a multiple of b

// ---- loads and stores --------------------------------------------------------------------------

INLINE vf load(const float* p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}
INLINE vi load(const int32_t* p) {
    vi v;
    memcpy(&v, p, sizeof v);
    return v;
}
INLINE void store(float* p, vf v) { memcpy(p, &v, sizeof v); }
INLINE vf splat(float x) { return x - vf{}; }  // x - 0 keeps the sign of zero, x + 0 does not

// All ones in the first n lanes, zeros in the others.
INLINE vi first(long n) {
    vi lane;
    for (int i = 0; i < W; ++i) lane[i] = i;
    return lane < (int32_t)n;
}

// The first n lanes (any n, also beyond W or below 0); the others are zero.
INLINE vf load_n(const float* p, long n) {
    if (n >= W) return load(p);
    if (n <= 0) return vf{};
#if LANES == 16
    return (vf)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#elif LANES == 8
    return (vf)_mm256_maskload_ps(p, (__m256i)first(n));
#else
    float t[W] = {};
    for (long i = 0; i < n; ++i) t[i] = p[i];
    return load(t);
#endif
}
INLINE void store_n(float* p, vf v, long n) {
    if (n >= W) return store(p, v);
    if (n <= 0) return;
#if LANES == 16
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
#elif LANES == 8
    _mm256_maskstore_ps(p, (__m256i)first(n), (__m256)v);
#else
    float t[W];
    store(t, v);
    for (long i = 0; i < n; ++i) p[i] = t[i];
#endif
}

// ---- moving and reducing lanes -----------------------------------------------------------------

// Lane i of the result is lane from[i] of a, or lane from[i] - W of b. `from` must be a constant.
INLINE vf shuffle(vf a, vf b, vi from) {
#if defined(__clang__)
    vf r = a;
    UNROLL for (int i = 0; i < W; ++i) r[i] = from[i] < W ? a[from[i] % W] : b[from[i] % W];
    return r;
#else
    return __builtin_shuffle(a, b, from);
#endif
}

template <int S>
INLINE vf swap_neighbours(vf v) {  // lane i and lane i ^ S change places
    vi from;
    for (int i = 0; i < W; ++i) from[i] = i ^ S;
    return shuffle(v, v, from);
}
INLINE vf first_n(vf v, long n, float rest = 0) {  // the first n lanes, `rest` beyond
    return n >= W ? v : first(n) ? v : splat(rest);
}
INLINE vf maximum(vf a, vf b) { return a > b ? a : b; }

INLINE float sum(vf v) {
    v += swap_neighbours<1>(v);
    v += swap_neighbours<2>(v);
    if constexpr (W >= 8) v += swap_neighbours<4 % W>(v);
    if constexpr (W >= 16) v += swap_neighbours<8 % W>(v);
    return v[0];
}
INLINE float largest(vf v) {
    float top = v[0];
    for (int i = 1; i < W; ++i) top = v[i] > top ? v[i] : top;
    return top;
}

// Transpose W x W items in registers: log2(W) rounds, each swapping the off-diagonal halves.
template <int S>
INLINE void transpose_round(vf r[W]) {
    vi low, high;
    for (int i = 0; i < W; ++i) {
        low[i] = i & S ? W + i - S : i;
        high[i] = i & S ? W + i : i + S;
    }
    UNROLL for (int i = 0; i < W; ++i) {
        if (i & S) continue;
        const vf a = r[i], b = r[i + S];
        r[i] = shuffle(a, b, low);
        r[i + S] = shuffle(a, b, high);
    }
}
INLINE void transpose(vf r[W]) {
    transpose_round<1>(r);
    transpose_round<2>(r);
    if constexpr (W >= 8) transpose_round<4 % W>(r);
    if constexpr (W >= 16) transpose_round<8 % W>(r);
}

// ---- functions: NaN in, NaN out ----------------------------------------------------------------

// exp, about 1 ulp: x = n ln 2 + r, a polynomial in r (Cephes), n added to the exponent.
// Below -87 it is 0 (so that no denormal number appears), above 88.7 infinite.
INLINE vf exp(vf x) {
    const vi tiny = x < -87.0f, normal = x <= 88.722f;  // normal is false for NaN
    vf n = x * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 rounds to the nearest integer ...
    const vi exponent = (vi)n << 23;       // ... and leaves that integer in the lowest bits
    n -= 12582912.0f;
    const vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vf y = r * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * (r * r) + r + 1.0f;
    y = (vf)((vi)y + exponent);
    return tiny ? vf{} : normal ? y : x + INF;  // NaN + inf is NaN
}
INLINE float exp(float x) { return exp(splat(x))[0]; }

INLINE vf sigmoid(vf x) { return 1.0f / (1.0f + exp(-x)); }

// The normal distribution's Φ(x) = erfc(-x / √2) / 2, to 3e-7 of its value on both sides
// (Numerical Recipes, "erfcc": a Chebyshev fit of erfc's logarithm).
INLINE vf normal_cdf(vf x) {
    const vi negative = x < 0.0f;
    const vf z = (negative ? -x : x) * 0.70710678f;
    const vf t = 1.0f / (1.0f + 0.5f * z);
    vf y = t * 0.17087277f - 0.82215223f;
    y = y * t + 1.48851587f;
    y = y * t - 1.13520398f;
    y = y * t + 0.27886807f;
    y = y * t - 0.18628806f;
    y = y * t + 0.09678418f;
    y = y * t + 0.37409196f;
    y = y * t + 1.00002368f;
    y = y * t - 1.26551223f;
    const vf tail = 0.5f * t * exp(y - z * z);
    return negative ? tail : 1.0f - tail;
}

INLINE vf sqrt(vf x) {
#if LANES == 16
    return (vf)_mm512_maskz_sqrt_ps(0xFFFF, (__m512)x);  // the plain one makes GCC 12 warn
#elif LANES == 8
    return (vf)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__)
    return (vf)_mm_sqrt_ps((__m128)x);
#else
    for (int i = 0; i < W; ++i) x[i] = __builtin_sqrtf(x[i]);
    return x;
#endif
}

// ---- memory and loops --------------------------------------------------------------------------

// What is fetched while something else is computed, a line at a time: `lines` lines of one stored
// row after another.
struct Fetch {
    const float* at;
    long line = 0, lines = 1, gap = -LINE;  // by default it stays where it is

    template <int LEVEL>  // of cache
    INLINE void step(Fetch& f) {
        __builtin_prefetch(f.at, 0, 4 - LEVEL);
        f.at += LINE;
        if (++f.line == f.lines) f.line = 0, f.at += f.gap;
    }
};

INLINE float* at(const Heads& x, long b, long h, long t) {
    return x.data + b * x.b + h * x.h + t * x.t;
}

struct Scratch {  // memory for the duration of a call
    const size_t floats;
    float* const data;
    explicit Scratch(long n) : floats(n), data(take_scratch(n)) {}
    ~Scratch() { give_scratch(data, floats); }
    Scratch(const Scratch&) = delete;
};

// f(i, n) for every vector of an array: it begins at i and has n <= W floats.
template <class F>
INLINE void for_vectors(long begin, long end, F f) {
    long i = begin;
    for (; i + W <= end; i += W) f(i, W);
    if (i < end) f(i, end - i);
}

// The same over a whole array, in chunks that the threads share.
template <class F>
INLINE void for_all_vectors(long size, int threads, F f) {
    constexpr long CHUNK = 1 << 14;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < size; i += CHUNK) for_vectors(i, min(size, i + CHUNK), f);
}
}  // namespace ISA
