// embedding.cpp - rows of a table, and the sums of gradients that fall on each row.
//
// Backward sorts the places by token (a counting sort, stable), so that each row of dweight is
// written once, by one thread, and adds its gradients in the order of the text. With `add`, rows of
// tokens that do not occur are not touched.
//
// 27 / 30 GB/s, forward / backward, where copying reaches 37 (Zen 4).
#include "simd.h"

namespace ISA {
static void embedding_forward(const int32_t* tokens, const float* weight, float* y, long N, long C,
                              int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long r = 0; r < N; ++r) memcpy(y + r * C, weight + tokens[r] * C, C * sizeof(float));
}

static void embedding_backward(const float* dy, const int32_t* tokens, float* dweight, bool add,
                               long N, long V, long C, int threads) {
    Scratch memory(V + 1 + N);
    int32_t *end = (int32_t*)memory.data, *places = end + V + 1;  // token v: end[v - 1] .. end[v]
    memset(end, 0, (V + 1) * sizeof *end);
    for (long r = 0; r < N; ++r) ++end[tokens[r] + 1];
    for (long v = 0; v < V; ++v) end[v + 1] += end[v];
    for (long r = 0; r < N; ++r) places[end[tokens[r]]++] = r;
#pragma omp parallel for schedule(dynamic, 64) num_threads(threads)
    for (long v = 0; v < V; ++v) {
        const long first = v ? end[v - 1] : 0;
        if (add && first == end[v]) continue;
        for_vectors(0, C, [=](long i, long n) {
            vf total = {};
            for (long p = first; p < end[v]; ++p) total += load_n(dy + places[p] * C + i, n);
            float* row = dweight + v * C + i;
            store_n(row, add ? load_n(row, n) + total : total, n);
        });
    }
}
}  // namespace ISA
