"""Which kernels run, and on which arrays: the one place that knows.

`kernels` is the module whose functions the ops call, `xp` the array library that goes with it.
A process runs on one backend at a time; `use` rebinds both names. A kernel that a backend lacks
raises by name: nothing ever falls back silently to another implementation.
"""

from __future__ import annotations

import importlib
import sys
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

import numpy
from threadpoolctl import threadpool_limits

from tinylm.kernels import CONTRACT, reference

MODULES = {
    "reference": "tinylm.kernels.reference",
    "cpu": "tinylm.kernels._cpu",
    "cuda": "tinylm.kernels.cuda",
}

name: str = "reference"
kernels: ModuleType = reference
xp: ModuleType = numpy


def use(backend: str) -> None:
    """Run on "reference" (NumPy, any float dtype), "cpu" (C++, float32) or "cuda" (CuPy arrays).

    Raises ValueError for an unknown name, and ImportError with the remedy where the backend
    cannot run here. Tensors made before stay on the arrays they were made with.
    """
    global name, kernels, xp
    if backend not in MODULES:
        raise ValueError(f"unknown backend {backend!r}: expected one of {', '.join(MODULES)}")
    try:
        module = importlib.import_module(MODULES[backend])
    except ImportError as error:
        remedy = NOT_COMPILED if backend == "cpu" else error
        raise ImportError(f"backend {backend!r} cannot run here: {remedy}") from error
    missing = [kernel for kernel in CONTRACT if not hasattr(module, kernel)]
    assert not missing, f"backend {backend!r} lacks the kernels {missing}"
    name, kernels = backend, module
    xp = getattr(module, "xp", numpy)


NOT_COMPILED = "its extension was not compiled; install a C++ compiler, then reinstall tinylm"


MOST_THREADS = 1024  # far more than processors: OpenMP ends the process where it cannot have them
_limits = None  # keeps threadpoolctl's limits in force


def set_threads(n: int) -> None:
    """Limit every thread pool of the process: our kernels', OpenMP's and NumPy's BLAS."""
    global _limits
    if n < 1:
        raise ValueError(f"threads: expected at least 1, got {n}")
    n = min(n, MOST_THREADS)
    _limits = threadpool_limits(n)
    if hasattr(kernels, "set_threads"):
        kernels.set_threads(n)


def set_products(dtype: str) -> None:
    """Multiply matrices in "float32", or with operands rounded to "bfloat16" and float32 sums.

    Weights, activations and everything else stay float32. Raises ValueError where the kernels in
    use, or this processor, cannot.
    """
    dtype = product_dtype(dtype)
    if hasattr(kernels, "set_products"):
        kernels.set_products(dtype)
    elif dtype != "float32":
        raise ValueError(f"the {name} kernels have no {dtype} products")


def product_dtype(dtype: str) -> str:
    """What "auto" means: bfloat16 on cuda, for whose tensor cores it was made, else float32."""
    return dtype if dtype != "auto" else "bfloat16" if name == "cuda" else "float32"


def threads() -> int:
    """How many threads the kernels use."""
    return kernels.threads() if hasattr(kernels, "threads") else 1


def describe() -> str:
    """One phrase for logs: backend, instruction set, threads."""
    if name == "cuda":
        return f"cuda ({kernels.describe()})"
    if name != "cpu":
        return name
    n, without = threads(), "" if kernels.openmp else ", compiled without OpenMP"
    return f"cpu ({kernels.isa()}, {n} thread{'s' if n > 1 else ''}{without})"


def asarray(x, dtype=None):
    """x as an array of the backend in use."""
    return xp.asarray(x, dtype)


def empty(shape: tuple[int, ...], dtype):
    """An array that is not initialised; of the kernels' own memory, which is kept, where it can."""
    if dtype == "float32" and hasattr(kernels, "empty"):
        return kernels.empty(shape)
    return xp.empty(shape, dtype)


def same(x, y) -> bool:
    """Whether two arrays are the same bytes of memory, in the same order."""
    interface = "__cuda_array_interface__" if name == "cuda" else "__array_interface__"
    return getattr(x, interface) == getattr(y, interface)


def copy(x):
    """x as a new C-contiguous array of the same kind."""
    y = empty(x.shape, x.dtype)
    y[...] = x
    return y


def packed_weights(rows: int) -> AbstractContextManager:
    """`with` it, products of so many rows pack each weight only once, if that pays.

    To be entered as often as one likes, as long as nothing changes the weights.
    """
    return getattr(kernels, "PackedWeights", nullcontext)(rows)


def to_numpy(x) -> numpy.ndarray:
    """x as a numpy array, copied from the device if it lives there.

    Raises ValueError if a kernel on the device met an integer out of range before.
    """
    if not hasattr(x, "get"):
        return numpy.asarray(x)
    if hasattr(kernels, "settle"):
        kernels.settle()
    return x.get()


try:
    use("cpu")
except ImportError:
    notice = "tinylm: the C++ kernels are not compiled, so the NumPy reference kernels run"
    print(f"{notice} (correct, but slow)", file=sys.stderr)
