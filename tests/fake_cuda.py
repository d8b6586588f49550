"""A machine with a GPU, as tinylm/kernels/cuda.py sees it: driver, CuPy and cuBLAS, all pretended.

Kernels run on the emulator; cuBLAS is a product written from its manual, by columns. So what that
file does with pointers, sizes and transposes is executed, though nothing here is NVIDIA's.
"""

from __future__ import annotations

import ctypes
from contextlib import contextmanager
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

    stream = workspace = 0

    def cublasSetStream_v2(self, handle, stream):
        self.stream, self.workspace = stream.value or 0, 0
        return 0

    def cublasSetWorkspace_v2(self, handle, workspace, size):
        self.workspace = size.value
        return 0

    def cublasGemmEx(
        self, handle, turn_a, turn_b, m, n, k, alpha, a, kind_a, lda, b, kind_b, ldb,
        beta, c, kind_c, ldc, compute, algorithm,
    ):  # fmt: skip
        assert (kind_c, compute, algorithm) == (0, 68, -1)
        assert self.stream == Stream.current.ptr
        assert self.workspace >= 32 << 20
        alpha, beta = alpha._obj.value, beta._obj.value
        left = by_columns(a, kind_a, *((k, m) if turn_a else (m, k)), lda)
        right = by_columns(b, kind_b, *((n, k) if turn_b else (k, n)), ldb)
        left, right = left.T if turn_a else left, right.T if turn_b else right
        out = by_columns(c, kind_c, m, n, ldc)

        def multiply():
            product = alpha * (left.astype("float32") @ right.astype("float32"))
            out[...] = product if beta == 0 else product + beta * out

        device_arrays.act(multiply)
        return 0


def by_columns(pointer, kind: int, rows: int, columns: int, leading: int) -> numpy.ndarray:
    """The matrix at a pointer, a view."""
    assert leading >= rows
    dtype = numpy.dtype({0: numpy.float32, 14: bfloat16}[kind])
    memory = (ctypes.c_char * (columns * leading * dtype.itemsize)).from_address(pointer.value)
    return numpy.frombuffer(memory, dtype).reshape(columns, leading)[:, :rows].T


class Stream:
    """A stream; the last one may record what is asked for while it is the current one."""

    def __init__(self, ptr: int = 7, non_blocking: bool = True):
        assert non_blocking
        self.ptr = ptr

    def __enter__(self):
        self.before, Stream.current = Stream.current, self

    def __exit__(self, *error):
        Stream.current = self.before

    def record(self):
        return Event()

    def wait_event(self, event):
        assert isinstance(event, Event)

    def begin_capture(self):
        assert self is Stream.current
        assert self.ptr, "the default stream cannot be recorded"
        assert MemoryPool.current, "a graph whose memory others may be given"
        self.recording = device_arrays.recording()
        self.tape = self.recording.__enter__()

    def end_capture(self):
        self.recording.__exit__(None, None, None)
        return Graph(self.tape)


Stream.current = Stream(0)


class Graph:
    launches = 0

    def __init__(self, tape):
        self.tape = tape

    def launch(self, stream):
        assert stream is Stream.current
        Graph.launches += 1
        self.tape.play()


class Event:
    def __init__(self, disable_timing=False):
        self.recorded = False

    def record(self):
        self.recorded = True

    def synchronize(self):
        assert self.recorded


class MemoryPool:
    current, given_back = None, 0

    def __init__(self, allocator):
        self.allocator = allocator

    def free_all_blocks(self):
        MemoryPool.given_back += 1

    def malloc(self, size):
        raise AssertionError("device_arrays allots by itself")


@contextmanager
def using_allocator(malloc):
    MemoryPool.current = malloc.__self__
    try:
        yield
    finally:
        MemoryPool.current = None


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
    made, cuda, cupyx = map(ModuleType, ("cupy", "cupy.cuda", "cupyx"))
    vars(made).update({name: getattr(device_arrays, name) for name in NAMES})
    made.cuda, made.RawModule = cuda, RawModule
    usual = SimpleNamespace(free_bytes=lambda: 0, freed=0)
    usual.free_all_blocks = lambda: setattr(usual, "freed", usual.freed + 1)
    made.get_default_memory_pool = lambda: usual
    cuda.nvrtc = SimpleNamespace(getVersion=lambda: (13, 0))
    cuda.Device = lambda: SimpleNamespace(id=0)
    cuda.get_current_stream = lambda: Stream.current
    cuda.Stream, cuda.Event, cuda.MemoryPool = Stream, Event, MemoryPool
    cuda.using_allocator = using_allocator
    cupyx.empty_pinned = numpy.empty
    cuda.runtime = SimpleNamespace(
        CUDARuntimeError=RuntimeError,
        getDeviceCount=lambda: 1,
        memGetInfo=lambda: (free, 8e9),
        runtimeGetVersion=lambda: 13000,
        getDevice=lambda: 0,
        getDeviceProperties=lambda i: {"name": b"Pretended GPU", "major": 9, "minor": 0},
    )
    return {"cupy": made, "cupy.cuda": cuda, "cupyx": cupyx}
