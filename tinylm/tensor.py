"""Reverse-mode automatic differentiation: the Tensor, its tape, and backward.

An op computes an array, then hands `Tensor.from_op` its parents and its vjp (vector-Jacobian
product): for y = a b that is dy -> (dy b, a dy). Nodes are numbered as they are made, so a parent's
number is always smaller than its child's: walking the numbers downwards visits every node after all
that depend on it, and backward is one loop. Which ops exist is the business of ops.py; this file
knows only how to undo them.

The tape holds no arrays. What backward needs is held by the vjps, and the rest is gone as soon as
the forward has passed over it, which saves a third of the memory of a training step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

Array = Any  # of the backend in use: numpy.ndarray or cupy.ndarray

_clock = count()  # creation order is a topological order of the graph
_recording = True
_FREED = object()  # in place of the vjp of a node that has been used


@contextmanager
def no_grad() -> Iterator[None]:
    """Inside this block no op is recorded: for sampling and evaluation."""
    global _recording
    previous, _recording = _recording, False
    try:
        yield
    finally:
        _recording = previous


def recording(*parents: Tensor) -> bool:
    """Whether an op on these Tensors will be asked for gradients."""
    return _recording and any(p.requires_grad for p in parents)


class Node:
    """Where a Tensor stands on the tape.

    parents   the nodes of the Tensors that the op read, None for constants
    vjp       maps the gradient of this node to a tuple with the gradient of each parent (None:
              that parent has none); the closure keeps what it needs alive. A leaf has no vjp
    grad      what a leaf has received so far, or, while backward runs, any node
    owns      grad must be memory that nobody else reads: a leaf keeps it, some vjps write there
    """

    __slots__ = ("grad", "index", "owns", "parents", "vjp")

    def __init__(
        self,
        parents: tuple[Node | None, ...] = (),
        vjp: Callable | None = None,
        overwrites: bool = False,
    ):
        self.parents, self.vjp, self.grad, self.index = parents, vjp, None, next(_clock)
        self.owns = vjp is None or overwrites

    def receive(self, grad: Array, new: bool) -> None:
        """Add to .grad. new: nobody else holds this array, so that it may be written to."""
        new = new and grad.flags.c_contiguous  # no kernel writes to any other
        if self.grad is None:
            self.grad = grad.copy() if self.owns and not new else grad
        elif new:
            grad += self.grad
            self.grad = grad
        else:
            self.grad = self.grad + grad


class Tensor:
    """An array that remembers which op made it.

    data    the array, of the backend in use
    node    its place on the tape; None where no gradient is asked for
    again   None, or a function that computes data once more, as a new array, from what is kept
            anyhow; an op that needs data in backward then keeps this function instead of the array
            (arXiv 1604.06174, for the cheap ops only)
    """

    __slots__ = ("again", "data", "node")
    __array_ufunc__ = None  # an array leaves array · Tensor to us, and makes no array of Tensors

    def __init__(self, data: Array, requires_grad: bool = False):
        if isinstance(data, Tensor) or not hasattr(data, "dtype"):
            raise TypeError(f"a Tensor is made of an array, got {type(data).__name__}")
        self.data, self.again = data, None
        self.node = Node() if requires_grad else None

    @classmethod
    def from_op(
        cls,
        data: Array,
        parents: tuple[Tensor, ...],
        vjp: Callable,
        again: Callable | None = None,
        overwrites: bool = False,
    ) -> Tensor:
        """The result of an op; recorded only if a parent asks for a gradient.

        overwrites: the vjp writes to the gradient that it is given.
        """
        out = cls(data)
        if recording(*parents):
            out.node = Node(tuple(p.node for p in parents), vjp, overwrites)
            out.again = again
        return out

    def kept(self) -> Callable[[], Array]:
        """A function that gives .data in a vjp, at the least cost in memory."""
        data = self.data
        return self.again or (lambda: data)

    @property
    def requires_grad(self) -> bool:
        return self.node is not None

    @property
    def grad(self) -> Array | None:
        """After backward, of a leaf that requires a gradient: an array of data's shape."""
        return self.node and self.node.grad

    @grad.setter
    def grad(self, grad: Array | None) -> None:
        self.node.grad = grad

    def backward(self, grad: Array | None = None) -> None:
        """Add d(self)/d(leaf), weighted by grad (of self's shape), to the .grad of every leaf.

        Frees the graph on the way: each node drops its parents and residuals once it is used.
        Raises RuntimeError if grad is missing for a non-scalar or of another shape, if nothing here
        asks for a gradient, or if part of the graph was freed by an earlier backward.
        """
        if self.size != 1 if grad is None else getattr(grad, "shape", None) != self.shape:
            raise RuntimeError(f"backward of a Tensor needs a gradient of its shape, {self.shape}")
        if isinstance(grad, Tensor):
            raise TypeError("backward: the gradient is an array, not a Tensor")
        if not self.requires_grad:
            raise RuntimeError("backward: no Tensor here requires a gradient")
        nodes = sorted(ancestors(self.node), key=lambda node: node.index, reverse=True)
        if any(node.vjp is _FREED for node in nodes):
            raise RuntimeError("backward: this graph was freed by an earlier backward")
        # ones, with no array library at hand: x**0 is 1 even where x is infinite or NaN
        self.node.receive(self.data**0 if grad is None else grad, new=grad is None)
        for node in nodes:
            if node.vjp is None or node.grad is None:  # a leaf, or reached by no gradient
                continue
            g, node.grad = node.grad, None
            for parent, dparent in zip(node.parents, node.vjp(g), strict=True):
                if dparent is not None and parent is not None:
                    parent.receive(dparent, new=not overlap(dparent, g))
            node.parents, node.vjp = (), _FREED

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


def overlap(dparent: Array, grad: Array) -> bool:
    """Whether what a vjp returned is the gradient it was given, or a view of it; else it is new."""
    return dparent is grad or dparent.base is grad or grad.base is dparent.base is not None


def ancestors(root: Node) -> set[Node]:
    """Every node that root depends on, root included."""
    seen, stack = {root}, [root]
    while stack:
        for parent in stack.pop().parents:
            if parent is not None and parent not in seen:
                seen.add(parent)
                stack.append(parent)
    return seen
