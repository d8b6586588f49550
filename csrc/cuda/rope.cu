// rope.cu - rotary position embedding: the pair (x[d], x[d + D/2]) turns by its position's angle.
//
// One thread per pair. x is (B, H, T, D) with any strides but the last; the result lies in memory
// as (B, T, H, D), the order in which x was made by a linear layer, so that threads run along it.
#include "device.cuh"

// direction +1 turns forward, -1 back
KERNEL rope(const float* x, i64 stride_b, i64 stride_h, i64 stride_t, const float* cos,
            const float* sin, const int* positions, i64 P, float direction, float* y, i64 pairs,
            i64 H, i64 T, i64 half, i64* fault, i64 check) {
    const i64 i = thread_index();
    if (i >= pairs) return;
    const i64 d = i % half, h = i / half % H, token = i / half / H, b = token / T, t = token % T;
    const i64 at = checked(positions[token], 0, P, fault, check) * half + d;
    x += b * stride_b + h * stride_h + t * stride_t;
    y += (token * H + h) * 2 * half;
    const float left = x[d], right = x[d + half], c = cos[at], s = direction * sin[at];
    y[d] = left * c - right * s;
    y[d + half] = right * c + left * s;
}
