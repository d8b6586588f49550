// embedding.cu - rows of a table by token, and the sums that travel back to them.
//
// Forward: one block per token copies its row. Backward: many tokens may have the same row, and
// adding to it with atomics would make the sum depend on who came first. So one block owns one row
// of the table: it looks through all N tokens for its own, CHUNK at a time, and adds what it finds
// in the order of the text:
//
//     tokens  3 7 3 1 3 ...        block 3 finds 0, 2, 4; thread c adds dy[0, c] + dy[2, c] + ...
//
// Looking costs V N reads of 4 bytes out of the cache: 1.6 GB for V 50,257 and N 8,192.
#include "device.cuh"

KERNEL embedding_forward(const int* tokens, const float* weight, float* y, i64 V, i64 C, i64* fault,
                         i64 check) {
    const i64 row = checked(tokens[blockIdx.x], 0, V, fault, check);
    for (i64 c = threadIdx.x; c < C; c += blockDim.x) y[blockIdx.x * C + c] = weight[row * C + c];
}

constexpr int CHUNK = 256;  // also the number of threads

// which[0 .. found) = the places among CHUNK tokens where `mine` holds, in order
DEVICE int find(bool mine, int* which) {
    __shared__ int before[CHUNK / WARP + 1];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const unsigned votes = __ballot_sync(ALL_LANES, mine);
    if (lane == 0) before[warp + 1] = __popc(votes);
    __syncthreads();
    int rank = __popc(votes & ((1u << lane) - 1)), found = 0;
    for (int w = 0; w < CHUNK / WARP; ++w) {
        if (w == warp) rank += found;
        found += before[w + 1];
    }
    if (mine) which[rank] = threadIdx.x;
    __syncthreads();
    return found;
}

// weight gradients (V, C); `keep` adds to what is there
KERNEL embedding_backward(const float* dy, const int* tokens, float* dweight, i64 keep, i64 N,
                          i64 V, i64 C, i64* fault, i64 check) {
    __shared__ int which[CHUNK];
    float* row = dweight + blockIdx.x * C;
    if (!keep)
        for (i64 c = threadIdx.x; c < C; c += CHUNK) row[c] = 0;
    for (i64 n = 0; n < N; n += CHUNK) {
        const i64 at = n + threadIdx.x;
        const int token = at < N ? tokens[at] : -1;
        if (blockIdx.x == 0 && at < N) checked(token, 0, V, fault, check);
        const bool mine = token == blockIdx.x && at < N;
        if (!__syncthreads_or(mine)) continue;  // as nearly always
        const int found = find(mine, which);
        for (i64 c = threadIdx.x; c < C; c += CHUNK) {
            float sum = row[c];
            for (int i = 0; i < found; ++i) sum += dy[(n + which[i]) * C + c];
            row[c] = sum;
        }
    }
}
