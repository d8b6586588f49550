"""Reverse-mode automatic differentiation: the Tensor, its tape, and backward.

An op computes an array, then hands `Tensor.from_op` its parents and its vjp (vector-Jacobian
product). Tensors are numbered as they are made, so a parent's number is always smaller than its
child's: walking the numbers downwards visits every Tensor after all that depend on it, and backward
is one loop. Which ops exist is the business of ops.py; this file knows only how to undo them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

Array = Any  # of the backend in use: numpy.ndarray or cupy.ndarray

_clock = count()  # creation order is a topological order of the graph
_recording = True


@contextmanager
def no_grad() -> Iterator[None]:
    """Inside this block no op is recorded: for sampling and evaluation."""
    global _recording
    previous, _recording = _recording, False
    try:
        yield
    finally:
        _recording = previous


class Tensor:
    """An array that remembers which op made it.

    data           the array, of the backend in use
    grad           after backward, of a leaf with requires_grad: an array of data's shape, else None
    parents        the Tensors that the op read
    vjp            maps the gradient of this Tensor to a tuple with the gradient of each parent
                   (None: that parent has none); the closure also keeps the op's residuals alive
    """

    __slots__ = ("data", "grad", "index", "parents", "requires_grad", "vjp")

    def __init__(self, data: Array, requires_grad: bool = False):
        self.data, self.grad, self.requires_grad = data, None, requires_grad
        self.parents, self.vjp, self.index = (), None, next(_clock)

    @classmethod
    def from_op(cls, data: Array, parents: tuple[Tensor, ...], vjp: Callable) -> Tensor:
        """The result of an op; recorded only if a parent asks for a gradient."""
        out = cls(data, _recording and any(p.requires_grad for p in parents))
        if out.requires_grad:
            out.parents, out.vjp = parents, vjp
        return out

    def backward(self, grad: Array | None = None) -> None:
        """Add d(self)/d(leaf), weighted by grad (of self's shape), to the .grad of every leaf.

        Frees the graph on the way: each node drops its parents and residuals once it is used.
        Raises RuntimeError if grad is missing for a non-scalar, if nothing here asks for a
        gradient, or if part of the graph was freed by an earlier backward.
        """
        if grad is None and self.data.size != 1:
            raise RuntimeError(f"backward of a Tensor of shape {self.shape} needs a gradient")
        if not self.requires_grad:
            raise RuntimeError("backward: no Tensor here requires a gradient")
        nodes = sorted(ancestors(self), key=lambda t: t.index, reverse=True)
        if any(node.vjp is _freed for node in nodes):
            raise RuntimeError("backward: this graph was freed by an earlier backward")
        grads = {self: self.data * 0 + 1 if grad is None else grad}
        for node in nodes:
            g = grads.pop(node, None)
            if g is None:  # reached only through parents that have no gradient
                continue
            if node.vjp is None:  # a leaf: keep its gradient
                node.grad = g if node.grad is None else node.grad + g
                continue
            for parent, dparent in zip(node.parents, node.vjp(g), strict=True):
                if dparent is not None and parent.requires_grad:
                    grads[parent] = grads[parent] + dparent if parent in grads else dparent
            node.parents, node.vjp = (), _freed

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def dtype(self):
        return self.data.dtype

    @property
    def ndim(self) -> int:
        return self.data.ndim

    @property
    def size(self) -> int:
        return self.data.size

    def item(self) -> float:
        """The value of a Tensor with one element."""
        return self.data.item()

    def __len__(self) -> int:
        return len(self.data)

    def __repr__(self) -> str:
        note = ", requires_grad" if self.requires_grad else ""
        return f"Tensor{self.shape} of {self.dtype}{note}"


def _freed(grad):
    """Stands in for the vjp of a node that has been used."""
    raise AssertionError("a freed node is refused before it is called")


def ancestors(root: Tensor) -> set[Tensor]:
    """Every Tensor that needs a gradient and that root depends on, root included."""
    seen, stack = {root}, [root]
    while stack:
        for parent in stack.pop().parents:
            if parent.requires_grad and parent not in seen:
                seen.add(parent)
                stack.append(parent)
    return seen
