"""ONE list of kernel cases, which the parity and gradient checks walk.

A case is a kernel's name and its arguments; what is expected comes from reference.py. Arguments are
drawn in float64 and rounded to the dtype under test, so that an error is the kernel's own.
Gradients: float64, central differences along a random direction. Parity: ‖out − ref‖ / ‖ref‖.
"""

import functools
import inspect
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from tinylm.kernels import reference

GRADIENT_TOLERANCE = 1e-6
TOLERANCE = {"float32": 3e-6, "bfloat16": 2e-2}


class Op(NamedTuple):
    """What a forward returns (the gradient enters at the first), which arguments have gradients, and
    which argument of the backward the first of these may be written over."""

    returns: tuple[str, ...]
    inputs: tuple[str, ...] = ()
    over: str = ""


OPS = {
    "add": Op(("sum",)),
    "matmul": Op(("c",)),
    "linear": Op(("y",), ("x", "weight", "bias"), over="x"),
    "embedding": Op(("y",), ("weight",)),
    "rms_norm": Op(("y", "rstd"), ("x", "weight")),
    "layer_norm": Op(("y", "mean", "rstd"), ("x", "weight", "bias")),
    "rope": Op(("y",), ("x",)),
    "softmax": Op(("y",), ("x",)),
    "attention": Op(("out", "lse"), ("q", "k", "v")),
    "prefix_attention": Op(("out",)),
    "swiglu": Op(("y",), ("gate", "up"), over="dy"),
    "gelu": Op(("y",), ("x",), over="dy"),
    "cross_entropy": Op(("loss", "lse"), ("logits",)),
    "linear_cross_entropy": Op(("loss", "lse"), ("x", "weight")),
    "linear_cross_entropy_with_gradients": Op(("loss", "lse", "dx", "dweight")),
    "adamw": Op(("param", "m", "v")),  # in place: the arguments themselves are the result
    "muon": Op(("matrices",)),
    "global_norm": Op(("norm",)),
}


@dataclass(frozen=True)
class Case:
    op: str
    about: str
    arguments: Callable[["Draw"], dict]
    smooth: bool = True  # False: no finite differences here (huge or infinite values, or too large)
    slack: float = 1.0  # times the tolerance: an lse of 1e4 has three decimals left in float32

    def __str__(self) -> str:
        return f"{self.op}: {self.about}"


class Draw:
    """Random arguments: draw(2, 3) is a normal array of that shape."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)

    def __call__(self, *shape, scale=1.0):
        return scale * self.rng.standard_normal(shape)

    def ints(self, low, high, *shape):
        return self.rng.integers(low, high, shape, dtype=np.int32)

    def huge(self, *shape):
        """±HUGE in the first column and 0 elsewhere; times `signs`, sums that no rounding blurs."""
        return HUGE * np.sign(self(*shape)) * (np.arange(shape[-1]) == 0)

    def signs(self, *shape):
        """±1 in the first column, normal elsewhere."""
        x = self(*shape)
        x[..., 0] = np.sign(x[..., 0])
        return x

    def rope(self, B, H, T, D, P=32):
        angle = np.outer(np.arange(P), 10000.0 ** (-np.arange(D // 2) / (D // 2)))
        positions = self.ints(0, P, B, T)
        return dict(x=self(B, H, T, D), cos=np.cos(angle), sin=np.sin(angle), positions=positions)

    def attention(self, B, H, G, T, S, D, **options):
        return dict(q=self(B, H, T, D), k=self(B, G, S, D), v=self(B, G, S, D)) | options

    def prefix_attention(self, B, H, G, T, S, D, P, prefix_S, **options):
        prefixes = dict(prefix_k=self(P, G, prefix_S, D), prefix_v=self(P, G, prefix_S, D))
        rows = dict(prefix=self.ints(0, P, B))
        return self.attention(B, H, G, T, S, D) | prefixes | rows | options

    def adamw(self, *shape, **options):
        moments = dict(m=self(*shape), v=self(*shape) ** 2)
        constants = dict(lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
        return dict(param=self(*shape), grad=self(*shape), **moments, **constants, **options)

    def muon(self, *shapes, scale=1.0, **options):
        matrices = [[self(*s), self(*s, scale=scale), self(*s, scale=scale)] for s in shapes]
        return dict(matrices=matrices, lr=1e-1, beta1=0.9, weight_decay=0.1, **options)


def documents(B, T, *starts):
    """start (B, T) of rows in which documents begin at these tokens."""
    begins = np.zeros(T, np.int32)
    begins[list(starts)] = starts
    return np.tile(np.maximum.accumulate(begins), (B, 1))


def answers(B, T, end, *begins):
    """gap (B, T, 2) of rows in which answers to a prompt that ends at `end` begin at these tokens."""
    gap = np.zeros((B, T, 2), np.int32)
    for begin in begins:
        gap[:, begin:] = end, begin
    return gap


def masked(d, shape, below, every=3):
    """Targets, of which each `every`-th is −1."""
    targets = d.ints(0, below, *shape)
    targets.reshape(-1)[::every] = -1
    return targets


HUGE = 1e4  # exp overflows at 89 in float32, at 710 in float64

# fmt: off
CASES = [
    Case("add", "odd", lambda d: dict(x=d(3, 67), y=d(3, 67))),
    Case("add", "large", lambda d: dict(x=d(70, 1000), y=d(70, 1000)), False),
    Case("matmul", "one", lambda d: dict(a=d(1, 1), b=d(1, 1))),
    Case("matmul", "odd", lambda d: dict(a=d(15, 67), b=d(67, 33))),
    Case("matmul", "odd, a transposed", lambda d: dict(a=d(67, 29), b=d(67, 65), transpose_a=True)),
    Case("matmul", "odd, b transposed", lambda d: dict(a=d(17, 5), b=d(3, 5), transpose_b=True)),
    Case("matmul", "both transposed", lambda d: dict(a=d(9, 31), b=d(70, 9), transpose_a=True, transpose_b=True)),
    Case("matmul", "deep and wide", lambda d: dict(a=d(130, 1000), b=d(1000, 3100))),
    Case("matmul", "tall", lambda d: dict(a=d(4001, 40), b=d(40, 70))),
    Case("linear", "one token", lambda d: dict(x=d(1, 8), weight=d(5, 8))),
    Case("linear", "odd, bias", lambda d: dict(x=d(2, 7, 33), weight=d(17, 33), bias=d(17))),
    Case("linear", "odd, transposed, bias", lambda d: dict(x=d(3, 33), weight=d(33, 18), bias=d(18), transposed=True)),
    Case("linear", "large", lambda d: dict(x=d(4, 256, 384), weight=d(1152, 384), bias=d(1152)), False),
    Case("embedding", "one token", lambda d: dict(tokens=d.ints(0, 7, 1, 1), weight=d(7, 5))),
    Case("embedding", "odd, repeated", lambda d: dict(tokens=d.ints(0, 4, 3, 11), weight=d(9, 17))),
    Case("embedding", "large", lambda d: dict(tokens=d.ints(0, 999, 8, 256), weight=d(1000, 128)), False),
    Case("rms_norm", "one token", lambda d: dict(x=d(1, 16), weight=d(16), eps=1e-5)),
    Case("rms_norm", "odd", lambda d: dict(x=d(3, 23, 37), weight=d(37), eps=1e-5)),
    Case("rms_norm", "large", lambda d: dict(x=d(8, 256, 384), weight=d(384), eps=1e-5), False),
    Case("layer_norm", "one token", lambda d: dict(x=d(1, 16), weight=d(16), bias=d(16), eps=1e-5)),
    Case("layer_norm", "odd", lambda d: dict(x=d(3, 23, 37), weight=d(37), bias=d(37), eps=1e-5)),
    Case("layer_norm", "far from 0", lambda d: dict(x=d(3, 37) + 10, weight=d(37), bias=d(37), eps=1e-5)),
    Case("layer_norm", "large", lambda d: dict(x=d(8, 256, 384), weight=d(384), bias=d(384), eps=1e-5), False),
    Case("rope", "one token", lambda d: d.rope(1, 1, 1, 2)),
    Case("rope", "odd", lambda d: d.rope(2, 3, 5, 14)),
    Case("rope", "large", lambda d: d.rope(4, 6, 256, 64), False),
    Case("softmax", "one", lambda d: dict(x=d(1, 1)), False),  # its gradient is 0
    Case("softmax", "odd", lambda d: dict(x=d(3, 5, 37))),
    Case("softmax", "overflow", lambda d: dict(x=d(7, 19, scale=HUGE)), False),
    Case("softmax", "rows of −inf", lambda d: dict(x=np.where(d(6, 21) > [[-9], [9], [0], [0], [1], [9]], d(6, 21), -np.inf)), False),
    Case("softmax", "large", lambda d: dict(x=d(512, 1025)), False),
    Case("attention", "one token", lambda d: d.attention(1, 1, 1, 1, 1, 8), False),
    Case("attention", "odd", lambda d: d.attention(2, 3, 3, 7, 7, 5)),
    Case("attention", "decoding", lambda d: d.attention(3, 4, 2, 1, 150, 16)),
    Case("attention", "S > T", lambda d: d.attention(1, 2, 2, 70, 140, 12)),
    Case("attention", "S < T: queries that see nothing", lambda d: d.attention(2, 2, 1, 9, 5, 8)),
    Case("attention", "grouped heads", lambda d: d.attention(2, 6, 2, 37, 37, 18)),
    Case("attention", "documents", lambda d: d.attention(2, 2, 2, 150, 150, 16, start=documents(2, 150, 3, 70, 140))),
    Case("attention", "left padding", lambda d: d.attention(3, 2, 1, 20, 90, 16, start=np.tile([[0], [75], [90]], 20).astype(np.int32))),
    Case("attention", "answers to a prompt", lambda d: d.attention(2, 2, 2, 150, 150, 16, start=documents(2, 150, 3), gap=answers(2, 150, 40, 40, 61, 130))),
    Case("attention", "answers to a prompt, wide gaps", lambda d: d.attention(1, 4, 2, 301, 301, 12, gap=answers(1, 301, 21, 149, 297))),
    Case("attention", "a gap for one query", lambda d: d.attention(3, 2, 1, 1, 50, 8, gap=np.int32([[[3, 20]], [[0, 50]], [[9, 2]]]))),
    Case("attention", "gaps that hide all", lambda d: d.attention(3, 2, 1, 20, 90, 16, start=np.tile([[0], [75], [20]], 20).astype(np.int32), gap=np.repeat(np.int32([[[0, 90]], [[-9, 99]], [[70, 88]]]), 20, 1))),
    Case("attention", "overflow", lambda d: d.attention(1, 2, 1, 33, 40, 16, q=d.huge(1, 2, 33, 16), k=d.signs(1, 1, 40, 16)), False, 100),
    Case("attention", "wide head", lambda d: d.attention(1, 1, 1, 66, 66, 256), False),
    Case("attention", "large", lambda d: d.attention(1, 3, 3, 256, 256, 64), False),
    Case("prefix_attention", "one token", lambda d: d.prefix_attention(1, 1, 1, 1, 1, 8, 1, 1)),
    Case("prefix_attention", "odd", lambda d: d.prefix_attention(7, 3, 3, 1, 19, 5, 3, 29)),
    Case("prefix_attention", "left padding", lambda d: d.prefix_attention(4, 4, 2, 1, 3, 16, 3, 90, start=np.int32([[0], [75], [90], [92]]))),
    Case("prefix_attention", "many query heads", lambda d: d.prefix_attention(3, 24, 2, 1, 40, 18, 2, 33)),
    Case("prefix_attention", "several tokens", lambda d: d.prefix_attention(2, 4, 2, 70, 75, 20, 2, 67)),
    Case("prefix_attention", "nothing before", lambda d: d.prefix_attention(2, 2, 1, 1, 9, 8, 1, 0)),
    Case("swiglu", "one", lambda d: dict(gate=d(1, 1), up=d(1, 1))),
    Case("swiglu", "odd", lambda d: dict(gate=d(3, 5, 37), up=d(3, 5, 37))),
    Case("swiglu", "overflow", lambda d: dict(gate=d(3, 37, scale=HUGE), up=d(3, 37)), False),
    Case("swiglu", "large", lambda d: dict(gate=d(1024, 768), up=d(1024, 768)), False),
    Case("gelu", "one", lambda d: dict(x=d(1, 1))),
    Case("gelu", "odd", lambda d: dict(x=d(3, 5, 37, scale=3.0))),
    Case("gelu", "overflow", lambda d: dict(x=d(3, 37, scale=HUGE)), False),
    Case("gelu", "large", lambda d: dict(x=d(1024, 768)), False),
    Case("gelu", "exact, odd", lambda d: dict(x=d(3, 5, 37, scale=3.0), approximate=False)),
    Case("gelu", "exact, overflow", lambda d: dict(x=d(3, 37, scale=HUGE), approximate=False), False),
    Case("cross_entropy", "one token", lambda d: dict(logits=d(1, 5), targets=d.ints(0, 5, 1))),
    Case("cross_entropy", "odd, some −1", lambda d: dict(logits=d(3, 5, 37), targets=masked(d, (3, 5), 37))),
    Case("cross_entropy", "overflow", lambda d: dict(logits=d(9, 37, scale=HUGE), targets=d.ints(0, 37, 9)), False),
    Case("cross_entropy", "large", lambda d: dict(logits=d(300, 5000), targets=masked(d, (300,), 5000)), False),
    Case("linear_cross_entropy", "one token", lambda d: dict(x=d(1, 6), weight=d(5, 6), targets=d.ints(0, 5, 1))),
    Case("linear_cross_entropy", "odd, some −1", lambda d: dict(x=d(3, 7, 9), weight=d(37, 9), targets=masked(d, (3, 7), 37))),
    Case("linear_cross_entropy", "all −1", lambda d: dict(x=d(4, 9), weight=d(37, 9), targets=np.full(4, -1, np.int32)), False),
    Case("linear_cross_entropy", "overflow", lambda d: dict(x=d.huge(9, 8), weight=d.signs(37, 8), targets=d.ints(0, 37, 9)), False, 100),
    Case("linear_cross_entropy", "large", lambda d: dict(x=d(1300, 16), weight=d(2100, 16), targets=masked(d, (1300,), 2100, 7)), False),
    Case("adamw", "first step", lambda d: d.adamw(37, 5, step=1)),
    Case("adamw", "clipped", lambda d: d.adamw(1, step=7, grad_scale=0.25)),
    Case("adamw", "large", lambda d: d.adamw(300, 1001, step=1000)),
    Case("muon", "odd", lambda d: d.muon((37, 5), (5, 37), (1, 1), grad_scale=0.25), slack=10),
    Case("muon", "zeros", lambda d: d.muon((8, 3), scale=0.0)),
    Case("muon", "large", lambda d: d.muon((130, 67), (300, 1001)), slack=10),
    Case("muon", "too large for one thread", lambda d: d.muon((9, 1 << 17)), slack=10),
    Case("global_norm", "several arrays", lambda d: dict(arrays=[d(1), d(37, 5), d(0), d(200, 301)])),
    Case("global_norm", "overflow of float32", lambda d: dict(arrays=[d(5, scale=1e30)])),
]
CASES += [replace(case, op=case.op + "_with_gradients") for case in CASES if case.op == "linear_cross_entropy"]
# fmt: on


def rounded(value, dtype):
    """The arguments with their float arrays in `dtype`; also a copy, so that kernels may write."""
    if isinstance(value, dict):
        return {name: rounded(v, dtype) for name, v in value.items()}
    if isinstance(value, list):
        return [rounded(v, dtype) for v in value]
    if isinstance(value, np.ndarray):
        return value.astype(dtype if value.dtype.kind == "f" else value.dtype)
    return value


def forward(kernels, case: Case, arguments: dict) -> dict:
    """Call the forward; -> its results by name."""
    names = OPS[case.op].returns
    if names[0] in arguments:  # in place
        arguments = deepcopy(arguments)
        getattr(kernels, case.op)(**arguments)
        return {name: joined(arguments[name]) for name in names}
    results = getattr(kernels, case.op + "_forward" * bool(OPS[case.op].inputs))(**arguments)
    return dict(zip(names, results if isinstance(results, tuple) else (results,)))


def joined(value) -> np.ndarray:
    """An array, or all numbers of a list of such."""
    return np.concatenate([joined(v).ravel() for v in value]) if isinstance(value, list) else value


def backward(kernels, case: Case, arguments: dict, results: dict, dy, over=False) -> dict:
    """Call the backward with what its signature asks for; -> gradients by name.

    over: let it write the first gradient over an argument, of which a copy is made.
    """
    op = OPS[case.op]
    known = arguments | {name: results[name] for name in op.returns} | {"d" + op.returns[0]: dy}
    if over:
        known[op.over] = known["d" + op.inputs[0]] = known[op.over].copy()
    known |= {"has_bias": "bias" in arguments, "vocab_size": len(arguments.get("weight", ()))}
    wanted = inspect.signature(getattr(reference, case.op + "_backward")).parameters
    gradients = getattr(kernels, case.op + "_backward")(
        **{k: known[k] for k in wanted if k in known}
    )
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    pairs = zip(op.inputs, gradients)
    return {"d" + name: gradient for name, gradient in pairs if name in arguments}


@functools.cache
def prepared(case: Case, dtype: str) -> tuple[dict, dict, np.ndarray]:
    """-> arguments and dy in `dtype`, and the reference's results and gradients for them in float64."""
    draw = Draw(seed=sum(map(ord, str(case))))
    arguments = rounded(case.arguments(draw), dtype)
    exact = rounded(arguments, np.float64)
    expected = forward(reference, case, exact)
    dy = draw(*np.shape(expected[OPS[case.op].returns[0]])).astype(dtype)
    if OPS[case.op].inputs:
        expected |= backward(reference, case, exact, expected, dy.astype(np.float64))
    return arguments, expected, dy


def gradient_error(case: Case) -> float:
    """How far the reference's backward is from central differences of its forward, in float64.

    Infinitely far where either is NaN.
    """
    arguments, expected, dy = prepared(case, "float64")
    rng, step, errors = np.random.default_rng(0), 1e-5, []

    def loss(moved: dict) -> float:
        return np.sum(dy * forward(reference, case, arguments | moved)[OPS[case.op].returns[0]])

    for name in (name for name in OPS[case.op].inputs if name in arguments):
        x, dx = arguments[name], expected["d" + name]
        along = rng.standard_normal(x.shape)
        numeric = (loss({name: x + step * along}) - loss({name: x - step * along})) / (2 * step)
        exact = np.sum(dx * along)
        errors.append(abs(numeric - exact) / max(abs(numeric), abs(exact), 1e-30))
    return float(np.nan_to_num(np.max(errors), nan=np.inf))


def run(kernels, case: Case, dtype="float32", over=False) -> dict:
    """Results and gradients of a backend by name; its backward gets the reference's residuals."""
    arguments, expected, dy = prepared(case, dtype)
    results = forward(kernels, case, arguments)
    if OPS[case.op].inputs:
        results |= backward(kernels, case, arguments, rounded(expected, dtype), dy, over)
    return results


def distance(out, ref) -> float:
    """‖out − ref‖ / ‖ref‖. Infinities must agree exactly; a NaN is infinitely far."""
    out, ref = np.asarray(out, np.float64), np.asarray(ref, np.float64)
    finite = np.isfinite(ref)
    if out.shape != ref.shape or not np.array_equal(out[~finite], ref[~finite]):
        return np.inf
    error = np.linalg.norm(out[finite] - ref[finite]) / (np.linalg.norm(ref[finite]) or 1)
    return float(error) if np.isfinite(error) else np.inf


def parity_error(kernels, case: Case, dtype="float32") -> float:
    """How far a backend is from the float64 reference: the worst of all results and gradients.

    To be compared with TOLERANCE[dtype] * case.slack.
    """
    _, expected, _ = prepared(case, dtype)
    runs = [run(kernels, case, dtype, over) for over in {False, bool(OPS[case.op].over)}]
    return max(distance(results[name], expected[name]) for results in runs for name in results)
