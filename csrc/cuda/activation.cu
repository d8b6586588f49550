// activation.cu - sums, SwiGLU and GELU: one thread per number, each read and written once.
//
// Nothing here computes enough to matter: the time is that of reading and writing the arrays, which
// is why what could be several array operations is one kernel.
#include "device.cuh"

KERNEL add(const float* x, const float* y, float* sum, i64 n) {
    const i64 i = thread_index();
    if (i < n) sum[i] = x[i] + y[i];
}

// tanh has no overflow at either end
DEVICE float sigmoid(float x) { return 0.5f * (1 + tanhf(0.5f * x)); }

KERNEL swiglu_forward(const float* gate, const float* up, float* y, i64 n) {
    const i64 i = thread_index();
    if (i < n) y[i] = gate[i] * sigmoid(gate[i]) * up[i];
}

KERNEL swiglu_backward(const float* dy, const float* gate, const float* up, float* dgate,
                       float* dup, i64 n) {
    const i64 i = thread_index();
    if (i >= n) return;
    const float d = dy[i], g = gate[i], s = sigmoid(g);
    dgate[i] = d * up[i] * s * (1 + g * (1 - s));
    dup[i] = d * g * s;
}

constexpr float SQRT_2_OVER_PI = 0.7978845608f, SQRT_HALF = 0.7071067812f, CUBIC = 0.044715f;
constexpr float ONE_OVER_SQRT_2_PI = 0.3989422804f;

DEVICE float gelu_tanh(float x) { return tanhf(SQRT_2_OVER_PI * (x + CUBIC * x * x * x)); }

// x Φ(x), or its tanh approximation; 1 + erf(x) would lose its digits where it is nearly 0
KERNEL gelu_forward(const float* x, float* y, i64 n, i64 approximate) {
    const i64 i = thread_index();
    if (i >= n) return;
    const float v = x[i];
    y[i] = 0.5f * v * (approximate ? 1 + gelu_tanh(v) : erfcf(-v * SQRT_HALF));
}

KERNEL gelu_backward(const float* dy, const float* x, float* dx, i64 n, i64 approximate) {
    const i64 i = thread_index();
    if (i >= n) return;
    const float v = x[i];
    float slope;
    if (approximate) {
        const float t = gelu_tanh(v);
        const float inner = SQRT_2_OVER_PI * (1 + 3 * CUBIC * v * v);
        slope = 0.5f * (1 + t) + 0.5f * v * (1 - t) * (1 + t) * inner;
    } else {
        const float density = ONE_OVER_SQRT_2_PI * expf(-0.5f * v * v);
        slope = 0.5f * erfcf(-v * SQRT_HALF) + v * density;
    }
    dx[i] = dy[i] * slope;
}
