"""The kernels on an NVIDIA GPU: launch.py, given a device made of CuPy, NVRTC and cuBLAS.

CuPy owns arrays, memory and streams, and compiles csrc/cuda with NVRTC at first use (and keeps the
result in its cache). cuBLAS multiplies. Where one of them cannot work, importing this module raises
ImportError with one sentence: which one, and how to get it.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from contextlib import contextmanager, suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy

from tinylm.kernels import CONTRACT, ON_A_DEVICE
from tinylm.kernels.launch import Kernels, source

WORKSPACE = 32 << 20  # bytes: what cuBLAS advises for the largest GPUs, ours for graphs to keep
LEAST_MEMORY = 500e6  # bytes: CUDA's own context, and a small model
STATIC_SHARED = 48 << 10  # bytes of a block's memory that need no permission


# ---- what must be here -------------------------------------------------------------------------


def driver_version() -> int:
    """CUDA's version as the driver knows it, 13000 for 13.0."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(name)
    except OSError:
        raise ImportError(
            f"no NVIDIA driver is installed ({name} not found): install your GPU's driver, then "
            "pip install 'tinylm[cuda]'"
        ) from None
    error, version = driver.cuInit(0), ctypes.c_int()
    if error:
        raise ImportError(f"the NVIDIA driver finds no GPU that it can use (cuInit error {error})")
    driver.cuDriverGetVersion(ctypes.byref(version))
    return version.value


def install(version: int) -> str:
    """The command that installs what belongs to this version of CUDA."""
    return f"pip install 'tinylm[{'cuda' if version >= 13000 else 'cuda12'}]'"


def load_cupy(version: int):
    """CuPy, if it and NVRTC can work with this driver."""
    try:
        import cupy
        from cupy.cuda import nvrtc, runtime
    except ImportError as error:
        raise ImportError(f"CuPy cannot be imported ({error}): {install(version)}") from error
    try:
        runtime.getDeviceCount()
        free, total = runtime.memGetInfo()
        found = runtime.getDeviceProperties(runtime.getDevice())
    except runtime.CUDARuntimeError as error:
        known = f"{version // 1000}.{version % 1000 // 10}"
        raise ImportError(
            f"CuPy cannot use the driver, which knows CUDA {known} ({error}): {install(version)}"
        ) from error
    if found["major"] < 8:
        raise ImportError(
            f"this GPU has compute capability {found['major']}.{found['minor']}: 8.0 or more is "
            "needed, which GPUs made since 2020 have (Ampere)"
        )
    if free < LEAST_MEMORY:
        raise ImportError(
            f"too little device memory: {free / 1e9:.1f} of {total / 1e9:.1f} GB are free; end "
            "other programs, or choose another GPU with CUDA_VISIBLE_DEVICES"
        )
    try:
        nvrtc.getVersion()
    except Exception as error:  # CuPy wraps the loader's error in various types
        raise ImportError(f"NVRTC cannot be loaded ({error}): {install(version)}") from error
    return cupy


def find_cublas(runtime_version: int) -> ctypes.CDLL:
    """The library of this major version: NVIDIA's wheels first, then wherever the system looks."""
    major = runtime_version // 1000
    name = f"cublas64_{major}.dll" if sys.platform == "win32" else f"libcublas.so.{major}"
    found = find_spec("nvidia")
    folders = found.submodule_search_locations if found else ()
    paths = [str(path) for folder in folders for path in Path(folder).rglob(name)]
    for path in (*paths, name):
        try:
            return ctypes.CDLL(path)
        except OSError:
            continue
    raise ImportError(f"cuBLAS is missing ({name} not found): {install(runtime_version)}")


# ---- the device --------------------------------------------------------------------------------


class Cublas:
    """Matrix products on a handle of our own, so that nothing of CuPy's is set anew."""

    FLOAT32, BFLOAT16 = 0, 14  # cudaDataType
    FLOAT32_SUMS, BEST = 68, -1  # cublasComputeType_t, cublasGemmAlgo_t

    def __init__(self, library: ctypes.CDLL, workspace):
        self.library, self.handle, self.stream = library, ctypes.c_void_p(), None
        self.workspace = workspace
        self.call("cublasCreate_v2", ctypes.byref(self.handle))

    def call(self, name: str, *arguments) -> None:
        status = getattr(self.library, name)(*arguments)
        if status:
            raise RuntimeError(f"{name}: cuBLAS status {status}")

    def follow(self, stream: int) -> None:
        """Work on this stream from now on. That gives the workspace back, so it is set anew."""
        if stream != self.stream:
            self.call("cublasSetStream_v2", self.handle, ctypes.c_void_p(stream))
            size = ctypes.c_size_t(self.workspace.nbytes)
            self.call("cublasSetWorkspace_v2", self.handle, pointer(self.workspace), size)
            self.stream = stream

    def multiply(self, a, b, c, transpose_a: bool, transpose_b: bool, add: bool) -> None:
        """c = op(a) op(b), or c += ...; a and b float32, or uint16: the bits of bfloat16.

        cuBLAS stores matrices by columns. Ours, by rows, look to it like their transposes, and
        cᵀ = op(b)ᵀ op(a)ᵀ: the operands change places, nothing is moved.
        """
        (M, N), K = c.shape, a.shape[not transpose_a]
        kind = self.BFLOAT16 if a.dtype == "uint16" else self.FLOAT32
        # the stride of a single row may be anything
        lda, ldb = (max(x.shape[1], x.strides[0] // x.itemsize) for x in (a, b))
        one, beta = ctypes.c_float(1), ctypes.c_float(add)
        self.call(
            "cublasGemmEx", self.handle, int(transpose_b), int(transpose_a), N, M, K,
            ctypes.byref(one), pointer(b), kind, ldb, pointer(a), kind, lda,
            ctypes.byref(beta), pointer(c), self.FLOAT32, N, self.FLOAT32_SUMS, self.BEST,
        )  # fmt: skip


def pointer(x) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data.ptr)


def sized(x):
    """An argument as the kernels declare it: i64, float, or a pointer."""
    if x is None:
        return numpy.uint64(0)
    if isinstance(x, int):
        return numpy.int64(x)
    return numpy.float32(x) if isinstance(x, float) else x


class Device:
    """What launch.Kernels asks of a device."""

    def __init__(self):
        self.xp = load_cupy(driver_version())
        self.module = self.xp.RawModule(code=source(), options=("-std=c++17",))
        library = find_cublas(self.xp.cuda.runtime.runtimeGetVersion())
        self.blas = Cublas(library, self.xp.empty(WORKSPACE, "uint8"))
        self.stream = self.xp.cuda.Stream(non_blocking=True)  # the default one cannot be recorded
        self.function = cache(self.function)

    def function(self, name: str, shared: int):
        kernel = self.module.get_function(name)
        if shared > STATIC_SHARED:
            kernel.max_dynamic_shared_size_bytes = shared
        return kernel

    def launch(self, name, grid, block, shared, arguments) -> None:
        kernel = self.function(name, shared)
        kernel(grid, (block,), tuple(map(sized, arguments)), shared_mem=shared)

    def multiply(self, *arguments) -> None:
        self.blas.follow(self.xp.cuda.get_current_stream().ptr)
        self.blas.multiply(*arguments)

    def later(self, x):
        """x, which is copied after all that was asked for so far, and before what comes next."""
        from cupyx import empty_pinned

        host, copied = empty_pinned(x.shape, x.dtype), self.xp.cuda.Event(disable_timing=True)
        x.get(out=host, blocking=False)
        copied.record()

        def read() -> list:
            copied.synchronize()
            return host.tolist()

        return read

    def memory(self):
        """A pool for a graph. Where the device is full it takes what the usual pool holds idle, and
        never what is idle in itself: a graph that is being recorded has worked there already."""
        cuda, usual = self.xp.cuda, self.xp.get_default_memory_pool()

        def allot(size: int):
            try:
                return cuda.MemoryPointer(cuda.Memory(size), 0)
            except cuda.runtime.CUDARuntimeError as error:
                if error.status != cuda.runtime.errorMemoryAllocation:
                    raise
            usual.free_all_blocks()
            try:
                return cuda.MemoryPointer(cuda.Memory(size), 0)
            except cuda.runtime.CUDARuntimeError as error:  # at which it would free its own
                raise MemoryError(f"no {size:,} bytes for a graph") from error

        return cuda.MemoryPool(allot)

    def give_back(self, memory) -> None:
        """What is idle in a pool of CuPy's stays taken, even when the pool is gone."""
        memory.free_all_blocks()

    @contextmanager
    def apart(self, memory):
        """On the stream that can be recorded, which waits for the usual one and is waited for."""
        usual = self.xp.cuda.get_current_stream()
        self.stream.wait_event(usual.record())
        try:
            with self.stream, self.xp.cuda.using_allocator(memory.malloc):
                yield
        finally:
            usual.wait_event(self.stream.record())

    def record(self, function):
        self.blas.follow(self.stream.ptr)  # before: setting it is nothing to be recorded
        self.stream.begin_capture()
        try:
            found = function()
        except BaseException:
            with suppress(Exception):  # which only tells that nothing was recorded, not why
                self.stream.end_capture()
            raise
        return self.stream.end_capture(), found

    def replay(self, graph) -> None:
        graph.launch(self.stream)

    def describe(self) -> str:
        properties = self.xp.cuda.runtime.getDeviceProperties(self.xp.cuda.Device().id)
        return properties["name"].decode()

    def free_bytes(self) -> int:
        """What may still be allotted: free on the device, or idle in CuPy's pool."""
        gc.collect()  # a run that has ended, and its graph, hold each other
        pool = self.xp.get_default_memory_pool()
        return self.xp.cuda.runtime.memGetInfo()[0] + pool.free_bytes()


device = Device()
xp, describe, free_bytes = device.xp, device.describe, device.free_bytes
kernels = Kernels(device)
globals().update({name: getattr(kernels, name) for name in CONTRACT + ON_A_DEVICE})
