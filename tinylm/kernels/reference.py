"""The kernels in NumPy: an executable specification, written to be read and clean in float64.

Every other implementation is checked against this one, and this one against finite differences.
Nothing here is optimised. Leading dimensions are free: where a docstring says (N, C), an array
(B, T, C) will do as well.
"""

import numpy as np


def _within(name, ids, least, limit):
    """Raise ValueError for an id out of range: from the end of an array NumPy would count."""
    wrong = ids[(ids < least) | (ids >= limit)]
    if wrong.size:
        raise ValueError(f"{name}: expected values in [{least}, {limit}), got {wrong[0]}")


# ---- sums and products -------------------------------------------------------------------------


def add(x, y):
    """x + y, of one shape."""
    return x + y


def matmul(a, b, transpose_a=False, transpose_b=False):
    """(M, K) times (K, N) -> (M, N); a transposed operand is stored (K, M) or (N, K)."""
    return (a.T if transpose_a else a) @ (b.T if transpose_b else b)


def linear_forward(x, weight, bias=None, transposed=False):
    """y = x Wᵀ + b.  x (N, C), weight (F, C), bias (F) -> y (N, F).

    transposed: the weight is stored (C, F), as in GPT-2's Conv1D, and y = x W + b.
    """
    y = x @ (weight if transposed else weight.T)
    return y if bias is None else y + bias


def linear_backward(dy, x, weight, transposed=False, has_bias=False, dx=None):
    """-> dx (N, C), dweight (as stored), dbias (F) or None.

    dx: where to write it, maybe x itself; the same of other gradients that are arguments.
    """
    dy_rows, x_rows = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    dweight = x_rows.T @ dy_rows if transposed else dy_rows.T @ x_rows
    dx = np.matmul(dy, weight.T if transposed else weight, out=dx)
    return dx, dweight, dy_rows.sum(0) if has_bias else None


def embedding_forward(tokens, weight):
    """tokens (B, T) of int, weight (V, C) -> (B, T, C): row number `token` of the table."""
    _within("[embedding_forward] tokens", tokens, 0, len(weight))
    return weight[tokens]


def embedding_backward(dy, tokens, vocab_size, total=None):
    """-> dweight (V, C): each row sums the gradients of the places where its token stood.

    A total (V, C), where there is one, receives them in place, and is returned.
    """
    if total is None:
        total = np.zeros((vocab_size, dy.shape[-1]), dy.dtype)
    np.add.at(total, tokens, dy)
    return total


# ---- normalisation -----------------------------------------------------------------------------


def rms_norm_forward(x, weight, eps):
    """y = x / sqrt(mean(x²) + eps) · weight.  x (N, C) -> y (N, C), rstd (N).  arXiv 1910.07467"""
    rstd = 1 / np.sqrt(np.mean(x * x, -1) + eps)
    return x * rstd[..., None] * weight, rstd


def rms_norm_backward(dy, x, weight, rstd):
    """-> dx (N, C), dweight (C). The mean is x's way through rstd."""
    xhat = x * rstd[..., None]
    dxhat = dy * weight
    dx = rstd[..., None] * (dxhat - xhat * np.mean(dxhat * xhat, -1, keepdims=True))
    return dx, _sum_rows(dy * xhat)


def layer_norm_forward(x, weight, bias, eps):
    """y = (x − mean) / sqrt(var + eps) · weight + bias -> y, mean, rstd (N).  arXiv 1607.06450"""
    mean = np.mean(x, -1)
    centred = x - mean[..., None]
    rstd = 1 / np.sqrt(np.mean(centred * centred, -1) + eps)
    return centred * rstd[..., None] * weight + bias, mean, rstd


def layer_norm_backward(dy, x, weight, mean, rstd):
    """-> dx (N, C), dweight (C), dbias (C). The means are x's ways through mean and rstd."""
    xhat = (x - mean[..., None]) * rstd[..., None]
    dxhat = dy * weight
    dxhat_mean = np.mean(dxhat, -1, keepdims=True)
    projection = np.mean(dxhat * xhat, -1, keepdims=True)
    dx = rstd[..., None] * (dxhat - dxhat_mean - xhat * projection)
    return dx, _sum_rows(dy * xhat), _sum_rows(dy)


def _sum_rows(x):
    return x.reshape(-1, x.shape[-1]).sum(0)


# ---- attention ---------------------------------------------------------------------------------


def rope_forward(x, cos, sin, positions):
    """Turn each pair (x[d], x[d + D/2]) by its position's angle.  arXiv 2104.09864

    x (B, H, T, D); cos, sin (P, D/2); positions (B, T) of int, each < P -> (B, H, T, D).
    """
    cos, sin = cos[positions][:, None], sin[positions][:, None]  # (B, 1, T, D/2)
    left, right = np.split(x, 2, -1)
    return np.concatenate([left * cos - right * sin, right * cos + left * sin], -1)


def rope_backward(dy, cos, sin, positions):
    """A rotation's gradient is turned back by the same angle."""
    return rope_forward(dy, cos, -sin, positions)


def softmax_forward(x):
    """exp(x) / Σ exp(x) over the last axis; a row of −inf gives zeros, never NaN."""
    p = np.exp(x - _finite(x.max(-1, keepdims=True)))
    total = p.sum(-1, keepdims=True)
    return p / np.where(total == 0, 1, total)


def softmax_backward(dy, y):
    """-> dx, of the output y: dx_i = Σ_j dy_j ∂y_j/∂x_i, where ∂y_j/∂x_i = y_j (δ_ij − y_i)."""
    return y * (dy - np.sum(dy * y, -1, keepdims=True))


def attention_forward(q, k, v, start=None, gap=None):
    """softmax(q kᵀ / √D) v, causal, grouped.  arXiv 1706.03762, 2305.13245, 2205.14135

    q (B, H, T, D); k, v (B, G, S, D) with G dividing H -> out (B, H, T, D), lse (B, H, T).
    Query t stands at key position t + S − T and sees the keys start[b, t] .. t + S − T.
    start (B, T) of int32, default 0: the first key of the query's document, or of its real tokens
    in a padded row. gap (B, T, 2) of int32, default empty: it does not see gap[b, t, 0] ..
    gap[b, t, 1] − 1 either, as of other answers to the same prompt. A query that sees no key gives
    out 0 and lse −inf.
    """
    scores = _scores(q, k, start, gap)
    top = _finite(scores.max(-1, keepdims=True))
    with np.errstate(divide="ignore"):  # log 0 = −inf is meant
        lse = top + np.log(np.exp(scores - top).sum(-1, keepdims=True))
    p = np.exp(scores - _finite(lse))
    return p @ _repeat_heads(v, q.shape[1]), lse[..., 0]


def attention_backward(dout, q, k, v, out, lse, start=None, gap=None):
    """-> dq (B, H, T, D), dk, dv (B, G, S, D).

    p is made again from lse. Then as in softmax_backward, whose sum over the keys, Σ dp p, is
    dout · out, because out = p v and dp = dout vᵀ.
    """
    B, G, S, D = k.shape
    p = np.exp(_scores(q, k, start, gap) - _finite(lse[..., None]))  # (B, H, T, S)
    dp = dout @ _repeat_heads(v, q.shape[1]).swapaxes(-1, -2)
    ds = p * (dp - (dout * out).sum(-1, keepdims=True)) / D**0.5
    dq = ds @ _repeat_heads(k, q.shape[1])
    dk = (ds.swapaxes(-1, -2) @ q).reshape(B, G, -1, S, D).sum(2)
    dv = (p.swapaxes(-1, -2) @ dout).reshape(B, G, -1, S, D).sum(2)
    return dq, dk, dv


def prefix_attention(q, k, v, prefix_k, prefix_v, prefix, start=None):
    """Attention of rows that begin alike, as several answers to one prompt do.  arXiv 2402.05099

    The keys of row b are those of row prefix[b] of prefix_k (P, G, S', D), and then those of k
    (B, G, S, D); the values likewise; prefix (B) of int. -> out (B, H, T, D), as above.
    """
    k, v = np.concatenate([prefix_k[prefix], k], 2), np.concatenate([prefix_v[prefix], v], 2)
    return attention_forward(q, k, v, start)[0]


def _scores(q, k, start, gap):
    """q kᵀ / √D with −inf where the query must not look.  (B, H, T, S)"""
    B, H, T, D = q.shape
    S = k.shape[2]
    first = np.zeros((B, T), np.int32) if start is None else start
    key, last = np.arange(S), np.arange(T) + S - T
    visible = (key <= last[:, None]) & (key >= first[..., None])  # (B, T, S)
    if gap is not None:
        visible &= (key < gap[..., :1]) | (key >= gap[..., 1:])
    scores = q @ _repeat_heads(k, H).swapaxes(-1, -2) / D**0.5
    return np.where(visible[:, None], scores, -np.inf)


def _repeat_heads(x, H):
    """(B, G, S, D) -> (B, H, S, D): each key/value head serves H/G query heads."""
    return np.repeat(x, H // x.shape[1], axis=1)


def _finite(x):
    """−inf (nothing seen) becomes 0, so that no −inf − −inf appears."""
    return np.where(np.isneginf(x), 0, x)


# ---- activations -------------------------------------------------------------------------------


def swiglu_forward(gate, up):
    """gate · σ(gate) · up.  (N, F), (N, F) -> (N, F).  arXiv 2002.05202"""
    return gate * _sigmoid(gate) * up


def swiglu_backward(dy, gate, up, dgate=None):
    """-> dgate, which may be written over dy, dup."""
    s = _sigmoid(gate)
    dup = dy * gate * s
    return np.multiply(dy, up * s * (1 + gate * (1 - s)), out=dgate), dup


def _sigmoid(x):
    return 0.5 * (1 + np.tanh(0.5 * x))  # no overflow at either end


SQRT_2_OVER_PI = 0.7978845608028654


def gelu_forward(x, approximate=True):
    """x Φ(x), Φ(x) = P(N(0, 1) ≤ x), or its tanh form ("gelu_new" of GPT-2).  arXiv 1606.08415"""
    if not approximate:
        return x * 0.5 * (1 + _erf(x / 2**0.5))
    return 0.5 * x * (1 + np.tanh(SQRT_2_OVER_PI * (x + 0.044715 * x**3)))


def gelu_backward(dy, x, approximate=True, dx=None):
    """-> dx, which may be written over dy."""
    if approximate:
        t = np.tanh(SQRT_2_OVER_PI * (x + 0.044715 * x**3))
        slope_u = SQRT_2_OVER_PI * (1 + 3 * 0.044715 * x * x)
        slope = 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * slope_u
    else:
        density = np.exp(-0.5 * x * x) / (2 * np.pi) ** 0.5
        slope = 0.5 * (1 + _erf(x / 2**0.5)) + x * density
    return np.multiply(dy, slope, out=dx)


def _erf(x):
    """The error function; NumPy has none, the standard library's is exact."""
    from math import erf

    return np.vectorize(erf, otypes=[x.dtype])(x)


# ---- loss --------------------------------------------------------------------------------------


def cross_entropy_forward(logits, targets):
    """−log softmax(logits)[target].  logits (N, V), targets (N) of int -> loss (N), lse (N).

    Where the target is −1 the loss is 0 and no gradient flows.
    """
    _within("[cross_entropy_forward] targets", targets, -1, logits.shape[-1])
    top = logits.max(-1, keepdims=True)
    lse = top[..., 0] + np.log(np.exp(logits - top).sum(-1))
    picked = np.take_along_axis(logits, np.maximum(targets, 0)[..., None], -1)[..., 0]
    return np.where(targets >= 0, lse - picked, 0).astype(logits.dtype), lse


def cross_entropy_backward(dloss, logits, targets, lse):
    """dlogits = dloss · (softmax(logits) − onehot(target))."""
    dlogits = np.exp(logits - lse[..., None])
    at = np.maximum(targets, 0)[..., None]
    np.put_along_axis(dlogits, at, np.take_along_axis(dlogits, at, -1) - 1, -1)
    return dlogits * np.where(targets >= 0, dloss, 0).astype(logits.dtype)[..., None]


def linear_cross_entropy_forward(x, weight, targets):
    """Language-model head and loss in one.  x (N, C), weight (V, C) -> loss (N), lse (N).

    Rows whose target is −1 take no part: their loss and lse are 0. The fast versions work in
    blocks, so that the (N, V) logits never exist at once.
    """
    _within("[linear_cross_entropy_forward] targets", targets, -1, len(weight))
    counted = targets >= 0
    logits = linear_forward(x[counted], weight)
    loss, lse = np.zeros((2, *targets.shape), x.dtype)
    loss[counted], lse[counted] = cross_entropy_forward(logits, targets[counted])
    return loss, lse


def linear_cross_entropy_backward(dloss, x, weight, targets, lse):
    """-> dx (N, C), dweight (V, C)."""
    counted = targets >= 0
    logits = linear_forward(x[counted], weight)
    dlogits = cross_entropy_backward(dloss[counted], logits, targets[counted], lse[counted])
    dx = np.zeros_like(x)
    dx[counted], dweight, _ = linear_backward(dlogits, x[counted], weight)
    return dx, dweight


def linear_cross_entropy_with_gradients(x, weight, targets):
    """-> loss (N), lse (N), and dx (N, C), dweight (V, C) of the mean over the rows that count.

    The forward and the backward in one, so that the logits are computed once.
    """
    loss, lse = linear_cross_entropy_forward(x, weight, targets)
    dloss = np.full_like(loss, 1 / max(1, np.sum(targets >= 0)))
    return loss, lse, *linear_cross_entropy_backward(dloss, x, weight, targets, lse)


# ---- optimizer ---------------------------------------------------------------------------------


def adamw(param, grad, m, v, lr, beta1, beta2, eps, weight_decay, step, grad_scale=1.0):
    """One AdamW update, in place on param, m and v.  arXiv 1711.05101

    step counts from 1 (bias correction); grad_scale multiplies the gradient first (clipping).
    m becomes β₁ m + (1 − β₁) grad, and v likewise of grad², each written as a step towards it.
    """
    grad = grad * grad_scale
    m += (1 - beta1) * (grad - m)
    v += (1 - beta2) * (grad * grad - v)
    mhat, vhat = m / (1 - beta1**step), v / (1 - beta2**step)
    param -= lr * (mhat / (np.sqrt(vhat) + eps) + weight_decay * param)


def muon(matrices, lr, beta1, weight_decay, grad_scale=1.0, matmul=matmul):
    """One Muon update of each (param, grad, m), all (M, N), in place on param and m.

    m ← β₁ m + G, param ← param − lr (0.2 √max(M, N) O + λ param), where O is G + β₁ m made
    orthogonal.  Jordan et al. 2024, kellerjordan.github.io/posts/muon; its size: arXiv 2502.16982
    matmul: what multiplies, where that is not NumPy.
    """
    for param, grad, m in matrices:
        grad = grad * grad_scale
        m *= beta1
        m += grad
        param *= 1 - lr * weight_decay
        param -= lr * 0.2 * max(param.shape) ** 0.5 * _orthogonal(grad + beta1 * m, matmul)


def _orthogonal(x, matmul):
    """Nearly U Vᵀ of x = U S Vᵀ, (M, N): every singular value becomes one, or near it.

    Newton-Schulz: each step takes each singular value s to a s + b s³ + c s⁵, which carries all of
    (0.005, 1] to about 0.7 to 1.2; 0 stays 0. The coefficients are Jordan's; he takes five steps
    from x / |x|. The fourth root of Σ s⁴ is nearer to the largest s, and saves one.
    """
    tall = x.shape[0] > x.shape[1]
    for step in range(4):
        gram = matmul(x, x, transpose_a=tall, transpose_b=not tall)  # the smaller of xᵀ x and x xᵀ
        if step == 0:  # where |gram| = √Σ s⁴
            largest = ((gram.astype("float64") ** 2).sum() ** 0.25 + 1e-15).astype(x.dtype)
            x, gram = x / largest, gram / largest**2  # no singular value is above 1 now
        mixed = -4.7750 * gram + 2.0315 * matmul(gram, gram)
        x = 3.4445 * x + (matmul(x, mixed) if tall else matmul(mixed, x))
    return x


def global_norm(arrays):
    """sqrt of the sum of squares over all arrays, summed in float64 -> float."""
    return float(np.sqrt(sum(np.sum(np.square(a, dtype=np.float64)) for a in arrays)))
