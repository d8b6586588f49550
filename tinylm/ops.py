"""Differentiable ops: each a forward kernel and, beside it, its vjp.

Read it as a list of pairs. An op unwraps Tensors into arrays, calls the kernel of the backend in
use, and tells `Tensor.from_op` how a gradient travels back. Only glue that moves or adds numbers
(views, residual adds, sums) is written with array methods; all arithmetic worth a name is a kernel.
"""

from __future__ import annotations

from collections.abc import Callable

from tinylm import backend
from tinylm.tensor import Array, Tensor, no_grad, recording

# ---- glue: adds, products, sums, views ---------------------------------------------------------


def unbroadcast(grad: Array, shape: tuple[int, ...]) -> Array:
    """Sum grad over the axes along which an operand of that shape was broadcast."""
    if grad.shape == shape:
        return grad
    grad = grad.sum(axis=tuple(range(grad.ndim - len(shape))))
    stretched = tuple(i for i, n in enumerate(shape) if n == 1 and grad.shape[i] != 1)
    return grad.sum(axis=stretched, keepdims=True)


def wrap(y, x: Tensor) -> Tensor:
    """y itself, or a constant Tensor around an array or a list, of the floats that x has."""
    if isinstance(y, Tensor):
        return y
    return Tensor(backend.asarray(y, x.dtype if x.dtype.kind == "f" else None))


def add(x: Tensor, y: Tensor | float) -> Tensor:
    """x + y, broadcasting."""
    if not isinstance(y, Tensor) and backend.xp.ndim(y) == 0:
        return Tensor.from_op(x.data + float(y), (x,), lambda dout: (dout,))
    y = wrap(y, x)
    shapes = x.shape, y.shape

    def vjp(dout):
        return tuple(unbroadcast(dout, shape) for shape in shapes)

    alike = x.shape == y.shape
    total = backend.kernels.add(x.data, y.data) if alike else x.data + y.data
    return Tensor.from_op(total, (x, y), vjp)


def mul(x: Tensor, y: Tensor | float) -> Tensor:
    """x · y, broadcasting."""
    if not isinstance(y, Tensor) and backend.xp.ndim(y) == 0:
        y = float(y)  # of no dtype, so that x keeps its own
        return Tensor.from_op(x.data * y, (x,), lambda dout: (dout * y,))
    y = wrap(y, x)

    def vjp(dout):
        return unbroadcast(dout * y.data, x.shape), unbroadcast(dout * x.data, y.shape)

    return Tensor.from_op(x.data * y.data, (x, y), vjp)


def sum(x: Tensor, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Tensor:
    """The sum over an axis, several, or (None) all of them."""

    def vjp(dout):
        if axis is not None and not keepdims:
            dout = backend.xp.expand_dims(dout, axis)
        return (dout + backend.xp.zeros_like(x.data),)

    return Tensor.from_op(x.data.sum(axis=axis, keepdims=keepdims), (x,), vjp)


def mean(x: Tensor, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Tensor:
    total = sum(x, axis, keepdims)
    return mul(total, total.size / x.size)


def reshape(x: Tensor, *shape: int) -> Tensor:
    """The same numbers in another shape; −1 stands for what is left."""
    before = x.shape
    return Tensor.from_op(x.data.reshape(shape), (x,), lambda dout: (dout.reshape(before),))


def split_heads(x: Tensor, n_head: int) -> Tensor:
    """(B, T, H·D) -> (B, H, T, D), a view."""
    B, T, C = x.shape
    heads = x.data.reshape(B, T, n_head, -1).swapaxes(1, 2)
    return Tensor.from_op(heads, (x,), lambda dout: (dout.swapaxes(1, 2).reshape(B, T, C),))


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, T, D) -> (B, T, H·D): undoes split_heads."""
    B, H, T, D = x.shape

    def vjp(dout):
        return (dout.reshape(B, T, H, D).swapaxes(1, 2),)

    return Tensor.from_op(x.data.swapaxes(1, 2).reshape(B, T, H * D), (x,), vjp)


def split(x: Tensor, parts: int) -> tuple[Tensor, ...]:
    """Cut the last axis into equal parts, as views; gradients that lie side by side stay there."""
    shape, dtype, width = x.shape, x.dtype, x.shape[-1] // parts
    places = [slice(i * width, (i + 1) * width) for i in range(parts)]
    gradients = {}

    def part(i):
        def vjp(dout):
            first = not gradients
            gradients[i] = dout
            return (dout if first else None,)  # a sign, never added: the whole's turn comes last

        return Tensor.from_op(x.data[..., places[i]], (whole,), vjp)

    def vjp(dpart):
        dx = dpart.base  # in which attention_backward may have laid all parts' gradients
        beside = getattr(dx, "shape", None) == shape and len(gradients) == parts
        if not beside or not all(backend.same(dx[..., places[i]], g) for i, g in gradients.items()):
            dx = backend.empty(shape, dtype)
            for i, place in enumerate(places):
                dx[..., place] = gradients.get(i, 0)
        return (dx,)

    whole = Tensor.from_op(x.data, (x,), vjp)
    return tuple(part(i) for i in range(parts))


# ---- products ----------------------------------------------------------------------------------


def matmul(x: Tensor, y: Tensor) -> Tensor:
    """(M, K) times (K, N) -> (M, N)."""
    y = wrap(y, x)

    def vjp(dout):
        dx = backend.kernels.matmul(dout, y.data, transpose_b=True)
        return dx, backend.kernels.matmul(x.data, dout, transpose_a=True)

    return Tensor.from_op(backend.kernels.matmul(x.data, y.data), (x, y), vjp)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, transposed: bool = False
) -> Tensor:
    """x Wᵀ + b.  x (..., C), weight (F, C), or (C, F) if transposed, bias (F) -> (..., F)."""
    b = None if bias is None else bias.data
    y = backend.kernels.linear_forward(x.data, weight.data, b, transposed)
    kept, computed_again, has_bias = x.kept(), x.again is not None, bias is not None

    def vjp(dy):
        x = kept()
        dx = x if computed_again else None  # nobody else reads it: dx may be written there
        grads = backend.kernels.linear_backward(dy, x, weight.data, transposed, has_bias, dx)
        return grads if has_bias else grads[:2]

    return Tensor.from_op(y, (x, weight) if bias is None else (x, weight, bias), vjp)


def embedding(tokens: Array, weight: Tensor) -> Tensor:
    """tokens (B, T) of int, weight (V, C) -> (B, T, C)."""
    tokens = backend.asarray(tokens)

    def vjp(dy):
        if weight.node.vjp is not None or weight.grad is None:
            return (backend.kernels.embedding_backward(dy, tokens, weight.shape[0]),)
        # a tied head has left its gradient, whose memory is the leaf's own: add a few rows to it
        backend.kernels.embedding_backward(dy, tokens, weight.shape[0], weight.grad)
        return (None,)

    return Tensor.from_op(backend.kernels.embedding_forward(tokens, weight.data), (weight,), vjp)


# ---- normalisation -----------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last axis.  arXiv 1910.07467"""
    kept = x.kept()
    y, rstd = backend.kernels.rms_norm_forward(x.data, weight.data, eps)

    def vjp(dy):
        return backend.kernels.rms_norm_backward(dy, kept(), weight.data, rstd)

    # kept, not computed again: two or three products read it, and each would do so (3 % of a step)
    return Tensor.from_op(y, (x, weight), vjp)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """(x − mean) / sqrt(var + eps) · weight + bias over the last axis.  arXiv 1607.06450"""
    kept = x.kept()

    def forward():
        return backend.kernels.layer_norm_forward(kept(), weight.data, bias.data, eps)

    def vjp(dy):
        return backend.kernels.layer_norm_backward(dy, kept(), weight.data, mean, rstd)

    y, mean, rstd = forward()
    return Tensor.from_op(y, (x, weight, bias), vjp, again=lambda: forward()[0])


# ---- attention ---------------------------------------------------------------------------------


def rope(x: Tensor, cos: Array, sin: Array, positions: Array) -> Tensor:
    """Rotary position embedding.  x (B, H, T, D); cos, sin (P, D/2); positions (B, T)."""
    y = backend.kernels.rope_forward(x.data, cos, sin, positions)

    def vjp(dy):
        return (backend.kernels.rope_backward(dy, cos, sin, positions),)

    return Tensor.from_op(y, (x,), vjp)


def softmax(x: Tensor) -> Tensor:
    """exp(x) / Σ exp(x) over the last axis."""
    y = backend.kernels.softmax_forward(x.data)
    return Tensor.from_op(y, (x,), lambda dy: (backend.kernels.softmax_backward(dy, y),))


def attention(
    q: Tensor, k: Tensor, v: Tensor, start: Array | None = None, gap: Array | None = None
) -> Tensor:
    """Causal softmax(q kᵀ / √D) v.  q (B, H, T, D); k, v (B, G, S, D) -> (B, H, T, D).

    Query t stands at key t + S − T. It sees the keys start[b, t] to t + S − T (default: from 0),
    except gap[b, t, 0] to gap[b, t, 1] − 1 (default: no gap).  start (B, T), gap (B, T, 2), int32.
    """
    out, lse = backend.kernels.attention_forward(q.data, k.data, v.data, start, gap)

    def vjp(dout):
        return backend.kernels.attention_backward(
            dout, q.data, k.data, v.data, out, lse, start, gap
        )

    return Tensor.from_op(out, (q, k, v), vjp)


def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, prefix: Array, start=None
) -> Tensor:
    """Attention whose keys begin, in row b, with those of row prefix[b] of others (P, G, S', D).

    For reading only: no gradient goes through it.
    """
    arrays = (x.data for x in (q, k, v, prefix_k, prefix_v))
    return Tensor(backend.kernels.prefix_attention(*arrays, prefix, start))


# ---- activations -------------------------------------------------------------------------------


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate · σ(gate) · up.  arXiv 2002.05202"""
    g, u = gate.kept(), up.kept()

    def forward():
        return backend.kernels.swiglu_forward(g(), u())

    def vjp(dy):
        return backend.kernels.swiglu_backward(dy, g(), u(), dgate=dy)

    return Tensor.from_op(forward(), (gate, up), vjp, again=forward, overwrites=True)


def gelu(x: Tensor, approximate: bool = True) -> Tensor:
    """x Φ(x), or its tanh approximation.  arXiv 1606.08415"""
    kept = x.kept()

    def forward():
        return backend.kernels.gelu_forward(kept(), approximate)

    def vjp(dy):
        return (backend.kernels.gelu_backward(dy, kept(), approximate, dx=dy),)

    return Tensor.from_op(forward(), (x,), vjp, again=forward, overwrites=True)


# ---- memory ------------------------------------------------------------------------------------


def recomputed(f: Callable[..., Tensor], x: Tensor, *rest) -> Tensor:
    """f(x, *rest), of which only x is kept: backward runs f again.  arXiv 1604.06174

    Whatever else f reads must be constant, or a leaf: leaves get their gradients where they are.
    """
    with no_grad():
        y = f(x, *rest).data

    def vjp(dy):
        again = Tensor(x.data, requires_grad=True)
        f(again, *rest).backward(dy)
        return (again.grad,)

    return Tensor.from_op(y, (x,), vjp)


# ---- loss --------------------------------------------------------------------------------------


def cross_entropy(logits: Tensor, targets: Array) -> Tensor:
    """−log softmax(logits)[target].  (..., V), (...) of int -> (...); 0 where the target is −1."""
    targets = backend.asarray(targets)
    loss, lse = backend.kernels.cross_entropy_forward(logits.data, targets)

    def vjp(dloss):
        return (backend.kernels.cross_entropy_backward(dloss, logits.data, targets, lse),)

    return Tensor.from_op(loss, (logits,), vjp)


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Array, even: bool = True) -> Tensor:
    """cross_entropy(linear(x, weight), targets) without ever holding all logits.

    even: a promise that the loss of every target will get the same gradient, as in a mean. Then
    gradients are made in the forward pass, which saves a third of the products. Where the promise
    is broken a CPU makes them again; a GPU raises an error when it is next waited for.
    """
    made, targets = None, backend.asarray(targets)
    if even and recording(x, weight):
        kernel = backend.kernels.linear_cross_entropy_with_gradients
        loss, lse, *made = kernel(x.data, weight.data, targets)
    else:
        loss, lse = backend.kernels.linear_cross_entropy_forward(x.data, weight.data, targets)

    def vjp(dloss):
        return (made and evenly(made, dloss, targets)) or (
            backend.kernels.linear_cross_entropy_backward(dloss, x.data, weight.data, targets, lse)
        )

    return Tensor.from_op(loss, (x, weight), vjp)


def evenly(made: list[Array], dloss: Array, targets: Array) -> list[Array] | None:
    """The gradients of a mean over targets, as those of Σ dloss · loss; None if dloss is uneven."""
    if hasattr(backend.kernels, "scale_evenly"):
        return backend.kernels.scale_evenly(made, dloss, targets)
    given = dloss[targets >= 0]
    if not len(given) or (given != given[0]).any():
        return None
    mean = given.dtype.type(1 / len(given))
    return made if given[0] == mean else [d * (given[0] / mean) for d in made]


# ---- so that a formula reads like one -----------------------------------------------------------

Tensor.__add__ = Tensor.__radd__ = add
Tensor.__mul__ = Tensor.__rmul__ = mul
Tensor.__neg__ = lambda x: mul(x, -1)
Tensor.__sub__ = lambda x, y: add(x, -y)
Tensor.__rsub__ = lambda x, y: add(mul(x, -1), y)
Tensor.__truediv__ = lambda x, y: mul(x, 1 / y)  # by a number
Tensor.__matmul__ = matmul
Tensor.sum, Tensor.mean, Tensor.reshape = sum, mean, reshape
