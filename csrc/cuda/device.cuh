// device.cuh - what every kernel file begins with: the machine in five lines, and sums over
// threads.
//
//   grid     blocks that know nothing of each other, in no order        blockIdx, gridDim
//   block    up to 1,024 threads on one processor, with a memory of     threadIdx, blockDim,
//            their own (48 to 99 KB) and a barrier                      __shared__, __syncthreads
//   warp     32 neighbouring threads that read each other's registers   __shfl_xor_sync
//
// Neighbouring threads should touch neighbouring addresses: the memory hands out 32 floats at once.
// All integers that a kernel is given are i64, all floating-point numbers are float. Shape letters
// as in tinylm/kernels/__init__.py; arrays are float32 and C-contiguous unless said otherwise. What
// is summed is summed in an order that the shapes alone decide: no atomics on floats.
//
// All files are compiled as one text (tinylm/kernels/launch.py), by NVRTC, without any header of
// the toolkit; the tests compile the same text with a C++ compiler and run it on fibers.

typedef long long i64;
typedef unsigned short u16;  // the bits of a bfloat16

#ifndef DYNAMIC_SHARED  // the memory of the block, of the size that the launch asks for
#define DYNAMIC_SHARED(name)                         \
    extern __shared__ __align__(16) float name##_[]; \
    float* name = name##_
#endif
#define KERNEL extern "C" __global__ void
#define DEVICE static __device__ __forceinline__

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;
#define INF __int_as_float(0x7f800000)

DEVICE i64 thread_index() { return (i64)blockIdx.x * blockDim.x + threadIdx.x; }
DEVICE float finite(float x) { return x == -INF ? 0 : x; }  // so that no -inf - -inf appears

// ---- sums and maxima over threads; every thread receives the result ----------------------------

struct Sum {
    template <class T>
    static __device__ T join(T a, T b) {
        return a + b;
    }
    static __device__ float nothing() { return 0; }
};
// A NaN does not win a maximum, but the sum that follows always meets it.
struct Max {
    static __device__ float join(float a, float b) { return fmaxf(a, b); }
    static __device__ float nothing() { return -INF; }
};

// Over each group of `width` neighbouring lanes: 16, 8, ... 1 lanes apart, each pair joins.
template <class How, int width = WARP, class T>
DEVICE T over_warp(T x) {
#pragma unroll
    for (int apart = width / 2; apart > 0; apart /= 2)
        x = How::join(x, __shfl_xor_sync(ALL_LANES, x, apart));
    return x;
}

template <class T>
DEVICE T* one_per_warp() {
    __shared__ T memory[WARP];
    return memory;
}

// Over the block, of whole warps: first within each warp, then over the warps' results.
template <class How, class T>
DEVICE T over_block(T x) {
    T* of_warp = one_per_warp<T>();
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    x = over_warp<How>(x);
    __syncthreads();  // an earlier call may still be reading
    if (lane == 0) of_warp[warp] = x;
    __syncthreads();
    return over_warp<How>(lane < blockDim.x / WARP ? of_warp[lane] : (T)How::nothing());
}

// ---- bfloat16: the upper half of a float -------------------------------------------------------

DEVICE u16 to_bfloat16(float x) {  // to the nearest, ties to even
    const unsigned bits = __float_as_uint(x);
    if (x != x) return (bits >> 16) | 0x40;  // a NaN stays one
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
DEVICE float to_float(u16 x) { return __uint_as_float((unsigned)x << 16); }
DEVICE float to_float(float x) { return x; }

// ---- tensor cores: the only lines of assembly, each with a twin that any compiler takes ---------

// Two numbers as bfloat16 in one register, the first in its lower half.
DEVICE unsigned packed(float first, float second) {
#ifdef __CUDA_ARCH__
    unsigned both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
    return both;
#else
    return to_bfloat16(first) | (unsigned)to_bfloat16(second) << 16;
#endif
}

// Two registers of another lane.
DEVICE unsigned long long shown(unsigned low, unsigned high, int lane) {
    return __shfl_sync(ALL_LANES, (unsigned long long)high << 32 | low, lane);
}

// C (16, 8) += A (16, 16) B (16, 8), by the whole warp; A and B in bfloat16, C in float. With
// g = lane / 4 and t = lane % 4 a lane holds
//
//   a[0] A(g, 2t) A(g, 2t + 1)          a[1] the same of row g + 8
//   a[2] A(g, 2t + 8) A(g, 2t + 9)      a[3] the same of row g + 8
//   b[0] B(2t, g) B(2t + 1, g)          b[1] B(2t + 8, g) B(2t + 9, g)
//   c[0] C(g, 2t)   c[1] C(g, 2t + 1)   c[2], c[3] the same of row g + 8
DEVICE void multiply_add(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#ifdef __CUDA_ARCH__
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    for (int u = 0; u < 4; ++u) {  // k = 2u, 2u + 1, 2u + 8, 2u + 9
        const unsigned long long near = shown(a[0], a[1], 4 * g + u),
                                 far = shown(a[2], a[3], 4 * g + u),
                                 even = shown(b[0], b[1], 8 * t + u),
                                 odd = shown(b[0], b[1], 8 * t + 4 + u);
        for (int i = 0; i < 4; ++i) {
            const int row = i / 2 * 32;  // g or g + 8
            const unsigned long long column = i % 2 ? odd : even;
            for (int bits = 0; bits < 32; bits += 16) {
                c[i] += to_float((u16)(near >> row >> bits)) * to_float((u16)(column >> bits));
                c[i] += to_float((u16)(far >> row >> bits)) * to_float((u16)(column >> 32 >> bits));
            }
        }
    }
#endif
}

// ---- what is wrong with numbers from outside ---------------------------------------------------

// Written down in fault, the first one wins, with the number of the check; the host raises the
// error when it next waits for the device.
DEVICE void note(i64* fault, i64 check, i64 value, i64 limit) {
    if (atomicCAS((unsigned long long*)fault, 0ull, (unsigned long long)check) != 0) return;
    fault[1] = value;
    fault[2] = limit;
}

// An index that must lie in [least, limit). With one that does not, the work goes on as if it were
// `least`, so that nothing is read out of bounds.
DEVICE int checked(int index, i64 least, i64 limit, i64* fault, i64 check) {
    if (index >= least && index < limit) return index;
    note(fault, check, index, limit);
    return (int)least;
}
