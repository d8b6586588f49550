// block.h - small matrices that lie in cache, as attention has them: rewritten and multiplied.
#pragma once
#include "word.h"

namespace ISA {
struct Matrix {  // word (i, j) is data[i * ld + j * step]
    const float* data;
    long ld, step = 1;
    const float* row(long i) const { return data + i * ld; }
    Matrix from(long i) const { return {row(i), ld, step}; }
};
struct Target {  // what a product writes, or adds to
    float* data;
    long ld;
    bool add = false;
    float* row(long i) const { return data + i * ld; }
    Target from(long i) const { return {row(i), ld, add}; }
};

// ---- words along the rows of a matrix, or across them ------------------------------------------
// x (rows, n) where a word is a float, or else rewritten into `copy`, which for `across` may be x.

template <class Word>
static Matrix along(Matrix x, long rows, long n, float* copy) {
    if (Word::PER_WORD == 1) return x;
    const long ld = round_up(up(n, Word::PER_WORD), W);
    for (long r = 0; r < rows; ++r)
        for (long w = 0; w < ld; w += W) {
            const long d = w * Word::PER_WORD;
            load_along<Word>(x.row(r) + d, n - d,
                             [&](int, vf words) { store(copy + r * ld + w, words); });
        }
    return {copy, ld};
}

template <class Word>
static Matrix across(Matrix x, long rows, long n, float* copy) {
    if (Word::PER_WORD == 1 && n % W == 0) return x;
    const long ld = round_up(n, W);
    for (long r = 0; r < rows; r += Word::PER_WORD)
        for (long d = 0; d < ld; d += W)
            load_across<Word>(x.row(r) + d, x.ld, n - d, rows - r, [&](int, vf words) {
                store(copy + r / Word::PER_WORD * ld + d, words);
            });
    return {copy, ld};
}

// dst (words of n, ld) = the transpose of x (rows, n), whose rows are padded with zeros.
template <class Word>
static void transpose_rows(Matrix x, long rows, long n, float* dst, long ld, float* copy) {
    const Matrix words = along<Word>(x, rows, n, copy);
    for (long r = 0; r < rows; r += W)
        for (long w = 0; w < up(n, Word::PER_WORD); w += W) {
            vf v[W];
            UNROLL for (int i = 0; i < W; ++i) v[i] = load(words.row(r + i) + w);
            transpose(v);
            UNROLL for (int i = 0; i < W; ++i) store(dst + (w + i) * ld + r, v[i]);
        }
}

// ---- products: C (m, n) = A (m, depth) B (depth, n), or C += A B -------------------------------
// A tile of C stays in registers for the whole depth, which counts words; nothing is packed.

#if REGISTERS == 32
constexpr int TILE_VECTORS = 4, TILE_ROWS[] = {0, 16, 8, 8, 6};  // by vectors
#else
constexpr int TILE_VECTORS = 2, TILE_ROWS[] = {0, 8, 6};
#endif

template <class Word, int R, int V>
INLINE void block_tile(long depth, Matrix a, Matrix b, Target c) {
    vf sums[R][V];
    UNROLL for (int i = 0; i < R; ++i) UNROLL for (int j = 0; j < V; ++j) sums[i][j] =
        c.add ? load(c.row(i) + j * W) : vf{};
    for (; depth > 0; --depth, a.data += a.step, b.data += b.ld) {
        vf bk[V];
        UNROLL for (int j = 0; j < V; ++j) bk[j] = load(b.data + j * W);
        UNROLL for (int i = 0; i < R; ++i) {
            const vf ai = Word::broadcast(a.row(i));
            UNROLL for (int j = 0; j < V; ++j) sums[i][j] = Word::dot(sums[i][j], ai, bk[j]);
        }
    }
    UNROLL for (int i = 0; i < R; ++i) UNROLL for (int j = 0; j < V; ++j)
        store(c.row(i) + j * W, sums[i][j]);
}

template <class Word, int V>
static void block_columns(long m, long depth, Matrix a, Matrix b, Target c) {
    constexpr int ROWS = TILE_ROWS[V];
    long i = 0;
    for (; i + ROWS <= m; i += ROWS) block_tile<Word, ROWS, V>(depth, a.from(i), b, c.from(i));
    for (; i + 4 <= m; i += 4) block_tile<Word, 4, V>(depth, a.from(i), b, c.from(i));
    for (; i < m; ++i) block_tile<Word, 1, V>(depth, a.from(i), b, c.from(i));
}

// n is a multiple of W, and B's step is 1.
template <class Word, int V = TILE_VECTORS>
static void block_product(long m, long n, long depth, Matrix a, Matrix b, Target c) {
    for (; n >= V * W; n -= V * W, b.data += V * W, c.data += V * W)
        block_columns<Word, V>(m, depth, a, b, c);
    if constexpr (V > 1)
        if (n > 0) block_product<Word, V - 1>(m, n, depth, a, b, c);
}

#if defined(__AMX_BF16__)
// The same on tiles. What does not fill them is copied first: a transposed A, a last row or group.
constexpr long STRIP = 2 * W, DEEPEST = 8 * Tiles::GROUP;

// dst (STRIP, DEEPEST) = the rows and the depth of A that are there, and zeros
static void fill_tiles(Matrix a, long rows, long depth, float* dst) {
    for (long i = 0; i < rows; i += W)
        for (long w = 0; w < depth; w += W) {
            vf v[W];
            if (a.step == 1) {
                for (long r = 0; r < W; ++r)
                    v[r] = load_n(a.row(i + r) + w, i + r < rows ? depth - w : 0);
            } else {
                for (long r = 0; r < W; ++r)
                    v[r] = load_n(a.row(i) + (w + r) * a.step, w + r < depth ? rows - i : 0);
                transpose(v);
            }
            for (long r = 0; r < W; ++r) store(dst + (i + r) * DEEPEST + w, v[r]);
        }
}

template <>
void block_product<Tiles>(long m, long n, long depth, Matrix a, Matrix b, Target c) {
    constexpr long GROUP = Tiles::GROUP;
    if (depth > DEEPEST) {
        block_product<Tiles>(m, n, DEEPEST, a, b, c);
        a.data += DEEPEST * a.step, c.add = true;
        return block_product<Tiles>(m, n, depth - DEEPEST, a, b.from(DEEPEST), c);
    }
    const long whole = depth / GROUP * GROUP, rest = depth - whole;
    alignas(64) float strip[STRIP * DEEPEST], last[GROUP * STRIP] = {}, sums[STRIP * STRIP];
    for (long i = 0; i < m; i += STRIP) {
        const long rows = min(STRIP, m - i);
        const bool fills = rows % W == 0, copied = a.step != 1 || !fills || rest > 0;
        if (copied) fill_tiles(a.from(i), rows, depth, strip);
        const float* left = copied ? strip : a.row(i);
        const long lda = copied ? DEEPEST : a.ld;
        for (long j = 0; j < n; j += STRIP) {
            const long columns = min(STRIP, n - j);
            float* to = fills ? c.row(i) + j : sums;
            const long ld = fills ? c.ld : STRIP;
            if (!fills && c.add) copy_rows(c.row(i) + j, c.ld, rows, columns, sums, STRIP);
            multiply_tiles_for<Tiles>(rows, columns,
                                      {whole, left, lda, GROUP, b.data + j, b.ld, to, ld,
                                       c.add ? to : ZEROS, c.add ? ld : 0});
            if (rest > 0) {
                copy_rows(b.row(whole) + j, b.ld, rest, columns, last, STRIP);
                multiply_tiles_for<Tiles>(
                    rows, columns, {rest, left + whole, lda, GROUP, last, STRIP, to, ld, to, ld});
            }
            if (!fills) copy_rows(sums, STRIP, rows, columns, c.row(i) + j, c.ld);
        }
    }
}
#endif
}  // namespace ISA
