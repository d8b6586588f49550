// attention.cu - causal attention in tiles whose scores never reach memory.  arXiv 2205.14135
//
// A block of 16 x 16 threads holds TILE queries in shared memory and meets the keys TILE at a time:
//
//                TILE keys                Thread (ty, tx) owns R x R scores: the rows
//             ┌────────────┐              ty R .. ty R + R - 1 and the columns tx, tx + 16, ...
//             │            │              So a row belongs to 16 neighbouring lanes: its maximum
//    TILE     │   Q Kᵀ/√D  │  ty          and its sum are shuffles, no barrier, and the weights
//    queries  │            │              that the next product reads as rows were written by the
//             └────────────┘              same warp. TILE = 16 R.
//                   tx
//
//   forward:  S = Q Kᵀ/√D; P = exp(S - max); O = O fade + P V                     (online softmax)
//   dq:       P = exp(S - lse); dS = P (dO Vᵀ - delta)/√D; dQ += dS K             by query tiles
//   dk, dv:   the same transposed, dV += Pᵀ dO, dK += dSᵀ Q                       by key tiles
//
// delta = Σ dO O, a number per query. Splitting the backward in two makes the scores twice, but no
// two blocks add to the same number: no atomics, the same bits every time. (Seven products where
// five would do.)
//
// Rows of a tile are D + 4 floats apart: eight threads that read 16 bytes each from neighbouring
// rows then hit 32 different banks. D is the head size rounded up to 32, 64, 128 or 256, filled
// with zeros; R shrinks as D grows, so that all tiles fit into 99 KB.
//
// Query t stands at key position t + S - T and sees the keys from start[b, t] to there, without its
// gap. Tiles that no query of a block sees are skipped. Long tiles begin first.
#include "heads.cuh"

namespace flash {
constexpr int THREADS = 256;

template <int D, int R>
struct Tile {
    static constexpr int SIZE = 16 * R;       // queries or keys
    static constexpr int ROW = D + 4;         // floats from one of them to the next
    static constexpr int WEIGHTS = SIZE + 4;  // and in a tile of scores
    static constexpr int COLUMNS = D / 16;    // columns of an output row that a thread owns
};

// tile = `count` rows of D numbers (as many as exist), zeros beyond them
template <int D, int R>
DEVICE void bring(float* tile, const float* x, i64 stride, int count, int columns) {
    for (int at = threadIdx.x; at < Tile<D, R>::SIZE * D; at += THREADS) {
        const int row = at / D, d = at % D;
        tile[row * Tile<D, R>::ROW + d] = row < count && d < columns ? x[row * stride + d] : 0;
    }
}

// s = the thread's R x R part of a bᵀ
template <int D, int R>
DEVICE void multiply(const float* a, const float* b, float (&s)[R][R]) {
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    constexpr int ROW = Tile<D, R>::ROW;
#pragma unroll
    for (int i = 0; i < R; ++i)
#pragma unroll
        for (int j = 0; j < R; ++j) s[i][j] = 0;
#pragma unroll 4
    for (int d = 0; d < D; d += 4) {
        float4 y[R];
#pragma unroll
        for (int j = 0; j < R; ++j) y[j] = *(const float4*)&b[(tx + 16 * j) * ROW + d];
#pragma unroll
        for (int i = 0; i < R; ++i) {
            const float4 x = *(const float4*)&a[(ty * R + i) * ROW + d];
#pragma unroll
            for (int j = 0; j < R; ++j)
                s[i][j] += x.x * y[j].x + x.y * y[j].y + x.z * y[j].z + x.w * y[j].w;
        }
    }
}

// out (rows ty R + i, columns tx + 16 c) += weights x
template <int D, int R>
DEVICE void accumulate(const float* weights, const float* x, float (&out)[R][D / 16]) {
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
#pragma unroll 1
    for (int k = 0; k < Tile<D, R>::SIZE; k += 4) {
        float4 w[R];
#pragma unroll
        for (int i = 0; i < R; ++i)
            w[i] = *(const float4*)&weights[(ty * R + i) * Tile<D, R>::WEIGHTS + k];
#pragma unroll
        for (int c = 0; c < D / 16; ++c) {
            const float* column = x + k * Tile<D, R>::ROW + tx + 16 * c;
            const float x0 = column[0], x1 = column[Tile<D, R>::ROW],
                        x2 = column[2 * Tile<D, R>::ROW], x3 = column[3 * Tile<D, R>::ROW];
#pragma unroll
            for (int i = 0; i < R; ++i)
                out[i][c] += w[i].x * x0 + w[i].y * x1 + w[i].z * x2 + w[i].w * x3;
        }
    }
}

// The thread's scores as a part of the tile that `accumulate` reads.
template <int D, int R>
DEVICE void keep(const float (&s)[R][R], float* weights) {
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    __syncwarp();  // the tile's rows have been read
#pragma unroll
    for (int i = 0; i < R; ++i)
#pragma unroll
        for (int j = 0; j < R; ++j)
            weights[(ty * R + i) * Tile<D, R>::WEIGHTS + tx + 16 * j] = s[i][j];
    __syncwarp();
}

// out (B, tokens, heads, D) in memory: rows first + ty R + i of one head, times scale[i]
template <int D, int R>
DEVICE void write(const float (&x)[R][D / 16], const float (&scale)[R], float* out, int b, int h,
                  int heads, int first, int tokens, int columns) {
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    for (int i = 0; i < R; ++i) {
        const int t = first + ty * R + i;
        if (t >= tokens) return;
#pragma unroll
        for (int c = 0; c < D / 16; ++c)
            if (tx + 16 * c < columns)
                out[(((i64)b * tokens + t) * heads + h) * columns + tx + 16 * c] =
                    x[i][c] * scale[i];
    }
}

template <int D, int R>
DEVICE void forward(Shape s, Heads q, Heads k, Heads v, Sight sight, float* out, float* lse) {
    constexpr int TILE = Tile<D, R>::SIZE, FLOATS = TILE * Tile<D, R>::ROW;
    DYNAMIC_SHARED(memory);
    float *queries = memory, *keys = queries + FLOATS, *weights = keys + FLOATS;
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    const int b = blockIdx.z, h = blockIdx.y, g = h / (s.H / s.G);
    const int first = (gridDim.x - 1 - blockIdx.x) * TILE;
    const int end = s.limit(smaller(first + TILE, s.T) - 1) + 1;
    const float scale = 1 / sqrtf(s.D);
    float top[R], total[R], o[R][D / 16] = {};
    for (int i = 0; i < R; ++i) top[i] = -INF, total[i] = 0;

    bring<D, R>(queries, q.at(b, h, first), q.t, s.T - first, s.D);
    const Window seen = window(sight, b, s.T, first, TILE);
    for (int j = seen.from; j < end; j += TILE) {
        if (seen.misses(j, TILE)) continue;
        bring<D, R>(keys, k.at(b, g, j), k.t, s.S - j, s.D);
        __syncthreads();
        float p[R][R];
        multiply<D, R>(queries, keys, p);
#pragma unroll
        for (int i = 0; i < R; ++i) {
            const int t = first + ty * R + i;
            float highest = top[i], sum = 0;
#pragma unroll
            for (int n = 0; n < R; ++n) {
                p[i][n] = visible(s, sight, b, t, j + tx + 16 * n) ? p[i][n] * scale : -INF;
                highest = fmaxf(highest, p[i][n]);
            }
            highest = over_warp<Max, 16>(highest);
            const float fade = expf(top[i] - finite(highest));
#pragma unroll
            for (int n = 0; n < R; ++n) sum += p[i][n] = expf(p[i][n] - finite(highest));
            total[i] = total[i] * fade + over_warp<Sum, 16>(sum);
            top[i] = highest;
#pragma unroll
            for (int c = 0; c < D / 16; ++c) o[i][c] *= fade;
        }
        keep<D, R>(p, weights);
        __syncthreads();  // the keys have been read: values take their place
        bring<D, R>(keys, v.at(b, g, j), v.t, s.S - j, s.D);
        __syncthreads();
        accumulate<D, R>(weights, keys, o);
        __syncthreads();
    }
    for (int i = 0; i < R; ++i) {
        const int t = first + ty * R + i;
        if (t < s.T && tx == 0) lse[((i64)b * s.H + h) * s.T + t] = top[i] + logf(total[i]);
        total[i] = total[i] == 0 ? 0 : 1 / total[i];
    }
    write<D, R>(o, total, out, b, h, s.H, first, s.T, s.D);
}

template <int D, int R>
DEVICE void backward_q(Shape s, Heads dout, Heads q, Heads k, Heads v, const float* lse,
                       const float* delta, Sight sight, float* dq) {
    constexpr int TILE = Tile<D, R>::SIZE, FLOATS = TILE * Tile<D, R>::ROW;
    DYNAMIC_SHARED(memory);
    float *queries = memory, *douts = queries + FLOATS, *keys = douts + FLOATS,
          *values = keys + FLOATS, *weights = values + FLOATS;
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    const int b = blockIdx.z, h = blockIdx.y, g = h / (s.H / s.G);
    const int first = (gridDim.x - 1 - blockIdx.x) * TILE;
    const int end = s.limit(smaller(first + TILE, s.T) - 1) + 1;
    const i64 of_head = ((i64)b * s.H + h) * s.T;
    const float scale = 1 / sqrtf(s.D);
    float d[R][D / 16] = {}, ones[R];

    bring<D, R>(queries, q.at(b, h, first), q.t, s.T - first, s.D);
    bring<D, R>(douts, dout.at(b, h, first), dout.t, s.T - first, s.D);
    const Window seen = window(sight, b, s.T, first, TILE);
    for (int j = seen.from; j < end; j += TILE) {
        if (seen.misses(j, TILE)) continue;
        bring<D, R>(keys, k.at(b, g, j), k.t, s.S - j, s.D);
        bring<D, R>(values, v.at(b, g, j), v.t, s.S - j, s.D);
        __syncthreads();
        float p[R][R], dp[R][R];
        multiply<D, R>(queries, keys, p);
        multiply<D, R>(douts, values, dp);
#pragma unroll
        for (int i = 0; i < R; ++i) {
            const int t = first + ty * R + i;
#pragma unroll
            for (int n = 0; n < R; ++n)
                p[i][n] = visible(s, sight, b, t, j + tx + 16 * n)
                              ? expf(p[i][n] * scale - finite(lse[of_head + t])) *
                                    (dp[i][n] - delta[of_head + t]) * scale
                              : 0;
        }
        keep<D, R>(p, weights);
        accumulate<D, R>(weights, keys, d);
        __syncthreads();
    }
    for (int i = 0; i < R; ++i) ones[i] = 1;
    write<D, R>(d, ones, dq, b, h, s.H, first, s.T, s.D);
}

template <int D, int R>
DEVICE void backward_kv(Shape s, Heads dout, Heads q, Heads k, Heads v, const float* lse,
                        const float* delta, Sight sight, float* dk, float* dv) {
    constexpr int TILE = Tile<D, R>::SIZE, FLOATS = TILE * Tile<D, R>::ROW;
    DYNAMIC_SHARED(memory);
    float *queries = memory, *douts = queries + FLOATS, *keys = douts + FLOATS,
          *values = keys + FLOATS, *weights = values + FLOATS;
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    const int b = blockIdx.z, g = blockIdx.y, first = blockIdx.x * TILE, group = s.H / s.G;
    const int earliest = larger(0, first - (s.S - s.T)) / TILE * TILE;  // query that sees `first`
    const float scale = 1 / sqrtf(s.D);
    float d_key[R][D / 16] = {}, d_value[R][D / 16] = {}, ones[R];

    bring<D, R>(keys, k.at(b, g, first), k.t, s.S - first, s.D);
    bring<D, R>(values, v.at(b, g, first), v.t, s.S - first, s.D);
    for (int h = g * group; h < (g + 1) * group; ++h)
        for (int t0 = earliest; t0 < s.T; t0 += TILE) {
            if (window(sight, b, s.T, t0, TILE).misses(first, TILE)) continue;
            bring<D, R>(queries, q.at(b, h, t0), q.t, s.T - t0, s.D);
            bring<D, R>(douts, dout.at(b, h, t0), dout.t, s.T - t0, s.D);
            __syncthreads();
            float p[R][R], dp[R][R];
            multiply<D, R>(keys, queries, p);
            multiply<D, R>(values, douts, dp);
#pragma unroll
            for (int n = 0; n < R; ++n) {
                const int t = t0 + tx + 16 * n;
                const i64 at = ((i64)b * s.H + h) * s.T + t;
                const float total = t < s.T ? finite(lse[at]) : 0, along = t < s.T ? delta[at] : 0;
#pragma unroll
                for (int i = 0; i < R; ++i) {
                    const bool seen = visible(s, sight, b, t, first + ty * R + i);
                    p[i][n] = seen ? expf(p[i][n] * scale - total) : 0;
                    dp[i][n] = seen ? p[i][n] * (dp[i][n] - along) * scale : 0;
                }
            }
            keep<D, R>(p, weights);
            accumulate<D, R>(weights, douts, d_value);
            keep<D, R>(dp, weights);
            accumulate<D, R>(weights, queries, d_key);
            __syncthreads();
        }
    for (int i = 0; i < R; ++i) ones[i] = 1;
    write<D, R>(d_key, ones, dk, b, g, s.G, first, s.S, s.D);
    write<D, R>(d_value, ones, dv, b, g, s.G, first, s.S, s.D);
}
}  // namespace flash

// delta (B, H, T) = Σ dout out, one warp per query; grid (T / warps, H, B)
KERNEL attention_delta(HEADS(dout), HEADS(out), float* delta, i64 T, i64 D) {
    const Heads d = AS_HEADS(dout), o = AS_HEADS(out);
    const i64 t = thread_index() / WARP, h = blockIdx.y, b = blockIdx.z;
    if (t >= T) return;
    float sum = 0;
    for (i64 c = threadIdx.x % WARP; c < D; c += WARP) sum += d.at(b, h, t)[c] * o.at(b, h, t)[c];
    sum = over_warp<Sum>(sum);
    if (threadIdx.x % WARP == 0) delta[(b * gridDim.y + h) * T + t] = sum;
}

// grid (query tiles, H, B), for dk and dv (key tiles, G, B)
#define ATTENTION(SIZE, R)                                                                        \
    KERNEL __launch_bounds__(flash::THREADS) attention_forward_##SIZE(                            \
        HEADS(q), HEADS(k), HEADS(v), SIGHT, float* out, float* lse, SHAPE) {                     \
        flash::forward<SIZE, R>(AS_SHAPE, AS_HEADS(q), AS_HEADS(k), AS_HEADS(v), AS_SIGHT, out,   \
                                lse);                                                             \
    }                                                                                             \
    KERNEL __launch_bounds__(flash::THREADS)                                                      \
        attention_backward_q_##SIZE(HEADS(dout), HEADS(q), HEADS(k), HEADS(v), const float* lse,  \
                                    const float* delta, SIGHT, float* dq, SHAPE) {                \
        flash::backward_q<SIZE, R>(AS_SHAPE, AS_HEADS(dout), AS_HEADS(q), AS_HEADS(k),            \
                                   AS_HEADS(v), lse, delta, AS_SIGHT, dq);                        \
    }                                                                                             \
    KERNEL __launch_bounds__(flash::THREADS)                                                      \
        attention_backward_kv_##SIZE(HEADS(dout), HEADS(q), HEADS(k), HEADS(v), const float* lse, \
                                     const float* delta, SIGHT, float* dk, float* dv, SHAPE) {    \
        flash::backward_kv<SIZE, R>(AS_SHAPE, AS_HEADS(dout), AS_HEADS(q), AS_HEADS(k),           \
                                    AS_HEADS(v), lse, delta, AS_SIGHT, dk, dv);                   \
    }

ATTENTION(32, 4)
ATTENTION(64, 4)
ATTENTION(128, 2)
ATTENTION(256, 1)
