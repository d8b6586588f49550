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
// diagonal, keys come STEP at a time, and only to the queries after them. One task is one key/value
// head, or forward, where heads are few, some of its blocks: no sum is shared.
//
// In bfloat16 every product has words (word.h) for floats, and all else stays in float32. What a
// product sums over decides how its words lie: K and V are rewritten once per head, P and dS where
// they are made.
//
// 54 / 65 % of the float32 peak forward / backward at 256 tokens, 74 / 79 % at 1,024; in bfloat16
// 1.2 / 1.2 and 1.4 / 1.5 times as fast (Zen 4, two threads, counting what is visible).
#include "word.h"

namespace ISA {
constexpr long BQ = 64, BK = 64, STEP = 16;
constexpr long FEW = W / 2;  // so few queries, as in generation, are answered one by one

INLINE float* at(const Heads& x, long b, long h, long t) {
    return x.data + b * x.b + h * x.h + t * x.t;
}

// ---- products of blocks in cache, nothing packed -----------------------------------------------
// C (m, n) += A (m, k) B (k, n) with A(i, k) = a[i * row + k * col], or C = A B where not `add`;
// k counts words.

template <class Word, int R, int V>
static void block_tile(long depth, const float* a, long row, long col, const float* b, long ldb,
                       float* c, long ldc, bool add) {
    vf sums[R][V];
    UNROLL for (int i = 0; i < R; ++i) UNROLL for (int j = 0; j < V; ++j) sums[i][j] =
        add ? load(c + i * ldc + j * W) : vf{};
    for (; depth > 0; --depth, a += col, b += ldb) {
        vf bk[V];
        UNROLL for (int j = 0; j < V; ++j) bk[j] = load(b + j * W);
        UNROLL for (int i = 0; i < R; ++i) {
            const vf ai = Word::broadcast(a + i * row);
            UNROLL for (int j = 0; j < V; ++j) sums[i][j] = Word::dot(sums[i][j], ai, bk[j]);
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

template <class Word, int V>
static void block_columns(long m, long depth, const float* a, long row, long col, const float* b,
                          long ldb, float* c, long ldc, bool add) {
    long i = 0;
    for (; i + TILE_ROWS <= m; i += TILE_ROWS)
        block_tile<Word, TILE_ROWS, V>(depth, a + i * row, row, col, b, ldb, c + i * ldc, ldc, add);
    if (TILE_ROWS > 4 && i + 4 <= m) {
        block_tile<Word, 4, V>(depth, a + i * row, row, col, b, ldb, c + i * ldc, ldc, add);
        i += 4;
    }
    for (; i < m; ++i)
        block_tile<Word, 1, V>(depth, a + i * row, row, col, b, ldb, c + i * ldc, ldc, add);
}

// n is a multiple of W.
template <class Word, int V = TILE_VECTORS>
static void block_product(long m, long n, long depth, const float* a, long row, long col,
                          const float* b, long ldb, float* c, long ldc, bool add) {
    long j = 0;
    for (; j + V * W <= n; j += V * W)
        block_columns<Word, V>(m, depth, a, row, col, b + j, ldb, c + j, ldc, add);
    if constexpr (V > 1)
        if (j < n)
            block_product<Word, V - 1>(m, n - j, depth, a, row, col, b + j, ldb, c + j, ldc, add);
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

struct Matrix {
    const float* data;
    long ld;
    const float* row(long r) const { return data + r * ld; }
};
static Matrix matrix_of(const Heads& x, long b, long h) { return {at(x, b, h, 0), x.t}; }

// x (rows, n) as words along its rows, or across them: in place, or else a copy, which for
// `across` may be x itself.
template <class Word>
static Matrix along(Matrix x, long rows, long n, float* copy) {
    if (Word::PER_WORD == 1) return x;
    const long ld = round_up(up(n, Word::PER_WORD), W);
    for (long r = 0; r < rows; ++r)
        for (long w = 0; w < ld; w += W) {
            const long d = w * Word::PER_WORD;
            store(copy + r * ld + w, load_along<Word>(x.row(r) + d, n - d));
        }
    return {copy, ld};
}
template <class Word>
static Matrix across(Matrix x, long rows, long n, float* copy) {
    if (Word::PER_WORD == 1 && n % W == 0) return x;
    const long ld = round_up(n, W);
    for (long r = 0; r < rows; r += Word::PER_WORD)
        for (long d = 0; d < ld; d += W)
            store(copy + r / Word::PER_WORD * ld + d,
                  load_across<Word>(x.row(r) + d, x.ld, n - d, rows - r));
    return {copy, ld};
}

// dst (words of D, BQ) = the transpose of src (lanes, D), whose rows are padded with zeros
template <class Word>
static void transpose_rows(Matrix src, long lanes, long D, float* dst, float* copy) {
    const Matrix words = along<Word>(src, lanes, D, copy);
    for (long l = 0; l < lanes; l += W)
        for (long w = 0; w < up(D, Word::PER_WORD); w += W) {
            vf v[W];
            UNROLL for (int i = 0; i < W; ++i) v[i] = load(words.row(l + i) + w);
            transpose(v);
            UNROLL for (int i = 0; i < W; ++i) store(dst + (w + i) * BQ + l, v[i]);
        }
}

// ---- forward -----------------------------------------------------------------------------------

// s (keys, BQ) becomes exp(s - top), in words across its rows; top and total are brought up to
// date; fade is what the past is worth now.
template <class Word>
static void online_softmax(float* s, long keys, long l, long lanes, float* top, float* total,
                           float* fade) {
    for (; l < lanes; l += W) {
        const vf before = load(top + l);
        vf now = before, sums = {};
        for (long key = 0; key < keys; ++key) now = maximum(load(s + key * BQ + l), now);
        const vf level =
            now == -INF ? vf{} : now;  // nothing seen yet: so that no -inf - -inf appears
        for (long key = 0; key < keys; key += Word::PER_WORD) {
            vf e[Word::PER_WORD];
            for (int i = 0; i < Word::PER_WORD; ++i) {
                e[i] = key + i < keys ? exp(load(s + (key + i) * BQ + l) - level) : vf{};
                sums += e[i];
            }
            store(s + key / Word::PER_WORD * BQ + l, Word::across(e));
        }
        const vf past = exp(before - level);
        store(top + l, now), store(fade + l, past), store(total + l, load(total + l) * past + sums);
    }
}

static long forward_scratch(long S, long D) { return (4 * BQ + 2 * S) * round_up(D, W) + BK * BQ; }

// k in words along its rows, v in words across them
template <class Word>
static void forward_block(const Queries& q, const Heads& Q, Matrix k, Matrix v, const Heads& out,
                          float* lse, float* scratch) {
    constexpr int PER = Word::PER_WORD;
    const long D = q.shape.D, ld = round_up(D, W);
    float *rows = scratch, *qt = rows + BQ * ld, *o = qt + BQ * ld, *copy = o + BQ * ld,
          *s = copy + BQ * ld;
    float top[BQ], total[BQ] = {}, fade[BQ];
    for (long r = 0; r < BQ; ++r) top[r] = -INF;
    memset(o, 0, BQ * ld * sizeof(float));
    gather(q, Q, 1 / __builtin_sqrtf(D), rows, ld);
    transpose_rows<Word>({rows, ld}, q.lanes, D, qt, copy);

    for (long j = q.begin / PER * PER, keys; j < q.end; j += keys) {
        keys = q.keys(j);
        const long l = q.blind(j);
        block_product<Word>(keys, q.lanes - l, up(D, PER), k.row(j), k.ld, 1, qt + l, BQ, s + l, BQ,
                            false);
        q.mask(s, j, keys, l);
        online_softmax<Word>(s, keys, l, q.lanes, top, total, fade);
        for (long r = l; r < q.rows; ++r)
            if (fade[r] != 1)
                for (long d = 0; d < ld; d += W)
                    store(o + r * ld + d, load(o + r * ld + d) * fade[r]);
        block_product<Word>(q.rows - l, ld, up(keys, PER), s + l, 1, BQ, v.row(j / PER), v.ld,
                            o + l * ld, ld, true);
    }
    for (long r = 0; r < q.rows; ++r) {
        const float scale = total[r] == 0 ? 0 : 1 / total[r];
        for (long d = 0; d < ld; d += W) store(o + r * ld + d, load(o + r * ld + d) * scale);
        lse[(q.b * q.shape.H + q.head(r)) * q.shape.T + q.token(r)] =
            total[r] == 0 ? -INF : top[r] + __builtin_logf(total[r]);
    }
    scatter(q, o, ld, out);
}

// One query: its keys are read once, W at a time, and then its values. The values are fetched into
// L2 while the keys are read, and then the keys of the `next` head that this thread will work on.
static void forward_row(const Queries& q, long r, const Heads& Q, const Heads& K, const Heads& V,
                        const Heads& out, float* lse, float* s, const float* next) {
    const long D = q.shape.D, from = q.from[r], to = q.to[r];
    const float *query = q.row(Q, r), *k = at(K, q.b, q.g, from), *v = at(V, q.b, q.g, from);
    vf tops = splat(-INF), totals = {};
    for (long j = 0; j < to - from; j += W) {
        vf dots[W] = {};
        for (long i = 0; i < min(W, to - from - j); ++i) {
            vf dot = {};
            for_vectors(0, D, [&](long d, long n) {
                __builtin_prefetch(v + (j + i) * V.t + d, 0, 2);
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
        for (long j = 0; j < to - from; ++j) UNROLL for (int i = 0; i < VECTORS; ++i) {
                __builtin_prefetch(next + j * K.t + d + i * W, 0, 2);
                sums[i] += s[j] * load_n(v + j * V.t + d + i * W, D - d - i * W);
            }
        UNROLL for (int i = 0; i < VECTORS; ++i)
            store_n(q.row(out, r) + d + i * W, sums[i] * scale, D - d - i * W);
    }
}

template <class Word>
static void attention_forward_in(const AttentionShape& shape, const Heads& q, const Heads& k,
                                 const Heads& v, const int32_t* start, const Heads& out, float* lse,
                                 int threads) {
    const long G = shape.G, S = shape.S, D = shape.D, rows = shape.H / G * shape.T;
    const long blocks = up(rows, BQ), parts = min(blocks, up(4 * threads, shape.B * G));
    const long tasks = shape.B * G * parts, size = S * round_up(D, W);
    const bool few = rows <= FEW;
    const long each = few ? round_up(S, W) : forward_scratch(S, D);
    Scratch scratch(threads * each);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (long task = 0; task < tasks; ++task) {
        const long part = task % parts, g = task / parts % G, b = task / parts / G;
        float* mine = scratch.data + THREAD_INDEX * each;
        if (few) {
            const Queries queries(shape, b, g, 0, start);
            const long then = min(task + THREAD_COUNT, tasks - 1);
            const float* next = at(k, then / G, then % G, 0);
            for (long r = 0; r < rows; ++r) forward_row(queries, r, q, k, v, out, lse, mine, next);
        } else {
            float* copies = mine + each - 2 * size;
            const Matrix keys = along<Word>(matrix_of(k, b, g), S, D, copies),
                         values = across<Word>(matrix_of(v, b, g), S, D, copies + size);
            for (long block = part; block < blocks; block += parts) {
                const Queries queries(shape, b, g, block * BQ, start);
                forward_block<Word>(queries, q, keys, values, out, lse, mine);
            }
        }
    }
}
static void attention_forward(const AttentionShape& shape, const Heads& q, const Heads& k,
                              const Heads& v, const int32_t* start, const Heads& out, float* lse,
                              int threads) {
    in_words([&](auto word) {
        attention_forward_in<decltype(word)>(shape, q, k, v, start, out, lse, threads);
    });
}

// ---- backward ----------------------------------------------------------------------------------

static long backward_scratch(long S, long D) {
    return (6 * BQ + 5 * S) * round_up(D, W) + 3 * BK * BQ;
}

struct Gradients {  // what one key/value head works with
    const Heads &dout, &q, &out;
    Matrix k, v, k_across;  // in words along their rows, or across them
    const float* lse;
    const Heads& dq;
    float *dk, *dv;  // (S, ld), sums over all query heads of the group
};

// p (keys, BQ) holds scores and becomes probabilities; ds holds dP and becomes dS: both in words
// along their rows, and dS in words across them too, where a word is not a float.
template <class Word>
static void score_gradients(long keys, long l, long lanes, const float* lse, const float* delta,
                            float* p, float* ds, float* ds_across) {
    constexpr int K = Word::PER_WORD;
    for (long key = 0; key < keys; key += K)
        for (long v = l / (K * W) * (K * W); v < lanes; v += K * W) {  // lanes before l: unused
            vf e[K][K], g[K][K], column[K];
            UNROLL for (int i = 0; i < K; ++i) UNROLL for (int j = 0; j < K; ++j) {
                const long lane = v + j * W, at = (key + i) * BQ + lane;
                e[i][j] = key + i < keys ? exp(load(p + at) - load(lse + lane)) : vf{};
                g[i][j] = e[i][j] * (load(ds + at) - load(delta + lane));
            }
            UNROLL for (int i = 0; i < K; ++i) {
                store(p + (key + i) * BQ + v / K, Word::along(e[i]));
                store(ds + (key + i) * BQ + v / K, Word::along(g[i]));
            }
            UNROLL for (int j = 0; j < (K > 1 ? K : 0); ++j) {
                UNROLL for (int i = 0; i < K; ++i) column[i] = g[i][j];
                store(ds_across + key / K * BQ + v + j * W, Word::across(column));
            }
        }
}

template <class Word>
static void backward_block(const Queries& q, const Gradients& x, float* scratch) {
    constexpr int PER = Word::PER_WORD;
    const long D = q.shape.D, ld = round_up(D, W), block = BQ * ld, depth = up(D, PER);
    float *rows = scratch, *qt = rows + block, *drows = qt + block, *dot = drows + block,
          *dq = dot + block, *copy = dq + block, *p = copy + block, *ds = p + BK * BQ,
          *ds_across = PER > 1 ? ds + BK * BQ : ds;
    const float scale = 1 / __builtin_sqrtf(D);
    float lse[BQ] = {}, delta[BQ] = {};
    memset(dq, 0, block * sizeof(float));
    gather(q, x.q, scale, rows, ld);
    transpose_rows<Word>({rows, ld}, q.lanes, D, qt, copy);
    gather(q, x.dout, 1, drows, ld);
    transpose_rows<Word>({drows, ld}, q.lanes, D, dot, copy);
    for (long r = 0; r < q.rows; ++r) {
        vf sums = {};
        for (long d = 0; d < D; d += W)
            sums += load_n(q.row(x.out, r) + d, D - d) * load(drows + r * ld + d);
        delta[r] = sum(sums);
        lse[r] = x.lse[(q.b * q.shape.H + q.head(r)) * q.shape.T + q.token(r)];
        if (lse[r] == -INF) lse[r] = 0;  // a query that sees nothing: exp(-inf - 0) is 0
    }
    across<Word>({rows, ld}, q.lanes, ld, rows);
    across<Word>({drows, ld}, q.lanes, ld, drows);
    for (long j = q.begin / PER * PER, keys; j < q.end; j += keys) {
        keys = q.keys(j);
        const long l = q.blind(j), lanes = q.lanes - l, seeing = q.rows - l;
        block_product<Word>(keys, lanes, depth, x.k.row(j), x.k.ld, 1, qt + l, BQ, p + l, BQ,
                            false);
        block_product<Word>(keys, lanes, depth, x.v.row(j), x.v.ld, 1, dot + l, BQ, ds + l, BQ,
                            false);
        q.mask(p, j, keys, l);
        score_gradients<Word>(keys, l, q.lanes, lse, delta, p, ds, ds_across);
        const long first = l / PER, words = up(seeing, PER);
        block_product<Word>(keys, ld, words, p + first, BQ, 1, drows + first * ld, ld,
                            x.dv + j * ld, ld, true);
        block_product<Word>(keys, ld, words, ds + first, BQ, 1, rows + first * ld, ld,
                            x.dk + j * ld, ld, true);
        block_product<Word>(seeing, ld, up(keys, PER), ds_across + l, 1, BQ,
                            x.k_across.row(j / PER), x.k_across.ld, dq + l * ld, ld, true);
    }
    for (long i = 0; i < q.rows * ld; i += W)
        store(dq + i, load(dq + i) * scale);  // dK has it from Q
    scatter(q, dq, ld, x.dq);
}

template <class Word>
static void attention_backward_in(const AttentionShape& shape, const Heads& dout, const Heads& q,
                                  const Heads& k, const Heads& v, const Heads& out,
                                  const float* lse, const int32_t* start, const Heads& dq,
                                  const Heads& dk, const Heads& dv, int threads) {
    const long S = shape.S, D = shape.D, ld = round_up(D, W), size = S * ld;
    const long each = backward_scratch(S, D);
    Scratch scratch(threads * each);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (long task = 0; task < shape.B * shape.G; ++task) {
        const long b = task / shape.G, g = task % shape.G;
        float *mine = scratch.data + THREAD_INDEX * each, *copies = mine + each - 3 * size,
              *sums = copies - 2 * size;
        memset(sums, 0, 2 * size * sizeof(float));
        const Matrix keys = along<Word>(matrix_of(k, b, g), S, D, copies),
                     values = along<Word>(matrix_of(v, b, g), S, D, copies + size),
                     keys_across = across<Word>(matrix_of(k, b, g), S, D, copies + 2 * size);
        const Gradients x = {dout, q, out, keys, values, keys_across, lse, dq, sums, sums + size};
        for (long first = 0; first < shape.H / shape.G * shape.T; first += BQ)
            backward_block<Word>(Queries(shape, b, g, first, start), x, mine);
        for (long s = 0; s < S; ++s) {
            memcpy(at(dk, b, g, s), x.dk + s * ld, D * sizeof(float));
            memcpy(at(dv, b, g, s), x.dv + s * ld, D * sizeof(float));
        }
    }
}
static void attention_backward(const AttentionShape& shape, const Heads& dout, const Heads& q,
                               const Heads& k, const Heads& v, const Heads& out, const float* lse,
                               const int32_t* start, const Heads& dq, const Heads& dk,
                               const Heads& dv, int threads) {
    in_words([&](auto word) {
        attention_backward_in<decltype(word)>(shape, dout, q, k, v, out, lse, start, dq, dk, dv,
                                              threads);
    });
}
}  // namespace ISA
