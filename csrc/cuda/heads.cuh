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
struct Least {
    static __device__ int join(int a, int b) { return smaller(a, b); }
};
struct Greatest {
    static __device__ int join(int a, int b) { return larger(a, b); }
};
DEVICE Window window(const Sight& sight, int b, int T, int first, int size) {  // by whole warps
    const int lane = threadIdx.x % WARP, most = 0x7fffffff;
    const i64 begin = (i64)b * T + first, end = (i64)b * T + smaller(first + size, T);
    Window w = {0, 0, 0};
    if (sight.start) {
        int from = most;
        for (i64 t = begin + lane; t < end; t += WARP) from = smaller(from, sight.start[t]);
        w.from = larger(over_warp<Least>(from), 0);
    }
    if (sight.gap) {
        int low = -most, high = most;
        for (i64 t = begin + lane; t < end; t += WARP)
            low = larger(low, sight.gap[2 * t]), high = smaller(high, sight.gap[2 * t + 1]);
        w.gap_from = over_warp<Greatest>(low), w.gap_to = over_warp<Least>(high);
    }
    return w;
}

DEVICE bool visible(const Shape& s, const Sight& sight, int b, int t, int key) {
    const i64 at = (i64)b * s.T + t;
    return t < s.T && key <= s.limit(t) && key < s.S && (!sight.start || key >= sight.start[at]) &&
           (!sight.gap || key < sight.gap[2 * at] || key >= sight.gap[2 * at + 1]);
}
