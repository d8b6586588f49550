// attention.cpp - causal attention in blocks whose scores never reach memory.  arXiv 2205.14135
//
// A block is BQ queries; it meets the keys BK at a time. All query heads that share a key/value
// head are stacked as rows of one matrix, (head, token), so that grouped heads read K and V once.
// Scores are held transposed, one row per key and one lane per query:
//
//                 BQ queries
//               ┌────────────┐   the maximum and the sum of a query are lane-wise,
//       BK keys │ K_j Qᵀ/√D  │   down the rows; K is read as it lies in memory,
//               └────────────┘   and queries are transposed, once per block.
//
//   forward:   S = K Qᵀ; P = exp(S - max); O = O fade + Pᵀ V                      (online softmax)
//   backward:  P = exp(K Qᵀ - lse); dV += P dO; dS = P (V dOᵀ - delta); dK += dS Q; dQ += dSᵀ K
//
// Every query sees a window of keys [from, to): `to` is the causal limit, `from` its document's
// start. Blocks outside all windows are skipped, blocks inside all of them need no mask. Along the
// diagonal, keys come STEP at a time, and only to the queries after them. One task is one block of
// queries (forward) or one key/value head (backward): no sum is shared.
//
// 54 / 65 % of the float32 peak forward / backward at 256 tokens, 74 / 79 % at 1,024 (Zen 4, two
// threads, counting what is visible).
#include "simd.h"

namespace ISA {
constexpr long BQ = 64, BK = 64, STEP = 16;
constexpr long FEW = W / 2;  // so few queries, as in generation, are answered one by one

INLINE float* at(const Heads& x, long b, long h, long t) {
    return x.data + b * x.b + h * x.h + t * x.t;
}

// ---- products of blocks in cache, nothing packed -----------------------------------------------
// C (m, n) += A (m, k) B (k, n) with A(i, k) = a[i * row + k * col], or C = A B where not `add`.

template <int R, int V>
static void block_tile(long depth, const float* a, long row, long col, const float* b, long ldb,
                       float* c, long ldc, bool add) {
    vf sums[R][V];
    UNROLL for (int i = 0; i < R; ++i) UNROLL for (int j = 0; j < V; ++j) sums[i][j] =
        add ? load(c + i * ldc + j * W) : vf{};
    for (; depth > 0; --depth, a += col, b += ldb) {
        vf bk[V];
        UNROLL for (int j = 0; j < V; ++j) bk[j] = load(b + j * W);
        UNROLL for (int i = 0; i < R; ++i) {
            const vf ai = splat(a[i * row]);
            UNROLL for (int j = 0; j < V; ++j) sums[i][j] += ai * bk[j];
        }
    }
    UNROLL for (int i = 0; i < R; ++i) UNROLL for (int j = 0; j < V; ++j)
        store(c + i * ldc + j * W, sums[i][j]);
}

#if LANES == 16
constexpr int TILE_ROWS = 6, TILE_VECTORS = 4;
#else
constexpr int TILE_ROWS = 4, TILE_VECTORS = 2;
#endif

template <int V>
static void block_columns(long m, long depth, const float* a, long row, long col, const float* b,
                          long ldb, float* c, long ldc, bool add) {
    long i = 0;
    for (; i + TILE_ROWS <= m; i += TILE_ROWS)
        block_tile<TILE_ROWS, V>(depth, a + i * row, row, col, b, ldb, c + i * ldc, ldc, add);
    if (TILE_ROWS > 4 && i + 4 <= m) {
        block_tile<4, V>(depth, a + i * row, row, col, b, ldb, c + i * ldc, ldc, add);
        i += 4;
    }
    for (; i < m; ++i)
        block_tile<1, V>(depth, a + i * row, row, col, b, ldb, c + i * ldc, ldc, add);
}

// n is a multiple of W.
template <int V = TILE_VECTORS>
static void block_product(long m, long n, long depth, const float* a, long row, long col,
                          const float* b, long ldb, float* c, long ldc, bool add) {
    long j = 0;
    for (; j + V * W <= n; j += V * W)
        block_columns<V>(m, depth, a, row, col, b + j, ldb, c + j, ldc, add);
    if constexpr (V > 1)
        if (j < n) block_product<V - 1>(m, n - j, depth, a, row, col, b + j, ldb, c + j, ldc, add);
}

// ---- one block of queries ----------------------------------------------------------------------

struct Queries {
    const AttentionShape& shape;
    long b, g, first, rows;    // rows first .. first + rows of the group's (H/G) T
    long lanes;                // rows, up to whole vectors
    int32_t from[BQ], to[BQ];  // the window of each row; empty for the lanes beyond `rows`
    long begin, end;           // the union of the windows
    long all_from, all_to;     // their intersection

    Queries(const AttentionShape& shape, long b, long g, long first, const int32_t* start)
        : shape(shape), b(b), g(g), first(first) {
        const long T = shape.T, S = shape.S;
        rows = min(BQ, shape.H / shape.G * T - first);
        lanes = round_up(rows, W);
        begin = S, end = 0, all_from = 0, all_to = S;
        for (long r = 0; r < lanes; ++r) {
            const long t = token(r);
            to[r] = r < rows ? max(0, t + S - T + 1) : 0;
            from[r] = r < rows && start ? max(0, start[b * T + t]) : 0;
            all_from = max(all_from, from[r]), all_to = min(all_to, to[r]);
            if (from[r] < to[r]) begin = min(begin, from[r]), end = max(end, to[r]);
        }
    }
    long head(long r) const { return g * (shape.H / shape.G) + (first + r) / shape.T; }
    long token(long r) const { return (first + r) % shape.T; }
    float* row(const Heads& x, long r) const { return at(x, b, head(r), token(r)); }

    // How many keys to take from j on.
    long keys(long j) const {
        return min(end - j, j + STEP > all_to ? STEP : min(BK, (all_to - j) / STEP * STEP));
    }
    // Whole vectors of lanes at the front that see no key from j on.
    long blind(long j) const {
        long r = 0;
        while (r < lanes && to[r] <= j) ++r;
        return r / W * W;
    }

    // s (keys, BQ) becomes -inf wherever lane r must not see key j + row.
    void mask(float* s, long j, long keys, long first_lane) const {
        if (all_from <= j && j + keys <= all_to) return;
        for (long l = first_lane; l < lanes; l += W) {
            const vi low = load(from + l), high = load(to + l);
            for (long key = 0; key < keys; ++key) {
                const int32_t at = j + key;
                float* x = s + key * BQ + l;
                const vi visible = (low <= at) & (high > at);
                store(x, visible ? load(x) : splat(-INF));
            }
        }
    }
};

// dst (BQ, ld) = the rows of x times scale, zero beyond the head size and beyond the last row
static void gather(const Queries& q, const Heads& x, float scale, float* dst, long ld) {
    for (long r = 0; r < q.lanes; ++r)
        for (long d = 0; d < ld; d += W) {
            const vf v = r < q.rows ? load_n(q.row(x, r) + d, q.shape.D - d) : vf{};
            store(dst + r * ld + d, v * scale);
        }
}
static void scatter(const Queries& q, const float* src, long ld, const Heads& x) {
    for (long r = 0; r < q.rows; ++r) memcpy(q.row(x, r), src + r * ld, q.shape.D * sizeof(float));
}
// dst (ld, BQ) = the transpose of src (lanes, ld)
static void transpose_rows(const float* src, long lanes, long ld, float* dst) {
    for (long l = 0; l < lanes; l += W)
        for (long d = 0; d < ld; d += W) {
            vf v[W];
            UNROLL for (int i = 0; i < W; ++i) v[i] = load(src + (l + i) * ld + d);
            transpose(v);
            UNROLL for (int i = 0; i < W; ++i) store(dst + (d + i) * BQ + l, v[i]);
        }
}

// Keys or values j .. j + n of one head as a matrix of whole vectors: in place, or else a padded
// copy.
struct Matrix {
    const float* data;
    long ld;
};
static Matrix whole_vectors(const Heads& x, long b, long g, long j, long n, long D, float* copy) {
    if (D % W == 0) return {at(x, b, g, j), x.t};
    const long ld = round_up(D, W);
    for (long i = 0; i < n; ++i)
        for (long d = 0; d < ld; d += W)
            store(copy + i * ld + d, load_n(at(x, b, g, j + i) + d, D - d));
    return {copy, ld};
}

// ---- forward -----------------------------------------------------------------------------------

// s becomes exp(s - top); top and total are brought up to date; fade is what the past is worth now.
static void online_softmax(float* s, long keys, long l, long lanes, float* top, float* total,
                           float* fade) {
    for (; l < lanes; l += W) {
        const vf before = load(top + l);
        vf now = before, sums = {};
        for (long key = 0; key < keys; ++key) now = maximum(load(s + key * BQ + l), now);
        const vf level =
            now == -INF ? vf{} : now;  // nothing seen yet: so that no -inf - -inf appears
        for (long key = 0; key < keys; ++key) {
            const vf e = exp(load(s + key * BQ + l) - level);
            store(s + key * BQ + l, e);
            sums += e;
        }
        const vf past = exp(before - level);
        store(top + l, now), store(fade + l, past), store(total + l, load(total + l) * past + sums);
    }
}

static long forward_scratch(long D) { return 4 * BQ * round_up(D, W) + BK * BQ; }

static void forward_block(const Queries& q, const Heads& Q, const Heads& K, const Heads& V,
                          const Heads& out, float* lse, float* scratch) {
    const long D = q.shape.D, ld = round_up(D, W);
    float *rows = scratch, *qt = rows + BQ * ld, *o = qt + BQ * ld, *copy = o + BQ * ld,
          *s = copy + BK * ld;
    float top[BQ], total[BQ] = {}, fade[BQ];
    for (long r = 0; r < BQ; ++r) top[r] = -INF;
    memset(o, 0, BQ * ld * sizeof(float));
    gather(q, Q, 1 / __builtin_sqrtf(D), rows, ld);
    transpose_rows(rows, q.lanes, ld, qt);

    for (long j = q.begin, keys; j < q.end; j += keys) {
        keys = q.keys(j);
        const long l = q.blind(j);
        block_product(keys, q.lanes - l, D, at(K, q.b, q.g, j), K.t, 1, qt + l, BQ, s + l, BQ,
                      false);
        q.mask(s, j, keys, l);
        online_softmax(s, keys, l, q.lanes, top, total, fade);
        for (long r = l; r < q.rows; ++r)
            if (fade[r] != 1)
                for (long d = 0; d < ld; d += W)
                    store(o + r * ld + d, load(o + r * ld + d) * fade[r]);
        const Matrix v = whole_vectors(V, q.b, q.g, j, keys, D, copy);
        block_product(q.rows - l, ld, keys, s + l, 1, BQ, v.data, v.ld, o + l * ld, ld, true);
    }
    for (long r = 0; r < q.rows; ++r) {
        const float scale = total[r] == 0 ? 0 : 1 / total[r];
        for (long d = 0; d < ld; d += W) store(o + r * ld + d, load(o + r * ld + d) * scale);
        lse[(q.b * q.shape.H + q.head(r)) * q.shape.T + q.token(r)] =
            total[r] == 0 ? -INF : top[r] + __builtin_logf(total[r]);
    }
    scatter(q, o, ld, out);
}

// One query: its keys are read once, W at a time, and then its values.
static void forward_row(const Queries& q, long r, const Heads& Q, const Heads& K, const Heads& V,
                        const Heads& out, float* lse, float* s) {
    const long D = q.shape.D, from = q.from[r], to = q.to[r];
    const float *query = q.row(Q, r), *k = at(K, q.b, q.g, from), *v = at(V, q.b, q.g, from);
    vf tops = splat(-INF), totals = {};
    for (long j = 0; j < to - from; j += W) {
        vf dots[W] = {};
        for (long i = 0; i < min(W, to - from - j); ++i) {
            vf dot = {};
            for_vectors(0, D, [&](long d, long n) {
                __builtin_prefetch(v + (j + i) * V.t + d);
                dot += load_n(k + (j + i) * K.t + d, n) * load_n(query + d, n);
            });
            dots[i] = dot;
        }
        transpose(dots);
        vf score = {};
        UNROLL for (int i = 0; i < W; ++i) score += dots[i];
        score = first_n(score / __builtin_sqrtf(D), to - from - j, -INF);
        tops = maximum(score, tops);
        store(s + j, score);
    }
    const float top = from < to ? largest(tops) : 0;
    for (long j = 0; j < to - from; j += W) {
        const vf e = exp(load(s + j) - top);
        totals += e;
        store(s + j, e);
    }
    const float total = sum(totals), scale = total == 0 ? 0 : 1 / total;
    lse[(q.b * q.shape.H + q.head(r)) * q.shape.T + q.token(r)] =
        total == 0 ? -INF : top + __builtin_logf(total);
    constexpr int VECTORS = 4;
    for (long d = 0; d < D; d += VECTORS * W) {
        vf sums[VECTORS] = {};
        for (long j = 0; j < to - from; ++j)
            UNROLL for (int i = 0; i < VECTORS; ++i) sums[i] +=
                s[j] * load_n(v + j * V.t + d + i * W, D - d - i * W);
        UNROLL for (int i = 0; i < VECTORS; ++i)
            store_n(q.row(out, r) + d + i * W, sums[i] * scale, D - d - i * W);
    }
}

static void attention_forward(const AttentionShape& shape, const Heads& q, const Heads& k,
                              const Heads& v, const int32_t* start, const Heads& out, float* lse,
                              int threads) {
    const long blocks = up(shape.H / shape.G * shape.T, BQ), tasks = shape.B * shape.G * blocks;
    const bool few = shape.H / shape.G * shape.T <= FEW;
    const long each = few ? round_up(shape.S, W) : forward_scratch(shape.D);
    Scratch scratch(threads * each);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (long task = 0; task < tasks; ++task) {
        const long block = task % blocks, g = task / blocks % shape.G, b = task / blocks / shape.G;
        const Queries queries(shape, b, g, block * BQ, start);
        float* mine = scratch.data + THREAD_INDEX * each;
        if (few)
            for (long r = 0; r < queries.rows; ++r)
                forward_row(queries, r, q, k, v, out, lse, mine);
        else
            forward_block(queries, q, k, v, out, lse, mine);
    }
}

// ---- backward ----------------------------------------------------------------------------------

static long backward_scratch(long S, long D) {
    return (6 * BQ + 2 * S) * round_up(D, W) + 2 * BK * BQ;
}

struct Gradients {  // what one key/value head works with
    const Heads &dout, &q, &k, &v, &out;
    const float* lse;
    const Heads& dq;
    float *dk, *dv;  // (S, ld), sums over all query heads of the group
};

// p (keys, BQ) holds scores and becomes probabilities; ds holds dP and becomes dS.
static void score_gradients(long keys, long l, long lanes, const float* lse, const float* delta,
                            float* p, float* ds) {
    for (; l < lanes; l += W) {
        const vf level = load(lse + l), d = load(delta + l);
        for (long i = l; i < keys * BQ; i += BQ) {
            const vf e = exp(load(p + i) - level);
            store(p + i, e);
            store(ds + i, e * (load(ds + i) - d));
        }
    }
}

static void backward_block(const Queries& q, const Gradients& x, float* scratch) {
    const long D = q.shape.D, ld = round_up(D, W), block = BQ * ld;
    float *rows = scratch, *qt = rows + block, *drows = qt + block, *dot = drows + block,
          *dq = dot + block, *copy = dq + block, *p = copy + block, *ds = p + BK * BQ;
    const float scale = 1 / __builtin_sqrtf(D);
    float lse[BQ] = {}, delta[BQ] = {};
    memset(dq, 0, block * sizeof(float));
    gather(q, x.q, scale, rows, ld);
    transpose_rows(rows, q.lanes, ld, qt);
    gather(q, x.dout, 1, drows, ld);
    transpose_rows(drows, q.lanes, ld, dot);
    for (long r = 0; r < q.rows; ++r) {
        vf sums = {};
        for (long d = 0; d < D; d += W)
            sums += load_n(q.row(x.out, r) + d, D - d) * load(drows + r * ld + d);
        delta[r] = sum(sums);
        lse[r] = x.lse[(q.b * q.shape.H + q.head(r)) * q.shape.T + q.token(r)];
        if (lse[r] == -INF) lse[r] = 0;  // a query that sees nothing: exp(-inf - 0) is 0
    }
    for (long j = q.begin, keys; j < q.end; j += keys) {
        keys = q.keys(j);
        const long l = q.blind(j), lanes = q.lanes - l, seeing = q.rows - l;
        const Matrix k = whole_vectors(x.k, q.b, q.g, j, keys, D, copy);
        block_product(keys, lanes, D, k.data, k.ld, 1, qt + l, BQ, p + l, BQ, false);
        block_product(keys, lanes, D, at(x.v, q.b, q.g, j), x.v.t, 1, dot + l, BQ, ds + l, BQ,
                      false);
        q.mask(p, j, keys, l);
        score_gradients(keys, l, q.lanes, lse, delta, p, ds);
        block_product(keys, ld, seeing, p + l, BQ, 1, drows + l * ld, ld, x.dv + j * ld, ld, true);
        block_product(keys, ld, seeing, ds + l, BQ, 1, rows + l * ld, ld, x.dk + j * ld, ld, true);
        block_product(seeing, ld, keys, ds + l, 1, BQ, k.data, k.ld, dq + l * ld, ld, true);
    }
    for (long i = 0; i < q.rows * ld; i += W)
        store(dq + i, load(dq + i) * scale);  // dK has it from Q
    scatter(q, dq, ld, x.dq);
}

static void attention_backward(const AttentionShape& shape, const Heads& dout, const Heads& q,
                               const Heads& k, const Heads& v, const Heads& out, const float* lse,
                               const int32_t* start, const Heads& dq, const Heads& dk,
                               const Heads& dv, int threads) {
    const long ld = round_up(shape.D, W), each = backward_scratch(shape.S, shape.D);
    Scratch scratch(threads * each);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (long task = 0; task < shape.B * shape.G; ++task) {
        const long b = task / shape.G, g = task % shape.G;
        float *mine = scratch.data + THREAD_INDEX * each, *sums = mine + each - 2 * shape.S * ld;
        memset(sums, 0, 2 * shape.S * ld * sizeof(float));
        const Gradients x = {dout, q, k, v, out, lse, dq, sums, sums + shape.S * ld};
        for (long first = 0; first < shape.H / shape.G * shape.T; first += BQ)
            backward_block(Queries(shape, b, g, first, start), x, mine);
        for (long s = 0; s < shape.S; ++s) {
            memcpy(at(dk, b, g, s), x.dk + s * ld, shape.D * sizeof(float));
            memcpy(at(dv, b, g, s), x.dv + s * ld, shape.D * sizeof(float));
        }
    }
}
}  // namespace ISA
