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

// The first key that any of the queries first .. first + size sees; start may be null.
DEVICE int first_key(const int* start, int b, int T, int first, int size) {
    if (!start) return 0;
    int key = start[b * T + first];
    for (int t = first + 1; t < smaller(first + size, T); ++t) key = smaller(key, start[b * T + t]);
    return larger(key, 0);
}

DEVICE bool visible(const Shape& s, const int* start, int b, int t, int key) {
    return t < s.T && key <= s.limit(t) && key < s.S && (!start || key >= start[b * s.T + t]);
}
