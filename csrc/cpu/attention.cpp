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
// start. It may have a gap, as between a prompt and the second answer to it. Blocks outside all
// windows or in every gap are skipped, blocks inside all windows that meet no gap need no mask.
// Along the diagonal, keys come `step` at a time, and only to the queries after them. One task is
// one key/value head, or forward, where heads are few, some of its blocks: no sum is shared.
//
// A row's keys may begin with those of a prefix that other rows share (arXiv 2402.05099). One after
// another they read it from cache: the same sums, to the bit, as if each had a copy of its own.
//
// In bfloat16 every product has words (word.h) for floats, and all else stays in float32. What a
// product sums over decides how its words lie: K and V are rewritten once per head, P and dS where
// they are made.
//
// 48 / 55 % of the float32 peak forward / backward at 256 tokens, 66 / 77 % at 1,024; in bfloat16
// 1.3 / 1.3 and 1.5 / 1.6 times as fast (Zen 5, two threads, counting what is visible).
#include "block.h"

namespace ISA {
constexpr long BQ = 64, BK = 64;
constexpr long FEW = W / 2;  // so few queries, as in generation, are answered one by one

// ---- keys and values ---------------------------------------------------------------------------

struct Rows {  // of one head: the prefix, and what follows it
    const float *prefix, *own;
    long prefix_t, own_t, shared;
    const float* operator[](long s) const {
        return s < shared ? prefix + s * prefix_t : own + (s - shared) * own_t;
    }
};
static Rows rows_of(const Attention& x, const Heads& own, const Heads& prefix, long b, long g) {
    const float* before = x.shared ? at(prefix, x.prefix[b], g, 0) : nullptr;
    return {before, at(own, b, g, 0), prefix.t, own.t, x.shared};
}

// All S of them as one matrix: as they lie, or where a prefix stands before them, copied.
static Matrix joined(const Rows& x, long S, long D, float* copy) {
    if (x.shared == 0) return {x.own, x.own_t};
    for (long s = 0; s < S; ++s) memcpy(copy + s * D, x[s], D * sizeof(float));
    return {copy, D};
}

// ---- one block of queries ----------------------------------------------------------------------

struct Range {  // of keys: from .. to - 1
    long from, to;
    bool holds(long j) const { return from <= j && j < to; }
    bool meets(long j, long keys) const { return j < to && j + keys > from; }
    void narrow(Range x) { from = max(from, x.from), to = min(to, x.to); }
    void widen(Range x) {
        if (x.from < x.to) from = min(from, x.from), to = max(to, x.to);
    }
};

struct Queries {
    const Attention& x;
    long b, g, first, rows;            // rows first .. first + rows of the group's (H/G) T
    long step;                         // keys that a product takes at once
    long lanes;                        // rows, up to whole vectors
    int32_t head[BQ], token[BQ];       // of each row
    int32_t from[BQ], to[BQ];          // the window of each row; empty for the lanes beyond `rows`
    int32_t gap_from[BQ], gap_to[BQ];  // what the row does not see of it
    Range any, all;                    // the union of the windows, and their intersection
    Range any_gap, all_gap;            // of the gaps

    Queries(const Attention& x, long b, long g, long first, long step)
        : x(x), b(b), g(g), first(first), step(step) {
        const long T = x.T, S = x.S;
        rows = min(BQ, x.H / x.G * T - first);
        lanes = round_up(rows, W);
        any = any_gap = {S, 0}, all = all_gap = {0, S};
        long h = g * (x.H / x.G) + first / T, t = first % T;
        for (long r = 0; r < lanes; ++r) {
            const long at = b * T + t;
            const bool real = r < rows;
            head[r] = h, token[r] = t;
            to[r] = real ? max(0, t + S - T + 1) : 0;
            from[r] = real && x.start ? max(0, x.start[at]) : 0;
            gap_from[r] = real && x.gap ? x.gap[2 * at] : 0;
            gap_to[r] = real && x.gap ? x.gap[2 * at + 1] : 0;
            const Range window = {from[r], to[r]}, gap = {gap_from[r], gap_to[r]};
            any.widen(window), all.narrow(window), any_gap.widen(gap);
            if (real) all_gap.narrow(gap);
            if (++t == T) t = 0, ++h;
        }
    }
    float* row(const Heads& heads, long r) const { return at(heads, b, head[r], token[r]); }
    long at_lse(long r) const { return (b * x.H + head[r]) * x.T + token[r]; }

    // From j on, the first key that is worth a look.
    long next(long j) const { return all_gap.holds(j) ? max(j, all_gap.to / step * step) : j; }
    // How many keys to take from j on.
    long keys(long j) const {
        const long n = j + step > all.to ? step : min(BK, (all.to - j) / step * step);
        const long gap = all_gap.from < all_gap.to && j < all_gap.from ? all_gap.from - j : BK;
        return min(any.to - j, min(n, round_up(gap, step)));
    }
    // Whole vectors of lanes at the front that see no key from j on.
    long blind(long j) const {
        long r = 0;
        while (r < lanes && to[r] <= j) ++r;
        return r / W * W;
    }

    // s (keys, BQ) becomes -inf wherever lane r must not see key j + row.
    void mask(float* s, long j, long keys, long first_lane) const {
        if (all.from <= j && j + keys <= all.to && !any_gap.meets(j, keys)) return;
        for (long l = first_lane; l < lanes; l += W) {
            const vi low = load(from + l), high = load(to + l);
            const vi gap_low = load(gap_from + l), gap_high = load(gap_to + l);
            for (long key = 0; key < keys; ++key) {
                const int32_t at = j + key;
                float* x = s + key * BQ + l;
                const vi visible = (low <= at) & (high > at) & ((gap_low > at) | (gap_high <= at));
                store(x, visible ? load(x) : splat(-INF));
            }
        }
    }
};

// dst (BQ, ld) = the rows of x times scale, zero beyond the head size and beyond the last row
static void gather(const Queries& q, const Heads& x, float scale, float* dst, long ld) {
    for (long r = 0; r < q.lanes; ++r) {
        const float* from = q.row(x, r);
        const long n = r < q.rows ? q.x.D : 0;
        for (long d = 0; d < ld; d += W) store(dst + r * ld + d, load_n(from + d, n - d) * scale);
    }
}
static void scatter(const Queries& q, const float* src, long ld, const Heads& x) {
    for (long r = 0; r < q.rows; ++r) memcpy(q.row(x, r), src + r * ld, q.x.D * sizeof(float));
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

static long forward_scratch(long S, long D) {
    return (4 * BQ + 2 * S) * round_up(D, W) + BK * BQ + 2 * S * D;
}

// k in words along its rows, v in words across them
template <class Word>
static void forward_block(const Queries& q, Matrix k, Matrix v, const Heads& out, float* lse,
                          float* scratch) {
    constexpr int PER = Word::PER_WORD;
    const long D = q.x.D, ld = round_up(D, W);
    float *rows = scratch, *qt = rows + BQ * ld, *o = qt + BQ * ld, *copy = o + BQ * ld,
          *s = copy + BQ * ld;
    float top[BQ], total[BQ] = {}, fade[BQ];
    for (long r = 0; r < BQ; ++r) top[r] = -INF;
    memset(o, 0, BQ * ld * sizeof(float));
    gather(q, q.x.q, 1 / __builtin_sqrtf(D), rows, ld);
    transpose_rows<Word>({rows, ld}, q.lanes, D, qt, BQ, copy);

    for (long j = q.next(q.any.from / PER * PER), keys; j < q.any.to; j = q.next(j + keys)) {
        keys = q.keys(j);
        const long l = q.blind(j);
        block_product<Word>(keys, q.lanes - l, up(D, PER), k.from(j), {qt + l, BQ}, {s + l, BQ});
        q.mask(s, j, keys, l);
        online_softmax<Word>(s, keys, l, q.lanes, top, total, fade);
        for (long r = l; r < q.rows; ++r)
            if (fade[r] != 1)
                for (long d = 0; d < ld; d += W)
                    store(o + r * ld + d, load(o + r * ld + d) * fade[r]);
        block_product<Word>(q.rows - l, ld, up(keys, PER), {s + l, 1, BQ}, v.from(j / PER),
                            {o + l * ld, ld, true});
    }
    for (long r = 0; r < q.rows; ++r) {
        const float scale = total[r] == 0 ? 0 : 1 / total[r];
        for (long d = 0; d < ld; d += W) store(o + r * ld + d, load(o + r * ld + d) * scale);
        lse[q.at_lse(r)] = total[r] == 0 ? -INF : top[r] + __builtin_logf(total[r]);
    }
    scatter(q, o, ld, out);
}

// One query: its keys are read once, W at a time, and then its values. The values are fetched into
// L2 while the keys are read, and then the keys of the `next` head that this thread will work on.
static void forward_row(const Queries& q, long r, const Rows& k, const Rows& v, const Rows& next,
                        const Heads& out, float* lse, float* s) {
    const long D = q.x.D, from = q.from[r], to = q.to[r];
    const float* query = q.row(q.x.q, r);
    vf tops = splat(-INF), totals = {};
    for (long j = from; j < to; j += W) {
        vf dots[W] = {};
        for (long i = 0; i < min(W, to - j); ++i) {
            const float *key = k[j + i], *value = v[j + i];
            vf dot = {};
            for_vectors(0, D, [&](long d, long n) {
                __builtin_prefetch(value + d, 0, 2);
                dot += load_n(key + d, n) * load_n(query + d, n);
            });
            dots[i] = dot;
        }
        transpose(dots);
        vf score = {};
        UNROLL for (int i = 0; i < W; ++i) score += dots[i];
        score = first_n(score / __builtin_sqrtf(D), to - j, -INF);
        tops = maximum(score, tops);
        store(s + j - from, score);
    }
    const float top = finite(largest(tops));
    for (long j = 0; j < to - from; j += W) {
        const vf e = exp(load(s + j) - top);
        totals += e;
        store(s + j, e);
    }
    const float total = sum(totals), scale = total == 0 ? 0 : 1 / total;
    lse[q.at_lse(r)] = total == 0 ? -INF : top + __builtin_logf(total);
    constexpr int VECTORS = 4;
    for (long d = 0; d < D; d += VECTORS * W) {
        vf sums[VECTORS] = {};
        for (long j = from; j < to; ++j) {
            const float *value = v[j] + d, *fetched = next[j - from] + d;
            UNROLL for (int i = 0; i < VECTORS; ++i) {
                __builtin_prefetch(fetched + i * W, 0, 2);
                sums[i] += s[j - from] * load_n(value + i * W, D - d - i * W);
            }
        }
        UNROLL for (int i = 0; i < VECTORS; ++i)
            store_n(q.row(out, r) + d + i * W, sums[i] * scale, D - d - i * W);
    }
}

template <class Word>
constexpr long step = Word::GROUP == 1 ? 16 : 32;  // whole groups of words

template <class Word>
static void forward(const Attention& x, const Heads& out, float* lse, int threads) {
    const long G = x.G, S = x.S, D = x.D, rows = x.H / G * x.T;
    const long blocks = up(rows, BQ), parts = min(blocks, up(4 * threads, max(x.B * G, 1)));
    const long tasks = x.B * G * parts, size = S * round_up(D, W);
    const bool few = rows <= FEW && !x.gap;
    const long each = few ? round_up(S, W) : forward_scratch(S, D);
    Scratch scratch(threads * each);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (long task = 0; task < tasks; ++task) {
        [[maybe_unused]] const typename Word::Unit unit{};
        const long part = task % parts, g = task / parts % G, b = task / parts / G;
        float* mine = scratch.data + THREAD_INDEX * each;
        const Rows k = rows_of(x, x.k, x.prefix_k, b, g), v = rows_of(x, x.v, x.prefix_v, b, g);
        if (few) {
            const long then = min(task + THREAD_COUNT, tasks - 1);
            const Rows next = rows_of(x, x.k, x.prefix_k, then / G, then % G);
            const Queries queries(x, b, g, 0, W);
            for (long r = 0; r < rows; ++r) forward_row(queries, r, k, v, next, out, lse, mine);
        } else {
            float *words = mine + each - 2 * size, *whole = words - 2 * S * D;
            const Matrix keys = along<Word>(joined(k, S, D, whole), S, D, words),
                         values = across<Word>(joined(v, S, D, whole + S * D), S, D, words + size);
            for (long block = part; block < blocks; block += parts)
                forward_block<Word>(Queries(x, b, g, block * BQ, step<Word>), keys, values, out,
                                    lse, mine);
        }
    }
}
static void attention_forward(const Attention& x, const Heads& out, float* lse, int threads) {
    in_words([&](auto word) { forward<decltype(word)>(x, out, lse, threads); });
}

// ---- backward ----------------------------------------------------------------------------------

static long backward_scratch(long S, long D) {
    return (6 * BQ + 5 * S) * round_up(D, W) + 3 * BK * BQ;
}

struct Gradients {  // what one key/value head works with
    const Heads &dout, &out;
    const float* lse;
    Matrix k, v, k_across;  // in words along their rows, or across them
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
                const bool real = key + i < keys;  // else what lies there may be NaN
                e[i][j] = real ? exp(load(p + at) - load(lse + lane)) : vf{};
                g[i][j] = real ? e[i][j] * (load(ds + at) - load(delta + lane)) : vf{};
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
    const long D = q.x.D, ld = round_up(D, W), block = BQ * ld, depth = up(D, PER);
    float *rows = scratch, *qt = rows + block, *drows = qt + block, *dot = drows + block,
          *dq = dot + block, *copy = dq + block, *p = copy + block, *ds = p + BK * BQ,
          *ds_across = PER > 1 ? ds + BK * BQ : ds;
    const float scale = 1 / __builtin_sqrtf(D);
    float lse[BQ] = {}, delta[BQ] = {};
    memset(dq, 0, block * sizeof(float));
    gather(q, q.x.q, scale, rows, ld);
    transpose_rows<Word>({rows, ld}, q.lanes, D, qt, BQ, copy);
    gather(q, x.dout, 1, drows, ld);
    transpose_rows<Word>({drows, ld}, q.lanes, D, dot, BQ, copy);
    for (long r = 0; r < q.rows; ++r) {
        const float* out = q.row(x.out, r);
        vf sums = {};
        for (long d = 0; d < D; d += W) sums += load_n(out + d, D - d) * load(drows + r * ld + d);
        delta[r] = sum(sums);
        lse[r] = x.lse[q.at_lse(r)];
        if (lse[r] == -INF) lse[r] = 0;  // a query that sees nothing: exp(-inf - 0) is 0
    }
    across<Word>({rows, ld}, q.lanes, ld, rows);
    across<Word>({drows, ld}, q.lanes, ld, drows);
    for (long j = q.next(q.any.from / PER * PER), keys; j < q.any.to; j = q.next(j + keys)) {
        keys = q.keys(j);
        const long l = q.blind(j), lanes = q.lanes - l, seeing = q.rows - l;
        block_product<Word>(keys, lanes, depth, x.k.from(j), {qt + l, BQ}, {p + l, BQ});
        block_product<Word>(keys, lanes, depth, x.v.from(j), {dot + l, BQ}, {ds + l, BQ});
        q.mask(p, j, keys, l);
        score_gradients<Word>(keys, l, q.lanes, lse, delta, p, ds, ds_across);
        const long first = l / PER, words = up(seeing, PER);
        block_product<Word>(keys, ld, words, {p + first, BQ}, {drows + first * ld, ld},
                            {x.dv + j * ld, ld, true});
        block_product<Word>(keys, ld, words, {ds + first, BQ}, {rows + first * ld, ld},
                            {x.dk + j * ld, ld, true});
        block_product<Word>(seeing, ld, up(keys, PER), {ds_across + l, 1, BQ},
                            x.k_across.from(j / PER), {dq + l * ld, ld, true});
    }
    for (long i = 0; i < q.rows * ld; i += W)
        store(dq + i, load(dq + i) * scale);  // dK has it from Q
    scatter(q, dq, ld, x.dq);
}

template <class Word>
static void backward(const Attention& x, const Heads& dout, const Heads& out, const float* lse,
                     const Heads& dq, const Heads& dk, const Heads& dv, int threads) {
    const long S = x.S, D = x.D, ld = round_up(D, W), size = S * ld;
    const long each = backward_scratch(S, D);
    Scratch scratch(threads * each);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (long task = 0; task < x.B * x.G; ++task) {
        [[maybe_unused]] const typename Word::Unit unit{};
        const long b = task / x.G, g = task % x.G;
        const Matrix k = {at(x.k, b, g, 0), x.k.t}, v = {at(x.v, b, g, 0), x.v.t};
        float *mine = scratch.data + THREAD_INDEX * each, *words = mine + each - 3 * size,
              *sums = words - 2 * size;
        memset(sums, 0, 2 * size * sizeof(float));
        const Matrix keys = along<Word>(k, S, D, words),
                     values = along<Word>(v, S, D, words + size),
                     keys_across = across<Word>(k, S, D, words + 2 * size);
        const Gradients head = {dout, out, lse, keys, values, keys_across, dq, sums, sums + size};
        for (long first = 0; first < x.H / x.G * x.T; first += BQ)
            backward_block<Word>(Queries(x, b, g, first, step<Word>), head, mine);
        for (long s = 0; s < S; ++s) {
            memcpy(at(dk, b, g, s), head.dk + s * ld, D * sizeof(float));
            memcpy(at(dv, b, g, s), head.dv + s * ld, D * sizeof(float));
        }
    }
}
static void attention_backward(const Attention& x, const Heads& dout, const Heads& out,
                               const float* lse, const Heads& dq, const Heads& dk, const Heads& dv,
                               int threads) {
    in_words([&](auto word) { backward<decltype(word)>(x, dout, out, lse, dq, dk, dv, threads); });
}
}  // namespace ISA
