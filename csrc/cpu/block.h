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

#if LANES == 16
constexpr int TILE_ROWS = 6, TILE_VECTORS = 4;
#else
constexpr int TILE_ROWS = 4, TILE_VECTORS = 2;
#endif

template <class Word, int R, int V>
static void block_tile(long depth, Matrix a, Matrix b, Target c) {
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
    long i = 0;
    for (; i + TILE_ROWS <= m; i += TILE_ROWS)
        block_tile<Word, TILE_ROWS, V>(depth, a.from(i), b, c.from(i));
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
}  // namespace ISA
