// micro_kernel.h - the innermost part of matmul.cpp: a tile of C, MR rows by NR columns, summed in
// registers over a block of depth, and how operands are packed for that.
#pragma once
#include "word.h"

namespace ISA {
#if LANES == 16
constexpr int MR = 14, NV = 2;  // 28 sums + 2 of B + 1 broadcast = 31 of 32 registers
#elif LANES == 8
constexpr int MR = 6, NV = 2;  // 12 + 2 + 1 = 15 of 16
#else
constexpr int MR = 4, NV = REGISTERS == 32 ? 4 : 2;  // 16 + 4 + 1 = 21 of 32, or 8 + 2 + 1
#endif
constexpr int NR = NV * W;
constexpr bool WIDE = LANES == 16;  // or else operands are always packed, and tiles ask for nothing
constexpr long AHEAD = 8;           // words of depth by which what caches lack is asked for
static_assert(MR <= W, "pack() writes a panel of A as one vector per word");

// ---- packing: `count` rows of op(A), or columns of op(B), and `depth` values of k --------------
// Panels are P wide and word-major: word w of row r of a panel lies at w * P + r. Stores are W wide
// even where P is not: the next word overwrites the surplus, and the gap after a panel takes the
// last. Of words in parts, a group has all first parts, then all second ones, then all third ones.

template <class Word>
INLINE long panel_size(int P, long words) {
    return round_up(P * words * Word::PARTS + W, 16);
}
template <class Word>
INLINE long place(long word, int part) {  // of a word's part in its panel, counted in words
    constexpr long GROUP = Word::GROUP;
    return (word / GROUP * Word::PARTS + part) * GROUP + word % GROUP;
}

// Up to W rows and W words of each. Constant indices alone keep r in registers: 0.30 cycles a float
// instead of 0.55 (Zen 5).
template <class Word, int ROWS, int P, bool WHOLE>
INLINE void pack_square(const float* src, long ld, long rows, long depth, long words, float* dst) {
    constexpr int PARTS = Word::PARTS;
    constexpr long K = Word::PER_WORD;
    const long n = WHOLE ? W * K : depth;
    vf r[PARTS][W] = {};
    UNROLL for (int i = 0; i < ROWS; ++i) load_along<Word>(src + i * ld, WHOLE || i < rows ? n : 0,
                                                           [&](int part, vf v) { r[part][i] = v; });
    UNROLL for (int part = 0; part < PARTS; ++part) {
        transpose(r[part]);
        float* d = dst + place<Word>(0, part) * P;
        UNROLL for (int i = 0; i < W; ++i) if (WHOLE || i < words) store(d + i * P, r[part][i]);
    }
}

template <class Word, int P>
static void pack_along_k(const float* src, long ld, long count, long depth, float* dst) {
    constexpr long K = Word::PER_WORD, ROWS = P < W ? P : W;
    const long words = words_of<Word>(depth), stride = panel_size<Word>(P, words);
    for (long row = 0; row < count; row += P, dst += stride)
        for (long w = 0; w < words; w += W)
            for (long g = 0; g < P; g += W) {
                const float* s = src + (row + g) * ld + w * K;
                float* d = dst + place<Word>(w, 0) * P + g;
                const long rows = count - row - g, left = depth - w * K;
                if (rows >= ROWS && left >= W * K)
                    pack_square<Word, ROWS, P, true>(s, ld, rows, left, words - w, d);
                else
                    pack_square<Word, ROWS, P, false>(s, ld, rows, left, words - w, d);
            }
}

// The words `first` and following of panels that have `words` of them; where P is no multiple of W
// these must be all of them.
template <class Word, int P>
static void pack_across_k(const float* src, long ld, long count, long depth, float* dst, long first,
                          long words) {
    constexpr long K = Word::PER_WORD;
    const long stride = panel_size<Word>(P, words), end = first + words_of<Word>(depth);
    for (long w = first; w < end; ++w, src += K * ld, depth -= K) {
        if (!WIDE)
            for (long i = 0; i < count; i += LINE) __builtin_prefetch(src + AHEAD * K * ld + i);
        for (long row = 0, panel = 0; row < count; row += P, ++panel) {
            UNROLL for (long g = 0; g < P; g += W)
                load_across<Word>(src + row + g, ld, count - row - g, depth, [&](int part, vf x) {
                    store(dst + panel * stride + place<Word>(w, part) * P + g, x);
                });
        }
    }
}

// ---- the micro-kernel: R rows and V vectors of C -----------------------------------------------

struct Walk {  // word k of row i of A is a[i * row + k * step]; word k of B begins at b + k * ldb
    long words, row, step, ldb, ldc;
    bool add;  // to what C holds
};

// Whether operands are packed always, so that the compiler knows how they lie.
template <class Word>
constexpr bool PACKED = Word::PER_WORD > 1 || !WIDE;

template <class Word, int R, int V, bool FETCH>
static void tile(const Walk& walk, const float* a, const float* b, float* c, long columns,
                 const float* bias, const Fetch* share) {
    const long words = walk.words, row = PACKED<Word> ? 1 : walk.row, ldc = walk.ldc;
    const long step = PACKED<Word> ? MR : walk.step, ldb = PACKED<Word> ? NR : walk.ldb;
    Fetch next = FETCH ? *share : Fetch{b};
    if (words >= 256) {  // in time for the end; shorter sums do not gain
        UNROLL for (int i = 0; i < R; ++i) UNROLL for (int j = 0; j < V; ++j)
            __builtin_prefetch(c + i * ldc + j * W, 1);
    }
    vf sums[R][V] = {};
    for (long k = 0; k < words; ++k, a += step, b += ldb) {
        if (FETCH) Fetch::step<1>(next);
        vf bk[V];
        if (WIDE) UNROLL for (int j = 0; j < V; ++j) __builtin_prefetch(b + AHEAD * ldb + j * W);
        UNROLL for (int j = 0; j < V; ++j) bk[j] = load(b + j * W);
        UNROLL for (int i = 0; i < R; ++i) {
            const vf ai = Word::broadcast(a + i * row);
            UNROLL for (int j = 0; j < V; ++j) sums[i][j] = Word::dot(sums[i][j], ai, bk[j]);
        }
    }
    vf base[V];
    UNROLL for (int j = 0; j < V; ++j) base[j] =
        bias ? load_n(bias + j * W, columns - j * W) : vf{};
    if (columns >= V * W && !walk.add) {  // the common case without a branch: 3 % of a product
        UNROLL for (int i = 0; i < R; ++i) UNROLL for (int j = 0; j < V; ++j)
            store(c + i * ldc + j * W, sums[i][j] + base[j]);
        return;
    }
    UNROLL for (int i = 0; i < R; ++i) UNROLL for (int j = 0; j < V; ++j) {
        float* p = c + i * ldc + j * W;
        const vf before = walk.add ? load_n(p, columns - j * W) : base[j];
        store_n(p, sums[i][j] + before, columns - j * W);
    }
}

template <class Word, int R = MR, class... Args>
INLINE void tile_of(long rows, long columns, const Fetch* share, Args... args) {  // rows <= MR
    if constexpr (R > 0) {
        if (rows != R) return tile_of<Word, R - 1>(rows, columns, share, args...);
        if (WIDE && share)
            (columns > W ? tile<Word, R, NV, true> : tile<Word, R, 1, true>)(args..., share);
        else
            (columns > W ? tile<Word, R, NV, false> : tile<Word, R, 1, false>)(args..., share);
    }
}

// How operands are packed and multiplied: by vectors.
template <class Word>
struct MicroKernel {
    static constexpr long ROWS = MR;  // to a panel of A
    static constexpr bool TILES = false;

    static void pack_along(const float* a, long ld, long count, long depth, float* dst) {
        pack_along_k<Word, MR>(a, ld, count, depth, dst);
    }
    static void pack_across(const float* a, long ld, long count, long depth, float* dst) {
        pack_across_k<Word, MR>(a, ld, count, depth, dst, 0, words_of<Word>(depth));
    }
    INLINE void multiply(long rows, const Walk& walk, const float* a, const float* b, float* c,
                         long columns, const float* bias, const Fetch* share) {
        tile_of<Word>(rows, columns, share, walk, a, b, c, columns, bias);
    }
};

#if defined(__AMX_BF16__)
// By tiles. A panel of A has, for each group of words, its rows one after another.
template <class Word>
struct TileKernel {
    static constexpr long ROWS = 2 * W, GROUP = Word::GROUP, PARTS = Word::PARTS;
    static constexpr bool TILES = true;
    static_assert(NR == 2 * W && GROUP == W);

    static void pack_along(const float* a, long ld, long count, long depth, float* dst) {
        const long words = words_of<Word>(depth), stride = panel_size<Word>(ROWS, words);
        for (long row = 0; row < count; row += ROWS, dst += stride)
            for (long w = 0; w < words; w += GROUP)
                for (long i = 0; i < ROWS; ++i) {
                    const long left = row + i < count ? depth - 2 * w : 0;
                    load_along<Word>(a + (row + i) * ld + 2 * w, left, [&](int part, vf words) {
                        store(dst + place<Word>(w, part) * ROWS + i * W, words);
                    });
                }
    }
    static void pack_across(const float* a, long ld, long count, long depth, float* dst) {
        const long words = words_of<Word>(depth), stride = panel_size<Word>(ROWS, words);
        for (long row = 0; row < count; row += ROWS, dst += stride)
            for (long w = 0; w < words; w += GROUP)
                for (long g = 0; g < ROWS; g += W) {
                    const float* from = a + 2 * w * ld + row + g;
                    vf r[PARTS][W];
                    UNROLL for (int i = 0; i < W; ++i) load_across<Word>(
                        from + 2 * i * ld, ld, count - row - g, depth - 2 * (w + i),
                        [&](int part, vf words) { r[part][i] = words; });
                    for (int part = 0; part < PARTS; ++part) {
                        transpose(r[part]);
                        float* d = dst + place<Word>(w, part) * ROWS + g * W;
                        UNROLL for (int i = 0; i < W; ++i) store(d + i * W, r[part][i]);
                    }
                }
    }
    static void multiply(long rows, const Walk& walk, const float* a, const float* b, float* c,
                         long columns, const float* bias, const Fetch* share) {
        const long words = walk.words, ldc = walk.ldc;
        const bool add = walk.add;
        const Fetch next = share ? *share : Fetch{b};
        if (rows % W == 0 && columns % W == 0) {
            const float* from = add ? c : bias ? bias : ZEROS;
            multiply_tiles_for<Word>(
                rows, columns, {words, a, W, ROWS * W, b, NR, c, ldc, from, add ? ldc : 0, next});
            return;
        }
        float sums[ROWS * NR] = {};
        if (add || bias) copy_rows(add ? c : bias, add ? ldc : 0, rows, columns, sums, NR);
        multiply_tiles_for<Word>(rows, columns,
                                 {words, a, W, ROWS * W, b, NR, sums, NR, sums, NR, next});
        copy_rows(sums, NR, rows, columns, c, ldc);
    }
};
template <>
struct MicroKernel<Tiles> : TileKernel<Tiles> {};
template <>
struct MicroKernel<Thirds> : TileKernel<Thirds> {};
#endif
}  // namespace ISA
