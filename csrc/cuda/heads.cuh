// heads.cuh - what both attention kernels share: where the numbers lie, and who sees whom.
#include "device.cuh"

// (B, heads, tokens, D) of which only D is contiguous
struct Heads {
    const float* data;
    i64 b, h, t;  // strides, in floats
    __device__ const float* at(i64 i, i64 j, i64 k) const { return data + i * b + j * h + k * t; }
};
#define HEADS(x) const float *x, i64 x##_b, i64 x##_h, i64 x##_t
#define AS_HEADS(x) {x, x##_b, x##_h, x##_t}

struct Shape {
    int H, G, T, S, D;  // only offsets into memory need 64 bits
    __device__ int limit(int t) const { return t + S - T; }  // the last key that query t sees
};
#define SHAPE i64 H, i64 G, i64 T, i64 S, i64 D
#define AS_SHAPE {(int)H, (int)G, (int)T, (int)S, (int)D}

DEVICE int larger(int a, int b) { return a > b ? a : b; }
DEVICE int smaller(int a, int b) { return a < b ? a : b; }

// Query t sees the keys from start[b, t] to its limit, without gap[b, t, 0] .. gap[b, t, 1] - 1.
struct Sight {
    const int *start, *gap;  // (B, T), (B, T, 2); either may be null
};
#define SIGHT const int *start, const int *gap
#define AS_SIGHT {start, gap}

struct Window {  // of a tile of queries: what none of them sees is before `from`, or in the gap
    int from, gap_from, gap_to;
    __device__ bool misses(int key, int size) const {
        return key + size <= from || (gap_from <= key && key + size <= gap_to);
    }
};
DEVICE Window window(const Sight& sight, int b, int T, int first, int size) {
    const i64 begin = (i64)b * T + first, end = (i64)b * T + smaller(first + size, T);
    Window w = {0, 0, 0};
    if (sight.start) {
        w.from = sight.start[begin];
        for (i64 t = begin + 1; t < end; ++t) w.from = smaller(w.from, sight.start[t]);
        w.from = larger(w.from, 0);
    }
    if (sight.gap) {
        w.gap_from = sight.gap[2 * begin], w.gap_to = sight.gap[2 * begin + 1];
        for (i64 t = begin + 1; t < end; ++t)
            w.gap_from = larger(w.gap_from, sight.gap[2 * t]),
            w.gap_to = smaller(w.gap_to, sight.gap[2 * t + 1]);
    }
    return w;
}

DEVICE bool visible(const Shape& s, const Sight& sight, int b, int t, int key) {
    const i64 at = (i64)b * s.T + t;
    return t < s.T && key <= s.limit(t) && key < s.S && (!sight.start || key >= sight.start[at]) &&
           (!sight.gap || key < sight.gap[2 * at] || key >= sight.gap[2 * at + 1]);
}
