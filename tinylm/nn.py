"""Layers: a Module holds Tensors and other Modules, and names them by where they hang.

Weights lie as in the files of `transformers`: (out, in), except in GPT-2's linears, (in, out).
What the layers compute is in ops.py; how they are put together is in model.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy

from tinylm import backend, ops
from tinylm.tensor import Array, Tensor


class Module:
    """Something with parameters: Tensors, Modules and lists of Modules among its attributes."""

    def named_tensors(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """Every parameter with its path, such as `blocks.0.attention.q.weight`."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                yield prefix + name, value
            elif isinstance(value, Module):
                yield from value.named_tensors(f"{prefix}{name}.")
            elif isinstance(value, list):
                for i, part in enumerate(value):
                    yield from part.named_tensors(f"{prefix}{name}.{i}.")


def parameter(values) -> Tensor:
    """A leaf that learns, float32 on the backend in use."""
    return Tensor(backend.asarray(values, "float32"), requires_grad=True)


def normal(rng: numpy.random.Generator, shape: tuple[int, ...], std: float) -> Tensor:
    """A parameter drawn from N(0, std²)."""
    return parameter(rng.standard_normal(shape, "float32") * numpy.float32(std))


class Linear(Module):
    """y = x Wᵀ + b, or x W + b where the weight is stored transposed, (in, out)."""

    def __init__(self, rng, n_in, n_out, std=0.02, bias=False, transposed=False):
        self.weight = normal(rng, (n_in, n_out) if transposed else (n_out, n_in), std)
        self.bias = parameter(numpy.zeros(n_out)) if bias else None
        self._transposed = transposed

    def __call__(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias, self._transposed)


class Embedding(Module):
    """A table with one row of width C for each of V tokens."""

    def __init__(self, rng, n_rows, width):
        self.weight = normal(rng, (n_rows, width), 0.02)

    def __call__(self, tokens: Array) -> Tensor:
        return ops.embedding(tokens, self.weight)


class RMSNorm(Module):
    def __init__(self, width: int, eps: float):
        self.weight = parameter(numpy.ones(width))
        self._eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self._eps)


class LayerNorm(Module):
    def __init__(self, width: int, eps: float):
        self.weight = parameter(numpy.ones(width))
        self.bias = parameter(numpy.zeros(width))
        self._eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self._eps)
