"""Every op's vjp against central differences, float64: what the kernels' own checks leave out."""

import numpy
import pytest

from tinylm import Tensor, backend, ops

B, T, H, G, D, C, V = 2, 5, 4, 2, 6, 8, 11
rng = numpy.random.default_rng(0)
TARGETS = rng.integers(-1, V, (B, T))
TOKENS = rng.integers(0, V, (B, T))
START = numpy.array([[0, 0, 2, 2, 2], [0, 1, 1, 1, 4]], numpy.int32)
ANGLES = numpy.arange(9)[:, None] * 0.3 ** numpy.arange(D // 2)
POSITIONS = rng.integers(0, 9, (B, T))

CASES = {
    "add": (ops.add, (3, 4), (3, 4)),
    "add a row": (ops.add, (3, 4), (4,)),
    "add a column": (ops.add, (2, 3, 4), (3, 1)),
    "add stretches the left": (ops.add, (1, 4), (3, 4)),
    "mul": (ops.mul, (2, 3, 4), (3, 1)),
    "mul a scalar tensor": (ops.mul, (3, 4), (1,)),
    "sub and number": (lambda x, y: 2 - (x - y) / 4 + 1, (3, 4), (4,)),
    "sum of an axis": (lambda x: x.sum(1), (2, 3, 4)),
    "sum keeping it": (lambda x: x.sum((0, 2), keepdims=True), (2, 3, 4)),
    "mean": (lambda x: x.mean(), (2, 3)),
    "mean of an axis": (lambda x: x.mean(-1), (2, 3)),
    "reshape": (lambda x: x.reshape(6, -1), (2, 3, 4)),
    "split": (lambda x: ops.mul(*ops.split(x, 2)), (2, 3, 8)),
    "split, and x read elsewhere": (lambda x: ops.split(x, 2)[0] * x.sum(), (2, 3, 8)),
    "split, one part unused": (lambda x: ops.split(x, 3)[1], (2, 3, 6)),
    "heads": (lambda x: ops.merge_heads(ops.split_heads(x, 2)), (B, T, C)),
    "matmul": (ops.matmul, (3, 4), (4, 5)),
    "linear": (ops.linear, (B, T, C), (9, C), (9,)),
    "linear without bias": (ops.linear, (B, T, C), (9, C)),
    "linear, transposed": (lambda x, w, b: ops.linear(x, w, b, True), (B, T, C), (C, 9), (9,)),
    "embedding": (lambda w: ops.embedding(TOKENS, w), (V, C)),
    "embedding, tied to the head": (
        lambda w: ops.linear_cross_entropy(ops.embedding(TOKENS, w), w, TARGETS), (V, C),
    ),
    "embedding of a table that was computed": (
        lambda w: ops.embedding(TOKENS, w * 2) + ops.embedding(TOKENS, w * 2), (V, C),
    ),
    "rms_norm": (ops.rms_norm, (B, T, C), (C,)),
    "layer_norm": (ops.layer_norm, (B, T, C), (C,), (C,)),
    "rope": (
        lambda x: ops.rope(x, numpy.cos(ANGLES), numpy.sin(ANGLES), POSITIONS),
        (B, H, T, D),
    ),
    "softmax": (ops.softmax, (B, T, V)),
    "attention": (ops.attention, (B, H, T, D), (B, H, T, D), (B, H, T, D)),
    "attention, grouped": (ops.attention, (B, H, T, D), (B, G, T, D), (B, G, T, D)),
    "attention, S > T": (ops.attention, (B, H, 3, D), (B, G, T, D), (B, G, T, D)),
    "attention, S < T": (ops.attention, (B, H, T, D), (B, G, 3, D), (B, G, 3, D)),
    "attention, documents": (
        lambda q, k, v: ops.attention(q, k, v, START),
        (B, H, T, D), (B, G, T, D), (B, G, T, D),
    ),
    "swiglu": (ops.swiglu, (B, T, C), (B, T, C)),
    "gelu": (ops.gelu, (B, T, C)),
    "gelu, exact": (lambda x: ops.gelu(x, False), (B, T, C)),
    "gelu and swiglu of one gradient": (
        lambda x, y: x + ops.gelu(x) + ops.swiglu(x, y) + y, (B, T, C), (B, T, C),
    ),
    "gelu of a gradient that lies apart": (
        lambda x: ops.split_heads(ops.gelu(x), 2), (B, T, C),
    ),
    "linear of what is computed again, and read twice": (
        lambda x, w: ops.linear(g := ops.gelu(x), w) * g, (B, T, C), (C, C),
    ),
    "cross_entropy": (lambda x: ops.cross_entropy(x, TARGETS), (B, T, V)),
    "linear_cross_entropy": (
        lambda x, w: ops.linear_cross_entropy(x, w, TARGETS), (B, T, C), (V, C),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("float64")
def test_gradient(name):
    """A wrong vjp makes every model train a little worse, in silence."""
    f, *shapes = CASES[name]
    local = numpy.random.default_rng(1)
    xs = [local.standard_normal(shape) for shape in shapes]
    us = [local.standard_normal(shape) for shape in shapes]
    tensors = [Tensor(x, requires_grad=True) for x in xs]
    y = f(*tensors)
    c = local.standard_normal(y.shape)
    y.backward(c)
    assert all(t.grad.shape == x.shape for t, x in zip(tensors, xs, strict=True))
    exact = sum((t.grad * u).sum() for t, u in zip(tensors, us, strict=True))
    eps = 1e-6
    plus, minus = (
        f(*[Tensor(x + sign * eps / 2 * u) for x, u in zip(xs, us, strict=True)]).data
        for sign in (1, -1)
    )
    numeric = (c * (plus - minus)).sum() / eps
    assert abs(exact - numeric) <= 1e-6 * max(abs(exact), abs(numeric), 1e-3)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("weights", [1 / 7, numpy.arange(B * T).reshape(B, T) / 7])
def test_gradients_made_on_the_way_are_those_of_a_second_look(weights):
    """A loss that is weighted token by token must not get the gradient of the mean."""
    found = []
    for even in (True, False):
        x, w = (
            Tensor(rng.standard_normal(shape), requires_grad=True) for shape in ((B, T, C), (V, C))
        )
        x.data[:], w.data[:] = (
            numpy.arange(B * T * C).reshape(B, T, C) % 5 - 2,
            1 / numpy.arange(1, C + 1),
        )
        w.data[::2] *= -1
        loss = ops.linear_cross_entropy(x, w, TARGETS, even)
        loss.backward(numpy.zeros((B, T)) + weights)
        found.append(numpy.concatenate([loss.data.ravel(), x.grad.ravel(), w.grad.ravel()]))
    assert numpy.allclose(*found, rtol=1e-12, atol=1e-14)


def test_an_unknown_backend_is_named():
    with pytest.raises(ValueError, match="'gpu'"):
        backend.use("gpu")


def test_the_compiled_backend_refuses_float64_by_name():
    """A silent cast would make a float64 check pass in float32."""
    backend.use("cpu")
    with pytest.raises(TypeError, match="float32"):
        ops.softmax(Tensor(numpy.zeros((2, 3))))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (0, 0, 2)])
def test_gradients_of_parts_are_copied_unless_they_lie_side_by_side(order):
    beside, seen = rng.standard_normal((4, 6)), []
    x = Tensor(numpy.zeros((4, 6)), requires_grad=True)
    y = Tensor.from_op(x.data, (x,), lambda dout: seen.append(dout) or (dout,))
    gradients = tuple(beside[:, 2 * i : 2 * i + 2] for i in order)
    Tensor.from_op(numpy.zeros(1), ops.split(y, 3), lambda dout: gradients).backward()
    assert numpy.array_equal(x.grad, numpy.concatenate(gradients, -1))
    assert (seen[0] is beside) == (order == (0, 1, 2))


def test_a_number_of_numpy_leaves_a_tensor_its_dtype():
    x = Tensor(numpy.ones(3, numpy.float32), requires_grad=True)
    y = (x + numpy.float64(1)) * (1 / numpy.int64(3)) - numpy.array(2.0)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype) == (numpy.float32, numpy.float32)


def test_arrays_and_lists_leave_a_tensor_its_dtype_too():
    x = Tensor(numpy.ones((2, 2), numpy.float32), requires_grad=True)
    for other in (numpy.full((2, 2), 2.0), [[2.0, 2.0], [2.0, 2.0]]):
        y = ((x + other) * other) @ other
        assert (y.dtype, y.data.tolist()) == (numpy.float32, [[24, 24], [24, 24]])
    whole = Tensor(numpy.arange(2)) * [0.5, 0.5]  # of which nothing is rounded away
    assert whole.data.tolist() == [0, 0.5]


def test_ids_may_be_lists():
    x = Tensor(numpy.eye(2, dtype=numpy.float32), requires_grad=True)
    loss = ops.cross_entropy(ops.embedding([[0, 1]], x), [[0, 1]])
    assert numpy.allclose(loss.data, ops.linear_cross_entropy(x, x, [0, 1]).data)
