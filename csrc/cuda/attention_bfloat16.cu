// attention_bfloat16.cu - attention.cu on tensor cores: operands in bfloat16, sums in float.
//
// A block is four warps; each owns 16 rows of a tile of 64 queries (in backward_kv: keys), and
// meets N keys (queries) at a time. The products are made of m16n8k16 pieces (device.cuh), and the
// scores never leave the registers: the layout in which a piece leaves its sums is, packed in
// pairs, the layout in which the next product wants its left operand.
//
//       N keys                     A warp's scores are N / 8 pieces of 16 x 8. Lane (g, t) holds
//     ┌──┬──┬──┬──┐                of each piece the rows g and g + 8, columns 2t and 2t + 1:
//  16 │  │  │  │  │  one warp      element e of piece n is (g + 8 (e / 2), 8 n + 2t + e % 2).
//     └──┴──┴──┴──┘                A row's maximum and sum are joined over the 4 lanes of a g.
//
// In shared memory a tile is float32 no more, but pairs of bfloat16 in one word, paired along the
// direction in which the product sums: `rows` pairs neighbouring columns (for scores, over d),
// `pairs` neighbouring rows (for outputs, over keys). A row is 4 words longer than D / 2, or 8
// longer than D, so that the 32 words which a warp reads at once lie in 32 different banks.
//
// Same masks, same order of work, same determinism as in attention.cu.
#include "heads.cuh"

namespace tensor {
constexpr int THREADS = 128, ROWS = 64;

DEVICE int lane_g() { return threadIdx.x % WARP / 4; }
DEVICE int lane_t() { return threadIdx.x % 4; }
DEVICE int warp_row() { return threadIdx.x / WARP * 16; }  // the first of the warp's rows in a tile

template <int D, int COUNT>
struct Tile {
    static constexpr int ROW = D / 2 + 4,
                         PAIR = D + 8;  // words from one row, one pair, to the next
    static constexpr int ROWS_SIZE = COUNT * ROW, PAIRS_SIZE = COUNT / 2 * PAIR;
};

// One matrix of tokens in memory: x[row * stride + column], zero beyond `count` and `columns`
struct Matrix {
    const float* x;
    i64 stride;
    int count, columns;
    __device__ float operator()(int row, int column) const {
        return row < count && column < columns ? x[row * stride + column] : 0;
    }
};

template <int D, int COUNT>
DEVICE void bring_rows(unsigned* tile, Matrix x) {
    for (int at = threadIdx.x; at < COUNT * D / 2; at += THREADS) {
        const int row = at / (D / 2), d = at % (D / 2);
        tile[row * Tile<D, COUNT>::ROW + d] = packed(x(row, 2 * d), x(row, 2 * d + 1));
    }
}

template <int D, int COUNT>
DEVICE void bring_pairs(unsigned* tile, Matrix x) {
    for (int at = threadIdx.x; at < COUNT / 2 * D; at += THREADS) {
        const int pair = at / D, d = at % D;
        tile[pair * Tile<D, COUNT>::PAIR + d] = packed(x(2 * pair, d), x(2 * pair + 1, d));
    }
}

// s (16, N) = the warp's rows of a times all N rows of b, summed over d
template <int D, int N>
DEVICE void multiply(const unsigned* a, const unsigned* b, float (&s)[N / 8][4]) {
    constexpr int ROW = Tile<D, N>::ROW;
    const unsigned* left = a + (warp_row() + lane_g()) * ROW + lane_t();
    const unsigned* right = b + lane_g() * ROW + lane_t();
#pragma unroll
    for (int n = 0; n < N / 8; ++n) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0;
#pragma unroll
    for (int d = 0; d < D / 2; d += 8) {
        const unsigned x[4] = {left[d], left[8 * ROW + d], left[d + 4], left[8 * ROW + d + 4]};
#pragma unroll
        for (int n = 0; n < N / 8; ++n) {
            const unsigned y[2] = {right[8 * n * ROW + d], right[8 * n * ROW + d + 4]};
            multiply_add(s[n], x, y);
        }
    }
}

// out (16, D) += weights (16, N) x (N, D), summed over the rows of x, which is in pairs
template <int D, int N>
DEVICE void accumulate(const float (&w)[N / 8][4], const unsigned* x, float (&out)[D / 8][4]) {
    constexpr int PAIR = Tile<D, N>::PAIR;
    const unsigned* right = x + lane_t() * PAIR + lane_g();
#pragma unroll
    for (int k = 0; k < N / 16; ++k) {
        const float (&low)[4] = w[2 * k], (&high)[4] = w[2 * k + 1];
        const unsigned left[4] = {packed(low[0], low[1]), packed(low[2], low[3]),
                                  packed(high[0], high[1]), packed(high[2], high[3])};
#pragma unroll
        for (int c = 0; c < D / 8; ++c) {
            const unsigned y[2] = {right[8 * k * PAIR + 8 * c], right[(8 * k + 4) * PAIR + 8 * c]};
            multiply_add(out[c], left, y);
        }
    }
}

// out (B, tokens, heads, D) in memory: the warp's rows of one head, times scale of rows g, g + 8
template <int D>
DEVICE void write(const float (&x)[D / 8][4], float scale_g, float scale_g8, float* out, int b,
                  int h, int heads, int first, int tokens, int columns) {
    for (int e = 0; e < 4; ++e) {
        const int t = first + warp_row() + lane_g() + 8 * (e / 2);
        if (t >= tokens) continue;
        float* row = out + (((i64)b * tokens + t) * heads + h) * columns;
#pragma unroll
        for (int c = 0; c < D / 8; ++c) {
            const int d = 8 * c + 2 * lane_t() + e % 2;
            if (d < columns) row[d] = x[c][e] * (e < 2 ? scale_g : scale_g8);
        }
    }
}

template <int D, int N>
DEVICE void forward(Shape s, Heads q, Heads k, Heads v, Sight sight, float* out, float* lse) {
    DYNAMIC_SHARED(memory);
    unsigned *queries = (unsigned*)memory, *keys = queries + Tile<D, ROWS>::ROWS_SIZE,
             *values = keys + Tile<D, N>::ROWS_SIZE;
    const int b = blockIdx.z, h = blockIdx.y, g = h / (s.H / s.G);
    const int first = (gridDim.x - 1 - blockIdx.x) * ROWS;
    const int end = s.limit(smaller(first + ROWS, s.T) - 1) + 1;
    const float scale = 1 / sqrtf(s.D);
    float top[2] = {-INF, -INF}, total[2] = {0, 0}, o[D / 8][4] = {};

    bring_rows<D, ROWS>(queries, {q.at(b, h, first), q.t, s.T - first, s.D});
    const Window seen = window(sight, b, s.T, first, ROWS);
    for (int j = seen.from; j < end; j += N) {
        if (seen.misses(j, N)) continue;
        bring_rows<D, N>(keys, {k.at(b, g, j), k.t, s.S - j, s.D});
        bring_pairs<D, N>(values, {v.at(b, g, j), v.t, s.S - j, s.D});
        __syncthreads();
        float p[N / 8][4];
        multiply<D, N>(queries, keys, p);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int t = first + warp_row() + lane_g() + 8 * half;
            float highest = top[half], sum = 0;
#pragma unroll
            for (int i = 0; i < N / 4; ++i) {
                float& x = p[i / 2][2 * half + i % 2];
                const int key = j + 8 * (i / 2) + 2 * lane_t() + i % 2;
                x = visible(s, sight, b, t, key) ? x * scale : -INF;
                highest = fmaxf(highest, x);
            }
            highest = over_warp<Max, 4>(highest);
            const float fade = expf(top[half] - finite(highest));
#pragma unroll
            for (int i = 0; i < N / 4; ++i) {
                float& x = p[i / 2][2 * half + i % 2];
                sum += x = expf(x - finite(highest));
            }
            total[half] = total[half] * fade + over_warp<Sum, 4>(sum);
            top[half] = highest;
#pragma unroll
            for (int c = 0; c < D / 8; ++c) o[c][2 * half] *= fade, o[c][2 * half + 1] *= fade;
        }
        accumulate<D, N>(p, values, o);
        __syncthreads();
    }
    for (int half = 0; half < 2; ++half) {
        const int t = first + warp_row() + lane_g() + 8 * half;
        if (t < s.T && lane_t() == 0)
            lse[((i64)b * s.H + h) * s.T + t] = top[half] + logf(total[half]);
        total[half] = total[half] == 0 ? 0 : 1 / total[half];
    }
    write<D>(o, total[0], total[1], out, b, h, s.H, first, s.T, s.D);
}

template <int D, int N>
DEVICE void backward_q(Shape s, Heads dout, Heads q, Heads k, Heads v, const float* lse,
                       const float* delta, Sight sight, float* dq) {
    DYNAMIC_SHARED(memory);
    unsigned *queries = (unsigned*)memory, *douts = queries + Tile<D, ROWS>::ROWS_SIZE,
             *keys = douts + Tile<D, ROWS>::ROWS_SIZE, *values = keys + Tile<D, N>::ROWS_SIZE,
             *key_pairs = values + Tile<D, N>::ROWS_SIZE;
    const int b = blockIdx.z, h = blockIdx.y, g = h / (s.H / s.G);
    const int first = (gridDim.x - 1 - blockIdx.x) * ROWS;
    const int end = s.limit(smaller(first + ROWS, s.T) - 1) + 1;
    const float scale = 1 / sqrtf(s.D);
    float d[D / 8][4] = {}, totals[2], along[2];
    for (int half = 0; half < 2; ++half) {
        const int t = first + warp_row() + lane_g() + 8 * half;
        const i64 at = ((i64)b * s.H + h) * s.T + t;
        totals[half] = t < s.T ? finite(lse[at]) : 0;
        along[half] = t < s.T ? delta[at] : 0;
    }
    bring_rows<D, ROWS>(queries, {q.at(b, h, first), q.t, s.T - first, s.D});
    bring_rows<D, ROWS>(douts, {dout.at(b, h, first), dout.t, s.T - first, s.D});
    const Window seen = window(sight, b, s.T, first, ROWS);
    for (int j = seen.from; j < end; j += N) {
        if (seen.misses(j, N)) continue;
        const Matrix key_rows = {k.at(b, g, j), k.t, s.S - j, s.D};
        bring_rows<D, N>(keys, key_rows);
        bring_pairs<D, N>(key_pairs, key_rows);
        bring_rows<D, N>(values, {v.at(b, g, j), v.t, s.S - j, s.D});
        __syncthreads();
        float p[N / 8][4], dp[N / 8][4];
        multiply<D, N>(queries, keys, p);
        multiply<D, N>(douts, values, dp);
#pragma unroll
        for (int i = 0; i < N / 2; ++i) {
            const int n = i / 4, e = i % 4, half = e / 2;
            const int t = first + warp_row() + lane_g() + 8 * half;
            const int key = j + 8 * n + 2 * lane_t() + e % 2;
            p[n][e] = visible(s, sight, b, t, key)
                          ? expf(p[n][e] * scale - totals[half]) * (dp[n][e] - along[half]) * scale
                          : 0;
        }
        accumulate<D, N>(p, key_pairs, d);
        __syncthreads();
    }
    write<D>(d, 1, 1, dq, b, h, s.H, first, s.T, s.D);
}

template <int D, int N>
DEVICE void backward_kv(Shape s, Heads dout, Heads q, Heads k, Heads v, const float* lse,
                        const float* delta, Sight sight, float* dk, float* dv) {
    DYNAMIC_SHARED(memory);
    unsigned *keys = (unsigned*)memory, *values = keys + Tile<D, ROWS>::ROWS_SIZE,
             *queries = values + Tile<D, ROWS>::ROWS_SIZE, *douts = queries + Tile<D, N>::ROWS_SIZE,
             *query_pairs = douts + Tile<D, N>::ROWS_SIZE,
             *dout_pairs = query_pairs + Tile<D, N>::PAIRS_SIZE;
    const int b = blockIdx.z, g = blockIdx.y, first = blockIdx.x * ROWS, group = s.H / s.G;
    const int earliest = larger(0, first - (s.S - s.T)) / N * N;  // query that sees `first`
    const float scale = 1 / sqrtf(s.D);
    float d_key[D / 8][4] = {}, d_value[D / 8][4] = {};

    bring_rows<D, ROWS>(keys, {k.at(b, g, first), k.t, s.S - first, s.D});
    bring_rows<D, ROWS>(values, {v.at(b, g, first), v.t, s.S - first, s.D});
    for (int h = g * group; h < (g + 1) * group; ++h)
        for (int t0 = earliest; t0 < s.T; t0 += N) {
            if (window(sight, b, s.T, t0, N).misses(first, ROWS)) continue;
            const Matrix query_rows = {q.at(b, h, t0), q.t, s.T - t0, s.D};
            const Matrix dout_rows = {dout.at(b, h, t0), dout.t, s.T - t0, s.D};
            bring_rows<D, N>(queries, query_rows);
            bring_rows<D, N>(douts, dout_rows);
            bring_pairs<D, N>(query_pairs, query_rows);
            bring_pairs<D, N>(dout_pairs, dout_rows);
            __syncthreads();
            float p[N / 8][4], dp[N / 8][4];
            multiply<D, N>(keys, queries, p);
            multiply<D, N>(values, douts, dp);
#pragma unroll
            for (int i = 0; i < N / 2; ++i) {
                const int n = i / 4, e = i % 4;
                const int t = t0 + 8 * n + 2 * lane_t() + e % 2;
                const int key = first + warp_row() + lane_g() + 8 * (e / 2);
                const i64 at = ((i64)b * s.H + h) * s.T + t;
                const bool seen = visible(s, sight, b, t, key);
                p[n][e] = seen ? expf(p[n][e] * scale - finite(lse[at])) : 0;
                dp[n][e] = seen ? p[n][e] * (dp[n][e] - delta[at]) * scale : 0;
            }
            accumulate<D, N>(p, dout_pairs, d_value);
            accumulate<D, N>(dp, query_pairs, d_key);
            __syncthreads();
        }
    write<D>(d_key, 1, 1, dk, b, g, s.G, first, s.S, s.D);
    write<D>(d_value, 1, 1, dv, b, g, s.G, first, s.S, s.D);
}
}  // namespace tensor

// grid (tiles of 64 queries, H, B), for dk and dv (tiles of 64 keys, G, B)
#define ATTENTION_BFLOAT16(SIZE, N)                                                              \
    KERNEL __launch_bounds__(tensor::THREADS) attention_forward_bfloat16_##SIZE(                 \
        HEADS(q), HEADS(k), HEADS(v), SIGHT, float* out, float* lse, SHAPE) {                    \
        tensor::forward<SIZE, N>(AS_SHAPE, AS_HEADS(q), AS_HEADS(k), AS_HEADS(v), AS_SIGHT, out, \
                                 lse);                                                           \
    }                                                                                            \
    KERNEL __launch_bounds__(tensor::THREADS) attention_backward_q_bfloat16_##SIZE(              \
        HEADS(dout), HEADS(q), HEADS(k), HEADS(v), const float* lse, const float* delta, SIGHT,  \
        float* dq, SHAPE) {                                                                      \
        tensor::backward_q<SIZE, N>(AS_SHAPE, AS_HEADS(dout), AS_HEADS(q), AS_HEADS(k),          \
                                    AS_HEADS(v), lse, delta, AS_SIGHT, dq);                      \
    }                                                                                            \
    KERNEL __launch_bounds__(tensor::THREADS) attention_backward_kv_bfloat16_##SIZE(             \
        HEADS(dout), HEADS(q), HEADS(k), HEADS(v), const float* lse, const float* delta, SIGHT,  \
        float* dk, float* dv, SHAPE) {                                                           \
        tensor::backward_kv<SIZE, N>(AS_SHAPE, AS_HEADS(dout), AS_HEADS(q), AS_HEADS(k),         \
                                     AS_HEADS(v), lse, delta, AS_SIGHT, dk, dv);                 \
    }

ATTENTION_BFLOAT16(64, 64)
ATTENTION_BFLOAT16(128, 32)
