"""A machine with a GPU, as tinylm/kernels/cuda.py sees it: driver, CuPy and cuBLAS, all pretended.

Kernels run on the emulator; cuBLAS is a product written from its manual, by columns. So what that
file does with pointers, sizes and transposes is executed, though nothing here is NVIDIA's.
"""

from __future__ import annotations

import ctypes
from types import ModuleType, SimpleNamespace

import device_arrays
import emulator
import numpy
from ml_dtypes import bfloat16

NAMES = ("ndarray", "asarray", "ascontiguousarray", "empty", "__getattr__")


class Driver:
    """libcuda, which knows CUDA 13.0."""

    error = 0

    def cuInit(self, flags):
        return self.error

    def cuDriverGetVersion(self, version):
        version._obj.value = 13000


class Cublas:
    """libcublas: C = alpha op(A) op(B) + beta C, all stored by columns."""

    def cublasCreate_v2(self, handle):
        handle._obj.value = 1
        return 0

    def cublasSetStream_v2(self, handle, stream):
        return 0

    def cublasGemmEx(
        self, handle, turn_a, turn_b, m, n, k, alpha, a, kind_a, lda, b, kind_b, ldb,
        beta, c, kind_c, ldc, compute, algorithm,
    ):  # fmt: skip
        assert (kind_c, compute, algorithm) == (0, 68, -1)
        left = by_columns(a, kind_a, *((k, m) if turn_a else (m, k)), lda)
        right = by_columns(b, kind_b, *((n, k) if turn_b else (k, n)), ldb)
        left, right = left.T if turn_a else left, right.T if turn_b else right
        out = by_columns(c, kind_c, m, n, ldc)
        product = alpha._obj.value * (left.astype("float32") @ right.astype("float32"))
        out[...] = product if beta._obj.value == 0 else product + beta._obj.value * out
        return 0


def by_columns(pointer, kind: int, rows: int, columns: int, leading: int) -> numpy.ndarray:
    """The matrix at a pointer, a view."""
    assert leading >= rows
    dtype = numpy.dtype({0: numpy.float32, 14: bfloat16}[kind])
    memory = (ctypes.c_char * (columns * leading * dtype.itemsize)).from_address(pointer.value)
    return numpy.frombuffer(memory, dtype).reshape(columns, leading)[:, :rows].T


class RawModule:
    """The emulator's kernels, by CuPy's call."""

    def __init__(self, code, options):
        self.device = emulator.Emulator(emulator.library())

    def get_function(self, name):
        return Function(self.device, name)


class Function:
    max_dynamic_shared_size_bytes = 48 << 10

    def __init__(self, device, name):
        self.device, self.name = device, name

    def __call__(self, grid, block, arguments, *, shared_mem):
        assert shared_mem <= self.max_dynamic_shared_size_bytes
        self.device.launch(self.name, grid, *block, shared_mem, map(plain, arguments))


def plain(x):
    """An argument as CuPy would take it, for the emulator."""
    if isinstance(x, device_arrays.ndarray):
        return x.memory
    assert type(x) in (numpy.int64, numpy.float32, numpy.uint64), type(x)
    return None if type(x) is numpy.uint64 else x.item()


def cupy(free: float = 8e9) -> dict[str, ModuleType]:
    """The modules that `import cupy` and `from cupy.cuda import …` find."""
    made, cuda = ModuleType("cupy"), ModuleType("cupy.cuda")
    vars(made).update({name: getattr(device_arrays, name) for name in NAMES})
    made.cuda, made.RawModule = cuda, RawModule
    made.get_default_memory_pool = lambda: SimpleNamespace(free_bytes=lambda: 0)
    cuda.nvrtc = SimpleNamespace(getVersion=lambda: (13, 0))
    cuda.Device = lambda: SimpleNamespace(id=0)
    cuda.get_current_stream = lambda: SimpleNamespace(ptr=0)
    cuda.runtime = SimpleNamespace(
        CUDARuntimeError=RuntimeError,
        getDeviceCount=lambda: 1,
        memGetInfo=lambda: (free, 8e9),
        runtimeGetVersion=lambda: 13000,
        getDeviceProperties=lambda i: {"name": b"Pretended GPU"},
    )
    return {"cupy": made, "cupy.cuda": cuda}
