// word.h - what products multiply: words of 32 bits, W to a vector, summed in float32.
//
// A word is one float32, or two neighbours in bfloat16: a vector of words times a vector of words
// is then twice the multiply-adds. The neighbours are those over which a product sums: they lie
// along a row of a matrix, or across its rows. Rounding happens here and nowhere else. Products
// take GROUP words of depth at once: one, or 16 on the unit of amx.h, where a word can also have
// three PARTS, whose sum is two neighbours in float32.
#pragma once
#include "simd.h"

namespace ISA {
struct Float32 {
    static constexpr int PER_WORD = 1, GROUP = 1, PARTS = 1;
    struct Unit {};
    INLINE vf broadcast(const float* word) { return splat(*word); }
    INLINE vf dot(vf sum, vf a, vf b) { return sum + a * b; }  // -ffp-contract: one fused operation
    INLINE vf along(const vf (&x)[1], int = 0) { return x[0]; }
    INLINE vf across(const vf (&x)[1], int = 0) { return x[0]; }
};

#if defined(__AVX512BF16__)
struct BFloat16 {
    static constexpr int PER_WORD = 2, GROUP = 1, PARTS = 1;
    struct Unit {};
    typedef int Bits __attribute__((may_alias));
    INLINE vf broadcast(const float* word) { return (vf)_mm512_set1_epi32(*(const Bits*)word); }
    INLINE vf dot(vf sum, vf a, vf b) {
        return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
    }
    INLINE vf along(const vf (&x)[2], int = 0) {  // 2 W floats of a row
        return (vf)_mm512_cvtne2ps_pbh((__m512)x[1], (__m512)x[0]);
    }
    INLINE vf across(const vf (&x)[2], int = 0) {  // W floats of a row, and those below them
        return (vf)(widened(x[0]) | widened(x[1]) << 16);
    }
    INLINE vi
    widened(vf x) {  // rounded, in the lower half of each lane (plain forms warn in GCC 12)
        return (vi)_mm512_maskz_cvtepu16_epi32(
            0xFFFF, (__m256i)_mm512_maskz_cvtneps_pbh(0xFFFF, (__m512)x));
    }
};
#endif

// What a depth takes: whole groups, of which what is beyond the depth is zero.
template <class Word>
INLINE long words_of(long depth) {
    return round_up(up(depth, Word::PER_WORD), Word::GROUP);
}

// Up to W words of the first n floats of a row, or of as many rows (of `depth` that are left), for
// to(part, words).
template <class Word, class To>
INLINE void load_along(const float* p, long n, To to) {
    vf x[Word::PER_WORD];
    UNROLL for (int i = 0; i < Word::PER_WORD; ++i) x[i] = load_n(p + i * W, n - i * W);
    UNROLL for (int part = 0; part < Word::PARTS; ++part) to(part, Word::along(x, part));
}
template <class Word, class To>
INLINE void load_across(const float* p, long ld, long n, long depth, To to) {
    vf x[Word::PER_WORD];
    UNROLL for (int i = 0; i < Word::PER_WORD; ++i) x[i] = i < depth ? load_n(p + i * ld, n) : vf{};
    UNROLL for (int part = 0; part < Word::PARTS; ++part) to(part, Word::across(x, part));
}

}  // namespace ISA
#if defined(__AMX_BF16__)
#include "amx.h"
#endif

namespace ISA {
// f(Float32{}), or one in bfloat16: what the user asked for.
template <class F>
INLINE auto in_words(F f) {
#if defined(__AMX_BF16__)
    if (bfloat16_products) return f(Tiles{});
#elif defined(__AVX512BF16__)
    if (bfloat16_products) return f(BFloat16{});
#endif
    return f(Float32{});
}
}  // namespace ISA
