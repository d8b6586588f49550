// amx.h - bfloat16 on a unit that multiplies whole matrices: AMX, in Xeons since 2023.
//
//         16 words              16 columns           16 columns
//         ┌───────┐             ┌───────┐            ┌───────┐
//      16 │   A   │    x     16 │   B   │     ->  16 │   C   │      8,192 multiply-adds at once,
//    rows └───────┘       words └───────┘       rows └───────┘      where two vectors do 32
//
// A core has eight such registers, tiles: four hold 32 x 32 sums, two A and two B. A is in words
// along its rows and B in words across them, as in all products here (word.h); depth comes in
// groups of 16 words, the last of them filled up with zeros.
//
// The operating system lets a process have tiles if it asks (isa.cpp). What they hold is declared
// by each thread, while it multiplies.
#pragma once
#include "word.h"

namespace ISA {
// GCC is not told what these instructions read: what is stored before this is in memory by then.
INLINE void finish_stores(const void* p) { asm volatile("" ::"r"(p) : "memory"); }

struct Tiles : BFloat16 {
    static constexpr int GROUP = 16;
    struct Unit {  // while it lives, this thread has tiles of 16 rows of 64 bytes
        Unit() {
            struct alignas(64) {
                uint8_t palette = 1, reserved[15] = {};
                uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
                uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
            } layout;
            finish_stores(&layout);
            _tile_loadconfig(&layout);
        }
        ~Unit() { _tile_release(); }
    };
};

// float32 on the same unit. A number is the sum of three in bfloat16: itself rounded, what that
// left over rounded, and the rest, which is all of its 24 bits. Of the nine products of such sums
// six count; the others are below 2^-24 of the whole. Their sum is made in fewer roundings than a
// chain of multiply-adds: its error is 0.4 to 0.8 of that (Henry, Tang and Heinecke, arXiv
// 1904.06376). Infinity becomes NaN, and numbers below 1e-33 lose bits, which become denormal.
struct Thirds : Tiles {
    static constexpr int PARTS = 3;
    INLINE vf take(int part, vf& x) {  // the last one is exact, and a NaN of any bits stays one
        const vf taken = (vf)(((vi)x + (part < PARTS - 1 ? 0x8000 : 0)) & -0x10000);
        x -= taken;
        return taken;
    }
    INLINE vf along(vf (&x)[2], int part) {
        const vf taken[2] = {take(part, x[0]), take(part, x[1])};
        return BFloat16::along(taken);
    }
    INLINE vf across(vf (&x)[2], int part) {
        typedef uint32_t vu __attribute__((vector_size(LANES * 4)));
        const vu low = (vu)take(part, x[0]), high = (vu)take(part, x[1]);
        return (vf)(low >> 16 | high);
    }
};

struct TileProduct {  // C = from + A B, at most 32 x 32
    long words;
    const float* a;
    long lda, a_group;  // floats to the next row, and to a group's next part or the next group
    const float* b;
    long ldb;
    float* c;
    long ldc;
    const float* from;  // may be C
    long ld_from;
    Fetch next = {from};
};

template <class Word, int R, int V>  // C is (16 R, 16 V)
static void multiply_tiles(TileProduct p) {
    constexpr long BYTES = sizeof(float), GROUP = Word::GROUP, PARTS = Word::PARTS;
    const long b_group = GROUP * p.ldb;
    finish_stores(p.a);
    _tile_loadd(0, p.from, p.ld_from * BYTES);
    if constexpr (V > 1) _tile_loadd(1, p.from + W, p.ld_from * BYTES);
    if constexpr (R > 1) _tile_loadd(2, p.from + W * p.ld_from, p.ld_from * BYTES);
    if constexpr (R > 1 && V > 1) _tile_loadd(3, p.from + W * p.ld_from + W, p.ld_from * BYTES);
    const auto load_a = [&](int part) {
        const float* a = p.a + part * p.a_group;
        _tile_loadd(4, a, p.lda * BYTES);
        if constexpr (R > 1) _tile_loadd(5, a + W * p.lda, p.lda * BYTES);
    };
    const auto load_b = [&](int part) {
        const float* b = p.b + part * b_group;
        _tile_loadd(6, b, p.ldb * BYTES);
        if constexpr (V > 1) _tile_loadd(7, b + W, p.ldb * BYTES);
    };
    // Meanwhile, of three parts, a share of the next group and a line of what comes later.
    const auto fetch = [&](int turn) {
        if (PARTS == 1) return;
        UNROLL for (int i = 0; i < 4; ++i) {
            const long line = (4 * turn + i) * LINE;
            __builtin_prefetch(p.a + PARTS * p.a_group + line);
            __builtin_prefetch(p.b + PARTS * b_group + line);
        }
        Fetch::step<2>(p.next);
    };
    const auto multiply = [&](int turn) {
        _tile_dpbf16ps(0, 4, 6);
        fetch(4 * turn);
        if constexpr (V > 1) _tile_dpbf16ps(1, 4, 7);
        fetch(4 * turn + 1);
        if constexpr (R > 1) _tile_dpbf16ps(2, 5, 6);
        fetch(4 * turn + 2);
        if constexpr (R > 1 && V > 1) _tile_dpbf16ps(3, 5, 7);
        fetch(4 * turn + 3);
    };
    const long rows = up(R * W * GROUP, max(p.words, 1));  // of C, asked for with each group
    for (long w = 0, row = 0; w < p.words; w += GROUP) {
        for (const long end = min(R * W, row + rows); row < end; ++row)
            UNROLL for (int j = 0; j < V; ++j) __builtin_prefetch(p.c + row * p.ldc + j * W, 1);
        load_b(PARTS - 1), load_a(0), multiply(0);
        if constexpr (PARTS == 3) {
            load_b(1), multiply(1);
            load_a(1), multiply(2);
            load_b(0), multiply(3);
            load_a(2), multiply(4);
            load_a(0), multiply(5);
        }
        p.a += PARTS * p.a_group, p.b += PARTS * b_group;
    }
    _tile_stored(0, p.c, p.ldc * BYTES);
    if constexpr (V > 1) _tile_stored(1, p.c + W, p.ldc * BYTES);
    if constexpr (R > 1) _tile_stored(2, p.c + W * p.ldc, p.ldc * BYTES);
    if constexpr (R > 1 && V > 1) _tile_stored(3, p.c + W * p.ldc + W, p.ldc * BYTES);
}

// Only the tiles that `rows` and `columns` of 32 need.
template <class Word>
INLINE void multiply_tiles_for(long rows, long columns, const TileProduct& p) {
    if (rows > W)
        (columns > W ? multiply_tiles<Word, 2, 2> : multiply_tiles<Word, 2, 1>)(p);
    else
        (columns > W ? multiply_tiles<Word, 1, 2> : multiply_tiles<Word, 1, 1>)(p);
}

constexpr float ZEROS[2 * W] = {};  // as rows that are 0 floats apart

// What does not fill tiles is copied to where it does.
static void copy_rows(const float* src, long ld_src, long rows, long n, float* dst, long ld_dst) {
    for (long i = 0; i < rows; ++i) memcpy(dst + i * ld_dst, src + i * ld_src, n * sizeof(float));
}
}  // namespace ISA
