// matmul.cu - matrix products to study. On a device cuBLAS multiplies; where there is none, as in
// the tests, this does, through the same call.
//
//               N                   One block computes a TILE x TILE piece of C. It walks along K
//            ┌──────┐               in steps of DEPTH: its threads bring a piece of A and a piece
//          K │  B ▒ │               of B into shared memory, wait for each other, and then each
//            └──────┘               multiplies its own 4 x 4 numbers out of it, in registers. So
//      K                            a number of A is read from memory N / TILE times, not N.
//   ┌──────┐ ┌──────┐
// M │  A   │ │  C   │               A thread's 4 x 4 lie 16 apart: at every step the threads of a
//   │ ▒▒▒▒ │ │    ▒ │               warp read neighbouring floats of B, and the same few of A.
//   └──────┘ └──────┘
//
// Operands are float, or bfloat16 bits; sums are float.
#include "device.cuh"

constexpr int TILE = 64, DEPTH = 16, SIDE = 16;  // SIDE x SIDE threads
constexpr int OWN = TILE / SIDE;

// to[k][i] = x(i0 + i, k0 + k), 0 outside; x(i, k) stands at i * row + k * column
template <class T>
DEVICE void bring(float (*to)[TILE + 1], const T* x, i64 row, i64 column, i64 i0, i64 rows, i64 k0,
                  i64 K) {
    for (int at = threadIdx.x; at < TILE * DEPTH; at += SIDE * SIDE) {
        // neighbouring threads go along whichever direction is contiguous
        const int i = column == 1 ? at / DEPTH : at % TILE,
                  k = column == 1 ? at % DEPTH : at / TILE;
        const bool inside = i0 + i < rows && k0 + k < K;
        to[k][i] = inside ? to_float(x[(i0 + i) * row + (k0 + k) * column]) : 0;
    }
}

// C (M, N) = op(A) op(B), or C += ...; grid (N / TILE, M / TILE)
template <class T>
DEVICE void product(const T* A, const T* B, float* C, i64 M, i64 N, i64 K, i64 transpose_a,
                    i64 transpose_b, i64 add) {
    __shared__ float a[DEPTH][TILE + 1], b[DEPTH][TILE + 1];
    const i64 m0 = (i64)blockIdx.y * TILE, n0 = (i64)blockIdx.x * TILE;
    const int tx = threadIdx.x % SIDE, ty = threadIdx.x / SIDE;
    float sums[OWN][OWN] = {};
    for (i64 k0 = 0; k0 < K; k0 += DEPTH) {
        bring(a, A, transpose_a ? 1 : K, transpose_a ? M : 1, m0, M, k0, K);
        bring(b, B, transpose_b ? K : 1, transpose_b ? 1 : N, n0, N, k0, K);
        __syncthreads();
        for (int k = 0; k < DEPTH; ++k)
            for (int i = 0; i < OWN; ++i)
                for (int j = 0; j < OWN; ++j)
                    sums[i][j] += a[k][ty + i * SIDE] * b[k][tx + j * SIDE];
        __syncthreads();
    }
    for (int i = 0; i < OWN; ++i)
        for (int j = 0; j < OWN; ++j) {
            const i64 m = m0 + ty + i * SIDE, n = n0 + tx + j * SIDE;
            if (m < M && n < N) C[m * N + n] = sums[i][j] + (add ? C[m * N + n] : 0);
        }
}

KERNEL matmul(const float* A, const float* B, float* C, i64 M, i64 N, i64 K, i64 transpose_a,
              i64 transpose_b, i64 add) {
    product(A, B, C, M, N, K, transpose_a, transpose_b, add);
}
KERNEL matmul_bfloat16(const u16* A, const u16* B, float* C, i64 M, i64 N, i64 K, i64 transpose_a,
                       i64 transpose_b, i64 add) {
    product(A, B, C, M, N, K, transpose_a, transpose_b, add);
}

// One thread per number, which need not divide to find its place: grid (rows, columns / threads)
DEVICE i64 column_index() { return (i64)blockIdx.y * blockDim.x + threadIdx.x; }

// y (N, F) += bias (F)
KERNEL add_bias(float* y, const float* bias, i64 F) {
    const i64 c = column_index();
    if (c < F) y[blockIdx.x * F + c] += bias[c];
}

// rows of C numbers, in y `wide` apart
KERNEL round_to_bfloat16(const float* x, u16* y, i64 C, i64 wide) {
    const i64 c = column_index();
    if (c < C) y[blockIdx.x * wide + c] = to_bfloat16(x[blockIdx.x * C + c]);
}

// int64 -> int32; what does not fit becomes the largest int32, which no check lets pass
KERNEL narrow(const i64* x, int* y, i64 n) {
    const i64 i = thread_index();
    if (i < n) y[i] = x[i] == (int)x[i] ? (int)x[i] : 0x7fffffff;
}
