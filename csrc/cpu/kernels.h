// kernels.h - what one instruction set offers. isa.cpp tells which of the tables run.
//
// Shape letters as in tinylm/kernels/__init__.py. Arrays are float32 and C-contiguous unless said
// otherwise; arguments are checked by bindings.cpp. The bits of a result depend on the shapes
// alone, never on the number of threads: work is split by shape, and partial sums are added in
// order.
#pragma once
#include <stddef.h>
#include <stdint.h>

float* take_scratch(size_t floats);  // from the pool, 64-byte aligned, not zeroed (runtime.h)
void give_scratch(float* p, size_t floats);
[[noreturn]] void out_of_memory();  // as take_scratch says it

extern bool bfloat16_products;  // round the operands of large products and of attention (runtime.h)

// C (M, N) = op(A) op(B) + bias, or C += op(A) op(B) where `add`.
struct Product {
    bool transpose_a, transpose_b;  // A is stored (K, M), B is stored (N, K)
    long M, N, K;
    const float* A;
    long lda;  // floats from one stored row to the next
    const float* B;
    long ldb;
    float* C;
    long ldc;
    const float* bias = nullptr;  // (N)
    bool add = false;
    const float* packed = nullptr;  // B as Kernels::pack lays it, or null: pack what is needed
};
constexpr long FEW_ROWS = 16;  // of A: up to here, packing B would cost more than it brings

struct Heads {  // an array (B, H, T, D) in which only D need be contiguous
    float* data;
    long b, h, t;  // floats to the next one
};
struct Attention {  // what attention reads in both directions
    long B, H, G, T, S, D;
    Heads q, k, v;
    const int32_t *start = nullptr, *gap = nullptr;  // (B, T), (B, T, 2), or null
    long shared = 0;  // of the S keys of row b, the first so many are not in k and v ...
    Heads prefix_k = {}, prefix_v = {};
    const int32_t* prefix = nullptr;  // ... but in row prefix[b] of these: (B)
};

struct AdamW {
    float lr, beta1_rest, beta2_rest;  // 1 - beta
    float correction1, correction2;    // 1 / (1 - beta^step)
    float eps, weight_decay, grad_scale;
};

struct Muon {
    double lr, weight_decay;
    float beta1, grad_scale;
};
struct MuonMatrix {  // (M, N), with its gradient and its momentum
    float* param;
    const float* grad;
    float* m;
    long M, N;
};

struct Kernels {
    const char* name;
    bool bfloat16;                // whether it has such products
    double (*peak)(int threads);  // multiply-adds on registers only; returns how many operations
    float (*read)(const float* x, long n, int threads);  // returns the sum
    void (*copy)(const float* x, float* y, long n, int threads);
    long (*barriers)(int threads);  // returns how many

    void (*matmul)(const Product& product, int threads);
    // Packing the whole of B once, for all products for which it becomes as many floats: how many,
    // and doing it
    long (*packed_size)(const Product& product);
    void (*pack)(const Product& product, float* packed, int threads);
    void (*sum_rows)(const float* x, float* y, long N, long C, int threads);  // (N, C) -> (C)

    void (*embedding_forward)(const int32_t* tokens, const float* weight, float* y, long N, long C,
                              int threads);
    void (*embedding_backward)(const float* dy, const int32_t* tokens, float* dweight, bool add,
                               long N, long V, long C, int threads);

    void (*rms_norm_forward)(const float* x, const float* weight, float eps, float* y, float* rstd,
                             long N, long C, int threads);
    void (*rms_norm_backward)(const float* dy, const float* x, const float* weight,
                              const float* rstd, float* dx, float* dweight, long N, long C,
                              int threads);
    void (*layer_norm_forward)(const float* x, const float* weight, const float* bias, float eps,
                               float* y, float* mean, float* rstd, long N, long C, int threads);
    void (*layer_norm_backward)(const float* dy, const float* x, const float* weight,
                                const float* mean, const float* rstd, float* dx, float* dweight,
                                float* dbias, long N, long C, int threads);

    // direction +1 turns forward, -1 back
    void (*rope)(const Heads& x, const float* cos, const float* sin, const int32_t* positions,
                 float direction, const Heads& y, long B, long H, long T, long D, int threads);

    void (*softmax_forward)(const float* x, float* y, long N, long C, int threads);
    void (*softmax_backward)(const float* dy, const float* y, float* dx, long N, long C,
                             int threads);

    // lse (B, H, T); only forward can have a prefix
    void (*attention_forward)(const Attention& x, const Heads& out, float* lse, int threads);
    void (*attention_backward)(const Attention& x, const Heads& dout, const Heads& out,
                               const float* lse, const Heads& dq, const Heads& dk, const Heads& dv,
                               int threads);

    void (*add)(const float* x, const float* y, float* sum, long n, int threads);
    void (*swiglu_forward)(const float* gate, const float* up, float* y, long n, int threads);
    void (*swiglu_backward)(const float* dy, const float* gate, const float* up, float* dgate,
                            float* dup, long n, int threads);
    void (*gelu_forward)(const float* x, float* y, long n, bool approximate, int threads);
    void (*gelu_backward)(const float* dy, const float* x, float* dx, long n, bool approximate,
                          int threads);

    void (*cross_entropy_forward)(const float* logits, const int32_t* targets, float* loss,
                                  float* lse, long N, long V, int threads);
    void (*cross_entropy_backward)(const float* dloss, const float* logits, const int32_t* targets,
                                   const float* lse, float* dlogits, long N, long V, int threads);
    void (*linear_cross_entropy_forward)(const float* x, const float* weight,
                                         const int32_t* targets, float* loss, float* lse, long N,
                                         long C, long V, int threads);
    void (*linear_cross_entropy_backward)(const float* dloss, const float* x, const float* weight,
                                          const int32_t* targets, const float* lse, float* dx,
                                          float* dweight, long N, long C, long V, int threads);
    void (*linear_cross_entropy_with_gradients)(const float* x, const float* weight,
                                                const int32_t* targets, float* loss, float* lse,
                                                float* dx, float* dweight, long N, long C, long V,
                                                int threads);

    void (*adamw)(const AdamW& step, float* param, const float* grad, float* m, float* v, long n,
                  int threads);
    void (*muon)(const Muon& step, const MuonMatrix* matrices, long n, int threads);
    double (*sum_squares)(const float* x, long n, int threads);
};

extern const Kernels kernels_baseline, kernels_avx2, kernels_avx512, kernels_avx512bf16,
    kernels_amx;
