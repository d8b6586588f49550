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
// The operating system lets a process have tiles if it asks (runtime.h). What they hold is declared
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

// C (16 R, 16 V) = A B, or C += A B. Rows are lda, ldb and ldc floats apart; the next group of A
// begins a_group floats after the last one.
template <int R, int V>
static void multiply_tiles(long words, const float* a, long lda, long a_group, const float* b,
                           long ldb, float* c, long ldc, bool add) {
    constexpr long BYTES = sizeof(float);
    finish_stores(a);
    if (add) {
        _tile_loadd(0, c, ldc * BYTES);
        if constexpr (V > 1) _tile_loadd(1, c + W, ldc * BYTES);
        if constexpr (R > 1) _tile_loadd(2, c + W * ldc, ldc * BYTES);
        if constexpr (R > 1 && V > 1) _tile_loadd(3, c + W * ldc + W, ldc * BYTES);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (long w = 0; w < words; w += Tiles::GROUP, a += a_group, b += Tiles::GROUP * ldb) {
        _tile_loadd(6, b, ldb * BYTES);
        _tile_loadd(4, a, lda * BYTES);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (V > 1) {
            _tile_loadd(7, b + W, ldb * BYTES);
            _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (R > 1) {
            _tile_loadd(5, a + W * lda, lda * BYTES);
            _tile_dpbf16ps(2, 5, 6);
        }
        if constexpr (R > 1 && V > 1) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, ldc * BYTES);
    if constexpr (V > 1) _tile_stored(1, c + W, ldc * BYTES);
    if constexpr (R > 1) _tile_stored(2, c + W * ldc, ldc * BYTES);
    if constexpr (R > 1 && V > 1) _tile_stored(3, c + W * ldc + W, ldc * BYTES);
}

// Of 32 x 32 sums, the tiles that `rows` and `columns` need.
template <class... Args>
INLINE void multiply_tiles_for(long rows, long columns, Args... args) {
    if (rows > W)
        (columns > W ? multiply_tiles<2, 2> : multiply_tiles<2, 1>)(args...);
    else
        (columns > W ? multiply_tiles<1, 2> : multiply_tiles<1, 1>)(args...);
}
}  // namespace ISA
